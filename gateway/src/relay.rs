//! Answer → client, as JSON or as server-sent events, noting each chunk. Settles before usage leaves; notices a hang-up.

use std::pin::{Pin, pin};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pingora_core::{Error, ErrorType, Result as PingoraResult};
use pingora_http::ResponseHeader;
use pingora_proxy::Session;

use crate::accounting::core::NanoUsd;
use crate::accounting::row::{Outcome, Service};
use crate::accounting::settlement::{Receipt, Running, Spent};
use crate::admission::Door;
use crate::answer::{Answer, Chunk, Chunks, End, Ended, Part, Prompts, next, next_ready};
use crate::api::glassgate::Glassgate;
use crate::api::openai::answer::{self as wire, Event, Head};
use crate::api::openai::gather::Gather;
use crate::api::openai::request::{Op, Request};
use crate::api::sse;
use crate::app::{App, Phase};
use crate::dispatch::waits::Waits;
use crate::exchange::{Exchange, Record};
use crate::invoke::{self, Reply};
use crate::observe::metrics::Served;
use crate::refusal::Refusal;
use crate::routing::Route;

/// A client that takes none of our bytes for this long is gone.
pub const WRITE_STALL: Duration = Duration::from_secs(30);
/// How long a cancelled backend may take to say what it had used. The engine needs one step; an upstream, which goes on
/// and would be paid, is listened to until it says, or counted.
const WIND_DOWN: Duration = Duration::from_secs(10);
/// … or, where a client waits to hear that it was too slow, or we have to leave, much shorter.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// A whole answer leaves in slices of this size.
const SLICE_BYTES: usize = 64 << 10;
/// Chunks that are there at once leave in writes of about this size.
const WRITE_BYTES_MAX: usize = 8 << 10;

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

async fn whole(app: &App, session: &mut Session, exchange: &mut Exchange, reply: Reply) -> Result<(), Stop> {
    let Reply { answer: Answer { running, mut chunks, prompts }, request, route, door, mut waits, .. } = reply;
    let mut cut: Cut<'_> = pin!(app.cut());
    let mut gather = Gather::default();
    let end = loop {
        match wait(&mut waits, &mut cut, session, &mut *chunks).await {
            Next::Chunk(Chunk::Part(part)) => {
                // Vectors are no tokens, and come all at once.
                if request.op != Op::Embeddings {
                    note_chunk(exchange);
                }
                gather.add(&part);
            }
            Next::Chunk(Chunk::End(end)) => break end,
            Next::Gone => {
                wind_down(exchange, running, chunks, Outcome::Aborted, false).await;
                return Err(Stop::Refused(Refusal::ClientGone));
            }
            Next::TimedOut(refusal) => {
                wind_down(exchange, running, chunks, Outcome::TimedOut, false).await;
                return Err(Stop::Refused(refusal));
            }
            Next::Cut => {
                wind_down(exchange, running, chunks, Outcome::Cut, false).await;
                return Err(Stop::Refused(Refusal::Draining));
            }
        }
    };
    // Its connection is free from here on, whatever the client does.
    drop(chunks);
    if matches!(end.how, Ended::Finished(_)) && request.op != Op::Embeddings {
        note_chunk(exchange);
    }
    let receipt = invoke::settle(exchange, running, &end, None, false).await?;
    let finishes = match end.how {
        Ended::Finished(finishes) => finishes,
        Ended::Failed(refusal) => return Err(Stop::Refused(refusal)),
        Ended::Cancelled | Ended::Stale => return Err(Stop::Refused(Refusal::EngineFailed)),
    };
    let Some(record) = exchange.record() else { return Err(Stop::Refused(Refusal::Internal)) };
    let parts = gather.finish(finishes.len());
    let glassgate = Glassgate::new(record, &receipt);
    let service_tier = told(end.service);
    let head = Head { service_tier, ..head(record, &request) };
    let body = wire::whole(&head, &prompts, &parts, &finishes, &receipt.usage, glassgate);
    let mut response = ResponseHeader::build_no_case(200, Some(20))?;
    response.insert_header("content-type", "application/json")?;
    response.insert_header("content-length", body.len())?;
    response.insert_header("x-glassgate-cost", receipt.billed.to_string())?;
    answer_headers(&mut response, exchange, &route, &door)?;
    part_ways(app, session);
    // The work is done: whoever has read this answer may ask again, also where one request at a time is allowed.
    drop(door);
    exchange
        .mark(|record, now| (record.status, record.marks.sent, record.bytes_out) = (200, Some(now), body.len() as u64));
    session.write_response_header(Box::new(response), false).await?;
    // The limit on a write is for a client that takes nothing, not for a large answer that it takes slowly.
    let mut body = Bytes::from(body);
    while body.len() > SLICE_BYTES {
        session.write_response_body(Some(body.split_to(SLICE_BYTES)), false).await?;
    }
    session.write_response_body(Some(body), true).await?;
    Ok(())
}

