//! THE request path. Read this first: who, may they, what, which, how much, on credit, and go.
//!
//! `answer` runs the stages in order; each returns the proof that the next one asks for. `settle` writes down what was
//! used before any byte that says so leaves. `close` ends the record; a dropped `Exchange` closes itself.

use std::sync::Arc;
use std::time::Duration;

use crate::accounting::core::{NanoUsd, Usage};
use crate::accounting::row::{Outcome, Role, Row, UsageSource};
use crate::accounting::settlement::{Receipt, Running, Spent, Terms};
use crate::admission::Door;
use crate::answer::{Answer, End, Ended};
use crate::api::openai::request::{Op, Request};
use crate::app::{App, Phase, Snapshot};
use crate::auth::{Caller, Identity};
use crate::cache::{self, Find, Flight};
use crate::dispatch::failover::{self, Asked};
use crate::dispatch::waits::Waits;
use crate::exchange::{Exchange, Record, TraceParent};
use crate::ports::Inbound;
use crate::refusal::Refusal;
use crate::routing::{self, Plan, Route};
use crate::shadow::{Mirror, Original};

/// An answer under way, and what `relay` needs to write it.
pub struct Reply {
    pub answer: Answer,
    pub request: Arc<Request>,
    pub route: Route,
    pub door: Door,
    pub waits: Waits,
    pub cost_max: NanoUsd,
    /// Dropped after the answer, it hands the shadow its copy.
    pub mirror: Option<Mirror>,
}

/// From an accepted head to an answer under way.
///
/// # Errors
/// The refusal, from whichever stage said no. What was reserved until then is given back.
pub async fn answer(
    app: &App,
    snapshot: &Snapshot,
    op: Op,
    inbound: &mut impl Inbound,
    exchange: &mut Exchange,
) -> Result<Reply, Refusal> {
    let caller = enter(app, snapshot, inbound, exchange).await?;
    let limits = &snapshot.config.gateway;
    let mut door = app.admission.knock(&caller, &limits.limits, &app.auth.rules()).await?;
    exchange.mark(|record, now| (record.quotas, record.marks.knocked) = (Some(door.quotas()), Some(now)));
    if app.phase() >= Phase::Draining {
        return Err(Refusal::Draining);
    }

    require_json(inbound)?;
    let body = inbound.read_body(snapshot.config.gateway.body_bytes_max).await?;
    exchange.mark(|record, now| (record.bytes_in, record.marks.body_read) = (body.len() as u64, Some(now)));
    let request = Arc::new(Request::parse(op, &body)?);
    note_request(exchange, &request);

    let route = snapshot.routing.choose(&caller, &request, &inbound.head().headers)?;
    note_route(exchange, snapshot, &route);
    let priority = route.priority(&inbound.head().headers)?;
    exchange.note(|record| record.priority = priority);
    let plan = route.measure(&request).await?;
    exchange.mark(|record, now| record.marks.measured = Some(now));

    let key = cache::key(&caller, &route, &request, &plan, &inbound.head().headers);
    // What a cache could have answered is a miss until it does.
    exchange.note(|record| record.cache = if key.is_some() { "miss" } else { "none" });

    let mut terms = terms(exchange, &caller, &route, &plan);
    terms.bound = door.is_strict().then(|| plan.bound(&request, terms.row.started_ns));
    // Vectors are the same each time: there is nothing to compare.
    let mirrored = route.shadow().filter(|_| op != Op::Embeddings);
    let row = mirrored.map(|_| terms.row.clone());
    let ticket = tokio::select! {
        biased;
        ticket = app.admission.admit(&mut door, terms, exchange.receipt()) => ticket?,
        // Only where a limit lets requests wait.
        why = inbound.gone() => return Err(why),
    };
    let cost_max = ticket.cost_max();
    exchange.mark(|record, now| record.marks.admitted = Some(now));
    let mut waits = Waits::begin(route.timeouts());
    let (found, waited) = app.cache.find(key, &route, waits.end(), inbound).await?;
    exchange.mark(|record, now| (record.marks.looked_up, record.cache_waited) = (key.map(|_| now), waited));
    let flight = match found {
        Find::Hit { entry, how } => {
            // Settled at once: nothing can change what it costs.
            let pending = ticket.settle_hit(entry.usage, entry.source, how);
            pending.durable().await.map_err(|_| Refusal::LedgerFull)?;
            exchange.note(|record| record.cache = how);
            let answer =
                Answer { running: None, chunks: entry.replay(), prompts: plan.first.measure.told_prompts(&request) };
            // Whoever waited for it has not waited for a model.
            let waits = Waits::begin(route.timeouts());
            // It was compared when it was made.
            return Ok(Reply { answer, request, route, door, waits, cost_max: NanoUsd(0), mirror: None });
        }
        Find::Lead(flight) => Some(flight),
        Find::Alone => None,
    };
    let mirror = row.and_then(|row| mirror(app, snapshot, &route, &request, &row, exchange));
    let asked = Asked { caller: &caller, request: &request, priority, plan, admission: &app.admission, door: &door };
    let sent = failover::send(&snapshot.backends, ticket.start(), asked, &mut waits, inbound, exchange).await;
    let answer = match (sent, flight) {
        (Ok(answer), Some(flight)) if is_by_chosen(exchange, &route) => {
            Answer { chunks: flight.record(answer.chunks), ..answer }
        }
        (sent, flight) => {
            // Nothing that others may have.
            flight.into_iter().for_each(Flight::fail);
            sent?
        }
    };
    Ok(Reply { answer, request, route, door, waits, cost_max, mirror })
}

