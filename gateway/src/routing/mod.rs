//! Which variant answers → `Route`.

pub mod core;
pub mod estimate;

use std::collections::VecDeque;
use std::sync::Arc;

use http::HeaderMap;

use crate::accounting::core::Usage;
use crate::accounting::price::Prices;
use crate::accounting::settlement::{Costs, Durability, Most};
use crate::answer::Prompts;
use crate::api::openai::embeddings;
use crate::api::openai::request::{Op, Request};
use crate::auth::Caller;
use crate::config::{CacheRule, RouteConfig, Timeouts, Unit};
use crate::ports::{Form, Prepared, Priority, Prompt, Tokenize};
use crate::refusal::Refusal;

/// Session ids longer than this are no ids.
const SESSION_BYTES_MAX: usize = 256;
/// The header by which a client lets others go first.
const PRIORITY: &str = "x-glassgate-priority";
/// Prompts longer than this are read off the proxy's threads.
const INLINE_BYTES_MAX: usize = 16 << 10;

/// One model version that can answer.
pub struct Target {
    pub variant: String,
    pub model: String,
    /// `glassgate`, or the upstream's name.
    pub provider: String,
    /// Which weights, or which model of which server: what makes its answers its own.
    pub identity: String,
    pub prices: Prices,
    pub costs: Costs,
    /// Tokens that one answer may have at the most.
    pub output_max: u64,
    pub reads: Reads,
    /// Where it runs, if not here.
    pub server: Option<(String, u16)>,
}

/// How a target reads prompts, which says how they are counted.
pub enum Reads {
    /// In this process, so exactly.
    Here(Arc<dyn Tokenize>),
    /// In this process, to make vectors of so many numbers.
    Embeds { tokenize: Arc<dyn Tokenize>, dimensions: u32 },
    /// Elsewhere; `context` is what it can take, where that is known.
    Elsewhere { context: Option<u64> },
    /// Not at all, while the model cannot be loaded.
    Never,
}

impl Target {
    fn is_able(&self) -> bool {
        !matches!(self.reads, Reads::Never)
    }

    /// Whether it makes vectors, as far as we know: of a server we do not.
    fn may_embed(&self) -> bool {
        !matches!(self.reads, Reads::Here(_))
    }
}

/// A route of the configuration with its targets resolved.
pub struct Entry {
    pub config: RouteConfig,
    /// In the order of the split.
    pub targets: Vec<Arc<Target>>,
    /// Who is asked when the chosen one fails, in order.
    pub fallback: Vec<Arc<Target>>,
    pub shadow: Option<Arc<Target>>,
}

/// The table of everything that clients can ask for.
#[derive(Default)]
pub struct Routing {
    entries: Vec<Entry>,
}

