//! May they, now? → `Door` before a body is read, `Ticket` before work starts.
//!
//! What binds a request is a list of rules: the four of `[limits]` or a key's own, then those of `[[limits.rules]]`. The
//! door takes a place among the requests at a time and looks whether there is room for one more request; admission then
//! takes everything at once: the request, and the tokens and the money that it could use at the most. Each step is all or
//! nothing, so a refused request costs nothing of any limit. Counts outlive reloads: a changed limit gives nobody a fresh
//! minute, or a fresh day.

pub mod before;
pub mod core;
pub mod counts;
mod door;
pub mod explain;
mod held;
pub mod local;
pub mod queue;
pub mod rules;
pub mod shared;

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota as Cells, RateLimiter};
use parking_lot::{Mutex, RwLock};

use self::core::bucket::Bucket;
use self::core::rule::{Mode, Rule, Sharing, Subjects};
use self::core::{Short, Wait};
use self::counts::{Ask, Counts, Denied, Time};
pub use self::door::Door;
use self::held::{Held, amount};
use self::queue::{Queue, Refused};
use self::rules::{Bound, Defaults};
use crate::accounting::core::NanoUsd;
use crate::accounting::settlement::{Hold, Journal, Most, Receipt, Terms, Ticket};
use crate::api::limit::{Of, Reached, scope};
use crate::auth::Caller;
use crate::config::Limits;
use crate::network::host;
use crate::observe::metrics::{Budget, Metrics};
use crate::refusal::Refusal;

const MINUTE: Duration = Duration::from_secs(60);
/// Judgements for every request that a key may make: an answer may be judged by a few names, and once more.
const JUDGEMENTS_PER_REQUEST: u32 = 4;
/// What a key may send for every request that it may make. What is refused costs nothing of any limit; this is what keeps
/// somebody who does not listen from having their bodies read and counted for ever.
const SENT_PER_REQUEST: u32 = 4;
/// … and at the least, so that a key of few requests may be told when to come back more than once.
const SENT_MIN: u32 = 60;
/// When to come back where nobody knows when the others end.
const FOR_OTHERS: Duration = Duration::from_secs(1);

/// The limits' state. It outlives reloads.
pub struct Admission {
    keys: RwLock<HashMap<String, Arc<Key>>>,
    defaults: ArcSwap<Defaults>,
    counts: Arc<dyn Counts>,
    queue: Arc<Queue>,
    watch: Arc<Watch>,
    journal: Arc<dyn Journal>,
}

/// What limits need to tell the time and to be seen.
struct Watch {
    time: Arc<Time>,
    metrics: Arc<Metrics>,
}

impl Watch {
    fn decided(&self, rule: &Rule, allowed: bool) {
        self.metrics.limit_decision(&scope(&rule.by), kind(rule.of), allowed);
    }
}

/// What is counted for a key beside its limits.
struct Key {
    tenant: String,
    name: String,
    flood: Flood,
    /// Apart from the requests: who judges answers must not lose any by it.
    judgements: Mutex<Bucket>,
    /// Looks at the models, likewise.
    lookups: Mutex<Bucket>,
    /// Its budget when it last knocked.
    per_day: Mutex<NanoUsd>,
}

/// Everything that a key sends, also what is refused.
struct Flood(Mutex<(u32, DefaultDirectRateLimiter)>);

impl Flood {
    fn new(limit: u32) -> Flood {
        Flood(Mutex::new((limit, Flood::limiter(limit))))
    }

    fn limiter(limit: u32) -> DefaultDirectRateLimiter {
        RateLimiter::direct(Cells::per_minute(NonZeroU32::new(limit).unwrap_or(NonZeroU32::MIN)))
    }

    fn check(&self, limit: u32) -> Result<(), Refusal> {
        let mut guard = self.0.lock();
        if guard.0 != limit {
            *guard = (limit, Flood::limiter(limit));
        }
        let until = |until: governor::NotUntil<_>| until.wait_time_from(DefaultClock::default().now());
        guard.1.check().map_err(|early| Refusal::Flooded { limit, retry_after: until(early) })
    }
}

impl Admission {
    pub fn new(journal: Arc<dyn Journal>, counts: Arc<dyn Counts>, time: Arc<Time>, metrics: Arc<Metrics>) -> Self {
        let (keys, defaults) = (RwLock::default(), ArcSwap::default());
        let (queue, watch) = (Arc::default(), Arc::new(Watch { time, metrics }));
        Admission { keys, defaults, counts, queue, watch, journal }
    }

