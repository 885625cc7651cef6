//! Takes from several counters at once, or from none.

use std::time::Duration;

use super::bucket::Bucket;
use super::calendar::{Calendar, Period};
use super::rule::{Mode, Rule};
use super::sliding::Sliding;
use super::slots::Slots;
use super::{Short, State, Taken};
use crate::api::limit::Per;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

/// What a rule has counted for one of those that it binds.
#[derive(Debug, PartialEq, Eq)]
pub enum Counter {
    Bucket(Bucket),
    Sliding(Sliding),
    Calendar(Calendar),
    Slots(Slots),
}

/// Now, by the clock that never runs backwards, and by a rule's calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    pub now: Duration,
    pub period: Period,
}

impl Counter {
    /// `used`: what was used in the present period before this process began.
    pub fn new(rule: &Rule, limit: u64, at: Moment, used: u64) -> Counter {
        let window = match rule.per {
            None => return Counter::Slots(Slots::new(limit)),
            Some(Per::Day | Per::Month) => return Counter::Calendar(Calendar::new(limit, at.period, used)),
            Some(per) => window(per),
        };
        match rule.exact {
            true => Counter::Sliding(Sliding::new(limit, window)),
            false => Counter::Bucket(Bucket::new(limit, window, at.now)),
        }
    }

    /// Another limit, or another way to hold to it. What was used stays used.
    pub fn set_limit(&mut self, now: Duration, limit: u64, mode: Mode) {
        match self {
            Counter::Bucket(bucket) => bucket.set_limit(now, limit),
            Counter::Sliding(sliding) => sliding.set_limit(limit),
            Counter::Calendar(calendar) => {
                calendar.set_limit(limit);
                calendar.set_throttle(
                    now,
                    match mode {
                        Mode::Throttle { requests, per } => Some((requests, window(per))),
                        Mode::Hard | Mode::Soft => None,
                    },
                );
            }
            Counter::Slots(slots) => slots.set_limit(limit),
        }
    }

    /// Whether so much could be taken now. What asks for nothing always fits.
    ///
    /// # Errors
    /// `Short`, with what is used and when there may be room.
    pub fn check(&self, at: Moment, amount: u64) -> Result<(), Short> {
        match self {
            Counter::Bucket(bucket) => bucket.check(at.now, amount),
            Counter::Sliding(sliding) => sliding.check(at.now, amount),
            Counter::Calendar(calendar) => calendar.check(at.now, at.period, amount),
            Counter::Slots(slots) => slots.check(amount),
        }
    }

    fn take(&mut self, at: Moment, amount: u64) -> Taken {
        match self {
            Counter::Bucket(bucket) => bucket.take(at.now, amount),
            Counter::Sliding(sliding) => sliding.take(at.now, amount),
            Counter::Calendar(calendar) => calendar.take(at.now, at.period, amount),
            Counter::Slots(slots) => slots.take(amount),
        }
    }

    /// Keeps what was used and gives back the rest. More than was taken is remembered.
    pub fn settle(&mut self, now: Duration, taken: Taken, used: u64) {
        match self {
            Counter::Bucket(bucket) => bucket.settle(now, taken, used),
            Counter::Sliding(sliding) => sliding.settle(now, taken, used),
            Counter::Calendar(calendar) => calendar.settle(now, taken, used),
            Counter::Slots(slots) => slots.settle(taken),
        }
    }

    /// So much was used in a period before this process began.
    pub fn add_before(&mut self, period: Period, used: u64) {
        if let Counter::Calendar(calendar) = self {
            calendar.add_before(period, used);
        }
    }

    /// Whether nothing is lost if it is made anew.
    pub fn is_at_rest(&self, at: Moment) -> bool {
        match self {
            Counter::Bucket(bucket) => bucket.is_at_rest(at.now),
            Counter::Sliding(sliding) => sliding.is_at_rest(at.now),
            Counter::Calendar(calendar) => calendar.is_at_rest(at.period),
            Counter::Slots(slots) => slots.is_at_rest(),
        }
    }

    pub fn state(&self, at: Moment) -> State {
        match self {
            Counter::Bucket(bucket) => bucket.state(at.now),
            Counter::Sliding(sliding) => sliding.state(at.now),
            Counter::Calendar(calendar) => calendar.state(at.period),
            Counter::Slots(slots) => slots.state(),
        }
    }
}

/// How long a window is that refills; of a day or a month nothing does.
fn window(per: Per) -> Duration {
    match per {
        Per::Second => SECOND,
        _ => MINUTE,
    }
}

/// What a request asks of one counter.
#[derive(Debug)]
pub struct Claim<'c> {
    pub counter: &'c mut Counter,
    pub mode: Mode,
    pub at: Moment,
    pub amount: u64,
}

impl Claim<'_> {
    fn check(&self) -> Result<(), Short> {
        match self.mode {
            Mode::Hard | Mode::Throttle { .. } => self.counter.check(self.at, self.amount),
            Mode::Soft => Ok(()),
        }
    }
}

/// Who had no room. Of several the one that takes longest: waiting for another would not help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Denied {
    /// Which of the claims.
    pub claim: usize,
    pub short: Short,
}

/// Whether all could be had now.
///
/// # Errors
/// `Denied`.
pub fn check(claims: &[Claim<'_>]) -> Result<(), Denied> {
    let short = |(claim, asked): (usize, &Claim<'_>)| Some(Denied { claim, short: asked.check().err()? });
    let longest = |one: Denied, other: Denied| if other.short.wait > one.short.wait { other } else { one };
    match claims.iter().enumerate().filter_map(short).reduce(longest) {
        Some(denied) => Err(denied),
        None => Ok(()),
    }
}

/// Takes all that is claimed, in the order of the claims, or nothing.
///
/// # Errors
/// `Denied`. Then every counter is as it was, to the bit.
pub fn reserve(claims: &mut [Claim<'_>]) -> Result<Vec<Taken>, Denied> {
    check(claims)?;
    Ok(take(claims))
}

/// Takes all that is claimed, whether or not there is room.
pub fn take(claims: &mut [Claim<'_>]) -> Vec<Taken> {
    claims.iter_mut().map(|claim| claim.counter.take(claim.at, claim.amount)).collect()
}
