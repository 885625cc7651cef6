//! May they, now? → `Door` before a body is read, `Ticket` before work starts.
//!
//! The door counts requests at a time and requests per minute; admission reserves tokens and money for the most that the
//! request could use. Each is all or nothing: what one limit refuses takes nothing from the others. A key's counts are
//! behind one short lock, and outlive reloads: a changed limit gives nobody a fresh minute, or a fresh day.

pub mod core;

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use governor::clock::{Clock as _, DefaultClock};
use governor::middleware::StateInformationMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota as Cells, RateLimiter};
use parking_lot::{Mutex, RwLock};

use self::core::{Account, Ask, Denied, Reservation};
use crate::accounting::core::NanoUsd;
use crate::accounting::settlement::{Hold, Journal, Receipt, Terms, Ticket};
use crate::api::openai::ratelimit::{Quota, Quotas};
use crate::auth::Caller;
use crate::config::Limits;
use crate::observe::metrics::{Budget, Metrics};
use crate::ports::Clock;
use crate::refusal::Refusal;

type Limiter = RateLimiter<NotKeyed, InMemoryState, DefaultClock, StateInformationMiddleware>;

const MINUTE: Duration = Duration::from_secs(60);
/// Judgements for every request that a key may make: an answer may be judged by a few names, and once more.
const JUDGEMENTS_PER_REQUEST: u32 = 4;

/// The limits' state. It outlives reloads.
pub struct Admission {
    keys: RwLock<HashMap<String, Arc<Key>>>,
    watch: Arc<Watch>,
    journal: Arc<dyn Journal>,
    spent: SpentBefore,
}

/// What keys had spent on the present UTC day before this process began.
#[derive(Debug, Default)]
pub struct SpentBefore {
    pub day: i64,
    pub by_key: HashMap<String, NanoUsd>,
}

/// What keys need to tell the time and to be seen.
struct Watch {
    clock: Arc<dyn Clock>,
    began: Instant,
    metrics: Arc<Metrics>,
}

impl Watch {
    fn now(&self) -> Duration {
        self.clock.instant().saturating_duration_since(self.began)
    }

    fn decided(&self, kind: &str, allowed: bool) {
        self.metrics.limit_decision("key", kind, allowed);
    }
}

/// One key's counts.
struct Key {
    tenant: String,
    name: String,
    state: Mutex<State>,
    watch: Arc<Watch>,
}

struct State {
    requests: Requests,
    /// Apart from the requests: who judges answers must not lose any by it.
    judgements: Requests,
    /// Looks at the models, likewise.
    lookups: Requests,
    account: Account,
    /// Its budget when it last knocked.
    per_day: NanoUsd,
}

impl State {
    fn quotas(&mut self, now: Duration) -> Quotas {
        let tokens = &mut self.account.tokens;
        let tokens =
            Quota { limit: tokens.limit().into(), remaining: tokens.remaining(now), reset: tokens.full_in(now) };
        Quotas { requests: self.requests.quota(now), tokens }
    }
}

/// Requests per minute. The limiter tells what is left only while it counts, so its last word is kept.
struct Requests {
    limit: u32,
    limiter: Limiter,
    missing: u32,
    seen: Duration,
}

impl Requests {
    fn new(limit: u32, now: Duration) -> Requests {
        let cells = Cells::per_minute(NonZeroU32::new(limit).unwrap_or(NonZeroU32::MIN));
        let limiter = RateLimiter::direct(cells).with_middleware::<StateInformationMiddleware>();
        Requests { limit, limiter, missing: 0, seen: now }
    }

    /// Another limit: what was used under the old one stays used, at most all of the new one.
    fn set_limit(&mut self, limit: u32, now: Duration) {
        if limit == self.limit {
            return;
        }
        let used = self.missing(now).min(limit);
        *self = Requests { missing: used, ..Requests::new(limit, now) };
        if let Some(used) = NonZeroU32::new(used) {
            // It has the capacity: no more than its whole burst is taken.
            let _ = self.limiter.check_n(used);
        }
    }

    /// A burst of a whole minute's worth is allowed; it refills evenly.
    fn count(&mut self, now: Duration) -> Result<(), Duration> {
        self.seen = now;
        match self.limiter.check() {
            Ok(state) => {
                self.missing = self.limit.saturating_sub(state.remaining_burst_capacity());
                Ok(())
            }
            Err(until) => {
                self.missing = self.limit;
                Err(until.wait_time_from(DefaultClock::default().now()))
            }
        }
    }

