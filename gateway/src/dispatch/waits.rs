//! How long an answer may take: until its first token, between two tokens, and as a whole.

use std::time::{Duration, Instant};

use crate::config::Timeouts;
use crate::refusal::Refusal;

/// The waits of one answer. The whole is one for all attempts; each attempt has its own first token to wait for.
#[derive(Clone, Copy, Debug)]
pub struct Waits {
    limits: Timeouts,
    began: Instant,
    attempt_began: Instant,
    /// Something came: from now on gaps count.
    pub has_begun: bool,
    /// The backend answers in one piece, so its first token is its last.
    pub is_whole: bool,
    /// Somebody could stand in: an answer in one piece gets half of the time that is left, so that there is some for them.
    pub is_shared: bool,
}

/// When waiting ends, and for want of what.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    pub at: Instant,
    what: &'static str,
    limit: Duration,
}

impl Deadline {
    pub fn refusal(&self) -> Refusal {
        Refusal::TimedOut { what: self.what, limit: self.limit }
    }
}

impl Waits {
    pub fn begin(limits: Timeouts) -> Waits {
        let now = Instant::now();
        Waits { limits, began: now, attempt_began: now, has_begun: false, is_whole: false, is_shared: false }
    }

    /// Another attempt: its first token is waited for anew.
    pub fn again(&mut self) {
        self.attempt_began = Instant::now();
    }

    /// How long an attempt that begins now may wait for a place in an engine.
    pub fn queue(&self) -> Duration {
        self.limits.queue.min(self.end().saturating_duration_since(Instant::now()))
    }

    /// When there is no time for anything more.
    pub fn end(&self) -> Instant {
        self.began + self.limits.total
    }

    /// Whether there is no time for anything more.
    pub fn is_over(&self) -> bool {
        Instant::now() >= self.end()
    }

    pub fn deadline(&self) -> Deadline {
        let total = Deadline { at: self.end(), what: "whole answer", limit: self.limits.total };
        // Idle time counts from here, where we wait for the model: a client that reads slowly is not its fault.
        let chunk = if self.has_begun {
            Deadline { at: Instant::now() + self.limits.idle, what: "next token", limit: self.limits.idle }
        } else if !self.is_whole {
            let limit = self.limits.first_token;
            Deadline { at: self.attempt_began + limit, what: "first token", limit }
        } else if self.is_shared {
            let limit = total.at.saturating_duration_since(self.attempt_began) / 2;
            Deadline { at: self.attempt_began + limit, what: "answer", limit }
        } else {
            total
        };
        if chunk.at < total.at { chunk } else { total }
    }
}
