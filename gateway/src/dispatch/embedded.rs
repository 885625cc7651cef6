//! The embedded runtime as a backend: the one place where its words become ours.

mod embeddings;

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

pub use embeddings::EmbeddingModel;
use glassgate_runtime as runtime;

use crate::accounting::core::Usage;
use crate::accounting::row::UsageSource;
use crate::accounting::settlement::Running;
use crate::answer::{Answer, Chunk, Chunks, End, Ended, EngineTimes, Finish, Part};
use crate::api::openai::asked::Asked;
use crate::api::openai::logprobs::{Place, Token, render};
use crate::api::openai::request::{Op, Sampling};
use crate::dispatch::{Call, NotStarted, Urgency};
use crate::observe::metrics::Metrics;
use crate::ports::{Form, Meter, Prepared, Prompt, Tokenize};
use crate::refusal::Refusal;
use crate::routing::{Leg, Measure};

/// A loaded model version.
pub struct Embedded {
    model: runtime::Model,
    metrics: Arc<Metrics>,
}

impl Embedded {
    pub fn new(model: runtime::Model, metrics: Arc<Metrics>) -> Self {
        Embedded { model, metrics }
    }

    /// A hash over the model's files.
    pub fn digest(&self) -> &str {
        self.model.digest()
    }

    /// Somebody else serves in its place.
    pub fn drain(&self, cut_at: Instant) {
        self.model.drain(cut_at);
    }

    pub fn start(&self, running: Running, leg: &Leg, call: &Call<'_>) -> Result<Answer, Box<NotStarted>> {
        let measure = &leg.measure;
        let asked = match call.request.asked() {
            Ok(asked) => asked,
            Err(refusal) => return Err(Box::new(NotStarted { running, refusal })),
        };
        let choices = call.request.n;
        let generations: Result<Vec<_>, _> = measure
            .prompts
            .iter()
            .map(|prompt| self.model.generate_many(self.request(prompt.clone(), measure, &asked, call), choices))
            .collect();
        match generations.map(|generations| generations.into_iter().flatten().collect::<Vec<_>>()) {
            Ok(generations) => {
                let handles = generations.iter().map(runtime::Generation::handle).collect();
                let chunks = Box::new(Stream {
                    sequences: generations
                        .into_iter()
                        .map(|generation| Sequence {
                            generation,
                            told_chars: 0,
                            has_told: false,
                            has_ended: false,
                            ending: None,
                        })
                        .collect(),
                    turn: 0,
                    choices: choices as usize,
                    tells_tokens: call.request.return_token_ids,
                    tells_logprobs: asked.logprobs.is_some() && call.urgency == Urgency::User,
                    op: call.request.op,
                    form: asked.form.as_ref().map(|(field, _)| *field),
                    failed: None,
                    model: self.model.clone(),
                    metrics: self.metrics.clone(),
                });
                let running = Some(running.measured_by(Arc::new(Count(handles))));
                Ok(Answer { running, chunks, prompts: measure.told_prompts(call.request) })
            }
            // Those that were taken are dropped here, which cancels them.
            Err(refusal) => Err(Box::new(NotStarted { running, refusal: self.refuse(refusal) })),
        }
    }

    fn request(&self, prompt: Vec<u32>, measure: &Measure, asked: &Asked, call: &Call<'_>) -> runtime::Request {
        let mut params = sampling(&call.request.sampling, self.model.defaults());
        params.logit_bias = asked.logit_bias.clone();
        // Nobody reads what a shadow says, and these change no token.
        params.logprobs = asked.logprobs.filter(|_| call.urgency == Urgency::User);
        params.grammar = measure.form.as_ref().and_then(|form| form.downcast_ref::<runtime::Grammar>()).cloned();
        runtime::Request {
            prompt,
            max_tokens: u32::try_from(measure.output_max).unwrap_or(u32::MAX),
            params,
            stop: call.request.stop.clone(),
            ignore_eos: call.request.ignore_eos,
            tenant: tenant_number(call.tenant),
            salt: tenant_salt(call.tenant),
            class: match call.urgency {
                Urgency::User => runtime::Class::Interactive,
                Urgency::Nobody => runtime::Class::Shadow,
            },
            deadline: None,
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
            runtime::Refusal::UnknownToken { id, vocab } => Refusal::BadParam {
                param: "prompt".into(),
                why: format!("has the token id {id}, and the model has {vocab}"),
            },
            runtime::Refusal::UnknownBias { id, vocab } => Refusal::BadParam {
                param: "logit_bias".into(),
                why: format!("has the token id {id}, and the model has {vocab}"),
            },
            // We bound the answer ourselves: this would be our mistake.
            runtime::Refusal::NothingToGenerate => {
                tracing::error!(model = self.model.name(), %refusal, "the engine was asked for the impossible");
                Refusal::Internal
            }
        }
    }
}

