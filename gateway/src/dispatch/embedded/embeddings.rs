//! An embedding model of the runtime as a backend: texts in, one part a vector out.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use glassgate_runtime as runtime;

use super::tenant_number;
use crate::accounting::core::Usage;
use crate::accounting::row::UsageSource;
use crate::accounting::settlement::Running;
use crate::answer::{Answer, Chunk, Chunks, End, Ended, EngineTimes, Finish, Part, Piece, Prompts};
use crate::api::openai::embeddings::{self, Encoding};
use crate::dispatch::{Call, NotStarted};
use crate::observe::metrics::Metrics;
use crate::ports::{Form, Prepared, Prompt, Tokenize, Turn};
use crate::refusal::Refusal;
use crate::routing::Leg;

/// A loaded embedding model.
pub struct EmbeddingModel {
    model: runtime::Embedder,
    metrics: Arc<Metrics>,
}

impl EmbeddingModel {
    pub fn new(model: runtime::Embedder, metrics: Arc<Metrics>) -> Self {
        EmbeddingModel { model, metrics }
    }

    /// A hash over the model's files.
    pub fn digest(&self) -> &str {
        self.model.digest()
    }

    /// Somebody else serves in its place.
    pub fn drain(&self, cut_at: Instant) {
        self.model.drain(cut_at);
    }

    pub fn dimensions(&self) -> u32 {
        self.model.dimensions()
    }

    pub fn start(&self, running: Running, leg: &Leg, call: &Call<'_>) -> Result<Answer, Box<NotStarted>> {
        let deadline = call.queue.map(|queue| Instant::now() + queue);
        match self.model.embed(leg.measure.prompts.to_vec(), tenant_number(call.tenant), deadline) {
            Ok(embedding) => {
                let stream = Stream {
                    embedding,
                    encoding: embeddings::wanted(&call.request.body).0,
                    parts: Vec::new().into_iter(),
                    end: None,
                    input: leg.measure.input,
                    is_cancelled: false,
                    class: call.urgency.as_str(),
                    queue: call.queue.unwrap_or_default(),
                    model: self.model.clone(),
                    metrics: self.metrics.clone(),
                };
                Ok(Answer { running: Some(running), chunks: Box::new(stream), prompts: Prompts::default() })
            }
            Err(refusal) => Err(Box::new(NotStarted { running, refusal: self.refuse(refusal) })),
        }
    }

    fn refuse(&self, refusal: runtime::Refusal) -> Refusal {
        match refusal {
            runtime::Refusal::Overloaded { retry_after } => Refusal::EngineBusy { retry_after },
            runtime::Refusal::Draining => Refusal::ModelUnavailable { model: self.model.name().to_owned() },
            runtime::Refusal::UnknownToken { id, vocab } => Refusal::BadParam {
                param: "input".into(),
                why: format!("has the token id {id}, and the model has {vocab}"),
            },
            runtime::Refusal::EmptyPrompt => {
                Refusal::BadParam { param: "input".into(), why: "has a text without a single token".into() }
            }
            // We have measured every text ourselves: this would be our mistake.
            other => {
                tracing::error!(model = self.model.name(), refusal = %other, "the engine was asked for the impossible");
                Refusal::Internal
            }
        }
    }
}

#[async_trait]
impl Tokenize for EmbeddingModel {
    async fn render(&self, _: &[Turn]) -> Result<String, Refusal> {
        Err(Refusal::BadParam { param: "messages".into(), why: "cannot be embedded: this model reads texts".into() })
    }

    fn tokenize(&self, prompt: &Prompt) -> Result<Vec<u32>, String> {
        let read = |text: &str| self.model.tokenize(text).map_err(|error| format!("cannot be tokenised: {error}"));
        match prompt {
            Prompt::Text(text) => read(text),
            Prompt::Cut(text) => {
                let mut ids = read(text)?;
                self.model.truncate(&mut ids);
                Ok(ids)
            }
            Prompt::Tokens(tokens) => Ok(tokens.clone()),
            Prompt::Turns(_) => Err("cannot be embedded: this model reads texts".into()),
        }
    }

    fn prepare(&self, _: &Form) -> Result<Prepared, String> {
        Err("is for answers of text: this model makes embeddings".into())
    }

    fn context(&self) -> u64 {
        u64::from(self.model.context())
    }
}

/// One request's vectors: nothing for a while, then all of them.
struct Stream {
    embedding: runtime::Embedding,
    encoding: Encoding,
    parts: std::vec::IntoIter<Part>,
    /// What comes after the parts; None while they are computed.
    end: Option<End>,
    /// Tokens of all texts.
    input: u64,
    is_cancelled: bool,
    class: &'static str,
    /// How long it was allowed to wait.
    queue: Duration,
    model: runtime::Embedder,
    metrics: Arc<Metrics>,
}

impl Stream {
    fn take(&mut self, runtime::Embedded { vectors, timeline }: runtime::Embedded) {
        self.metrics.runtime_queue(self.model.name(), self.class, timeline.queue());
        let computed = timeline.started.map(|started| timeline.finished.saturating_duration_since(started));
        let engine = EngineTimes {
            queue: timeline.queue(),
            prefill: computed,
            decode: None,
            compute: timeline.compute,
            steps: timeline.batches,
            prefill_chunks: timeline.batches,
            batch_max: timeline.texts_max,
            ..EngineTimes::default()
        };
        let parts: Result<Vec<Part>, Refusal> = match vectors {
            Ok(vectors) => (0..).zip(&vectors).map(|(index, vector)| self.part(index, vector)).collect(),
            Err(runtime::Failure::DeadlineExceeded) => {
                Err(Refusal::QueuedTooLong { limit: self.queue, retry_after: self.model.retry_after() })
            }
            Err(failure) => {
                tracing::error!(model = self.model.name(), %failure, "embeddings failed in the engine");
                self.metrics.runtime_failure(self.model.name());
                Err(Refusal::EngineFailed)
            }
        };
        let (how, input) = match parts {
            Ok(parts) => {
                let finishes = vec![Finish::Stop; parts.len()];
                self.parts = parts.into_iter();
                (Ended::Finished(finishes), self.input)
            }
            Err(refusal) => (Ended::Failed(refusal), self.embedding.read()),
        };
        self.end = Some(End {
            how,
            usage: Usage::tokens(input, 0),
            source: UsageSource::Counted,
            service: None,
            engine: Some(engine),
        });
    }

    fn part(&self, index: u32, vector: &[f32]) -> Result<Part, Refusal> {
        let raw = embeddings::vector(vector, self.encoding).ok_or(Refusal::Internal)?;
        Ok(Part { index, piece: Piece::Message(raw), logprobs: None, tokens: Vec::new() })
    }

    /// What it had used when it was told to stop.
    fn cut(&self) -> End {
        let usage = Usage::tokens(self.embedding.read(), 0);
        End { how: Ended::Cancelled, usage, source: UsageSource::Counted, service: None, engine: None }
    }
}

impl Chunks for Stream {
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Chunk> {
        if self.end.is_none() {
            if self.is_cancelled {
                return Poll::Ready(Chunk::End(self.cut()));
            }
            let embedded = ready!(Pin::new(&mut self.embedding).poll(context));
            self.take(embedded);
        }
        match (self.parts.next(), self.end.take()) {
            (Some(part), end) => {
                self.end = end;
                Poll::Ready(Chunk::Part(part))
            }
            (None, Some(end)) => Poll::Ready(Chunk::End(end)),
            (None, None) => Poll::Ready(Chunk::End(self.cut())),
        }
    }

    fn cancel(&mut self) {
        self.is_cancelled = true;
    }
}