    fn missing(&self, now: Duration) -> u32 {
        let refilled = now.saturating_sub(self.seen).as_nanos() * u128::from(self.limit) / MINUTE.as_nanos();
        self.missing.saturating_sub(u32::try_from(refilled).unwrap_or(u32::MAX))
    }

    fn quota(&self, now: Duration) -> Quota {
        let missing = self.missing(now);
        Quota {
            limit: self.limit.into(),
            remaining: self.limit.saturating_sub(missing).into(),
            reset: (MINUTE * missing) / self.limit.max(1),
        }
    }
}

/// A request at a time: the place is given back when this is dropped.
struct Place(Arc<Key>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.state.lock().account.leave();
    }
}

/// Proof that a caller is within their limits of requests. Holds their place among the requests at a time, so it lives as
/// long as the request works.
pub struct Door {
    place: Place,
    limits: Limits,
}

impl Door {
    /// What the key has left now.
    pub fn quotas(&self) -> Quotas {
        let key = &self.place.0;
        key.state.lock().quotas(key.watch.now())
    }

    /// OpenAI's `x-ratelimit-*` headers.
    pub fn headers(&self) -> [(&'static str, String); 6] {
        self.quotas().headers()
    }
}

impl Admission {
    pub fn new(journal: Arc<dyn Journal>, clock: Arc<dyn Clock>, metrics: Arc<Metrics>, spent: SpentBefore) -> Self {
        let watch = Arc::new(Watch { began: clock.instant(), clock, metrics });
        Admission { keys: RwLock::default(), watch, journal, spent }
    }

    /// Counts the request against its key: at a time first, then per minute.
    ///
    /// # Errors
    /// `ConcurrencyLimited` or `RequestsLimited` with the limit and when to come back.
    pub fn knock(&self, caller: &Caller, default: &Limits) -> Result<Door, Refusal> {
        let limits = caller.limits(default);
        let key = self.key(caller, &limits);
        let now = self.watch.now();
        let mut state = key.state.lock();
        state.requests.set_limit(limits.requests_per_minute, now);
        state.account.tokens.set_limit(now, limits.tokens_per_minute);
        state.per_day = limits.per_day;
        if !state.account.enter(limits.concurrency) {
            let quotas = state.quotas(now);
            drop(state);
            self.watch.decided("concurrency", false);
            return Err(Refusal::ConcurrencyLimited { limit: limits.concurrency, quotas });
        }
        if let Err(retry_after) = state.requests.count(now) {
            state.account.leave();
            let quotas = state.quotas(now);
            drop(state);
            self.watch.decided("requests", false);
            return Err(Refusal::RequestsLimited { quotas, retry_after });
        }
        drop(state);
        self.watch.decided("concurrency", true);
        self.watch.decided("requests", true);
        Ok(Door { place: Place(key), limits })
    }

    /// Counts a judgement of an answer, which takes nothing from what a key may ask.
    ///
    /// # Errors
    /// `FeedbackLimited` with the limit and when to come back.
    pub fn knock_to_judge(&self, caller: &Caller, default: &Limits) -> Result<(), Refusal> {
        let limits = caller.limits(default);
        let limit = judgements(&limits);
        let key = self.key(caller, &limits);
        let now = self.watch.now();
        let counted = {
            let mut state = key.state.lock();
            state.judgements.set_limit(limit, now);
            state.judgements.count(now)
        };
        self.watch.decided("feedback", counted.is_ok());
        counted.map_err(|retry_after| Refusal::FeedbackLimited { limit, retry_after })
    }

    /// Counts a look at the models, which takes nothing from what a key may ask.
    ///
    /// # Errors
    /// `LookupsLimited` with the limit and when to come back.
    pub fn knock_to_look(&self, caller: &Caller, default: &Limits) -> Result<(), Refusal> {
        let limits = caller.limits(default);
        let limit = judgements(&limits);
        let key = self.key(caller, &limits);
        let now = self.watch.now();
        let counted = {
            let mut state = key.state.lock();
            state.lookups.set_limit(limit, now);
            state.lookups.count(now)
        };
        self.watch.decided("lookups", counted.is_ok());
        counted.map_err(|retry_after| Refusal::LookupsLimited { limit, retry_after })
    }