/// Proof that a target was chosen. Only `Routing::choose` makes one.
#[derive(Clone)]
pub struct Route {
    name: String,
    /// The chosen one, then who may stand in.
    targets: Vec<Arc<Target>>,
    shadow: Option<(Arc<Target>, f64)>,
    cache: Option<CacheRule>,
    priority: Priority,
    timeouts: Timeouts,
    durability: Durability,
}

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
        Most::of(&self.measure.reservation(), self.target.prices.at(started_ns))
    }

    /// The most that can be, also where the prompt is only estimated.
    pub fn bound(&self, request: &Request, started_ns: i64) -> Most {
        let mut usage = self.measure.reservation();
        if let Reads::Elsewhere { context } = self.target.reads {
            let most = estimate::prompt_tokens_bound(&request.body);
            usage.input = most.min(context.unwrap_or(most)).max(usage.input);
        }
        Most::of(&usage, self.target.prices.at(started_ns))
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

/// Why a caller gets the variant they get.
#[derive(Debug, serde::Serialize)]
pub struct Explanation {
    pub route: String,
    pub unit: String,
    pub chosen: Option<String>,
    pub variants: Vec<ExplainedVariant>,
}

#[derive(Debug, serde::Serialize)]
pub struct ExplainedVariant {
    pub name: String,
    pub weight: u32,
    pub share: f64,
    pub available: bool,
    /// −ln(u)/weight; the lowest of the available ones wins.
    pub draw: Option<f64>,
}

impl Routing {
    pub fn add(&mut self, entry: Entry) {
        self.entries.push(entry);
    }

    /// The names that clients can ask for, in the order of the file.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|entry| entry.config.name.as_str())
    }

    /// As `names`, of those that this caller may use.
    pub fn names_for<'a>(&'a self, caller: &'a Caller) -> impl Iterator<Item = &'a str> {
        self.names().filter(|name| caller.may_use(name))
    }

    /// The name itself, if this caller can ask for it.
    ///
    /// # Errors
    /// `UnknownModel` with what there is for them.
    pub fn find(&self, name: &str, caller: &Caller) -> Result<&str, Refusal> {
        self.entry_for(name, caller).map(|entry| entry.config.name.as_str())
    }

    /// # Errors
    /// `UnknownModel` with what there is; `ModelUnavailable` if nobody is able to answer.
    pub fn choose(&self, caller: &Caller, request: &Request, headers: &HeaderMap) -> Result<Route, Refusal> {
        if request.op == Op::Embeddings && !self.targets().any(|target| target.may_embed()) {
            return Err(Refusal::NoEmbeddingModel);
        }
        let entry = self.entry_for(&request.model, caller)?;
        let unit = entry.unit(caller.key_id(), caller.user().or(request.user.as_deref()), headers);
        let able: Vec<(&Arc<Target>, u32)> = entry
            .targets
            .iter()
            .zip(&entry.config.split)
            .filter_map(|(target, (_, weight))| target.is_able().then_some((target, *weight)))
            .collect();
        let weights: Vec<(&str, u32)> =
            able.iter().map(|(target, weight)| (target.variant.as_str(), *weight)).collect();
        // A variant that cannot serve is left out; its callers spread over the others, and nobody else moves.
        let picked = core::pick(&entry.config.name, &unit, &weights).and_then(|index| able.get(index));
        let mut targets: Vec<Arc<Target>> = picked.map(|(target, _)| Arc::clone(target)).into_iter().collect();
        for target in entry.fallback.iter().filter(|target| target.is_able()) {
            if targets.iter().all(|taken| taken.variant != target.variant) {
                targets.push(target.clone());
            }
        }
        let Some(chosen) = targets.first() else {
            return Err(Refusal::ModelUnavailable { model: entry.config.name.clone() });
        };
        let shadow = entry
            .shadow
            .as_ref()
            .filter(|shadow| shadow.is_able() && shadow.variant != chosen.variant)
            .zip(entry.config.shadow.as_ref().map(|rule| rule.sample));
        Ok(Route {
            name: entry.config.name.clone(),
            shadow: shadow.map(|(target, sample)| (target.clone(), sample)),
            cache: entry.config.cache,
            priority: entry.config.priority,
            durability: entry.config.durability,
            timeouts: entry.config.timeouts,
            targets,
        })
    }

    /// The decision and its reasons, for `glassgate routes explain`.
    ///
    /// # Errors
    /// `UnknownModel` with what there is.
    pub fn explain(&self, route: &str, key_id: &str, session: Option<&str>) -> Result<Explanation, Refusal> {
        let entry = self.entry(route)?;
        let mut headers = HeaderMap::new();
        if let Some(session) = session {
            for unit in &entry.config.sticky {
                if let Unit::Header(name) = unit
                    && let (Ok(name), Ok(value)) = (http::HeaderName::from_bytes(name.as_bytes()), session.parse())
                {
                    headers.insert(name, value);
                }
            }
        }
        let unit = entry.unit(key_id, None, &headers);
        let total: u32 = entry.config.split.iter().map(|(_, weight)| weight).sum();
        let variants: Vec<ExplainedVariant> = entry
            .targets
            .iter()
            .zip(&entry.config.split)
            .map(|(target, (name, weight))| ExplainedVariant {
                name: name.clone(),
                weight: *weight,
                share: f64::from(*weight) / f64::from(total.max(1)),
                available: target.is_able(),
                draw: (*weight > 0).then(|| -core::uniform(route, &unit, name).ln() / f64::from(*weight)),
            })
            .collect();
        let able: Vec<(&str, u32)> = variants
            .iter()
            .filter(|variant| variant.available)
            .map(|variant| (variant.name.as_str(), variant.weight))
            .collect();
        let chosen = core::pick(route, &unit, &able).map(|index| able[index].0.to_owned());
        Ok(Explanation { route: route.to_owned(), unit, chosen, variants })
    }

    fn targets(&self) -> impl Iterator<Item = &Arc<Target>> {
        self.entries.iter().flat_map(|entry| entry.targets.iter().chain(&entry.fallback))
    }

    fn entry(&self, name: &str) -> Result<&Entry, Refusal> {
        self.find_entry(name).ok_or_else(|| unknown(name, self.names()))
    }

    /// A model that a caller may not use does not exist for them.
    fn entry_for(&self, name: &str, caller: &Caller) -> Result<&Entry, Refusal> {
        let entry = self.find_entry(name).filter(|_| caller.may_use(name));
        entry.ok_or_else(|| unknown(name, self.names_for(caller)))
    }

    fn find_entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.config.name == name)
    }
}