async fn stream(app: &App, session: &mut Session, exchange: &mut Exchange, reply: Reply) -> Result<(), Stop> {
    let Reply { answer, request, route, door, mut waits, cost_max, .. } = reply;
    let Answer { running, mut chunks, prompts } = answer;
    let gaps = {
        let Some(record) = exchange.record() else { return Err(Stop::Refused(Refusal::Internal)) };
        app.metrics.inter_token(Served { route: &record.route, model: &record.model, variant: &record.variant })
    };
    let mut cut: Cut<'_> = pin!(app.cut());
    let mut sent = false;
    let mut last_text: Option<Instant> = None;
    let mut begun = Begun { choices: Vec::new(), prompts };
    let mut out = Vec::with_capacity(512);
    let end = loop {
        let mut chunk = match wait(&mut waits, &mut cut, session, &mut *chunks).await {
            Next::Chunk(chunk) => chunk,
            Next::Gone => {
                wind_down(exchange, running, chunks, Outcome::Aborted, sent).await;
                return Err(Stop::Refused(Refusal::ClientGone));
            }
            Next::TimedOut(refusal) => {
                wind_down(exchange, running, chunks, Outcome::TimedOut, sent).await;
                return Err(broken_off(session, exchange, sent, refusal).await);
            }
            Next::Cut => {
                wind_down(exchange, running, chunks, Outcome::Cut, sent).await;
                return Err(broken_off(session, exchange, sent, Refusal::Draining).await);
            }
        };
        // What is there already leaves in one write.
        let ended = loop {
            match chunk {
                Chunk::End(end) => break Some(end),
                Chunk::Part(part) => {
                    note_chunk(exchange);
                    // A replay says nothing of how fast a model is.
                    if let Some(last) = last_text.replace(Instant::now()).filter(|_| running.is_some()) {
                        gaps.observe(last.elapsed().as_secs_f64());
                    }
                    let Some(record) = exchange.record() else { return Err(Stop::Refused(Refusal::Internal)) };
                    write_part(&head(record, &request), &part, &request, &mut begun, &mut out);
                }
            }
            if out.len() >= WRITE_BYTES_MAX {
                break None;
            }
            match next_ready(&mut *chunks).await {
                Some(more) => chunk = more,
                None => break None,
            }
        };
        let is_finished = matches!(ended, Some(End { how: Ended::Finished(_), .. }));
        if ended.is_some() && !is_finished && !sent {
            // A failure before anything was sent is an ordinary error answer.
            out.clear();
        }
        // What a finished answer still has to say leaves with its end.
        if !out.is_empty() && !is_finished {
            if !sent {
                sent = true;
                part_ways(app, session);
                if let Err(error) = begin_stream(session, exchange, &route, &door, cost_max).await {
                    return Err(client_lost(app, exchange, running, chunks, ended, error).await);
                }
            }
            let written = tokio::select! {
                biased;
                written = write(session, exchange, &out) => written,
                // A client that does not read must not keep us when we have to leave.
                () = &mut cut => Err(Error::explain(ErrorType::WriteTimedout, "cut in the middle of a write")),
            };
            if let Err(error) = written {
                return Err(client_lost(app, exchange, running, chunks, ended, error).await);
            }
            out.clear();
        }
        if let Some(end) = ended {
            break end;
        }
    };
    drop(chunks);
    if !matches!(end.how, Ended::Finished(_)) {
        let settled = invoke::settle(exchange, running, &end, None, sent).await;
        let refusal = match (settled, end.how) {
            (Err(refusal), _) | (_, Ended::Failed(refusal)) => refusal,
            _ => Refusal::EngineFailed,
        };
        return Err(broken_off(session, exchange, sent, refusal).await);
    }
    note_chunk(exchange);

    let receipt = match invoke::settle(exchange, running, &end, None, sent).await {
        Ok(receipt) => receipt,
        Err(refusal) => return Err(broken_off(session, exchange, sent, refusal).await),
    };
    if !sent {
        part_ways(app, session);
        begin_stream(session, exchange, &route, &door, cost_max).await?;
    }
    finish_stream(exchange, &request, &end, &receipt, &mut begun, &mut out);
    // As in `whole`: before the client can know that it is over.
    drop(door);
    write(session, exchange, &out).await?;
    session.write_response_body(None, true).await?;
    Ok(())
}