    /// From now on gateways share the limits of every key like this.
    pub fn share(&self, shared: Option<Sharing>) {
        self.defaults.store(Arc::new(Defaults::new(shared)));
    }

    /// Takes a place among the requests at a time, and looks whether there is room for one more request.
    ///
    /// # Errors
    /// `Limited`, by the limit that has none and with when to come back; `LimitsUnavailable`; `Flooded` for who does not
    /// listen.
    pub async fn knock(&self, caller: &Caller, default: &Limits, rules: &[Arc<Rule>]) -> Result<Door, Refusal> {
        let limits = caller.limits(default);
        let key = self.key(caller, &limits);
        *key.per_day.lock() = limits.per_day;
        key.flood.check(sent(&limits))?;
        let mut door = Door {
            counts: self.counts.clone(),
            time: self.watch.time.clone(),
            subjects: subjects(caller),
            bound: self.defaults.load().with(&limits, rules).collect(),
            _place: None,
            told: Vec::new(),
            warning: None,
            waited: None,
            is_apart: false,
        };
        let began_ns = self.watch.time.clock.now_ns();
        // Which model is meant nobody knows yet; of those who do not bind by it the headers can tell already.
        door.told = door.asks(began_ns, |rule| (rule.is_known_at_door() && is_told(rule)).then_some(0));
        let one_more = |rule: &Rule| rule.is_known_at_door() && rule.of == Of::Requests && rule.wait.is_zero();
        let requests = door.asks(began_ns, |rule| one_more(rule).then_some(1));
        self.counts.peek(&requests).map_err(|denied| self.refusal(&door, &requests, denied))?;
        let places = door.asks(began_ns, |rule| is_taken_at_door(rule).then_some(1));
        let place = self.counts.reserve(&places).await.map_err(|denied| self.refusal(&door, &places, denied))?;
        (door.is_apart, door._place) = (place.is_apart(), Some(place));
        Ok(door)
    }

    /// Counts a judgement of an answer, which takes nothing from what a key may ask.
    ///
    /// # Errors
    /// `FeedbackLimited` with the limit and when to come back.
    pub fn knock_to_judge(&self, caller: &Caller, default: &Limits) -> Result<(), Refusal> {
        let limits = caller.limits(default);
        let (key, limit) = (self.key(caller, &limits), aside(&limits));
        let counted = self.count(&key.judgements, limit, "feedback");
        counted.map_err(|retry_after| Refusal::FeedbackLimited { limit, retry_after })
    }

    /// Counts a look at the models, which takes nothing from what a key may ask.
    ///
    /// # Errors
    /// `LookupsLimited` with the limit and when to come back.
    pub fn knock_to_look(&self, caller: &Caller, default: &Limits) -> Result<(), Refusal> {
        let limits = caller.limits(default);
        let (key, limit) = (self.key(caller, &limits), aside(&limits));
        let counted = self.count(&key.lookups, limit, "lookups");
        counted.map_err(|retry_after| Refusal::LookupsLimited { limit, retry_after })
    }

    /// # Errors
    /// When to come back.
    fn count(&self, bucket: &Mutex<Bucket>, limit: u32, kind: &str) -> Result<(), Duration> {
        let now = self.watch.time.now();
        let counted = {
            let mut bucket = bucket.lock();
            bucket.set_limit(now, limit.into());
            bucket.check(now, 1).map(|()| {
                let taken = bucket.take(now, 1);
                bucket.settle(now, taken, 1);
            })
        };
        self.watch.metrics.limit_decision("key", kind, counted.is_ok());
        counted.map_err(|short| told(short.wait).unwrap_or(MINUTE))
    }

    /// Entries are made for who proved themselves, so there are never more than keys, and tenants of trusted issuers.
    fn key(&self, caller: &Caller, limits: &Limits) -> Arc<Key> {
        let id = caller.key_id();
        if let Some(key) = self.keys.read().get(id) {
            return key.clone();
        }
        let make = || {
            let now = self.watch.time.now();
            let aside = || Mutex::new(Bucket::new(aside(limits).into(), MINUTE, now));
            Arc::new(Key {
                tenant: caller.tenant().to_owned(),
                name: caller.key_name().to_owned(),
                flood: Flood::new(sent(limits)),
                judgements: aside(),
                lookups: aside(),
                per_day: Mutex::new(limits.per_day),
            })
        };
        self.keys.write().entry(id.to_owned()).or_insert_with(make).clone()
    }

