//! What leaves the engine for one request: a refusal at the door, or a stream of events with exactly one ending.

use crate::{
    report::Timeline,
    sampling::{logprobs::Logprobs, params::BadParam},
};
use std::{
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// Why a request was not taken. Typed, and ignorant of HTTP.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Refusal {
    #[error("the request needs {need_tokens} tokens of KV memory and the whole pool holds {total_tokens}")]
    NeverFits { need_tokens: u32, total_tokens: u32 },
    #[error("the queue is full")]
    Overloaded { retry_after: Duration },
    #[error("the model is being unloaded")]
    Draining,
    #[error(transparent)]
    BadParams(#[from] BadParam),
    #[error("the prompt is empty")]
    EmptyPrompt,
    #[error("max_tokens must be at least 1")]
    NothingToGenerate,
    #[error("prompt token {id} is outside the vocabulary of {vocab}")]
    UnknownToken { id: u32, vocab: u32 },
    #[error("logit_bias names token {id}, outside the vocabulary of {vocab}")]
    UnknownBias { id: u32, vocab: u32 },
    #[error("{prompt} prompt tokens and {max_tokens} output tokens exceed the context of {context}")]
    OverContext { prompt: u32, max_tokens: u32, context: u32 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token or a stop string.
    Stop,
    Length,
    Cancelled,
}

/// Why an accepted request ended without an answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    #[error("the deadline passed while the request was queued")]
    DeadlineExceeded,
    /// A panic or an error in a step; all requests of that step share it.
    #[error("the engine step failed: {0}")]
    Step(String),
    #[error("the model produced a value that is not a number")]
    NotFinite,
    /// The grammar became too much to follow, in its own words.
    #[error("the answer could not be kept to its grammar: {0}")]
    Grammar(String),
    /// The time that a draining model's last requests had is over.
    #[error("the model was unloaded")]
    Unloaded,
    #[error("the engine stopped")]
    EngineStopped,
}

#[derive(Clone, Debug)]
pub enum Event {
    /// `tokens`: those sampled since the last event. Their text may be longer or shorter: what could begin a stop string,
    /// or ends within a character, is held back, and comes with the tokens of a later event.
    Text {
        text: String,
        tokens: Vec<u32>,
        /// Of these tokens but an end token, if they were asked for; otherwise empty.
        logprobs: Vec<Logprobs>,
    },
    /// `tokens`: those sampled since the last event, of which no text comes: an end token, the rest of a stop string.
    Finished {
        reason: FinishReason,
        tokens: Vec<u32>,
        logprobs: Vec<Logprobs>,
        timeline: Timeline,
    },
    Failed {
        failure: Failure,
        timeline: Timeline,
    },
}

/// What the caller and the engine share about one request.
#[derive(Debug, Default)]
pub(crate) struct Flags {
    pub cancelled: AtomicBool,
    pub produced: AtomicU32,
}

/// The count of one request's tokens, apart from its stream.
#[derive(Clone, Debug)]
pub struct Handle(Arc<Flags>);

impl Handle {
    /// Tokens sampled so far.
    pub fn produced(&self) -> u32 {
        self.0.produced.load(Ordering::Acquire)
    }
}

/// One request's answer. Dropping it cancels the request.
#[derive(Debug)]
pub struct Generation {
    pub(crate) events: mpsc::Receiver<Event>,
    pub(crate) flags: Arc<Flags>,
    pub(crate) submitted: Instant,
    pub(crate) prompt_tokens: u32,
    pub(crate) ended: bool,
}

impl Generation {
    /// The next event; None after the ending. Cancel-safe: a dropped future loses nothing.
    pub async fn next(&mut self) -> Option<Event> {
        poll_fn(|context| self.poll_next(context)).await
    }

    /// As `next`, for callers that poll.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let event = ready!(self.events.poll_recv(context)).unwrap_or_else(|| self.stopped());
        self.ended = matches!(event, Event::Finished { .. } | Event::Failed { .. });
        Poll::Ready(Some(event))
    }

    /// Counts this request's tokens from elsewhere, also after the generation was dropped.
    pub fn handle(&self) -> Handle {
        Handle(self.flags.clone())
    }

    /// Tokens sampled so far.
    pub fn produced(&self) -> u32 {
        self.flags.produced.load(Ordering::Acquire)
    }

    /// Asks the engine to end this within one step, with `Finished{Cancelled}`. May be called again and late.
    pub fn cancel(&self) {
        self.flags.cancelled.store(true, Ordering::Release);
    }

    /// The engine is gone without an ending. The caller still gets one, with what is known on this side.
    fn stopped(&self) -> Event {
        let timeline = Timeline {
            submitted: self.submitted,
            admitted: None,
            first_token: None,
            finished: Instant::now(),
            prompt_tokens: self.prompt_tokens,
            output_tokens: self.produced(),
            prefill_chunks: 0,
            steps: 0,
            batch_max: 0,
            batch_mean: 0.0,
            cached_tokens: 0,
            preemptions: 0,
            compute: Duration::ZERO,
        };
        Event::Failed { failure: Failure::EngineStopped, timeline }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.cancel();
    }
}
