//! What a request will read and may write, of whoever may answer it → `Plan`.

use std::collections::VecDeque;
use std::sync::Arc;

use super::{Reads, Target, estimate};
use crate::accounting::core::Usage;
use crate::accounting::price::Extras;
use crate::accounting::settlement::Most;
use crate::answer::Prompts;
use crate::api::openai::embeddings;
use crate::api::openai::request::{Op, Request};
use crate::ports::{Form, Prepared, Prompt, Tokenize};
use crate::refusal::Refusal;

/// Prompts longer than this are read off the proxy's threads.
const INLINE_BYTES_MAX: usize = 16 << 10;

/// What a request will read and may write.
#[derive(Clone, Debug, Default)]
pub struct Measure {
    /// Exact prompts for an embedded model; empty for an upstream.
    pub prompts: Arc<[Vec<u32>]>,
    /// Prompt tokens: counted here, estimated elsewhere.
    pub input: u64,
    /// Answers: prompts × `n`.
    pub choices: u32,
    /// Answers that are made to choose from them (`best_of`).
    pub made: u32,
    /// Tokens that each of them may have.
    pub output_max: u64,
    /// What its price depends on beside tokens.
    pub extras: Extras,
    /// The form that an embedded model's answers must have.
    pub form: Option<Prepared>,
}

impl Measure {
    /// The most that the request can use.
    pub fn reservation(&self) -> Usage {
        Usage::tokens(self.input, self.output_max.saturating_mul(u64::from(self.made)))
    }

    /// What the client is told of the prompts.
    pub fn told_prompts(&self, request: &Request) -> Prompts {
        if request.return_token_ids { Prompts::new(self.prompts.clone(), request.n) } else { Prompts::default() }
    }
}

/// One target with what it would take to answer.
#[derive(Clone)]
pub struct Leg {
    pub target: Arc<Target>,
    pub measure: Measure,
}

impl Leg {
    /// The most that it can take of a request that began then.
    pub fn most(&self, started_ns: i64) -> Most {
        Most::of(&self.measure.reservation(), self.measure.extras, self.target.prices.at(started_ns))
    }

    /// The most that can be, also where the prompt is only estimated.
    pub fn bound(&self, request: &Request, started_ns: i64) -> Most {
        let mut usage = self.measure.reservation();
        if let Reads::Elsewhere { context } = self.target.reads {
            let most = estimate::prompt_tokens_bound(&request.body);
            usage.input = most.min(context.unwrap_or(most)).max(usage.input);
        }
        Most::of(&usage, self.measure.extras, self.target.prices.at(started_ns))
    }
}

/// Every attempt that is allowed, in order, measured. Never empty.
#[derive(Clone)]
pub struct Plan {
    pub first: Leg,
    pub fallback: VecDeque<Leg>,
}

impl Plan {
    fn legs(&self) -> impl Iterator<Item = &Leg> {
        std::iter::once(&self.first).chain(&self.fallback)
    }

    /// What whichever of them answers can use and cost.
    pub fn most(&self, started_ns: i64) -> Most {
        self.legs().map(|leg| leg.most(started_ns)).fold(Most::default(), Most::max)
    }

    /// As `most`, with no estimate in it: reckons the length of the request, so only for limits that ask for it.
    pub fn bound(&self, request: &Request, started_ns: i64) -> Most {
        self.legs().map(|leg| leg.bound(request, started_ns)).fold(Most::default(), Most::max)
    }
}

/// As `measure`, by whom the client may be answered. (Nobody reads what a shadow says.)
pub(super) async fn measure_for_client(target: &Arc<Target>, request: &Request) -> Result<Leg, Refusal> {
    if let Reads::Elsewhere { .. } = target.reads {
        request.check_upstream()?;
    }
    measure(target, request).await
}

