//! What every way of answering yields: a stream of semantic chunks and the debt that pays for it.

use std::future::poll_fn;
use std::task::{Context, Poll};
use std::time::Duration;

use serde::Serialize;

use crate::accounting::core::Usage;
use crate::accounting::row::UsageSource;
use crate::accounting::settlement::Running;
use crate::refusal::Refusal;

/// A piece of an answer.
#[derive(Debug)]
pub enum Chunk {
    /// Text for the client; never empty.
    Text(String),
    /// The last chunk of every answer.
    End(End),
}

#[derive(Debug)]
pub struct End {
    pub how: Ended,
    pub usage: Usage,
    pub source: UsageSource,
    pub engine: EngineTimes,
}

#[derive(Debug)]
pub enum Ended {
    Finished(Finish),
    /// We asked it to stop.
    Cancelled,
    /// The backend failed; the refusal is what the client may know of it.
    Failed(Refusal),
}

/// Why a complete answer ended, in OpenAI's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    Stop,
    Length,
}

impl Finish {
    pub fn as_str(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
        }
    }
}

/// Where the time went inside an engine. Offsets count from submission.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EngineTimes {
    pub queue: Duration,
    /// From admission to the first token.
    pub prefill: Option<Duration>,
    /// From the first token to the last.
    pub decode: Option<Duration>,
    /// This request's share of the device's time.
    pub compute: Duration,
    pub steps: u32,
    pub prefill_chunks: u32,
    pub batch_max: u32,
}

/// A backend's stream of chunks. Its last chunk is `End`; after `cancel` that comes within one engine step.
pub trait Chunks: Send {
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Chunk>;
    fn cancel(&mut self);
}

/// An answer under way.
pub struct Answer {
    pub running: Running,
    pub chunks: Box<dyn Chunks>,
}

/// The next chunk. Cancel-safe: a chunk is either returned or still to come.
pub async fn next(chunks: &mut dyn Chunks) -> Chunk {
    poll_fn(|context| chunks.poll_next(context)).await
}