fn write_part(head: &Head<'_>, part: &Part, request: &Request, begun: &mut Begun, out: &mut Vec<u8>) {
    begin_choice(head, part.index, request, begun, out);
    sse::event(&wire::chunk(head, Event::Part(part), request.include_usage), out);
}

/// What the beginnings of choices have told.
struct Begun {
    choices: Vec<u32>,
    /// To be told there, if they were asked for.
    prompts: Prompts,
}

/// A chat's choice begins with its role, and a choice whose tokens are told with its prompt's.
fn begin_choice(head: &Head<'_>, index: u32, request: &Request, begun: &mut Begun, out: &mut Vec<u8>) {
    let prompt = begun.prompts.of(index);
    if (request.op == Op::Chat || prompt.is_some()) && !begun.choices.contains(&index) {
        begun.choices.push(index);
        sse::event(&wire::chunk(head, Event::Begin(index, prompt), request.include_usage), out);
    }
}

/// The last events of a complete stream, onto whatever is still unsent in `out`.
fn finish_stream(
    exchange: &Exchange,
    request: &Request,
    end: &End,
    receipt: &Receipt,
    begun: &mut Begun,
    out: &mut Vec<u8>,
) {
    let (Some(record), Ended::Finished(finishes)) = (exchange.record(), &end.how) else { return };
    let head = Head { service_tier: told(end.service), ..head(record, request) };
    let glassgate = || Glassgate::new(record, receipt);
    for (index, finish) in finishes.iter().enumerate() {
        let is_last = index + 1 == finishes.len();
        let on_finish = (is_last && !request.include_usage).then(glassgate);
        begin_choice(&head, index as u32, request, begun, out);
        sse::event(&wire::chunk(&head, Event::Finish(index as u32, *finish, on_finish), request.include_usage), out);
    }
    if request.include_usage {
        sse::event(&wire::chunk(&head, Event::Usage(&receipt.usage, glassgate()), true), out);
    }
    out.extend_from_slice(sse::DONE);
}

/// The write failed: the client is gone, or we are, and what was produced is owed.
async fn client_lost(
    app: &App,
    exchange: &mut Exchange,
    running: Option<Running>,
    chunks: Box<dyn Chunks>,
    ended: Option<End>,
    error: Box<Error>,
) -> Stop {
    let (outcome, why) = match app.phase() {
        Phase::Cut => (Outcome::Cut, Refusal::Draining),
        _ => (Outcome::Aborted, Refusal::ClientGone),
    };
    match ended {
        Some(end) => {
            let _ = invoke::settle(exchange, running, &end, None, true).await;
        }
        None => wind_down(exchange, running, chunks, outcome, true).await,
    }
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
    let mut response = ResponseHeader::build_no_case(200, Some(20))?;
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
