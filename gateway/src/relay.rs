//! Answer → client, as JSON or as server-sent events, noting each chunk. Settles before usage leaves; notices a hang-up.

use std::pin::{Pin, pin};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pingora_core::{Error, ErrorType, Result as PingoraResult};
use pingora_http::ResponseHeader;
use pingora_proxy::Session;

use crate::accounting::core::NanoUsd;
use crate::accounting::row::Outcome;
use crate::accounting::settlement::{Receipt, Running};
use crate::admission::Door;
use crate::answer::{Answer, Chunk, Chunks, End, Ended, EngineTimes, next};
use crate::api::glassgate::Glassgate;
use crate::api::openai::chat::{self, Head, Piece};
use crate::api::sse;
use crate::app::{App, Phase};
use crate::config::Timeouts;
use crate::exchange::Exchange;
use crate::invoke::{self, Reply};
use crate::observe::metrics::Served;
use crate::refusal::Refusal;
use crate::routing::Route;

/// A client that takes none of our bytes for this long is gone.
pub const WRITE_STALL: Duration = Duration::from_secs(30);
/// How long a cancelled backend may take to say what it had produced. The engine needs one step.
const WIND_DOWN: Duration = Duration::from_secs(5);

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
        stream(app, session, exchange, reply).await
    } else {
        whole(app, session, exchange, reply).await
    }
}

/// What the client's side and the clock can do while we wait for the next chunk.
enum Next {
    Chunk(Chunk),
    Gone,
    TimedOut(&'static str, Duration),
    Cut,
}

/// The waits of one answer.
struct Waits<'c> {
    limits: Timeouts,
    began: Instant,
    begun: bool,
    /// Ends when we have to leave. One for all waits: it is subscribed once.
    cut: Pin<&'c mut (dyn Future<Output = ()> + Send)>,
}

impl<'c> Waits<'c> {
    fn begin(limits: Timeouts, cut: Pin<&'c mut (dyn Future<Output = ()> + Send)>) -> Self {
        Waits { limits, began: Instant::now(), begun: false, cut }
    }

    /// When waiting ends, and for want of what.
    fn deadline(&self) -> (Instant, &'static str, Duration) {
        let total = (self.began + self.limits.total, "whole answer", self.limits.total);
        // Idle time counts from here, where we wait for the model: a client that reads slowly is not its fault.
        let chunk = if self.begun {
            (Instant::now() + self.limits.idle, "next token", self.limits.idle)
        } else {
            (self.began + self.limits.first_token, "first token", self.limits.first_token)
        };
        if chunk.0 < total.0 { chunk } else { total }
    }

    async fn next(&mut self, session: &mut Session, chunks: &mut dyn Chunks) -> Next {
        let (deadline, what, limit) = self.deadline();
        tokio::select! {
            // Chunks come last: an engine that is always ahead must not hide a hang-up or a passed deadline.
            biased;
            // Resolves only when the client hangs up or resets: the body is read, and the guard keeps what comes after it.
            _ = session.as_downstream_mut().read_body_or_idle(true) => Next::Gone,
            () = &mut self.cut => Next::Cut,
            () = tokio::time::sleep_until(deadline.into()) => Next::TimedOut(what, limit),
            chunk = next(chunks) => {
                self.begun = true;
                Next::Chunk(chunk)
            }
        }
    }
}

/// Stops a backend and settles what it had produced.
async fn wind_down(
    exchange: &mut Exchange,
    running: Running,
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
    match tokio::time::timeout(WIND_DOWN, rest).await {
        Ok(end) => {
            // It may have finished while the client left: then the whole answer was produced, and is owed.
            let finished = outcome == Outcome::Aborted && matches!(end.how, Ended::Finished(_));
            let outcome = if finished { Outcome::Answered } else { outcome };
            let _ = invoke::settle(exchange, running, &end, Some(outcome), delivered);
        }
        // A backend that does not even stop is settled by the count we have.
        Err(_) => {
            let usage = running.usage_so_far();
            let end = End { how: Ended::Cancelled, usage, engine: EngineTimes::default() };
            let _ = invoke::settle(exchange, running, &end, Some(outcome), delivered);
        }
    }
}

