//! An answer as server-sent events, as it is made.

use std::pin::pin;
use std::time::Instant;

use bytes::Bytes;
use pingora_core::{Error, ErrorType, Result as PingoraResult};
use pingora_http::ResponseHeader;
use pingora_proxy::Session;

use super::{Cut, Next, Stop, WRITE_STALL, answer_headers, head, note_chunk, part_ways, told, wait, wind_down};
use crate::accounting::core::NanoUsd;
use crate::accounting::row::Outcome;
use crate::accounting::settlement::{Receipt, Running};
use crate::admission::Door;
use crate::answer::{Answer, Chunk, Chunks, End, Ended, Part, Prompts, next_ready};
use crate::api::glassgate::Glassgate;
use crate::api::openai::answer::{self as wire, Event, Head};
use crate::api::openai::request::{Op, Request};
use crate::api::sse;
use crate::app::{App, Phase};
use crate::exchange::Exchange;
use crate::invoke::{self, Reply};
use crate::observe::metrics::Served;
use crate::refusal::Refusal;
use crate::routing::Route;

/// Chunks that are there at once leave in writes of about this size.
const WRITE_BYTES_MAX: usize = 8 << 10;

pub(super) async fn send(app: &App, session: &mut Session, exchange: &mut Exchange, reply: Reply) -> Result<(), Stop> {
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
