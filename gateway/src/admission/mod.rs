//! May they, now? → `Door` before a body is read, `Ticket` before work starts.

pub mod core;

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use governor::clock::{Clock as _, DefaultClock};
use governor::middleware::StateInformationMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use parking_lot::Mutex;

use crate::accounting::settlement::{Journal, Receipt, Terms, Ticket};
use crate::auth::Caller;
use crate::observe::metrics::Metrics;
use crate::ports::Clock;
use crate::refusal::Refusal;

type Limiter = RateLimiter<NotKeyed, InMemoryState, DefaultClock, StateInformationMiddleware>;

/// Proof that a caller is within their request limit. Carries what they have left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Door {
    limit: u32,
    remaining: u32,
}

impl Door {
    /// OpenAI's `x-ratelimit-*` headers.
    pub fn headers(&self) -> [(&'static str, String); 3] {
        // The cell refills evenly over a minute.
        let missing = u64::from(self.limit.saturating_sub(self.remaining));
        let reset = Duration::from_millis((missing * 60_000).div_ceil(u64::from(self.limit.max(1))));
        [
            ("x-ratelimit-limit-requests", self.limit.to_string()),
            ("x-ratelimit-remaining-requests", self.remaining.to_string()),
            ("x-ratelimit-reset-requests", format!("{}ms", reset.as_millis())),
        ]
    }
}

/// The limits' state. It outlives reloads: a changed file does not give anybody a fresh minute.
pub struct Admission {
    requests: Mutex<HashMap<String, (u32, Arc<Limiter>)>>,
    journal: Arc<dyn Journal>,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
}

impl Admission {
    pub fn new(journal: Arc<dyn Journal>, clock: Arc<dyn Clock>, metrics: Arc<Metrics>) -> Self {
        Admission { requests: Mutex::default(), journal, clock, metrics }
    }

    /// Counts the request against its key. A burst of a whole minute's worth is allowed; it refills evenly.
    ///
    /// # Errors
    /// `RequestsLimited` with the limit and when to come back.
    pub fn knock(&self, caller: &Caller, default_per_minute: u32) -> Result<Door, Refusal> {
        let limit = caller.requests_per_minute().unwrap_or(default_per_minute);
        let decided = match self.limiter(caller.key_id(), limit).check() {
            Ok(state) => Ok(Door { limit, remaining: state.remaining_burst_capacity() }),
            Err(until) => Err(Refusal::RequestsLimited {
                limit,
                retry_after: until.wait_time_from(DefaultClock::default().now()),
            }),
        };
        self.metrics.limit_decision("key", "requests", decided.is_ok());
        decided
    }

    /// Entries are made for keys that proved themselves, so there are never more than there are keys.
    fn limiter(&self, key_id: &str, per_minute: u32) -> Arc<Limiter> {
        let mut limiters = self.requests.lock();
        let known = limiters.get(key_id);
        if let Some((limit, limiter)) = known
            && *limit == per_minute
        {
            return limiter.clone();
        }
        let quota = Quota::per_minute(NonZeroU32::new(per_minute).unwrap_or(NonZeroU32::MIN));
        let limiter = Arc::new(RateLimiter::direct(quota).with_middleware::<StateInformationMiddleware>());
        // What was used under the old limit stays used under the new one.
        let used = known.map_or(0, |(limit, old)| match old.check() {
            Ok(state) => limit.saturating_sub(state.remaining_burst_capacity()).saturating_sub(1),
            Err(_) => *limit,
        });
        if let Some(used) = NonZeroU32::new(used.min(per_minute)) {
            // It has the capacity: no more than its whole burst is taken.
            let _ = limiter.check_n(used);
        }
        limiters.insert(key_id.to_owned(), (per_minute, limiter.clone()));
        limiter
    }

    /// Writes the intent and hands out leave to start.
    ///
    /// # Errors
    /// `LedgerFull`: without a place for its record, no request is taken.
    pub fn admit(&self, _door: &Door, terms: Terms, receipt: Arc<OnceLock<Receipt>>) -> Result<Ticket, Refusal> {
        Ticket::admit(terms, self.journal.clone(), self.clock.clone(), receipt).map_err(|_| Refusal::LedgerFull)
    }
}
