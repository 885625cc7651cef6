//! The embedded runtime as a backend: the one place where its words become ours.

mod embeddings;
mod stream;

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
pub use embeddings::EmbeddingModel;
use glassgate_runtime as runtime;
use stream::{Sequence, Stream};

use crate::accounting::settlement::Running;
use crate::answer::Answer;
use crate::api::openai::asked::Asked;
use crate::api::openai::request::Sampling;
use crate::dispatch::{Call, NotStarted, Urgency};
use crate::models::templates::{Templates, Unrendered};
use crate::observe::metrics::Metrics;
use crate::ports::{Form, Meter, Prepared, Priority, Prompt, Tokenize, Turn};
use crate::refusal::Refusal;
use crate::routing::{Leg, Measure, beside_if_long};

/// A loaded model version.
pub struct Embedded {
    model: runtime::Model,
    /// None: it brings no chat template.
    templates: Option<Templates>,
    metrics: Arc<Metrics>,
}

impl Embedded {
    pub fn new(model: runtime::Model, templates: Option<Templates>, metrics: Arc<Metrics>) -> Self {
        Embedded { model, templates, metrics }
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
                    sequences: generations.into_iter().map(Sequence::new).collect(),
                    turn: 0,
                    choices: choices as usize,
                    class: call.urgency.as_str(),
                    queue: call.queue.unwrap_or_default(),
                    tells_tokens: call.request.return_token_ids,
                    tells_logprobs: asked.logprobs.is_some() && call.urgency != Urgency::Nobody,
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
        params.logprobs = asked.logprobs.filter(|_| call.urgency != Urgency::Nobody);
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
                Urgency::User(Priority::Interactive) => runtime::Class::Interactive,
                Urgency::User(Priority::Batch) => runtime::Class::Batch,
                Urgency::Nobody => runtime::Class::Shadow,
            },
            // Of several prompts one may have begun: the others then wait as long as it takes.
            deadline: call.queue.filter(|_| measure.prompts.len() == 1).map(|queue| Instant::now() + queue),
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

#[async_trait]
impl Tokenize for Embedded {
    async fn render(&self, turns: &[Turn]) -> Result<String, Refusal> {
        let bad = |why: String| Refusal::BadParam { param: "messages".into(), why };
        let Some(templates) = &self.templates else {
            return Err(bad("cannot be read: this model has no chat template".into()));
        };
        let bytes = turns.iter().map(|turn| turn.content.len()).sum();
        let message = |turn: &Turn| runtime::Message { role: turn.role.clone(), content: turn.content.clone() };
        let (model, messages) = (self.model.clone(), turns.iter().map(message).collect::<Vec<_>>());
        let guarded = beside_if_long(bytes, move || model.guarded(&messages)).await?;
        templates.render(guarded).await.map_err(|unrendered| match unrendered {
            Unrendered::Refused(why) => bad(format!("does not fit the model's chat template: {why}")),
            Unrendered::TooMuch(why) => bad(format!("cannot be put into the model's chat template: that {why}")),
            Unrendered::Busy => Refusal::EngineBusy { retry_after: self.model.retry_after() },
            Unrendered::Unavailable => Refusal::ModelUnavailable { model: self.model.name().to_owned() },
        })
    }

    fn tokenize(&self, prompt: &Prompt) -> Result<Vec<u32>, String> {
        let text = match prompt {
            Prompt::Turns(_) => return Err("is not in the model's chat template yet".into()),
            Prompt::Text(text) | Prompt::Cut(text) => text,
            Prompt::Tokens(tokens) => return Ok(tokens.clone()),
        };
        self.model.tokenize(text).map_err(|error| format!("cannot be tokenised: {error}"))
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