    /// At the end, once nothing runs.
    pub fn close(&self) {
        self.counts.close();
    }

    /// Shows what keys have spent of today's budgets.
    pub fn observe(&self) {
        let (now, now_ns) = (self.watch.time.now(), self.watch.time.clock.now_ns());
        let keys: Vec<(String, Arc<Key>)> =
            self.keys.read().iter().map(|(id, key)| (id.clone(), key.clone())).collect();
        let defaults = self.defaults.load();
        self.watch.metrics.budgets(keys.iter().map(|(id, key)| {
            let limit = *key.per_day.lock();
            let subjects = Subjects { key: id.clone(), ..Subjects::default() };
            let bound = Bound { rule: defaults.per_day().clone(), limit: limit.0 };
            let spent = NanoUsd(self.counts.state(&bound.ask(&subjects, 0, now, now_ns, now_ns)).used);
            Budget { tenant: &key.tenant, key: &key.name, limit, spent }
        }));
    }

    /// Reserves what the request could use, writes the intent, and hands out leave to start.
    ///
    /// # Errors
    /// `Limited`, by the limit that has no room and with when to come back; `LimitsUnavailable`; `LedgerFull`: without a
    /// place for its record, no request is taken. Nothing stays reserved then.
    pub async fn admit(
        &self,
        door: &mut Door,
        mut terms: Terms,
        receipt: Arc<OnceLock<Receipt>>,
    ) -> Result<Ticket, Refusal> {
        let row = &terms.row;
        (door.subjects.route, door.subjects.model) = (Some(row.route.clone()), Some(row.model.clone()));
        let (most, bound) = (terms.most, terms.bound.unwrap_or(terms.most));
        let amount = |rule: &Rule| amount(rule.of, if rule.strict { bound } else { most });
        let asks = door.asks(row.started_ns, |rule| (!is_taken_at_door(rule)).then(|| amount(rule)));
        door.told = asks.iter().filter(|ask| is_told(&ask.rule)).cloned().collect();
        let taken = self.queue.take(&*self.counts, &asks, &door.subjects.key).await;
        let (grant, waited) =
            taken.map_err(|Refused { denied, waited }| match (self.refusal(door, &asks, denied), waited) {
                (Refusal::Limited(reached), Some(waited)) => Refusal::WaitedTooLong { waited, reached },
                (refusal, _) => refusal,
            })?;
        door.waited = waited;
        door.is_apart |= grant.is_apart();
        let hold = Held::new(grant, &terms.row.model, most, self.watch.clone(), self.queue.clone());
        // Also where it binds a model that may stand in.
        let may_bind = |rule: &Rule| rule.is_by_model() || rule.binds(&door.subjects);
        if door.bound.iter().any(|Bound { rule, .. }| rule.strict && rule.of == Of::Usd && may_bind(rule)) {
            terms.billed_max = Some(bound.cost);
        }
        let clock = self.watch.time.clock.clone();
        let ticket = Ticket::admit(Terms { hold, ..terms }, self.journal.clone(), clock, receipt)
            .map_err(|_| Refusal::LedgerFull)?;
        let was_taken = |rule: &Rule| is_taken_at_door(rule) && rule.binds(&door.subjects);
        let taken_before = door.bound.iter().filter(|bound| was_taken(&bound.rule));
        for rule in asks.iter().map(|ask| &ask.rule).chain(taken_before.map(|bound| &bound.rule)) {
            self.watch.decided(rule, true);
        }
        door.warning = self.warning(&asks);
        Ok(ticket)
    }