async fn whole(app: &App, session: &mut Session, exchange: &mut Exchange, reply: Reply) -> Result<(), Stop> {
    let Reply { answer: Answer { running, mut chunks }, request, route, door, .. } = reply;
    let cut = pin!(app.cut());
    let mut waits = Waits::begin(route.timeouts(), cut);
    let mut text = String::new();
    let end = loop {
        match waits.next(session, &mut *chunks).await {
            Next::Chunk(Chunk::Text(piece)) => {
                note_chunk(exchange);
                text.push_str(&piece);
            }
            Next::Chunk(Chunk::End(end)) => break end,
            Next::Gone => {
                wind_down(exchange, running, chunks, Outcome::Aborted, false).await;
                return Err(Stop::Refused(Refusal::ClientGone));
            }
            Next::TimedOut(what, limit) => {
                wind_down(exchange, running, chunks, Outcome::TimedOut, false).await;
                return Err(Stop::Refused(Refusal::TimedOut { what, limit }));
            }
            Next::Cut => {
                wind_down(exchange, running, chunks, Outcome::Cut, false).await;
                return Err(Stop::Refused(Refusal::Draining));
            }
        }
    };
    if matches!(end.how, Ended::Finished(_)) {
        note_chunk(exchange);
    }
    let receipt = invoke::settle(exchange, running, &end, None, false)?;
    let finish = match end.how {
        Ended::Finished(finish) => finish,
        Ended::Failed(refusal) => return Err(Stop::Refused(refusal)),
        Ended::Cancelled => return Err(Stop::Refused(Refusal::EngineFailed)),
    };
    let Some(record) = exchange.record() else { return Err(Stop::Refused(Refusal::Internal)) };
    let head = head(record, &request.model);
    let body = chat::whole(&head, &text, finish, &receipt.usage, Glassgate::new(record, &receipt));
    let mut response = ResponseHeader::build(200, Some(20))?;
    response.insert_header("content-type", "application/json")?;
    response.insert_header("content-length", body.len())?;
    response.insert_header("x-glassgate-cost", receipt.billed.to_string())?;
    answer_headers(&mut response, exchange, &route, &door)?;
    part_ways(app, session);
    exchange
        .mark(|record, now| (record.status, record.marks.sent, record.bytes_out) = (200, Some(now), body.len() as u64));
    session.write_response_header(Box::new(response), false).await?;
    session.write_response_body(Some(body.into()), true).await?;
    Ok(())
}

async fn stream(app: &App, session: &mut Session, exchange: &mut Exchange, reply: Reply) -> Result<(), Stop> {
    let Reply { answer: Answer { running, mut chunks }, request, route, door, cost_max } = reply;
    let gaps = app.metrics.inter_token(Served { route: route.name(), model: route.model(), variant: route.variant() });
    let cut = pin!(app.cut());
    let mut waits = Waits::begin(route.timeouts(), cut);
    let mut sent = false;
    let mut last_text: Option<Instant> = None;
    let mut out = Vec::with_capacity(512);
    let end = loop {
        let chunk = match waits.next(session, &mut *chunks).await {
            // The first chunk is looked at before the head is sent: a failure until then is an ordinary error answer.
            Next::Chunk(Chunk::End(end)) if !matches!(end.how, Ended::Finished(_)) => {
                let settled = invoke::settle(exchange, running, &end, None, sent);
                let refusal = match (settled, end.how) {
                    (Err(refusal), _) | (_, Ended::Failed(refusal)) => refusal,
                    _ => Refusal::EngineFailed,
                };
                return Err(broken_off(session, exchange, sent, refusal).await);
            }
            Next::Chunk(chunk) => chunk,
            Next::Gone => {
                wind_down(exchange, running, chunks, Outcome::Aborted, sent).await;
                return Err(Stop::Refused(Refusal::ClientGone));
            }
            Next::TimedOut(what, limit) => {
                wind_down(exchange, running, chunks, Outcome::TimedOut, sent).await;
                return Err(broken_off(session, exchange, sent, Refusal::TimedOut { what, limit }).await);
            }
            Next::Cut => {
                wind_down(exchange, running, chunks, Outcome::Cut, sent).await;
                return Err(broken_off(session, exchange, sent, Refusal::Draining).await);
            }
        };
        note_chunk(exchange);
        let Some(record) = exchange.record() else { return Err(Stop::Refused(Refusal::Internal)) };
        let head = head(record, &request.model);
        out.clear();
        if !sent {
            sse::event(&chat::part(&head, Piece::Role, request.include_usage), &mut out);
        }
        match chunk {
            Chunk::Text(text) => {
                if let Some(last) = last_text.replace(Instant::now()) {
                    gaps.observe(last.elapsed().as_secs_f64());
                }
                sse::event(&chat::part(&head, Piece::Text(&text), request.include_usage), &mut out);
                if !sent {
                    sent = true;
                    part_ways(app, session);
                    if let Err(error) = begin_stream(session, exchange, &route, &door, cost_max).await {
                        return Err(client_lost(app, exchange, running, chunks, error).await);
                    }
                }
                let written = tokio::select! {
                    biased;
                    written = write(session, exchange, &out) => written,
                    // A client that does not read must not keep us when we have to leave.
                    () = &mut waits.cut => Err(Error::explain(ErrorType::WriteTimedout, "cut in the middle of a write")),
                };
                if let Err(error) = written {
                    return Err(client_lost(app, exchange, running, chunks, error).await);
                }
            }
            Chunk::End(end) => break end,
        }
    };

    let receipt = match invoke::settle(exchange, running, &end, None, sent) {
        Ok(receipt) => receipt,
        Err(refusal) => return Err(broken_off(session, exchange, sent, refusal).await),
    };
    if !sent {
        part_ways(app, session);
        begin_stream(session, exchange, &route, &door, cost_max).await?;
    }
    finish_stream(exchange, &request, &end, &receipt, &mut out);
    write(session, exchange, &out).await?;
    session.write_response_body(None, true).await?;
    Ok(())
}

