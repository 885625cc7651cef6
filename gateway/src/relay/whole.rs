//! An answer in one piece.

use std::pin::pin;

use bytes::Bytes;
use pingora_http::ResponseHeader;
use pingora_proxy::Session;

use super::{Cut, Next, Stop, answer_headers, head, note_chunk, part_ways, told, wait, wind_down};
use crate::accounting::row::Outcome;
use crate::answer::{Answer, Chunk, Ended};
use crate::api::glassgate::Glassgate;
use crate::api::openai::answer::{self as wire, Head};
use crate::api::openai::gather::Gather;
use crate::api::openai::request::Op;
use crate::app::App;
use crate::exchange::Exchange;
use crate::invoke::{self, Reply};
use crate::refusal::Refusal;

/// A whole answer leaves in slices of this size.
const SLICE_BYTES: usize = 64 << 10;

pub(super) async fn send(app: &App, session: &mut Session, exchange: &mut Exchange, reply: Reply) -> Result<(), Stop> {
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
