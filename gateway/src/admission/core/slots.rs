//! Requests at a time.

use std::time::Duration;

use super::{Short, State, Taken, Wait};

#[derive(Debug, PartialEq, Eq)]
pub struct Slots {
    limit: u64,
    running: u64,
}

impl Slots {
    pub fn new(limit: u64) -> Slots {
        Slots { limit, running: 0 }
    }

    pub fn set_limit(&mut self, limit: u64) {
        self.limit = limit;
    }

    /// # Errors
    /// `Short`, with as many under way as there may be.
    pub fn check(&self, amount: u64) -> Result<(), Short> {
        if self.running.saturating_add(amount) <= self.limit {
            return Ok(());
        }
        let wait = if amount > self.limit { Wait::Never } else { Wait::ForOthers };
        Err(Short { state: self.state(), wait })
    }

    pub fn take(&mut self, amount: u64) -> Taken {
        self.running = self.running.saturating_add(amount);
        Taken { amount, mark: 0, throttled: None }
    }

    /// A place is free again, whatever was done in it.
    pub fn settle(&mut self, taken: Taken) {
        self.running = self.running.saturating_sub(taken.amount);
    }

    pub fn is_at_rest(&self) -> bool {
        self.running == 0
    }

    pub fn state(&self) -> State {
        let remaining = self.limit.saturating_sub(self.running);
        State { limit: self.limit, used: 0, held: self.running, remaining, reset: Duration::ZERO }
    }
}
