//! The embedded runtime as a backend: the one place where its words become ours.

use std::sync::Arc;
use std::task::{Context, Poll};

use glassgate_runtime as runtime;

use crate::accounting::core::Usage;
use crate::accounting::row::UsageSource;
use crate::accounting::settlement::Running;
use crate::answer::{Answer, Chunk, Chunks, End, Ended, EngineTimes, Finish};
use crate::api::openai::chat::{ChatRequest, Sampling};
use crate::auth::Caller;
use crate::observe::metrics::Metrics;
use crate::ports::{Meter, Tokenize, Turn};
use crate::refusal::Refusal;
use crate::routing::Measure;

/// A loaded model version.
pub struct Embedded {
    model: runtime::Model,
    metrics: Arc<Metrics>,
}

impl Embedded {
    pub fn new(model: runtime::Model, metrics: Arc<Metrics>) -> Self {
        Embedded { model, metrics }
    }

    pub fn send(
        &self,
        running: Running,
        caller: &Caller,
        request: &ChatRequest,
        measure: Measure,
    ) -> Result<Answer, Refusal> {
        let prompt_tokens = measure.prompt.len() as u64;
        let submitted = self.model.generate(runtime::Request {
            prompt: measure.prompt,
            max_tokens: u32::try_from(measure.output_max).unwrap_or(u32::MAX),
            params: sampling(&request.sampling, self.model.defaults()),
            stop: request.stop.clone(),
            ignore_eos: request.ignore_eos,
            tenant: tenant_number(caller.tenant()),
            class: runtime::Class::Interactive,
            deadline: None,
        });
        match submitted {
            Ok(generation) => {
                let running = running.measured_by(Arc::new(Count(generation.handle())));
                let chunks = Box::new(Stream {
                    generation,
                    prompt_tokens,
                    model: self.model.name().to_owned(),
                    metrics: self.metrics.clone(),
                });
                Ok(Answer { running, chunks })
            }
            Err(refusal) => {
                running.release();
                Err(self.refuse(refusal))
            }
        }
    }

    fn refuse(&self, refusal: runtime::Refusal) -> Refusal {
        match refusal {
            runtime::Refusal::Overloaded { retry_after } => Refusal::EngineBusy { retry_after },
            runtime::Refusal::Draining => Refusal::ModelUnavailable { model: self.model.name().to_owned() },
            runtime::Refusal::BadParams(bad) => {
                Refusal::BadParam { param: bad.name.to_owned(), why: format!("must be {}", bad.range) }
            }
            runtime::Refusal::OverContext { prompt, max_tokens, context } => Refusal::ContextExceeded {
                prompt_tokens: u64::from(prompt),
                output_tokens: Some(u64::from(max_tokens)),
                context_tokens: u64::from(context),
            },
            runtime::Refusal::NeverFits { need_tokens, total_tokens } => Refusal::BadParam {
                param: "max_completion_tokens".into(),
                why: format!(
                    "needs {need_tokens} tokens of KV cache with this prompt, and the model has {total_tokens}"
                ),
            },
            runtime::Refusal::EmptyPrompt => {
                Refusal::BadParam { param: "messages".into(), why: "must not be empty".into() }
            }
            // We bound the answer and made the tokens ourselves: this would be our mistake.
            runtime::Refusal::NothingToGenerate | runtime::Refusal::UnknownToken { .. } => {
                tracing::error!(model = self.model.name(), %refusal, "the engine was asked for the impossible");
                Refusal::Internal
            }
        }
    }
}

impl Tokenize for Embedded {
    fn tokenize(&self, turns: &[Turn]) -> Result<Vec<u32>, String> {
        let messages: Vec<runtime::Message> = turns
            .iter()
            .map(|turn| runtime::Message { role: turn.role.clone(), content: turn.content.clone() })
            .collect();
        let prompt =
            self.model.prompt(&messages).map_err(|error| format!("does not fit the model's chat template: {error}"))?;
        self.model.tokenize(&prompt).map_err(|error| format!("cannot be tokenised: {error}"))
    }

