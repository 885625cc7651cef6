//! What one key has left: tokens, money, requests at a time. Exact integers; time is passed in; nothing here does I/O.
//!
//! A request takes the most that it could use before its work starts (`reserve`) and gives back the rest at its end
//! (`settle`). Afterwards the account is as if only what was used had ever been asked for. So in any window a key uses
//! and holds at most a burst and what refills in that window, and a day's spending never passes its budget.

use std::time::Duration;

use crate::accounting::core::NanoUsd;

/// One token in the bucket's unit. With it, a limit per minute refills by whole units every nanosecond.
const TOKEN: i128 = 60_000_000_000;
/// Days that a budget remembers. A clock that jumps ahead and back must find today as it left it.
const DAYS_MAX: usize = 3;
const DAY_NS: i64 = 86_400_000_000_000;

/// The UTC day of a moment, counted from the epoch.
pub fn day(unix_ns: i64) -> i64 {
    unix_ns.div_euclid(DAY_NS)
}

/// When a day begins.
pub fn day_start_ns(day: i64) -> i64 {
    day.saturating_mul(DAY_NS)
}

/// Everything that is counted for one key.
#[derive(Debug)]
pub struct Account {
    pub tokens: Bucket,
    pub budget: Budget,
    running: u32,
}

/// What a request could use at the most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    pub tokens: u64,
    pub cost_max: NanoUsd,
    /// The day on which the request began: it counts there, also if it ends on the next.
    pub day: i64,
}

/// What a request holds until its end. It cannot be copied, so it is settled once.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Reservation {
    sequence: u64,
    tokens: u64,
    cost_max: NanoUsd,
    day: i64,
}

impl Reservation {
    pub fn tokens(&self) -> u64 {
        self.tokens
    }
    pub fn cost_max(&self) -> NanoUsd {
        self.cost_max
    }
}

/// Why nothing was reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    Budget {
        spent: NanoUsd,
        held: NanoUsd,
        /// The day whose budget it is.
        day: i64,
    },
    Tokens {
        /// Until so many are there, if nobody else takes them; `None` if the limit itself is smaller.
        wait: Option<Duration>,
    },
}

impl Account {
    /// `today` is the first day that is known: a clock that shows an earlier one is wrong, and gives no second budget.
    pub fn new(tokens_per_minute: u32, now: Duration, today: i64, spent: NanoUsd) -> Account {
        Account { tokens: Bucket::new(tokens_per_minute, now), budget: Budget::new(today, spent), running: 0 }
    }

    /// One more request at a time, if the limit allows it.
    pub fn enter(&mut self, limit: u32) -> bool {
        let may = self.running < limit;
        self.running += u32::from(may);
        may
    }

    pub fn leave(&mut self) {
        self.running = self.running.saturating_sub(1);
    }

    /// Takes tokens and money together, or neither.
    ///
    /// # Errors
    /// What there is too little of; the budget first, because waiting for tokens would not help then.
    pub fn reserve(&mut self, now: Duration, per_day: NanoUsd, ask: Ask) -> Result<Reservation, Denied> {
        let day = self.budget.check(per_day, ask.day, ask.cost_max)?;
        let sequence = self.tokens.take(now, ask.tokens)?;
        self.budget.hold(day, ask.cost_max);
        Ok(Reservation { sequence, tokens: ask.tokens, cost_max: ask.cost_max, day })
    }

    /// Keeps what was used of a reservation and gives back the rest. More than was reserved becomes a debt.
    pub fn settle(&mut self, now: Duration, reservation: Reservation, tokens: u64, billed: NanoUsd) {
        self.tokens.settle(now, reservation.sequence, reservation.tokens, tokens);
        self.budget.settle(reservation.day, reservation.cost_max, billed);
    }
}

/// A token bucket that takes back what was not used, exactly: it then is as if it had never been taken, so what would have
/// run over meanwhile is gone.
#[derive(Debug)]
pub struct Bucket {
    per_minute: u32,
    /// In units of `1 / TOKEN`; below zero is a debt.
    level: i128,
    /// Since when `level` holds.
    at: Duration,
    sequence: u64,
    /// For every open reservation the highest level since it was made: what it left out would have run over above that.
    /// Falling, and shared by neighbours with the same peak, so that there are never more of them than reservations.
    peaks: Vec<Peak>,
}

#[derive(Clone, Copy, Debug)]
struct Peak {
    /// The last reservation that it is about; those after the previous peak's share it.
    through: u64,
    level: i128,
    open: u32,
}

impl Bucket {
    fn new(per_minute: u32, now: Duration) -> Bucket {
        let mut bucket = Bucket { per_minute, level: 0, at: now, sequence: 0, peaks: Vec::new() };
        bucket.level = bucket.capacity();
        bucket
    }

    fn capacity(&self) -> i128 {
        i128::from(self.per_minute) * TOKEN
    }

    pub fn limit(&self) -> u32 {
        self.per_minute
    }

    /// Whole tokens that can be taken now.
    pub fn remaining(&mut self, now: Duration) -> u64 {
        self.refill(now);
        u64::try_from(self.level / TOKEN).unwrap_or(0)
    }

    /// Until it is full again.
    pub fn full_in(&mut self, now: Duration) -> Duration {
        self.refill(now);
        self.time_for(self.capacity() - self.level)
    }

