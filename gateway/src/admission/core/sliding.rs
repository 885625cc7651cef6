//! At most the limit in every window, wherever it begins: what `exact` rules count with.
//!
//! Time is cut into slices of a 64th of the window. Any window touches at most 65 of them, so the sum of the last 65, the
//! oldest counted whole, bounds what any window that ends now has seen. The price: capacity is up to a 64th late.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Short, State, Taken, Wait};

/// Slices that are counted together: those of a window, and the one that it begins in.
const SLICES: i64 = 65;

#[derive(Debug, PartialEq, Eq)]
pub struct Sliding {
    limit: u64,
    slice_ns: i64,
    /// Of the last 65 those in which something was taken, rising.
    slices: VecDeque<Slice>,
    /// The last slice that was seen. Time does not run backwards here: a clock that does stands still.
    newest: i64,
    held: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slice {
    number: i64,
    taken: u64,
}

impl Sliding {
    pub fn new(limit: u64, window: Duration) -> Sliding {
        let slice_ns = i64::try_from(window.as_nanos()).unwrap_or(i64::MAX) / (SLICES - 1);
        Sliding { limit, slice_ns: slice_ns.max(1), slices: VecDeque::new(), newest: 0, held: 0 }
    }

    pub fn set_limit(&mut self, limit: u64) {
        self.limit = limit;
    }

    /// # Errors
    /// `Short`, with what was taken in the window that ends now.
    pub fn check(&self, now: Duration, amount: u64) -> Result<(), Short> {
        let taken = self.taken(now);
        if amount == 0 || taken.saturating_add(amount) <= self.limit {
            return Ok(());
        }
        let (mut left, mut wait) = (taken, Wait::Never);
        for slice in self.counted(now).filter(|_| amount <= self.limit) {
            left = left.saturating_sub(slice.taken);
            wait = Wait::For(self.until_forgotten(slice.number, now));
            if left.saturating_add(amount) <= self.limit {
                break;
            }
        }
        Err(Short { state: self.state(now), wait })
    }

    pub fn take(&mut self, now: Duration, amount: u64) -> Taken {
        self.newest = self.number(now);
        let number = self.newest;
        self.add(number, amount);
        self.held = self.held.saturating_add(amount);
        Taken { amount, mark: number, throttled: None }
    }

    /// What was not used was never taken; what was used beyond it is taken now.
    pub fn settle(&mut self, now: Duration, taken: Taken, used: u64) {
        self.newest = self.number(now);
        self.held = self.held.saturating_sub(taken.amount);
        if let Some(beyond) = used.checked_sub(taken.amount).filter(|beyond| *beyond > 0) {
            self.add(self.newest, beyond);
        } else if let Some(slice) = self.slices.iter_mut().find(|slice| slice.number == taken.mark) {
            slice.taken = slice.taken.saturating_sub(taken.amount - used);
        }
    }

    pub fn is_at_rest(&self, now: Duration) -> bool {
        self.held == 0 && self.taken(now) == 0
    }

    pub fn state(&self, now: Duration) -> State {
        let taken = self.taken(now);
        let held = self.held.min(taken);
        let last = self.counted(now).filter(|slice| slice.taken > 0).last();
        State {
            limit: self.limit,
            used: taken - held,
            held,
            remaining: self.limit.saturating_sub(taken),
            reset: last.map_or(Duration::ZERO, |slice| self.until_forgotten(slice.number, now)),
        }
    }

    fn add(&mut self, number: i64, amount: u64) {
        self.slices.retain(|slice| slice.number > number - SLICES);
        match self.slices.back_mut().filter(|slice| slice.number == number) {
            Some(slice) => slice.taken = slice.taken.saturating_add(amount),
            None => self.slices.push_back(Slice { number, taken: amount }),
        }
    }

    fn number(&self, now: Duration) -> i64 {
        let number = now.as_nanos() / u128::from(self.slice_ns.unsigned_abs());
        i64::try_from(number).unwrap_or(i64::MAX).max(self.newest)
    }

    fn counted(&self, now: Duration) -> impl Iterator<Item = &Slice> {
        let from = self.number(now) - SLICES;
        self.slices.iter().filter(move |slice| slice.number > from)
    }

    fn taken(&self, now: Duration) -> u64 {
        self.counted(now).fold(0, |sum, slice| sum.saturating_add(slice.taken))
    }

    fn until_forgotten(&self, number: i64, now: Duration) -> Duration {
        let end = u128::from((number + SLICES).unsigned_abs()) * u128::from(self.slice_ns.unsigned_abs());
        Duration::from_nanos(u64::try_from(end).unwrap_or(u64::MAX)).saturating_sub(now)
    }
}
