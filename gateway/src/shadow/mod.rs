//! Mirror after the answer: another target gets a copy of the request, nobody pays for it, and its user never notices.
//!
//! A copy is made of requests whose answer was complete or failed; what a client left is no fair comparison. It waits in
//! a bounded queue, runs beside a bounded number of others, and leaves a ledger row of its own with the role `shadow`.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::accounting::core::Usage;
use crate::accounting::row::{Outcome, Role, Row, UsageSource};
use crate::accounting::settlement::{Durability, Journal, Most, Receipt, Running, Spent, Terms, Ticket};
use crate::answer::{Answer, Chunk, Chunks, End, Ended, next};
use crate::api::openai::request::Request;
use crate::config::{ShadowConfig, Timeouts};
use crate::dispatch::waits::Waits;
use crate::dispatch::{Backends, Call, NotStarted, Urgency};
use crate::exchange::{Child, Exchange, Observer};
use crate::observe::metrics::Metrics;
use crate::ports::Clock;
use crate::routing::{self, Leg, Route, Target};

/// What copies that wait may hold, in bytes of their bodies; parsed they take several times as much.
const WAITING_BYTES_MAX: usize = 16 << 20;
/// A backend that was cancelled says within this what it had used.
const WIND_DOWN: Duration = Duration::from_secs(10);

/// The funnel that every copy passes: sampled = shed + the four ways in which a pair can end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Funnel {
    Eligible,
    Sampled,
    /// Not run to its end, for want of room.
    Shed,
    PrimaryFailed,
    ShadowFailed,
    BothFailed,
    Paired,
}

impl Funnel {
    fn as_str(self) -> &'static str {
        match self {
            Funnel::Eligible => "eligible",
            Funnel::Sampled => "sampled",
            Funnel::Shed => "shed",
            Funnel::PrimaryFailed => "primary_failed",
            Funnel::ShadowFailed => "shadow_failed",
            Funnel::BothFailed => "both_failed",
            Funnel::Paired => "paired",
        }
    }
}

pub struct Shadows {
    limits: ShadowConfig,
    running: Semaphore,
    waiting: AtomicUsize,
    waiting_bytes: AtomicUsize,
    journal: Arc<dyn Journal>,
    observer: Arc<dyn Observer>,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
}

/// A request that may be mirrored. Dropped at the request's end, it decides by how that was.
pub struct Mirror {
    shadows: Arc<Shadows>,
    copy: Option<Copy>,
    receipt: Arc<OnceLock<Receipt>>,
}

/// What a shadow needs of its request. The row is the request's own, to be told again by the shadow.
struct Copy {
    request: Arc<Request>,
    target: Arc<Target>,
    sample: f64,
    /// It may also have given the answer, for somebody who failed.
    stands_in: bool,
    backends: Arc<Backends>,
    timeouts: Timeouts,
    bytes: usize,
    row: Row,
    original: Original,
}

/// Where the copy hangs in the request's trace.
pub struct Original {
    pub session: Option<String>,
    pub user: Option<String>,
    pub trace_id: opentelemetry::TraceId,
    pub span_id: opentelemetry::SpanId,
}

impl Shadows {
    pub fn new(
        limits: ShadowConfig,
        journal: Arc<dyn Journal>,
        observer: Arc<dyn Observer>,
        clock: Arc<dyn Clock>,
        metrics: Arc<Metrics>,
    ) -> Arc<Shadows> {
        Arc::new(Shadows {
            running: Semaphore::new(limits.concurrency),
            limits,
            waiting: AtomicUsize::new(0),
            waiting_bytes: AtomicUsize::new(0),
            journal,
            observer,
            clock,
            metrics,
        })
    }

    /// Prepares the copy of an admitted request, if its route has a shadow. `row` is the request's own.
    pub fn mirror(
        self: &Arc<Self>,
        route: &Route,
        request: &Arc<Request>,
        backends: &Arc<Backends>,
        row: &Row,
        original: Original,
        receipt: Arc<OnceLock<Receipt>>,
    ) -> Option<Mirror> {
        let (target, sample) = route.shadow()?;
        let copy = Copy {
            request: request.clone(),
            target: target.clone(),
            sample,
            stands_in: route.stands_in(&target.variant),
            backends: backends.clone(),
            timeouts: route.timeouts(),
            bytes: request.bytes,
            row: row.clone(),
            original,
        };
        Some(Mirror { shadows: self.clone(), copy: Some(copy), receipt })
    }

    /// No more copies: those that wait are shed. Those that run end with the process, if not before.
    pub fn stop(&self) {
        self.running.close();
    }