fn unknown<'a>(name: &str, available: impl Iterator<Item = &'a str>) -> Refusal {
    // The name is the client's; what goes back of it is bounded.
    Refusal::UnknownModel { model: name.chars().take(64).collect(), available: available.map(str::to_owned).collect() }
}

impl Entry {
    fn unit(&self, key_id: &str, user: Option<&str>, headers: &HeaderMap) -> String {
        for unit in &self.config.sticky {
            match unit {
                Unit::Header(name) => {
                    if let Some(value) = header(headers, name) {
                        return format!("header:{name}={value}");
                    }
                }
                Unit::User => {
                    if let Some(user) = user {
                        return format!("user={user}");
                    }
                }
                Unit::Key => return format!("key={key_id}"),
            }
        }
        format!("key={key_id}")
    }
}

/// A header's value if it can be an id: not empty, not endless.
pub fn header<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok().filter(|value| (1..=SESSION_BYTES_MAX).contains(&value.len()))
}

impl Route {
    pub fn name(&self) -> &str {
        &self.name
    }
    /// Who was chosen; others may stand in.
    pub fn target(&self) -> &Arc<Target> {
        // There is one: `choose` makes no route without.
        &self.targets[0]
    }
    /// Who gets a copy afterwards, and of which share of the requests.
    pub fn shadow(&self) -> Option<(&Arc<Target>, f64)> {
        self.shadow.as_ref().map(|(target, sample)| (target, *sample))
    }
    /// Whether a variant is asked when the chosen one fails.
    pub fn stands_in(&self, variant: &str) -> bool {
        self.targets[1..].iter().any(|target| target.variant == variant)
    }
    pub fn cache(&self) -> Option<CacheRule> {
        self.cache
    }
    pub fn timeouts(&self) -> Timeouts {
        self.timeouts
    }

    /// What an answer's row has survived before the answer says what was used.
    pub fn durability(&self) -> Durability {
        self.durability
    }

    /// The route's, or what the client says if that is lower: nobody pushes themselves forward.
    ///
    /// # Errors
    /// `BadParam` for a header that says neither.
    pub fn priority(&self, headers: &HeaderMap) -> Result<Priority, Refusal> {
        let Some(said) = headers.get(PRIORITY) else { return Ok(self.priority) };
        let said = said.to_str().ok().and_then(Priority::parse);
        let bad = || Refusal::BadParam { param: PRIORITY.into(), why: "must be \"interactive\" or \"batch\"".into() };
        said.map(|said| said.max(self.priority)).ok_or_else(bad)
    }

    /// Measures the request for everybody who may answer it. A stand-in that cannot take it is left out.
    ///
    /// # Errors
    /// Why the chosen one cannot take it, as of `measure`; `Unsupported` for what we could not hand on of its answer.
    pub async fn measure(&self, request: &Request) -> Result<Plan, Refusal> {
        let first = measure_for_client(self.target(), request).await?;
        let mut fallback = VecDeque::new();
        for target in &self.targets[1..] {
            fallback.extend(measure_for_client(target, request).await.ok());
        }
        Ok(Plan { first, fallback })
    }
}

/// As `measure`, by whom the client may be answered. (Nobody reads what a shadow says.)
async fn measure_for_client(target: &Arc<Target>, request: &Request) -> Result<Leg, Refusal> {
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
    Ok(Leg { target: target.clone(), measure: Measure { prompts, input, choices, made, output_max, form } })
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
    Ok(Leg { target: target.clone(), measure: Measure { prompts, input, choices, made: 0, output_max: 0, form: None } })
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