    fn context(&self) -> u64 {
        u64::from(self.model.context())
    }
}

/// What the client said, on top of the model's defaults.
fn sampling(asked: &Sampling, defaults: &runtime::SamplingParams) -> runtime::SamplingParams {
    let or = |asked: Option<f64>, default: f32| asked.map_or(default, |value| value as f32);
    runtime::SamplingParams {
        temperature: or(asked.temperature, defaults.temperature),
        top_k: asked.top_k.map_or(defaults.top_k, |k| u32::try_from(k).unwrap_or(u32::MAX)),
        top_p: or(asked.top_p, defaults.top_p),
        min_p: or(asked.min_p, defaults.min_p),
        repetition_penalty: or(asked.repetition_penalty, defaults.repetition_penalty),
        frequency_penalty: or(asked.frequency_penalty, defaults.frequency_penalty),
        presence_penalty: or(asked.presence_penalty, defaults.presence_penalty),
        // Without a seed every request draws its own: repeating a prompt should not repeat its answer.
        seed: asked.seed.map_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0, |seed| seed as u64),
    }
}

/// Tenants are opaque numbers to the runtime.
fn tenant_number(tenant: &str) -> u64 {
    let hash = blake3::hash(tenant.as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(first)
}

struct Count(runtime::Handle);

impl Meter for Count {
    fn produced(&self) -> u64 {
        u64::from(self.0.produced())
    }
}

struct Stream {
    generation: runtime::Generation,
    prompt_tokens: u64,
    model: String,
    metrics: Arc<Metrics>,
}

impl Stream {
    fn end(&self, how: Ended, timeline: &runtime::Timeline) -> Chunk {
        self.metrics.runtime_queue(&self.model, timeline.queue());
        // A sequence that left the queue without being admitted read nothing.
        let input = if timeline.admitted.is_some() { self.prompt_tokens } else { 0 };
        Chunk::End(End {
            how,
            usage: Usage::tokens(input, u64::from(timeline.output_tokens)),
            source: UsageSource::Counted,
            engine: EngineTimes {
                queue: timeline.queue(),
                prefill: timeline.prefill(),
                decode: timeline.decode(),
                compute: timeline.compute,
                steps: timeline.steps,
                prefill_chunks: timeline.prefill_chunks,
                batch_max: timeline.batch_max,
            },
        })
    }
}

impl Chunks for Stream {
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Chunk> {
        loop {
            return Poll::Ready(match std::task::ready!(self.generation.poll_next(context)) {
                // Tokens that make no text yet: an unfinished character, or the beginning of a stop string.
                Some(runtime::Event::Text { text, .. }) if text.is_empty() => continue,
                Some(runtime::Event::Text { text, .. }) => Chunk::Text(text),
                Some(runtime::Event::Finished { reason, timeline }) => {
                    let how = match reason {
                        runtime::FinishReason::Stop => Ended::Finished(Finish::Stop),
                        runtime::FinishReason::Length => Ended::Finished(Finish::Length),
                        runtime::FinishReason::Cancelled => Ended::Cancelled,
                    };
                    self.end(how, &timeline)
                }
                Some(runtime::Event::Failed { failure, timeline }) => {
                    tracing::error!(model = %self.model, %failure, "a sequence failed in the engine");
                    self.metrics.runtime_failure(&self.model);
                    self.end(Ended::Failed(Refusal::EngineFailed), &timeline)
                }
                // The engine promises a last event; without one it is gone.
                None => Chunk::End(End {
                    how: Ended::Failed(Refusal::EngineFailed),
                    usage: Usage::tokens(self.prompt_tokens, u64::from(self.generation.produced())),
                    source: UsageSource::Counted,
                    engine: EngineTimes::default(),
                }),
            });
        }
    }

    fn cancel(&mut self) {
        self.generation.cancel();
    }
}