    fn count(&self, copy: &Copy, funnel: Funnel) {
        self.metrics.shadow(&copy.row.route, &copy.target.variant, funnel.as_str());
    }

    /// A place in the queue, if there is one.
    fn queue(self: &Arc<Self>, bytes: usize) -> Option<Place> {
        let place = Place { shadows: self.clone(), bytes };
        let waiting = self.waiting.fetch_add(1, Ordering::Relaxed);
        let held = self.waiting_bytes.fetch_add(bytes, Ordering::Relaxed);
        // Dropped, it gives back what it took.
        (waiting < self.limits.queue_max && held + bytes <= WAITING_BYTES_MAX).then_some(place)
    }

    fn offer(self: Arc<Self>, copy: Copy, primary_failed: bool) {
        self.count(&copy, Funnel::Eligible);
        if routing::core::uniform("shadow", &copy.row.request_id, &copy.target.variant) >= copy.sample {
            return;
        }
        self.count(&copy, Funnel::Sampled);
        let (Some(place), Ok(runtime)) = (self.queue(copy.bytes), tokio::runtime::Handle::try_current()) else {
            return self.count(&copy, Funnel::Shed);
        };
        // Also if the task is dropped, the copy has its place in the funnel.
        let (route, variant) = (copy.row.route.clone(), copy.target.variant.clone());
        let ending = Ending { metrics: self.metrics.clone(), route, variant, funnel: Funnel::Shed };
        runtime.spawn(async move {
            let mut ending = ending;
            let Ok(_running) = self.running.acquire().await else { return };
            drop(place);
            ending.funnel = match (self.run(&copy).await, primary_failed) {
                (Ran::Shed, _) => Funnel::Shed,
                (Ran::Answered, false) => Funnel::Paired,
                (Ran::Answered, true) => Funnel::PrimaryFailed,
                (Ran::Failed, false) => Funnel::ShadowFailed,
                (Ran::Failed, true) => Funnel::BothFailed,
            };
        });
    }

    async fn run(&self, copy: &Copy) -> Ran {
        let mut exchange = Exchange::open(self.observer.clone(), self.clock.clone());
        exchange.note(|record| {
            record.is_shadow = true;
            record.request_id.clone_from(&copy.row.request_id);
            record.response_id = Some(copy.row.response_id.clone());
            record.trace_id = copy.original.trace_id;
            record.parent_span_id = Some(copy.original.span_id);
            record.session.clone_from(&copy.original.session);
            record.user.clone_from(&copy.original.user);
            record.authenticated = true;
            record.tenant.clone_from(&copy.row.tenant);
            record.key_id.clone_from(&copy.row.key_id);
            record.op = copy.request.op.as_str();
            record.route.clone_from(&copy.row.route);
            record.model.clone_from(&copy.target.model);
            record.variant.clone_from(&copy.target.variant);
            record.provider.clone_from(&copy.target.provider);
            record.stream = copy.request.stream;
            record.sampling = copy.request.sampling.clone();
            record.max_tokens = copy.request.max_tokens;
            record.config_hash.clone_from(&copy.row.config_hash);
            record.price_version.clone_from(&copy.row.price_version);
            record.status = 200;
        });
        let Ok(leg) = routing::measure(&copy.target, &copy.request).await else { return Ran::Failed };
        let terms = terms(copy, &leg, exchange.record().map_or(0, |record| record.started_ns));
        // Without room for its row, there is no copy.
        let Ok(ticket) = Ticket::admit(terms, self.journal.clone(), self.clock.clone(), exchange.receipt()) else {
            return Ran::Shed;
        };
        exchange.mark(|record, now| record.marks.admitted = Some(now));
        let call = Call {
            request: &copy.request,
            tenant: &copy.row.tenant,
            request_id: &copy.row.request_id,
            traceparent: exchange.record().map(|record| record.traceparent(Child::Inference)).unwrap_or_default(),
            urgency: Urgency::Nobody,
            queue: None,
            is_fresh: false,
        };
        match copy.backends.start(ticket.start(), &leg, &call) {
            Ok(Answer { running: Some(running), chunks, .. }) => answer(copy, &mut exchange, running, chunks).await,
            Ok(Answer { running: None, .. }) => Ran::Failed,
            Err(not_started) => {
                let NotStarted { running, refusal } = *not_started;
                exchange.refused(&refusal);
                running.release();
                // A model with a full queue has users to serve.
                if refusal.is_busy() { Ran::Shed } else { Ran::Failed }
            }
        }
    }
}

/// How a copy ended.
enum Ran {
    Answered,
    Failed,
    /// It had to make way.
    Shed,
}

