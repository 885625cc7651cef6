//! Which variant answers → `Route`.

pub mod core;

use std::sync::Arc;

use http::HeaderMap;

use crate::accounting::core::{Price, Usage};
use crate::api::openai::chat::ChatRequest;
use crate::auth::Caller;
use crate::config::{RouteConfig, Timeouts, Unit};
use crate::ports::Tokenize;
use crate::refusal::Refusal;

/// Session ids longer than this are no ids.
const SESSION_BYTES_MAX: usize = 256;
/// Prompts longer than this are tokenised off the proxy's threads.
const INLINE_BYTES_MAX: usize = 16 << 10;

/// One model version that can answer.
#[derive(Clone)]
pub struct Target {
    pub variant: String,
    pub model: String,
    pub price: Price,
    /// Tokens that one answer may have at the most.
    pub output_max: u64,
    /// `None` while the model is not able to serve.
    pub tokenize: Option<Arc<dyn Tokenize>>,
}

/// A route of the configuration with its targets resolved.
struct Entry {
    config: RouteConfig,
    targets: Vec<Target>,
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
    target: Target,
    tokenize: Arc<dyn Tokenize>,
    timeouts: Timeouts,
}

/// What a request will read and may write, counted exactly.
#[derive(Debug)]
pub struct Measure {
    pub prompt: Vec<u32>,
    pub output_max: u64,
}

impl Measure {
    /// The most that the request can use.
    pub fn reservation(&self) -> Usage {
        Usage::tokens(self.prompt.len() as u64, self.output_max)
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
    /// Adds a route; `targets` are in the order of its split.
    pub fn add(&mut self, config: RouteConfig, targets: Vec<Target>) {
        self.entries.push(Entry { config, targets });
    }

    /// The names that clients can ask for, in the order of the file.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|entry| entry.config.name.as_str())
    }

    /// The name itself, if clients can ask for it.
    ///
    /// # Errors
    /// `UnknownModel` with what there is.
    pub fn find(&self, name: &str) -> Result<&str, Refusal> {
        self.entry(name).map(|entry| entry.config.name.as_str())
    }

    /// # Errors
    /// `UnknownModel` with what there is; `ModelUnavailable` if no variant is able to answer.
    pub fn choose(&self, caller: &Caller, request: &ChatRequest, headers: &HeaderMap) -> Result<Route, Refusal> {
        let entry = self.entry(&request.model)?;
        let unit = entry.unit(caller.key_id(), request.user.as_deref(), headers);
        let able: Vec<(&Target, &Arc<dyn Tokenize>, u32)> = entry
            .targets
            .iter()
            .zip(&entry.config.split)
            .filter_map(|(target, (_, weight))| Some((target, target.tokenize.as_ref()?, *weight)))
            .collect();
        let weights: Vec<(&str, u32)> =
            able.iter().map(|(target, _, weight)| (target.variant.as_str(), *weight)).collect();
        // A variant that cannot serve is left out; its callers spread over the others, and nobody else moves.
        let Some((target, tokenize, _)) =
            core::pick(&entry.config.name, &unit, &weights).and_then(|index| able.get(index))
        else {
            return Err(Refusal::ModelUnavailable { model: entry.config.name.clone() });
        };
        Ok(Route {
            name: entry.config.name.clone(),
            target: (*target).clone(),
            tokenize: Arc::clone(tokenize),
            timeouts: entry.config.timeouts,
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
                available: target.tokenize.is_some(),
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

    fn entry(&self, name: &str) -> Result<&Entry, Refusal> {
        self.entries.iter().find(|entry| entry.config.name == name).ok_or_else(|| Refusal::UnknownModel {
            // The name is the client's; what goes back of it is bounded.
            model: name.chars().take(64).collect(),
            available: self.names().map(str::to_owned).collect(),
        })
    }
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
    pub fn model(&self) -> &str {
        &self.target.model
    }
    pub fn variant(&self) -> &str {
        &self.target.variant
    }
    pub fn price(&self) -> Price {
        self.target.price
    }
    pub fn timeouts(&self) -> Timeouts {
        self.timeouts
    }

    /// Counts the prompt exactly and bounds the answer.
    ///
    /// # Errors
    /// `ContextExceeded` with the counts; `BadParam` if the model's template refuses the conversation.
    pub async fn measure(&self, request: &ChatRequest) -> Result<Measure, Refusal> {
        let bytes: usize = request.turns.iter().map(|turn| turn.content.len()).sum();
        let tokenized = if bytes <= INLINE_BYTES_MAX {
            self.tokenize.tokenize(&request.turns)
        } else {
            let (tokenize, turns) = (self.tokenize.clone(), request.turns.clone());
            tokio::task::spawn_blocking(move || tokenize.tokenize(&turns)).await.map_err(|_| Refusal::Internal)?
        };
        let prompt = tokenized.map_err(|why| Refusal::BadParam { param: "messages".into(), why })?;
        let (prompt_tokens, context_tokens) = (prompt.len() as u64, self.tokenize.context());
        let room = context_tokens.saturating_sub(prompt_tokens);
        let output_max = match request.max_tokens {
            Some(asked) if asked > room => {
                return Err(Refusal::ContextExceeded { prompt_tokens, output_tokens: Some(asked), context_tokens });
            }
            Some(asked) if asked > self.target.output_max => {
                return Err(Refusal::BadParam {
                    param: "max_completion_tokens".into(),
                    why: format!("must be at most {} for this model", self.target.output_max),
                });
            }
            Some(asked) => asked,
            None if room == 0 => {
                return Err(Refusal::ContextExceeded { prompt_tokens, output_tokens: None, context_tokens });
            }
            None => room.min(self.target.output_max),
        };
        Ok(Measure { prompt, output_max })
    }
}