    /// Entries are made for keys that proved themselves, so there are never more than there are keys.
    fn key(&self, caller: &Caller, limits: &Limits) -> Arc<Key> {
        let id = caller.key_id();
        if let Some(key) = self.keys.read().get(id) {
            return key.clone();
        }
        let make = || {
            let now = self.watch.now();
            let spent = self.spent.by_key.get(id).copied().unwrap_or_default();
            let state = State {
                requests: Requests::new(limits.requests_per_minute, now),
                judgements: Requests::new(judgements(limits), now),
                lookups: Requests::new(judgements(limits), now),
                account: Account::new(limits.tokens_per_minute, now, self.spent.day, spent),
                per_day: limits.per_day,
            };
            let (tenant, name) = (caller.tenant().to_owned(), caller.key_name().to_owned());
            Arc::new(Key { tenant, name, state: Mutex::new(state), watch: self.watch.clone() })
        };
        self.keys.write().entry(id.to_owned()).or_insert_with(make).clone()
    }

    /// Shows what keys have spent of today's budgets.
    pub fn observe(&self) {
        let today = core::day(self.watch.clock.now_ns());
        let keys: Vec<Arc<Key>> = self.keys.read().values().cloned().collect();
        self.watch.metrics.budgets(keys.iter().map(|key| {
            let state = key.state.lock();
            let (limit, spent) = (state.per_day, state.account.budget.spent(today));
            Budget { tenant: &key.tenant, key: &key.name, limit, spent }
        }));
    }

    /// Reserves the most that the request could use, writes the intent, and hands out leave to start.
    ///
    /// # Errors
    /// `TokensLimited` or `BudgetSpent` with what is used and when to come back; `LedgerFull`: without a place for its
    /// record, no request is taken. Nothing stays reserved then.
    pub fn admit(&self, door: &Door, terms: Terms, receipt: Arc<OnceLock<Receipt>>) -> Result<Ticket, Refusal> {
        let hold = Box::new(Held::reserve(door, &terms)?);
        Ticket::admit(Terms { hold, ..terms }, self.journal.clone(), self.watch.clock.clone(), receipt)
            .map_err(|_| Refusal::LedgerFull)
    }
}

/// What a request has reserved of its key's tokens and money. Dropped, all of it goes back.
struct Held {
    key: Arc<Key>,
    reservation: Option<Reservation>,
}

impl Held {
    fn reserve(door: &Door, terms: &Terms) -> Result<Held, Refusal> {
        let key = &door.place.0;
        let watch = &key.watch;
        let ask = Ask { tokens: terms.tokens_max, cost_max: terms.cost_max, day: core::day(terms.row.started_ns) };
        let now = watch.now();
        let mut state = key.state.lock();
        match state.account.reserve(now, door.limits.per_day, ask) {
            Ok(reservation) => {
                drop(state);
                watch.decided("budget", true);
                watch.decided("tokens", true);
                watch.metrics.reserved(signed(ask.tokens), signed(ask.cost_max.0));
                Ok(Held { key: key.clone(), reservation: Some(reservation) })
            }
            Err(Denied::Tokens { wait }) => {
                let quotas = state.quotas(now);
                drop(state);
                watch.decided("tokens", false);
                Err(Refusal::TokensLimited { quotas, requested: ask.tokens, retry_after: wait })
            }
            Err(Denied::Budget { spent, held, day }) => {
                drop(state);
                watch.decided("budget", false);
                let resets_ns = core::day_start_ns(day.saturating_add(1));
                let reset = Duration::from_nanos(resets_ns.saturating_sub(watch.clock.now_ns()).max(0).unsigned_abs());
                let (limit, requested) = (door.limits.per_day, ask.cost_max);
                Err(Refusal::BudgetSpent { limit, spent, held, requested, resets_ns, reset })
            }
        }
    }

    fn end(&mut self, tokens: u64, billed: NanoUsd) {
        let watch = &self.key.watch;
        let now = watch.now();
        let Some(reservation) = self.reservation.take() else { return };
        let (held, cost_max) = (reservation.tokens(), reservation.cost_max());
        self.key.state.lock().account.settle(now, reservation, tokens, billed);
        watch.metrics.reserved(-signed(held), -signed(cost_max.0));
    }
}

impl Hold for Held {
    fn settle(mut self: Box<Self>, receipt: &Receipt) {
        self.end(receipt.usage.total(), receipt.billed);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.end(0, NanoUsd(0));
    }
}

/// Judgements a minute, and looks at the models.
fn judgements(limits: &Limits) -> u32 {
    limits.requests_per_minute.saturating_mul(JUDGEMENTS_PER_REQUEST)
}

/// A gauge's change. Neither tokens nor money of one request come near the bound.
fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