fn mirror(
    app: &App,
    snapshot: &Snapshot,
    route: &Route,
    request: &Arc<Request>,
    row: &Row,
    exchange: &Exchange,
) -> Option<Mirror> {
    let original = exchange.record().map(|record| Original {
        trace_id: record.trace_id,
        span_id: record.span_id,
        session: record.session.clone(),
        user: record.user.clone(),
    })?;
    app.shadows.mirror(route, request, &snapshot.backends, row, original, exchange.receipt())
}

/// Whether the route's own target answers, and not a stand-in.
fn is_by_chosen(exchange: &Exchange, route: &Route) -> bool {
    exchange.record().is_some_and(|record| record.variant == route.target().variant)
}

/// Writes the terminal row and waits until it is as durable as the route asks, before usage leaves.
///
/// # Errors
/// When the row is not; the client must not be told otherwise.
pub async fn settle(
    exchange: &mut Exchange,
    running: Option<Running>,
    end: &End,
    why: Option<Outcome>,
    delivered: bool,
) -> Result<Receipt, Refusal> {
    let outcome = why.unwrap_or(match end.how {
        Ended::Finished(_) => Outcome::Answered,
        Ended::Cancelled => Outcome::Aborted,
        Ended::Failed(_) | Ended::Stale => Outcome::Failed,
    });
    // Who only ever gets an error does not pay for it; tokens that were delivered are owed.
    let owed = delivered || matches!(outcome, Outcome::Answered | Outcome::Aborted);
    let usage = if owed { end.usage } else { Usage::default() };
    // Our device worked, whoever pays.
    let compute = end.engine.map_or(Duration::ZERO, |engine| engine.compute);
    exchange.mark(|record, now| {
        record.marks.settling = Some(now);
        record.engine = end.engine;
        // A vector has one way to end.
        if let Ended::Finished(finishes) = &end.how
            && record.op != Op::Embeddings.as_str()
        {
            record.finishes.clone_from(finishes);
        }
    });
    let Some(running) = running else {
        // A cache hit was settled before it was told.
        return exchange.receipt().get().copied().ok_or(Refusal::Internal);
    };
    let spent = Spent { usage, source: end.source, service: end.service, compute };
    let settled = running.end(outcome, spent, delivered).durable().await.map_err(|_| Refusal::LedgerFull);
    exchange.mark(|record, now| record.marks.settled = Some(now));
    settled
}

/// Ends the record. By now everything is settled: what `relay` did not settle, the drop of `Running` did.
pub fn close(exchange: &mut Exchange) {
    exchange.close();
}

