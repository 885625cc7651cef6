//! What callers have left. Exact integers; time is passed in; nothing here does I/O.
//!
//! A request takes the most that it could use before its work starts (`reserve`) and gives back the rest at its end
//! (`settle`). Afterwards every counter is as if only what was used had ever been asked for. So in any window a caller
//! uses and holds at most a burst and what refills in that window, and spending never passes a budget.
//!
//! One file for each way of counting: `bucket` (seconds and minutes), `sliding` (the same, with no burst beyond the
//! limit), `calendar` (days and months), `slots` (requests at a time). `rule` says who shares a counter, `set` takes from
//! several at once or from none, and `order` says who is next of those who wait.

pub mod bucket;
pub mod calendar;
pub mod order;
pub mod rule;
pub mod set;
pub mod sliding;
pub mod slots;

use std::time::Duration;

/// When there may be room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wait {
    /// When somebody else ends; nobody knows when that is.
    ForOthers,
    /// After this time, if nobody else takes it.
    For(Duration),
    /// The limit itself is smaller than what was asked.
    Never,
}

/// Why there was no room in a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Short {
    pub state: State,
    pub wait: Wait,
}

/// How a counter stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    pub limit: u64,
    pub used: u64,
    /// What is reserved for requests under way.
    pub held: u64,
    pub remaining: u64,
    /// Until all of it is there again, if nothing is used meanwhile.
    pub reset: Duration,
}

/// What was taken from a counter. It cannot be copied, so it is settled once.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Taken {
    amount: u64,
    /// Where the counter finds it again.
    mark: i64,
    /// Where a throttle does, if one was needed.
    throttled: Option<i64>,
}

impl Taken {
    pub fn amount(&self) -> u64 {
        self.amount
    }
}

#[cfg(test)]
mod set_model;