/// Counts the prompt, exactly where that is possible, and bounds the answer.
///
/// # Errors
/// `Unsupported` and `BadParam` for what the model does not do or its template refuses; `ContextExceeded` with the counts.
pub async fn measure(target: &Arc<Target>, request: &Request) -> Result<Leg, Refusal> {
    if request.op == Op::Embeddings {
        return measure_texts(target, request).await;
    }
    let mut form = None;
    let (prompts, input, longest, context_tokens) = match &target.reads {
        Reads::Embeds { .. } => {
            let why = format!("names `{}`, which makes embeddings and writes no text", request.model);
            return Err(Refusal::BadParam { param: "model".into(), why });
        }
        Reads::Here(tokenize) => {
            let asked = request.asked()?;
            let prompts = count(tokenize, request).await?;
            let input = prompts.iter().map(|prompt| prompt.len() as u64).sum();
            let longest = prompts.iter().map(Vec::len).max().unwrap_or(0) as u64;
            if let Some((field, asked)) = asked.form {
                form = Some(prepare(tokenize, field, asked).await?);
            }
            (prompts.into(), input, longest, Some(tokenize.context()))
        }
        Reads::Elsewhere { context } => {
            let input = estimate::prompt_tokens(&request.body);
            // What is sent as a bound must not be smaller than what fits: there, the estimate leans the other way.
            (Arc::default(), input, context.map_or(0, |context| (input / 2).min(context.saturating_sub(1))), *context)
        }
        Reads::Never => return Err(Refusal::ModelUnavailable { model: target.variant.clone() }),
    };
    let room = context_tokens.map_or(u64::MAX, |context| context.saturating_sub(longest));
    let over = |output_tokens| Refusal::ContextExceeded {
        prompt_tokens: longest,
        output_tokens,
        context_tokens: context_tokens.unwrap_or(u64::MAX),
    };
    // An estimate bounds what is reserved; it is no reason to refuse.
    let is_exact = matches!(target.reads, Reads::Here(_));
    let output_max = match request.max_tokens {
        Some(asked) if is_exact && asked > room => return Err(over(Some(asked))),
        Some(asked) if asked > target.output_max => {
            let why = format!("must be at most {} for this model", target.output_max);
            return Err(Refusal::BadParam { param: request.op.bound_field().into(), why });
        }
        Some(asked) => asked,
        None if room == 0 => return Err(over(None)),
        None => room.min(target.output_max),
    };
    let count = request.prompt_count();
    let (choices, made) = (request.n.saturating_mul(count), request.n.max(request.best_of).saturating_mul(count));
    let extras = extras(request);
    Ok(Leg { target: target.clone(), measure: Measure { prompts, input, choices, made, output_max, extras, form } })
}

/// As `measure`, for vectors: there is much to read and nothing to write.
async fn measure_texts(target: &Arc<Target>, request: &Request) -> Result<Leg, Refusal> {
    let choices = request.prompt_count();
    let (prompts, input): (Arc<[Vec<u32>]>, u64) = match &target.reads {
        Reads::Embeds { tokenize, dimensions } => {
            let (_, wanted) = embeddings::wanted(&request.body);
            if wanted.is_some_and(|wanted| wanted != u64::from(*dimensions)) {
                let why = format!("the vectors of this model have {dimensions} numbers and cannot be shortened");
                return Err(Refusal::Unsupported { param: "dimensions".into(), why });
            }
            let texts = count(tokenize, request).await?;
            let limit = tokenize.context();
            if let Some(index) = texts.iter().position(|text| text.len() as u64 > limit) {
                return Err(Refusal::TextTooLong { index, tokens: texts[index].len() as u64, limit });
            }
            let input = texts.iter().map(|text| text.len() as u64).sum();
            (texts.into(), input)
        }
        Reads::Elsewhere { .. } => (Arc::default(), estimate::prompt_tokens(&request.body)),
        Reads::Here(_) => {
            let why = format!("names `{}`, which writes text and makes no embeddings", request.model);
            return Err(Refusal::BadParam { param: "model".into(), why });
        }
        Reads::Never => return Err(Refusal::ModelUnavailable { model: target.variant.clone() }),
    };
    let measure = Measure { prompts, input, choices, extras: extras(request), ..Measure::default() };
    Ok(Leg { target: target.clone(), measure })
}

fn extras(request: &Request) -> Extras {
    Extras { images: estimate::images(&request.body), service: request.service }
}

/// Renders and tokenises.
async fn count(tokenize: &Arc<dyn Tokenize>, request: &Request) -> Result<Vec<Vec<u32>>, Refusal> {
    let mut prompts = request.prompts()?;
    for prompt in &mut prompts {
        if let Prompt::Turns(turns) = prompt {
            *prompt = Prompt::Text(tokenize.render(turns).await?);
        }
    }
    let bytes = prompts.iter().map(Prompt::bytes).sum();
    let tokenize = tokenize.clone();
    let all = move || prompts.iter().map(|prompt| tokenize.tokenize(prompt)).collect();
    let counted: Result<Vec<Vec<u32>>, String> = beside_if_long(bytes, all).await?;
    counted.map_err(|why| Refusal::BadParam { param: request.op.input_field().into(), why })
}

/// Does what takes a while for many bytes; beside the proxy's threads if there are many.
pub async fn beside_if_long<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Refusal> {
    if bytes <= INLINE_BYTES_MAX {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await.map_err(|_| Refusal::Internal)
}

/// Makes a form ready, beside the proxy's threads.
async fn prepare(tokenize: &Arc<dyn Tokenize>, field: &'static str, form: Form) -> Result<Prepared, Refusal> {
    let tokenize = tokenize.clone();
    let prepared = tokio::task::spawn_blocking(move || tokenize.prepare(&form)).await;
    prepared.map_err(|_| Refusal::Internal)?.map_err(|why| Refusal::BadParam { param: field.into(), why })
}
