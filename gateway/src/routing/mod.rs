//! Which variant answers → `Route`.

pub mod core;
pub mod estimate;
mod explain;
mod measure;

use std::collections::VecDeque;
use std::sync::Arc;

use http::HeaderMap;

pub use self::explain::{ExplainedVariant, Explanation};
use self::measure::measure_for_client;
pub use self::measure::{Leg, Measure, Plan, beside_if_long, measure};
use crate::accounting::price::Prices;
use crate::accounting::settlement::{Costs, Durability};
use crate::api::openai::request::{Op, Request};
use crate::auth::Caller;
use crate::config::{CacheRule, RouteConfig, Timeouts, Unit};
use crate::ports::{Priority, Tokenize};
use crate::refusal::Refusal;

/// Session ids longer than this are no ids.
const SESSION_BYTES_MAX: usize = 256;
/// The header by which a client lets others go first.
const PRIORITY: &str = "x-glassgate-priority";

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