impl Tokenize for Embedded {
    fn tokenize(&self, prompt: &Prompt) -> Result<Vec<u32>, String> {
        let text = match prompt {
            Prompt::Turns(turns) => {
                let messages: Vec<runtime::Message> = turns
                    .iter()
                    .map(|turn| runtime::Message { role: turn.role.clone(), content: turn.content.clone() })
                    .collect();
                let rendered = self.model.prompt(&messages);
                rendered.map_err(|error| format!("does not fit the model's chat template: {error}"))?
            }
            Prompt::Text(text) | Prompt::Cut(text) => text.clone(),
            Prompt::Tokens(tokens) => return Ok(tokens.clone()),
        };
        self.model.tokenize(&text).map_err(|error| format!("cannot be tokenised: {error}"))
    }

    fn prepare(&self, form: &Form) -> Result<Prepared, String> {
        let constraint = match form.clone() {
            Form::JsonSchema(schema) => runtime::Constraint::JsonSchema(schema),
            Form::Regex(regex) => runtime::Constraint::Regex(regex),
            Form::Choice(choices) => runtime::Constraint::Choice(choices),
            Form::Lark(grammar) => runtime::Constraint::Lark(grammar),
        };
        let grammar = self.model.grammar(&constraint);
        grammar.map(|grammar| Arc::new(grammar) as Prepared).map_err(|error| error.to_string())
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
        ..runtime::SamplingParams::default()
    }
}

