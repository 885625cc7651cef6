//! Where counters are: the seam between what limits mean and who keeps count. A store of another kind is another
//! implementation of `Counts`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;

use super::core::rule::{Rule, Subject};
use super::core::set::Moment;
use super::core::{Short, State, Wait};
use crate::ports::Clock;

/// One counter that a request needs, and how much of it.
#[derive(Clone, Debug)]
pub struct Ask {
    pub rule: Arc<Rule>,
    pub subject: Subject,
    /// The rule's, or the caller's own instead.
    pub limit: u64,
    pub amount: u64,
    pub at: Moment,
}

/// Which of the asks had no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Denied {
    pub ask: usize,
    /// `None`: who keeps count cannot be asked, and the rule then lets nobody in.
    pub short: Option<Short>,
}

impl Denied {
    pub fn wait(&self) -> Wait {
        self.short.map_or(Wait::Never, |short| short.wait)
    }
}

#[async_trait]
pub trait Counts: Send + Sync {
    /// Whether all could be had now. Takes nothing.
    ///
    /// # Errors
    /// `Denied`.
    fn peek(&self, asks: &[Ask]) -> Result<(), Denied>;

    /// Takes all that is asked for, or nothing.
    ///
    /// # Errors
    /// `Denied`, by the one that takes longest to have room.
    async fn reserve(&self, asks: &[Ask]) -> Result<Box<dyn Grant>, Denied>;

    /// How the counter of an ask stands.
    fn state(&self, ask: &Ask) -> State;

    /// Nobody asks any more: what was taken ahead of requests goes back.
    fn close(&self) {}
}

/// What was taken. Dropped, all of it goes back.
#[must_use]
pub trait Grant: Send + Sync {
    /// Keeps what was used under each rule and gives back the rest.
    fn settle(self: Box<Self>, used: &dyn Fn(&Rule) -> u64);

    /// Whether a limit was held to that is only this gateway's part of the shared one.
    fn is_apart(&self) -> bool {
        false
    }
}

/// Time since the start, by the clock that never runs backwards.
pub struct Time {
    pub clock: Arc<dyn Clock>,
    began: Instant,
}

impl Time {
    pub fn new(clock: Arc<dyn Clock>) -> Time {
        Time { began: clock.instant(), clock }
    }

    pub fn now(&self) -> Duration {
        self.clock.instant().saturating_duration_since(self.began)
    }
}