/// The last events of a complete stream, onto whatever is still unsent in `out`.
fn finish_stream(exchange: &Exchange, request: &chat::ChatRequest, end: &End, receipt: &Receipt, out: &mut Vec<u8>) {
    let (Some(record), Ended::Finished(finish)) = (exchange.record(), &end.how) else { return };
    let head = head(record, &request.model);
    let glassgate = || Glassgate::new(record, receipt);
    let on_finish = (!request.include_usage).then(glassgate);
    sse::event(&chat::part(&head, Piece::Finish(*finish, on_finish), request.include_usage), out);
    if request.include_usage {
        sse::event(&chat::part(&head, Piece::Usage(&receipt.usage, glassgate()), true), out);
    }
    out.extend_from_slice(sse::DONE);
}

/// The write failed: the client is gone, or we are, and what was produced is owed.
async fn client_lost(
    app: &App,
    exchange: &mut Exchange,
    running: Running,
    chunks: Box<dyn Chunks>,
    error: Box<Error>,
) -> Stop {
    let (outcome, why) = match app.phase() {
        Phase::Cut => (Outcome::Cut, Refusal::Draining),
        _ => (Outcome::Aborted, Refusal::ClientGone),
    };
    wind_down(exchange, running, chunks, outcome, true).await;
    exchange.note(|record| record.error_type = why.describe().code);
    Stop::Broken(error)
}

/// An answer that cannot go on: an error answer if nothing was sent, else an error event and no clean end.
async fn broken_off(session: &mut Session, exchange: &mut Exchange, sent: bool, refusal: Refusal) -> Stop {
    if !sent {
        return Stop::Refused(refusal);
    }
    exchange.note(|record| record.error_type = refusal.describe().code);
    let mut out = Vec::new();
    sse::event(&refusal.body(), &mut out);
    // Whether or not it still arrives, the stream ends without `[DONE]` and without the last chunk.
    let _ = write(session, exchange, &out).await;
    Stop::Broken(Error::explain(ErrorType::Custom("AnswerBrokenOff"), refusal.message()))
}

async fn begin_stream(
    session: &mut Session,
    exchange: &mut Exchange,
    route: &Route,
    door: &Door,
    cost_max: NanoUsd,
) -> PingoraResult<()> {
    let mut response = ResponseHeader::build(200, Some(20))?;
    response.insert_header("content-type", "text/event-stream")?;
    response.insert_header("cache-control", "no-store")?;
    response.insert_header("x-glassgate-cost-max", cost_max.to_string())?;
    if session.req_header().version == http::Version::HTTP_11 {
        // Without it the end of the connection would be the end of the answer, and a cut would look complete.
        response.insert_header("transfer-encoding", "chunked")?;
    } else if session.req_header().version == http::Version::HTTP_10 {
        // It knows no chunks: there the end of the connection has to be the end of the answer.
        session.set_keepalive(None);
    }
    answer_headers(&mut response, exchange, route, door)?;
    exchange.mark(|record, now| (record.status, record.marks.sent) = (200, Some(now)));
    // Unlike a body, a head is written without a time limit of its own; here it is flushed.
    let written = tokio::time::timeout(WRITE_STALL, session.write_response_header(Box::new(response), false));
    written.await.unwrap_or_else(|_| Err(Error::explain(ErrorType::WriteTimedout, "the client does not read")))
}

async fn write(session: &mut Session, exchange: &mut Exchange, out: &[u8]) -> PingoraResult<()> {
    exchange.note(|record| record.bytes_out += out.len() as u64);
    session.write_response_body(Some(Bytes::copy_from_slice(out)), false).await
}

fn note_chunk(exchange: &mut Exchange) {
    exchange.mark(|record, now| {
        record.marks.first_token.get_or_insert(now);
        record.marks.last_token = Some(now);
    });
}

fn head<'a>(record: &'a crate::exchange::Record, model: &'a str) -> Head<'a> {
    Head {
        response_id: record.response_id.as_deref().unwrap_or_default(),
        created: record.started_ns / 1_000_000_000,
        model,
    }
}

/// What every answer says of itself, streamed or not.
fn answer_headers(response: &mut ResponseHeader, exchange: &Exchange, route: &Route, door: &Door) -> PingoraResult<()> {
    common_headers(response, exchange)?;
    for (name, value) in door.headers() {
        response.insert_header(name, value)?;
    }
    response.insert_header("x-glassgate-route", route.name())?;
    response.insert_header("x-glassgate-model", route.model())?;
    response.insert_header("x-glassgate-variant", route.variant())?;
    if let Some(record) = exchange.record() {
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
