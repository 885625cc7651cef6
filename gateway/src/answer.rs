//! What every way of answering yields: a stream of semantic chunks and the debt that pays for it.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use serde::Serialize;
use serde_json::value::RawValue;

use crate::accounting::core::Usage;
use crate::accounting::row::{Service, UsageSource};
use crate::accounting::settlement::Running;
use crate::refusal::Refusal;

/// A piece of an answer.
#[derive(Debug)]
pub enum Chunk {
    /// Something for the client.
    Part(Part),
    /// The last chunk of every answer.
    End(End),
}

/// A piece of one choice.
#[derive(Clone, Debug)]
pub struct Part {
    pub index: u32,
    pub piece: Piece,
    /// An upstream's own words.
    pub logprobs: Option<Box<RawValue>>,
    /// The ids of its tokens, if they were asked for.
    pub tokens: Vec<u32>,
}

#[derive(Clone, Debug)]
pub enum Piece {
    Text(String),
    /// An upstream's delta with more than text in it (tool calls, reasoning), as it came.
    Delta(Box<RawValue>),
    /// A whole message, from an upstream that was not asked to stream, or a vector as the client asked for it.
    Message(Box<RawValue>),
}

impl Piece {
    /// The text, where it is nothing else.
    pub fn text(&self) -> &str {
        match self {
            Piece::Text(text) => text,
            Piece::Delta(_) | Piece::Message(_) => "",
        }
    }
}

impl Part {
    pub fn text(index: u32, text: impl Into<String>) -> Part {
        Part { index, piece: Piece::Text(text.into()), logprobs: None, tokens: Vec::new() }
    }

    /// About what it takes in memory.
    pub fn bytes(&self) -> usize {
        let piece = match &self.piece {
            Piece::Text(text) => text.len(),
            Piece::Delta(raw) | Piece::Message(raw) => raw.get().len(),
        };
        let logprobs = self.logprobs.as_ref().map_or(0, |raw| raw.get().len());
        piece + logprobs + size_of_val(self.tokens.as_slice())
    }
}

#[derive(Debug)]
pub struct End {
    pub how: Ended,
    pub usage: Usage,
    pub source: UsageSource,
    /// How an upstream says that it served it, if what was asked for allows that.
    pub service: Option<Service>,
    /// Where the time went, if the engine is ours.
    pub engine: Option<EngineTimes>,
}

#[derive(Debug)]
pub enum Ended {
    /// One reason a choice, in order.
    Finished(Vec<Finish>),
    /// We asked it to stop.
    Cancelled,
    /// The backend failed; the refusal is what the client may know of it.
    Failed(Refusal),
    /// A pooled connection had been closed by the other side before it took the request: a fresh one may try.
    Stale,
}

/// Why a complete answer ended, in OpenAI's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    Stop,
    Length,
    ToolCalls,
    FunctionCall,
    ContentFilter,
}

impl Finish {
    pub fn as_str(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::ToolCalls => "tool_calls",
            Finish::FunctionCall => "function_call",
            Finish::ContentFilter => "content_filter",
        }
    }

    /// An upstream's word. Those that OpenAI does not have (`eos`, `abort`, …) become its nearest.
    pub fn parse(word: &str) -> Finish {
        match word {
            "length" | "max_tokens" => Finish::Length,
            "tool_calls" => Finish::ToolCalls,
            "function_call" => Finish::FunctionCall,
            "content_filter" => Finish::ContentFilter,
            _ => Finish::Stop,
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
    /// Prompt tokens that were there already.
    pub cached_tokens: u64,
    /// How often it gave up its memory for others, and computed again what it had.
    pub preemptions: u32,
}

/// A backend's stream of chunks. Its last chunk is `End`; after `cancel` that comes within one engine step, or as soon as
/// an upstream has said what it used.
pub trait Chunks: Send {
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Chunk>;
    fn cancel(&mut self);
}

/// An answer under way.
pub struct Answer {
    /// What is owed for it; `None` if that is settled already, as for a cache hit.
    pub running: Option<Running>,
    pub chunks: Box<dyn Chunks>,
    pub prompts: Prompts,
}

/// The token ids of what is answered, if they were asked for.
#[derive(Default)]
pub struct Prompts {
    ids: Arc<[Vec<u32>]>,
    /// Choices of each prompt.
    n: u32,
}

impl Prompts {
    pub fn new(ids: Arc<[Vec<u32>]>, n: u32) -> Prompts {
        Prompts { ids, n }
    }

    /// What a choice is the answer to.
    pub fn of(&self, choice: u32) -> Option<&[u32]> {
        self.ids.get(choice.checked_div(self.n)? as usize).map(Vec::as_slice)
    }
}

/// The next chunk. Cancel-safe: a chunk is either returned or still to come.
pub async fn next(chunks: &mut dyn Chunks) -> Chunk {
    poll_fn(|context| chunks.poll_next(context)).await
}

/// The next chunk, if it is there already. If not, `context` is woken when it comes.
pub async fn next_ready(chunks: &mut dyn Chunks) -> Option<Chunk> {
    poll_fn(|context| match chunks.poll_next(context) {
        Poll::Ready(chunk) => Poll::Ready(Some(chunk)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}