/// Tenants are opaque numbers to the runtime.
fn tenant_number(tenant: &str) -> u64 {
    let hash = blake3::hash(tenant.as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(first)
}

/// What a tenant's prompts are cached under in the engine: nobody else's are found there.
fn tenant_salt(tenant: &str) -> [u8; 16] {
    let hash = blake3::derive_key("glassgate 2026-11 salt of a tenant's prefix cache", tenant.as_bytes());
    let mut first = [0; 16];
    first.copy_from_slice(&hash[..16]);
    first
}

struct Count(Vec<runtime::Handle>);

impl Meter for Count {
    fn produced(&self) -> u64 {
        self.0.iter().map(|handle| u64::from(handle.produced())).sum()
    }
}

/// One choice.
struct Sequence {
    generation: runtime::Generation,
    /// Characters of the tokens whose log-probabilities were told.
    told_chars: usize,
    has_told: bool,
    has_ended: bool,
    ending: Option<(runtime::FinishReason, runtime::Timeline)>,
}

/// One answer of independent sequences.
struct Stream {
    sequences: Vec<Sequence>,
    /// Who is asked first next time, so that none hides the others.
    turn: usize,
    /// Sequences of each prompt, which follow each other.
    choices: usize,
    tells_tokens: bool,
    tells_logprobs: bool,
    op: Op,
    /// The field that asks for a form.
    form: Option<&'static str>,
    failed: Option<Refusal>,
    model: runtime::Model,
    metrics: Arc<Metrics>,
}

impl Stream {
    fn part(&mut self, index: usize, text: String, mut tokens: Vec<u32>, logprobs: &[runtime::Logprobs]) -> Chunk {
        if !self.tells_tokens {
            tokens.clear();
        }
        let places: Vec<Place> = logprobs.iter().map(|told| self.place(told)).collect();
        let is_due = !places.is_empty() || self.owes_logprobs(index);
        let sequence = &mut self.sequences[index];
        sequence.has_told |= is_due;
        let logprobs = is_due.then(|| render(self.op, &places, &mut sequence.told_chars)).flatten();
        Chunk::Part(Part { tokens, logprobs, ..Part::text(index as u32, text) })
    }

    /// Who asks is told something, if only that there was no token.
    fn owes_logprobs(&self, index: usize) -> bool {
        self.tells_logprobs && !self.sequences[index].has_told
    }

    fn place(&self, told: &runtime::Logprobs) -> Place {
        let token = |id: u32, logprob: f32| match self.model.control_token(id) {
            Some(name) => Token { bytes: None, name: name.to_owned(), logprob },
            None => Token { bytes: Some(self.model.token_bytes(id).to_vec()), name: String::new(), logprob },
        };
        let top = told.top.iter().map(|&(id, logprob)| token(id, logprob)).collect();
        Place { chosen: token(told.id, told.logprob), top }
    }

    /// The end of all, once each has ended.
    fn end(&mut self) -> Chunk {
        let (mut output, mut times) = (0, EngineTimes::default());
        for sequence in &self.sequences {
            let Some((_, timeline)) = &sequence.ending else {
                output += u64::from(sequence.generation.produced());
                continue;
            };
            self.metrics.runtime_queue(self.model.name(), timeline.queue());
            output += u64::from(timeline.output_tokens);
            times.queue = times.queue.max(timeline.queue());
            times.prefill = times.prefill.max(timeline.prefill());
            times.decode = times.decode.max(timeline.decode());
            times.compute += timeline.compute;
            times.steps = times.steps.max(timeline.steps);
            times.prefill_chunks = times.prefill_chunks.max(timeline.prefill_chunks);
            times.batch_max = times.batch_max.max(timeline.batch_max);
        }
        let is_cut = self
            .sequences
            .iter()
            .any(|sequence| matches!(sequence.ending, None | Some((runtime::FinishReason::Cancelled, _))));
        let how = match self.failed.take() {
            Some(refusal) => Ended::Failed(refusal),
            None if is_cut => Ended::Cancelled,
            None => Ended::Finished(
                self.sequences
                    .iter()
                    .map(|sequence| match sequence.ending {
                        Some((runtime::FinishReason::Length, _)) => Finish::Length,
                        _ => Finish::Stop,
                    })
                    .collect(),
            ),
        };
        let usage = Usage::tokens(self.read(), output);
        Chunk::End(End { how, usage, source: UsageSource::Counted, engine: Some(times) })
    }

    /// Tokens of the prompts that were admitted, each once: of one that left the queue without it nothing was read.
    fn read(&self) -> u64 {
        let prompt = |choices: &[Sequence]| {
            let mut admitted = choices.iter().filter_map(|sequence| sequence.ending.as_ref());
            admitted.find(|(_, timeline)| timeline.admitted.is_some()).map(|(_, timeline)| timeline.prompt_tokens)
        };
        self.sequences.chunks(self.choices.max(1)).filter_map(prompt).map(u64::from).sum()
    }

    fn end_one(&mut self, index: usize, ending: Option<(runtime::FinishReason, runtime::Timeline)>) {
        (self.sequences[index].has_ended, self.sequences[index].ending) = (true, ending);
    }

    /// One failed: the others have no use any more.
    fn fail(&mut self, index: usize, refusal: Refusal, timeline: Option<runtime::Timeline>) {
        self.metrics.runtime_failure(self.model.name());
        self.failed = Some(refusal);
        self.end_one(index, timeline.map(|timeline| (runtime::FinishReason::Cancelled, timeline)));
        self.cancel();
    }
}

impl Chunks for Stream {
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Chunk> {
        let count = self.sequences.len();
        let mut asked = 0;
        while asked < count {
            let index = (self.turn + asked) % count;
            if self.sequences[index].has_ended {
                asked += 1;
                continue;
            }
            let Poll::Ready(event) = self.sequences[index].generation.poll_next(context) else {
                asked += 1;
                continue;
            };
            match event {
                Some(runtime::Event::Text { text, tokens, logprobs }) => {
                    self.turn = (index + 1) % count;
                    return Poll::Ready(self.part(index, text, tokens, &logprobs));
                }
                Some(runtime::Event::Finished { reason, tokens, mut logprobs, timeline }) => {
                    self.end_one(index, Some((reason, timeline)));
                    // A stop string is no part of the answer, as little as an end token.
                    if reason == runtime::FinishReason::Stop {
                        logprobs.clear();
                    }
                    // The end token makes no text.
                    let has_tokens = self.tells_tokens && !tokens.is_empty();
                    if has_tokens || !logprobs.is_empty() || self.owes_logprobs(index) {
                        return Poll::Ready(self.part(index, String::new(), tokens, &logprobs));
                    }
                }
                Some(runtime::Event::Failed { failure, timeline }) => {
                    tracing::error!(model = self.model.name(), %failure, "a sequence failed in the engine");
                    let refusal = match (failure, self.form) {
                        // It can be compiled and still be more than a step may cost.
                        (runtime::Failure::Grammar(why), Some(field)) => {
                            Refusal::BadParam { param: field.into(), why: format!("could not be followed: {why}") }
                        }
                        (runtime::Failure::Unloaded, _) => {
                            Refusal::ModelUnavailable { model: self.model.name().to_owned() }
                        }
                        _ => Refusal::EngineFailed,
                    };
                    self.fail(index, refusal, Some(timeline));
                }
                // The engine promises a last event; without one it is gone.
                None => self.fail(index, Refusal::EngineFailed, None),
            }
        }
        match self.sequences.iter().all(|sequence| sequence.has_ended) {
            true => Poll::Ready(self.end()),
            false => Poll::Pending,
        }
    }

    fn cancel(&mut self) {
        for sequence in &mut self.sequences {
            sequence.generation.cancel();
        }
    }
}
