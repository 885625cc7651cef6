//! Attempts in order, until one has something to say. Nothing has been sent to the client meanwhile, so nothing shows.

use std::collections::VecDeque;
use std::task::{Context, Poll};
use std::time::Duration;

use super::{Backends, Call, NotStarted, Urgency};
use crate::accounting::row::{Outcome, Role, UsageSource};
use crate::accounting::settlement::{Attempt as Next, Running, Spent};
use crate::admission::{Admission, Door};
use crate::answer::{Answer, Chunk, Chunks, End, Ended, next};
use crate::api::openai::request::Request;
use crate::auth::Caller;
use crate::dispatch::waits::Waits;
use crate::exchange::{Attempt, Child, Exchange};
use crate::ports::{Inbound, Priority};
use crate::refusal::Refusal;
use crate::routing::{Leg, Plan};

/// Who asks what, of whom.
pub struct Asked<'a> {
    pub caller: &'a Caller,
    pub request: &'a Request,
    pub priority: Priority,
    pub plan: Plan,
    /// Who says whether a model may stand in that was not admitted.
    pub admission: &'a Admission,
    pub door: &'a Door,
}

/// Why an attempt gave nothing.
struct Failed {
    running: Running,
    refusal: Refusal,
    outcome: Outcome,
    is_stale: bool,
}

/// What came of waiting for the first chunk.
enum First {
    Chunk(Chunk),
    Gone,
    TimedOut(Refusal),
}

/// Asks the plan's targets in order. The answer that comes back has begun, or its client is gone.
///
/// # Errors
/// What the last of them said, with every attempt's row written.
pub async fn send(
    backends: &Backends,
    mut running: Running,
    asked: Asked<'_>,
    waits: &mut Waits,
    inbound: &mut impl Inbound,
    exchange: &mut Exchange,
) -> Result<Answer, Refusal> {
    let Asked { caller, request, priority, plan: Plan { first: mut leg, fallback }, admission, door } = asked;
    let (mut role, mut has_retried) = (Role::Primary, false);
    let began_ns = exchange.record().map_or(0, |record| record.started_ns);
    let admitted = vec![leg.target.model.clone()];
    let mut stand_ins = StandIns { fallback, admitted, admission, door, request, began_ns };
    // Whoever waited for somebody else's answer has not waited for this one.
    waits.again();
    loop {
        let attempt = note_began(exchange, role, &leg);
        waits.is_shared = !stand_ins.fallback.is_empty();
        let call = Call {
            request,
            tenant: caller.tenant(),
            request_id: &exchange.record().map(|record| record.request_id.clone()).unwrap_or_default(),
            traceparent: exchange
                .record()
                .map(|record| record.traceparent(Child::Attempt(attempt)))
                .unwrap_or_default(),
            urgency: Urgency::User(priority),
            queue: Some(waits.queue()),
            is_fresh: role == Role::Retry,
        };
        let mut failed = match try_leg(backends, running, &leg, &call, waits, inbound, exchange).await {
            Ok(answer) => return Ok(answer),
            Err(failed) => failed,
        };
        note_failed(exchange, &failed);
        // One fresh connection for a request that a pooled one lost; then whoever stands in.
        let next = if failed.is_stale && !has_retried {
            has_retried = true;
            Some((leg.clone(), Role::Retry))
        } else if failed.refusal.may_fail_over() && !waits.is_over() {
            stand_ins.next(&mut failed.running).await.map(|leg| (leg, Role::Fallback))
        } else {
            None
        };
        let Some((next_leg, next_role)) = next else {
            // What nobody got costs nothing.
            let settled = failed.running.end(failed.outcome, Spent::NOTHING, false).durable().await;
            return Err(settled.map_or(Refusal::LedgerFull, |_| failed.refusal));
        };
        (leg, role) = (next_leg, next_role);
        running = failed.running.fail_over(terms(&leg, role, began_ns)).map_err(|_| Refusal::LedgerFull)?;
        waits.again();
    }
}

/// Those who stand in, in order.
struct StandIns<'a> {
    fallback: VecDeque<Leg>,
    /// Models whose limits hold what they ask for.
    admitted: Vec<String>,
    admission: &'a Admission,
    door: &'a Door,
    request: &'a Request,
    began_ns: i64,
}

impl StandIns<'_> {
    /// The next whose model has room in its limits. A model that has none is left out, as one that is down would be.
    async fn next(&mut self, running: &mut Running) -> Option<Leg> {
        while let Some(leg) = self.fallback.pop_front() {
            let model = &leg.target.model;
            if self.admitted.contains(model) {
                return Some(leg);
            }
            let most = |strict| match strict {
                true => leg.bound(self.request, self.began_ns),
                false => leg.most(self.began_ns),
            };
            match self.admission.stand_in(self.door, model, self.began_ns, most).await {
                Ok(hold) => {
                    self.admitted.push(model.clone());
                    hold.into_iter().for_each(|hold| running.holds_too(hold));
                    return Some(leg);
                }
                Err(refusal) => tracing::info!(model, reason = refusal.describe().code, "a stand-in is not asked"),
            }
        }
        None
    }
}

