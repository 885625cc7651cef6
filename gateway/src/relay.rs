//! Answer → client, as JSON or as server-sent events, noting each chunk. Settles before usage leaves; notices a hang-up.

mod stream;
mod whole;

use std::pin::Pin;
use std::time::Duration;

use pingora_core::{Error, Result as PingoraResult};
use pingora_http::ResponseHeader;
use pingora_proxy::Session;

use crate::accounting::row::{Outcome, Service};
use crate::accounting::settlement::{Running, Spent};
use crate::admission::Door;
use crate::answer::{Chunk, Chunks, End, Ended, next};
use crate::api::openai::answer::Head;
use crate::api::openai::request::Request;
use crate::app::{App, Phase};
use crate::dispatch::waits::Waits;
use crate::exchange::{Exchange, Record};
use crate::invoke::{self, Reply};
use crate::refusal::Refusal;
use crate::routing::Route;

/// A client that takes none of our bytes for this long is gone.
pub const WRITE_STALL: Duration = Duration::from_secs(30);
/// How long a cancelled backend may take to say what it had used. The engine needs one step; an upstream, which goes on
/// and would be paid, is listened to until it says, or counted.
const WIND_DOWN: Duration = Duration::from_secs(10);
/// … or, where a client waits to hear that it was too slow, or we have to leave, much shorter.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Why a relay ended early.
pub enum Stop {
    /// Nothing was sent yet: say no properly.
    Refused(Refusal),
    /// The connection is of no more use: pingora ends it without a clean end, so that a cut never looks complete.
    Broken(Box<Error>),
}

impl From<Box<Error>> for Stop {
    fn from(error: Box<Error>) -> Self {
        Stop::Broken(error)
    }
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Stop::Refused(refusal)
    }
}

/// Sends an answer. Whatever happens, it is settled when this returns.
pub async fn send(app: &App, session: &mut Session, exchange: &mut Exchange, reply: Reply) -> Result<(), Stop> {
    if reply.request.stream {
        stream::send(app, session, exchange, reply).await
    } else {
        whole::send(app, session, exchange, reply).await
    }
}

/// What the client's side and the clock can do while we wait for the next chunk.
enum Next {
    Chunk(Chunk),
    Gone,
    TimedOut(Refusal),
    Cut,
}

/// Ends when we have to leave. One for all waits of an answer: it is subscribed once.
type Cut<'c> = Pin<&'c mut (dyn Future<Output = ()> + Send)>;

async fn wait(waits: &mut Waits, cut: &mut Cut<'_>, session: &mut Session, chunks: &mut dyn Chunks) -> Next {
    let deadline = waits.deadline();
    tokio::select! {
        // Chunks come last: an engine that is always ahead must not hide a hang-up or a passed deadline.
        biased;
        // Resolves only when the client hangs up or resets: the body is read, and the guard keeps what comes after it.
        _ = session.as_downstream_mut().read_body_or_idle(true) => Next::Gone,
        () = cut => Next::Cut,
        () = tokio::time::sleep_until(deadline.at.into()) => Next::TimedOut(deadline.refusal()),
        chunk = next(chunks) => {
            waits.has_begun = true;
            Next::Chunk(chunk)
        }
    }
}

/// Stops a backend and settles what it had produced.
async fn wind_down(
    exchange: &mut Exchange,
    running: Option<Running>,
    mut chunks: Box<dyn Chunks>,
    outcome: Outcome,
    delivered: bool,
) {
    chunks.cancel();
    let rest = async {
        loop {
            if let Chunk::End(end) = next(&mut *chunks).await {
                return end;
            }
        }
    };
    // Only where nobody waits for us is there time to listen.
    let patience = if outcome == Outcome::Aborted { WIND_DOWN } else { LAST_WORDS };
    match tokio::time::timeout(patience, rest).await {
        Ok(end) => {
            // It may have finished while the client left: then the whole answer was produced, and is owed.
            let finished = outcome == Outcome::Aborted && matches!(end.how, Ended::Finished(_));
            // What failed before anybody got anything of it is owed by nobody, also when they did not stay to hear of it.
            let failed = !delivered && matches!(end.how, Ended::Failed(_) | Ended::Stale);
            let outcome = match (finished, failed) {
                (true, _) => Outcome::Answered,
                (false, true) => Outcome::Failed,
                (false, false) => outcome,
            };
            let _ = invoke::settle(exchange, running, &end, Some(outcome), delivered).await;
        }
        // A backend that does not even stop is settled by the count we have.
        Err(_) => {
            let spent = running.as_ref().map_or(Spent::NOTHING, Running::spent_so_far);
            let Spent { usage, source, service, .. } = spent;
            let end = End { how: Ended::Cancelled, usage, source, service, engine: None };
            let _ = invoke::settle(exchange, running, &end, Some(outcome), delivered).await;
        }
    }
}

fn note_chunk(exchange: &mut Exchange) {
    exchange.mark(|record, now| {
        record.marks.first_token.get_or_insert(now);
        record.marks.last_token = Some(now);
    });
}

fn head<'a>(record: &'a Record, request: &'a Request) -> Head<'a> {
    Head {
        op: request.op,
        response_id: record.response_id.as_deref().unwrap_or_default(),
        created: record.started_ns / 1_000_000_000,
        model: &request.model,
        service_tier: None,
    }
}

/// What clients are told of how it was served, where that is a word of theirs.
fn told(service: Option<Service>) -> Option<&'static str> {
    service.filter(|service| *service != Service::Other).map(Service::as_str)
}

/// What every answer says of itself, streamed or not.
fn answer_headers(response: &mut ResponseHeader, exchange: &Exchange, route: &Route, door: &Door) -> PingoraResult<()> {
    common_headers(response, exchange)?;
    for (name, value) in door.headers() {
        response.insert_header(name, value)?;
    }
    response.insert_header("x-glassgate-route", route.name())?;
    if let Some(record) = exchange.record() {
        response.insert_header("x-glassgate-model", &record.model)?;
        response.insert_header("x-glassgate-variant", &record.variant)?;
        response.insert_header("x-glassgate-cache", record.cache)?;
        response.insert_header("x-glassgate-config-hash", &record.config_hash)?;
    }
    Ok(())
}

/// While we are leaving, an answer says that no other request may follow it here.
pub fn part_ways(app: &App, session: &mut Session) {
    if app.phase() > Phase::Serving {
        session.set_keepalive(None);
    }
}

/// What every response carries, refusals too.
pub fn common_headers(response: &mut ResponseHeader, exchange: &Exchange) -> PingoraResult<()> {
    if let Some(record) = exchange.record() {
        response.insert_header("x-request-id", &record.request_id)?;
        response.insert_header("traceparent", format!("00-{}-{}-01", record.trace_id, record.span_id))?;
    }
    Ok(())
}