/// Reads the answer to its end, and settles.
async fn answer(copy: &Copy, exchange: &mut Exchange, running: Running, mut chunks: Box<dyn Chunks>) -> Ran {
    let mut waits = Waits::begin(copy.timeouts);
    waits.is_whole = !copy.request.stream;
    let mut timed_out = false;
    let end = loop {
        let deadline = waits.deadline();
        match tokio::time::timeout_at(deadline.at.into(), next(&mut *chunks)).await {
            Ok(Chunk::Part(_)) => {
                waits.has_begun = true;
                exchange.mark(|record, now| {
                    record.marks.first_token.get_or_insert(now);
                    record.marks.last_token = Some(now);
                });
            }
            Ok(Chunk::End(end)) => break end,
            Err(_) if timed_out => {
                let Spent { usage, source, service, .. } = running.spent_so_far();
                break End { how: Ended::Cancelled, usage, source, service, engine: None };
            }
            Err(_) => {
                timed_out = true;
                chunks.cancel();
                // One more wait, for what it had used.
                waits = Waits::begin(Timeouts {
                    first_token: WIND_DOWN,
                    idle: WIND_DOWN,
                    total: WIND_DOWN,
                    ..copy.timeouts
                });
            }
        }
    };
    let (outcome, ran) = match (&end.how, timed_out) {
        // A model of ours that let it wait had users to serve.
        (_, true) if copy.target.server.is_none() => (Outcome::TimedOut, Ran::Shed),
        (_, true) => (Outcome::TimedOut, Ran::Failed),
        (Ended::Finished(_), false) => (Outcome::Answered, Ran::Answered),
        // Nobody but the engine cancels a shadow: a user needed its place.
        (Ended::Cancelled, false) => (Outcome::Aborted, Ran::Shed),
        (Ended::Failed(refusal), false) if refusal.is_busy() => (Outcome::Failed, Ran::Shed),
        // Nobody tries again for a copy.
        (Ended::Stale, false) => (Outcome::Failed, Ran::Shed),
        (Ended::Failed(_), false) => (Outcome::Failed, Ran::Failed),
    };
    if let Ended::Failed(refusal) = &end.how {
        exchange.refused(refusal);
    }
    exchange.mark(|record, now| {
        record.marks.settling = Some(now);
        record.engine = end.engine;
        if let Ended::Finished(finishes) = &end.how {
            record.finishes.clone_from(finishes);
        }
    });
    let compute = end.engine.map_or(Duration::ZERO, |engine| engine.compute);
    // A row that is not durable is the ledger's to report; nobody waits for this one.
    let End { usage, source, service, .. } = end;
    let _ = running.settle(outcome, Spent { usage, source, service, compute }, true);
    ran
}

/// The request's row as the shadow's own. Nobody is charged, whatever becomes of it.
fn terms(copy: &Copy, leg: &Leg, started_ns: i64) -> Terms {
    let target = &copy.target;
    let row = Row {
        attempt: 0,
        role: Role::Shadow,
        started_ns,
        ended_ns: 0,
        model: target.model.clone(),
        variant: target.variant.clone(),
        provider: target.provider.clone(),
        cache: "none".to_owned(),
        outcome: Outcome::Killed,
        usage: Usage::default(),
        usage_source: UsageSource::Reserved,
        ..copy.row.clone()
    };
    Terms {
        row,
        price: target.prices.at(started_ns).clone(),
        costs: target.costs,
        reservation: leg.measure.reservation(),
        most: Most::default(),
        bound: None,
        billed_max: None,
        is_charged: false,
        durability: Durability::Process,
        hold: Box::new(()),
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        let (Some(copy), Some(receipt)) = (self.copy.take(), self.receipt.get()) else { return };
        let primary_failed = match (receipt.outcome, receipt.role) {
            // Who was to answer did not. Where the shadow may have stood in, it would be compared with itself.
            (Outcome::Answered, Role::Fallback) if copy.stands_in => return,
            (Outcome::Answered, Role::Fallback) | (Outcome::Failed | Outcome::TimedOut, _) => true,
            (Outcome::Answered, _) => false,
            _ => return,
        };
        self.shadows.clone().offer(copy, primary_failed);
    }
}

/// A place in the queue, given back when the copy runs or goes.
struct Place {
    shadows: Arc<Shadows>,
    bytes: usize,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shadows.waiting.fetch_sub(1, Ordering::Relaxed);
        self.shadows.waiting_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Counts how a copy ended, whatever happens to its task.
struct Ending {
    metrics: Arc<Metrics>,
    route: String,
    variant: String,
    funnel: Funnel,
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.metrics.shadow(&self.route, &self.variant, self.funnel.as_str());
    }
}
