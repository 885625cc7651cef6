//! What was used on each of the last days or months, and what is held for requests that run.

use std::time::Duration;

use super::bucket::Bucket;
use super::{Short, State, Taken, Wait};

/// Periods that are remembered. A clock that jumps ahead and back must find today as it left it.
const PERIODS_MAX: usize = 3;

/// A day or a month of some time zone, and the moment in it. Where it begins and ends is found out elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Period {
    /// Unix nanoseconds, like the others.
    pub start_ns: i64,
    pub end_ns: i64,
    pub now_ns: i64,
}

impl Period {
    pub fn ends_in(&self) -> Duration {
        Duration::from_nanos(self.end_ns.saturating_sub(self.now_ns).max(0).unsigned_abs())
    }
}

#[derive(Debug, PartialEq, Eq)]
pub struct Calendar {
    limit: u64,
    /// Requests that are let in all the same once the limit is reached, where that is meant.
    beyond: Option<Bucket>,
    /// Rising; never empty.
    known: Vec<Entry>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    start_ns: i64,
    end_ns: i64,
    used: u64,
    held: u64,
}

impl Calendar {
    /// `first` is the first period that is known, in which `used` was used before: a clock that shows an earlier one is
    /// wrong, and gives no second budget.
    pub fn new(limit: u64, first: Period, used: u64) -> Calendar {
        Calendar { limit, beyond: None, known: vec![Entry { used, ..Entry::new(first) }] }
    }

    /// Lets so many requests in a window pass beyond the limit from now on, or none.
    pub fn set_throttle(&mut self, now: Duration, throttle: Option<(u64, Duration)>) {
        match (&mut self.beyond, throttle) {
            (Some(bucket), Some((requests, window))) if bucket.window() == window => bucket.set_limit(now, requests),
            (beyond, throttle) => *beyond = throttle.map(|(requests, window)| Bucket::new(requests, window, now)),
        }
    }

    pub fn set_limit(&mut self, limit: u64) {
        self.limit = limit;
    }

    /// # Errors
    /// `Short`, with what is used and held. What costs nothing always fits.
    pub fn check(&self, now: Duration, period: Period, amount: u64) -> Result<(), Short> {
        if self.has_room(period, amount) {
            return Ok(());
        }
        let state = self.state(period);
        if let Some(bucket) = &self.beyond {
            return bucket.check(now, 1).map_err(|short| Short { state, wait: short.wait });
        }
        let wait = if amount > self.limit { Wait::Never } else { Wait::For(state.reset) };
        Err(Short { state, wait })
    }

    fn has_room(&self, period: Period, amount: u64) -> bool {
        let entry = self.entry(period);
        amount == 0 || entry.used.saturating_add(entry.held).saturating_add(amount) <= self.limit
    }

    /// Counts in the period in which the request began, also if it ends in the next.
    pub fn take(&mut self, now: Duration, period: Period, amount: u64) -> Taken {
        let is_beyond = !self.has_room(period, amount);
        let throttled = self.beyond.as_mut().filter(|_| is_beyond).map(|bucket| bucket.take(now, 1).mark);
        let at = self.place(period);
        let entry = &mut self.known[at];
        entry.held = entry.held.saturating_add(amount);
        Taken { amount, mark: entry.start_ns, throttled }
    }

    /// A period that is forgotten by now has nothing left to count against.
    pub fn settle(&mut self, now: Duration, taken: Taken, used: u64) {
        if let Some((bucket, mark)) = self.beyond.as_mut().zip(taken.throttled) {
            bucket.settle(now, Taken { amount: 1, mark, throttled: None }, used.min(1));
        }
        if let Some(entry) = self.known.iter_mut().find(|entry| entry.start_ns == taken.mark) {
            entry.held = entry.held.saturating_sub(taken.amount);
            entry.used = entry.used.saturating_add(used);
        }
    }

    /// So much was used in a period before anybody counted here. One that is forgotten by now needs it no more.
    pub fn add_before(&mut self, period: Period, used: u64) {
        if let Some(entry) = self.known.iter_mut().find(|entry| entry.start_ns == period.start_ns) {
            entry.used = entry.used.saturating_add(used);
        }
    }

    /// Whether nothing is lost if it is made anew.
    pub fn is_at_rest(&self, period: Period) -> bool {
        self.known.iter().all(|entry| entry.held == 0) && self.entry(period).used == 0
    }

    pub fn state(&self, period: Period) -> State {
        let entry = self.entry(period);
        State {
            limit: self.limit,
            used: entry.used,
            held: entry.held,
            remaining: self.limit.saturating_sub(entry.used.saturating_add(entry.held)),
            reset: Period { end_ns: entry.end_ns, ..period }.ends_in(),
        }
    }

    /// What is known of a period. One before all that are known is a clock's mistake and counts as the first of them.
    fn entry(&self, period: Period) -> Entry {
        let at = self.known.partition_point(|entry| entry.start_ns < period.start_ns);
        match self.known.get(at) {
            Some(entry) if entry.start_ns == period.start_ns || at == 0 => *entry,
            _ => Entry::new(period),
        }
    }

    /// Where a period's entry is, made if it is new.
    fn place(&mut self, period: Period) -> usize {
        let at = self.known.partition_point(|entry| entry.start_ns < period.start_ns);
        let is_known = self.known.get(at).is_some_and(|entry| entry.start_ns == period.start_ns);
        if is_known || at == 0 {
            return at;
        }
        self.known.insert(at, Entry::new(period));
        if self.known.len() <= PERIODS_MAX {
            return at;
        }
        self.known.remove(0);
        at - 1
    }
}

impl Entry {
    fn new(period: Period) -> Entry {
        Entry { start_ns: period.start_ns, end_ns: period.end_ns, used: 0, held: 0 }
    }
}