    /// Leave to ask a model that stands in for the one that was admitted: what rules by model hold for it. Nobody waits
    /// for that, as others may stand in. `None` if no rule tells models apart. `most`: what it can use, strictly or likely.
    ///
    /// # Errors
    /// `Limited`.
    pub async fn stand_in(
        &self,
        door: &Door,
        model: &str,
        began_ns: i64,
        most: impl Fn(bool) -> Most,
    ) -> Result<Option<Box<dyn Hold>>, Refusal> {
        let subjects = Subjects { model: Some(model.to_owned()), ..door.subjects.clone() };
        let asks =
            door.asks_for(&subjects, began_ns, |rule| rule.is_by_model().then(|| amount(rule.of, most(rule.strict))));
        if asks.is_empty() {
            return Ok(None);
        }
        let grant = self.counts.reserve(&asks).await.map_err(|denied| self.refusal(door, &asks, denied))?;
        asks.iter().for_each(|ask| self.watch.decided(&ask.rule, true));
        // What it could use at the most is held, and shown, since admission.
        Ok(Some(Held::new(grant, model, Most::default(), self.watch.clone(), self.queue.clone())))
    }

    /// The first rule whose limit is passed although it lets in, counted and in words.
    fn warning(&self, asks: &[Ask]) -> Option<String> {
        let mut warning = None;
        for ask in asks.iter().filter(|ask| ask.rule.mode != Mode::Hard) {
            let state = self.counts.state(ask);
            let gone = state.used.saturating_add(state.held);
            if gone > ask.limit {
                self.watch.metrics.budget_exceeded(&ask.rule.name, ask.rule.mode.as_str());
                let tell = |amount: u64| match ask.rule.of {
                    Of::Usd => NanoUsd(amount).to_string(),
                    _ => amount.to_string(),
                };
                warning.get_or_insert_with(|| format!("{} {}/{}", ask.rule.name, tell(gone), tell(ask.limit)));
            }
        }
        warning
    }

    fn refusal(&self, door: &Door, asks: &[Ask], denied: Denied) -> Refusal {
        let ask = &asks[denied.ask];
        self.watch.decided(&ask.rule, false);
        let Some(Short { state, wait }) = denied.short else {
            return Refusal::LimitsUnavailable { rule: ask.rule.name.clone() };
        };
        let at_ns = ask.at.period.now_ns.saturating_add(i64::try_from(state.reset.as_nanos()).unwrap_or(i64::MAX));
        Refusal::Limited(Box::new(Reached {
            rule: ask.rule.name.clone(),
            by: ask.rule.by.clone(),
            of: ask.rule.of,
            per: ask.rule.per,
            limit: ask.limit,
            used: state.used,
            held: state.held,
            requested: ask.amount,
            // Nobody knows when requests end.
            resets: ask.rule.per.map(|_| (at_ns, state.reset)),
            retry_after: told(wait),
            quotas: door.quotas(),
        }))
    }
}

/// Whom a caller's requests are counted for, as far as it shows before the body is read.
fn subjects(caller: &Caller) -> Subjects {
    Subjects {
        key: caller.key_id().to_owned(),
        key_name: caller.key_name().to_owned(),
        user: caller.user().map(str::to_owned),
        tenant: caller.tenant().to_owned(),
        route: None,
        model: None,
        ip: Some(host(caller.ip()).to_string()),
        tags: caller.tags(),
        tier: caller.tier().map(str::to_owned),
    }
}

/// Who may wait for a place waits once their body is read: from then on it shows if they hang up.
fn is_taken_at_door(rule: &Rule) -> bool {
    rule.of == Of::Concurrency && rule.is_known_at_door() && rule.wait.is_zero()
}

/// Whether OpenAI's headers have words for it.
fn is_told(rule: &Rule) -> bool {
    matches!(rule.of, Of::Requests | Of::Tokens) && rule.mode == Mode::Hard
}

/// When to come back, if ever.
fn told(wait: Wait) -> Option<Duration> {
    match wait {
        Wait::ForOthers => Some(FOR_OTHERS),
        Wait::For(wait) => Some(wait),
        Wait::Never => None,
    }
}

/// What is counted, as a label.
fn kind(of: Of) -> &'static str {
    match of {
        Of::Usd => "budget",
        of => of.as_str(),
    }
}

/// Requests a minute that are heard at all.
fn sent(limits: &Limits) -> u32 {
    limits.requests_per_minute.saturating_mul(SENT_PER_REQUEST).max(SENT_MIN)
}

/// Judgements a minute, and looks at the models.
fn aside(limits: &Limits) -> u32 {
    limits.requests_per_minute.saturating_mul(JUDGEMENTS_PER_REQUEST)
}

#[cfg(test)]
mod tests;