pub fn require_json(inbound: &impl Inbound) -> Result<(), Refusal> {
    let found =
        inbound.head().headers.get(http::header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let essence = found.split(';').next().unwrap_or("").trim();
    if essence.eq_ignore_ascii_case("application/json") {
        Ok(())
    } else {
        Err(Refusal::WrongContentType { found: found.chars().take(64).collect() })
    }
}

/// The ledger's row as far as it is known at admission; settlement fills in the rest.
fn terms(exchange: &Exchange, caller: &Caller, route: &Route, plan: &Plan) -> Terms {
    let target = route.target();
    let record = exchange.record();
    let started_ns = record.map_or(0, |record| record.started_ns);
    let of = |fact: fn(&Record) -> String| record.map(fact).unwrap_or_default();
    let row = Row {
        request_id: of(|record| record.request_id.clone()),
        attempt: 0,
        role: Role::Primary,
        response_id: of(|record| record.response_id.clone().unwrap_or_default()),
        trace_id: of(|record| record.trace_id.to_string()),
        started_ns,
        ended_ns: 0,
        tenant: caller.tenant().to_owned(),
        key_id: caller.key_id().to_owned(),
        route: route.name().to_owned(),
        model: target.model.clone(),
        variant: target.variant.clone(),
        provider: target.provider.clone(),
        op: of(|record| record.op.to_owned()),
        stream: record.is_some_and(|record| record.stream),
        cache: of(|record| record.cache.to_owned()),
        outcome: Outcome::Killed,
        usage: Usage::default(),
        usage_source: UsageSource::Reserved,
        billed: NanoUsd(0),
        provider_cost: NanoUsd(0),
        price_version: of(|record| record.price_version.clone()),
        config_hash: of(|record| record.config_hash.clone()),
        user_id: caller.user().map(str::to_owned),
        unpriced: false,
        service_tier: plan.first.measure.extras.service,
        images: plan.first.measure.extras.images,
    };
    Terms {
        row,
        price: target.prices.at(started_ns).clone(),
        costs: target.costs,
        reservation: plan.first.measure.reservation(),
        most: plan.most(started_ns),
        bound: None,
        billed_max: None,
        is_charged: true,
        durability: route.durability(),
        // Admission holds what its limits say.
        hold: Box::new(()),
    }
}

/// Who is calling, and whether they may come in for this. Whoever is known is noted before they are refused.
///
/// # Errors
/// What is wrong with their credential, or what they may not do with it.
pub async fn enter(
    app: &App,
    snapshot: &Snapshot,
    inbound: &mut impl Inbound,
    exchange: &mut Exchange,
) -> Result<Caller, Refusal> {
    let known = app.auth.identify(&snapshot.config.gateway.auth, &inbound.head().headers, inbound.client()).await?;
    note_caller(exchange, known.identity(), inbound);
    known.enter(inbound.scope())
}

fn note_caller(exchange: &mut Exchange, caller: &Identity, inbound: &impl Inbound) {
    let headers = &inbound.head().headers;
    let session = routing::header(headers, "x-session-id").map(str::to_owned);
    // Only somebody who proved who they are may hang our spans into their trace.
    let parent = headers.get("traceparent").and_then(|value| TraceParent::parse(value.to_str().ok()?));
    exchange.mark(|record, now| {
        record.marks.identified = Some(now);
        record.authenticated = true;
        record.tenant.clone_from(&caller.tenant);
        record.key_id.clone_from(&caller.key_id);
        record.key_name.clone_from(&caller.key_name);
        record.user.clone_from(&caller.user);
        record.session = session;
        if let Some(parent) = parent {
            record.trace_id = parent.trace_id;
            record.parent_span_id = Some(parent.parent);
        }
    });
}

fn note_request(exchange: &mut Exchange, request: &Request) {
    exchange.note(|record| {
        record.response_id = Some(format!("{}{}", request.op.id_prefix(), record.request_id));
        record.stream = request.stream;
        record.max_tokens = request.max_tokens;
        record.sampling = request.sampling.clone();
        record.stop.clone_from(&request.stop);
        // Whom we know is not called otherwise by a request.
        if record.user.is_none() {
            record.user.clone_from(&request.user);
        }
    });
}

fn note_route(exchange: &mut Exchange, snapshot: &Snapshot, route: &Route) {
    exchange.mark(|record, now| {
        record.marks.routed = Some(now);
        record.route = route.name().to_owned();
        record.model.clone_from(&route.target().model);
        record.variant.clone_from(&route.target().variant);
        record.provider.clone_from(&route.target().provider);
        record.config_hash.clone_from(&snapshot.config.hash);
        record.price_version.clone_from(&snapshot.config.prices.version);
    });
}