    /// Another limit: what was used under the old one stays used, at most all of the new one. Debts stay debts.
    pub fn set_limit(&mut self, now: Duration, per_minute: u32) {
        if per_minute == self.per_minute {
            return;
        }
        self.refill(now);
        let change = (i128::from(per_minute) - i128::from(self.per_minute)) * TOKEN;
        self.level = (self.level + change).max(self.level.min(0));
        self.per_minute = per_minute;
        for peak in &mut self.peaks {
            peak.level = (peak.level + change).max(self.level);
        }
    }

    /// Takes all of it and returns its number, or takes nothing.
    fn take(&mut self, now: Duration, tokens: u64) -> Result<u64, Denied> {
        self.refill(now);
        let wanted = i128::from(tokens) * TOKEN;
        if wanted > self.capacity() {
            return Err(Denied::Tokens { wait: None });
        }
        if wanted > self.level {
            return Err(Denied::Tokens { wait: Some(self.time_for(wanted - self.level)) });
        }
        self.level -= wanted;
        self.sequence += 1;
        self.peaks.push(Peak { through: self.sequence, level: self.level, open: 1 });
        Ok(self.sequence)
    }

    fn settle(&mut self, now: Duration, sequence: u64, reserved: u64, used: u64) {
        self.refill(now);
        let mine = self.peaks.partition_point(|peak| peak.through < sequence);
        let Some(peak) = self.peaks.get_mut(mine) else { return };
        peak.open = peak.open.saturating_sub(1);
        let unused = (i128::from(reserved) - i128::from(used)) * TOKEN;
        // Had it not been taken, the bucket would have run over at its peak.
        let back = unused.min(i128::from(self.per_minute) * TOKEN - peak.level);
        self.level += back;
        if back > 0 {
            // The levels since then were too low by as much, and so were the peaks that others remember of them.
            for peak in &mut self.peaks[mine..] {
                peak.level += back;
            }
            let level = self.peaks[mine].level;
            let from = self.peaks[..mine].partition_point(|peak| peak.level > level);
            self.merge(from, mine + 1, level);
        } else if self.peaks[mine].open == 0 {
            self.peaks.remove(mine);
        }
    }

    fn refill(&mut self, now: Duration) {
        let Some(passed) = now.checked_sub(self.at) else { return };
        // Nanoseconds of a `Duration` are below 2⁹⁴ and the limit is below 2³².
        let refilled = i128::try_from(passed.as_nanos()).unwrap_or(i128::MAX >> 33) * i128::from(self.per_minute);
        self.level = (self.level + refilled).min(self.capacity());
        self.at = now;
        let from = self.peaks.partition_point(|peak| peak.level > self.level);
        self.merge(from, self.peaks.len(), self.level);
    }

    /// Makes one peak of several, or none if nobody needs it any more.
    fn merge(&mut self, from: usize, to: usize, level: i128) {
        let Some(last) = self.peaks[from..to].last() else { return };
        let through = last.through;
        let open = self.peaks[from..to].iter().map(|peak| peak.open).sum();
        let merged = (open > 0).then_some(Peak { through, level, open });
        self.peaks.splice(from..to, merged);
    }

    /// How long so much takes to refill, rounded up.
    fn time_for(&self, units: i128) -> Duration {
        let nanos = units.max(0).unsigned_abs().div_ceil(u128::from(self.per_minute.max(1)));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// What was spent on each of the last days, and what is held for requests that run.
#[derive(Debug)]
pub struct Budget {
    /// By day, rising; never empty.
    days: Vec<Day>,
}

#[derive(Clone, Copy, Debug)]
struct Day {
    number: i64,
    spent: u64,
    held: u64,
}

impl Budget {
    fn new(today: i64, spent: NanoUsd) -> Budget {
        Budget { days: vec![Day { number: today, spent: spent.0, held: 0 }] }
    }

    pub fn spent(&self, day: i64) -> NanoUsd {
        NanoUsd(self.days.iter().find(|known| known.number == day).map_or(0, |day| day.spent))
    }

    /// The day that a cost would count on, if it fits. What costs nothing always fits.
    fn check(&mut self, per_day: NanoUsd, day: i64, cost: NanoUsd) -> Result<i64, Denied> {
        let Some(Day { number, spent, held }) = self.day(day).copied() else { return Ok(day) };
        let total = u128::from(spent) + u128::from(held) + u128::from(cost.0);
        if cost.0 > 0 && total > u128::from(per_day.0) {
            return Err(Denied::Budget { spent: NanoUsd(spent), held: NanoUsd(held), day: number });
        }
        Ok(number)
    }

    fn hold(&mut self, day: i64, cost: NanoUsd) {
        if let Some(day) = self.days.iter_mut().find(|known| known.number == day) {
            day.held = day.held.saturating_add(cost.0);
        }
    }

    /// A day that is forgotten by now has no budget left to count against.
    fn settle(&mut self, day: i64, held: NanoUsd, billed: NanoUsd) {
        if let Some(day) = self.days.iter_mut().find(|known| known.number == day) {
            day.held = day.held.saturating_sub(held.0);
            day.spent = day.spent.saturating_add(billed.0);
        }
    }

    /// The entry of a day, made if it is new. A day before all that are known is a clock's mistake and counts as the
    /// first of them.
    fn day(&mut self, number: i64) -> Option<&mut Day> {
        let at = self.days.partition_point(|day| day.number < number);
        let known = self.days.get(at).is_some_and(|day| day.number == number);
        if known || at == 0 {
            return self.days.get_mut(at);
        }
        self.days.insert(at, Day { number, spent: 0, held: 0 });
        if self.days.len() > DAYS_MAX {
            self.days.remove(0);
        }
        self.days.iter_mut().find(|day| day.number == number)
    }
}

#[cfg(test)]
#[path = "core_model.rs"]
mod model;