async fn try_leg(
    backends: &Backends,
    running: Running,
    leg: &Leg,
    call: &Call<'_>,
    waits: &mut Waits,
    inbound: &mut impl Inbound,
    exchange: &mut Exchange,
) -> Result<Answer, Failed> {
    let Answer { running, mut chunks, prompts } = match backends.start(running, leg, call) {
        Ok(answer) => answer,
        Err(not_started) => {
            let NotStarted { running, refusal } = *not_started;
            return Err(Failed { running, refusal, outcome: Outcome::Released, is_stale: false });
        }
    };
    waits.is_whole = !call.request.stream && leg.measure.prompts.is_empty();
    let (refusal, outcome, is_stale) = match first(&mut *chunks, waits, inbound).await {
        First::Chunk(Chunk::End(End { how: Ended::Failed(refusal), .. })) => (refusal, Outcome::Failed, false),
        First::Chunk(Chunk::End(End { how: Ended::Stale, .. })) => {
            (Refusal::UpstreamUnreachable, Outcome::Failed, true)
        }
        First::Chunk(chunk) => {
            waits.has_begun = true;
            exchange.mark(|record, now| {
                if let Some(attempt) = record.attempts.last_mut() {
                    attempt.first_byte = Some(now);
                    attempt.status = attempt.server.is_some().then_some(200);
                }
            });
            return Ok(Answer { running, chunks: Box::new(Begun { first: Some(chunk), rest: chunks }), prompts });
        }
        // Whoever relays it will find that out at once, and wind it down.
        First::Gone => return Ok(Answer { running, chunks, prompts }),
        First::TimedOut(refusal) => (refusal, Outcome::TimedOut, false),
    };
    match running {
        Some(running) => Err(Failed { running, refusal, outcome, is_stale }),
        // No backend settles by itself; there is nothing left to fail.
        None => Ok(Answer { running, chunks: Box::new(Begun { first: Some(failed(refusal)), rest: chunks }), prompts }),
    }
}

fn failed(refusal: Refusal) -> Chunk {
    Chunk::End(End {
        how: Ended::Failed(refusal),
        usage: Spent::NOTHING.usage,
        source: UsageSource::Counted,
        service: None,
        engine: None,
    })
}

async fn first(chunks: &mut dyn Chunks, waits: &Waits, inbound: &mut impl Inbound) -> First {
    let deadline = waits.deadline();
    tokio::select! {
        biased;
        chunk = next(chunks) => First::Chunk(chunk),
        _ = inbound.gone() => First::Gone,
        () = tokio::time::sleep_until(deadline.at.into()) => First::TimedOut(deadline.refusal()),
    }
}

/// `began_ns`: when the request did, whose prices hold for all its attempts.
fn terms(leg: &Leg, role: Role, began_ns: i64) -> Next {
    let target = &leg.target;
    Next {
        role,
        model: target.model.clone(),
        variant: target.variant.clone(),
        provider: target.provider.clone(),
        price: target.prices.at(began_ns).clone(),
        costs: target.costs,
        reservation: leg.measure.reservation(),
    }
}

/// The record follows the attempt: it ends as the last of them.
fn note_began(exchange: &mut Exchange, role: Role, leg: &Leg) -> u32 {
    let target = &leg.target;
    let number = exchange.record().map_or(0, |record| record.attempts.len() as u32);
    exchange.mark(|record, now| {
        record.model.clone_from(&target.model);
        record.variant.clone_from(&target.variant);
        record.provider.clone_from(&target.provider);
        record.attempts.push(Attempt {
            number,
            role: role.as_str(),
            model: target.model.clone(),
            variant: target.variant.clone(),
            provider: target.provider.clone(),
            server: target.server.clone(),
            began: now,
            first_byte: None,
            ended: Duration::ZERO,
            outcome: "",
            error_type: "",
            status: None,
        });
    });
    number
}

fn note_failed(exchange: &mut Exchange, failed: &Failed) {
    exchange.mark(|record, now| {
        if let Some(attempt) = record.attempts.last_mut() {
            attempt.ended = now;
            attempt.outcome = failed.outcome.as_str();
            attempt.status = match &failed.refusal {
                Refusal::UpstreamRejected { status, .. } => Some(*status),
                Refusal::UpstreamLimited { .. } => Some(429),
                _ => None,
            };
            attempt.error_type = if failed.is_stale { "stale_connection" } else { failed.refusal.describe().code };
        }
    });
}

/// An answer whose first chunk was looked at.
struct Begun {
    first: Option<Chunk>,
    rest: Box<dyn Chunks>,
}

impl Chunks for Begun {
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Chunk> {
        match self.first.take() {
            Some(chunk) => Poll::Ready(chunk),
            None => self.rest.poll_next(context),
        }
    }

    fn cancel(&mut self) {
        self.rest.cancel();
    }
}
