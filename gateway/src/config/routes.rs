//! `routes.toml`: what clients reach, and who answers them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::NAME_CHARS_MAX;
use super::models::{self, ModelConfig};
use super::problem::did_you_mean;
use super::reader::{At, Section};
use super::upstreams::{self, UpstreamConfig};
use crate::accounting::settlement::Durability;
use crate::exchange::EMBEDDED;
use crate::ports::Priority;

#[derive(Clone, Debug)]
pub struct RouteConfig {
    pub name: String,
    /// (variant, weight), in the order of the file.
    pub split: Vec<(String, u32)>,
    pub sticky: Vec<Unit>,
    /// Who is asked when the chosen one fails before it has said anything, in order.
    pub fallback: Vec<String>,
    pub cache: Option<CacheRule>,
    pub shadow: Option<ShadowRule>,
    pub priority: Priority,
    pub timeouts: Timeouts,
    /// What an answer's row has survived before the answer says what was used.
    pub durability: Durability,
}

/// Which answers may be given again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheRule {
    pub ttl: Duration,
    /// Also those that would differ each time.
    pub sampled: bool,
}

/// Who gets copies of requests for comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct ShadowRule {
    pub variant: String,
    /// The share of requests, from 0 to 1.
    pub sample: f64,
}

/// What a caller is told apart by, so that they keep their variant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unit {
    Header(String),
    User,
    Key,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Until an engine of ours begins with it.
    pub queue: Duration,
    pub first_token: Duration,
    pub idle: Duration,
    pub total: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            queue: Duration::from_secs(15),
            first_token: Duration::from_secs(30),
            idle: Duration::from_secs(30),
            total: Duration::from_secs(300),
        }
    }
}

const CACHE_TTL: Duration = Duration::from_secs(600);

/// What the routes file says.
pub(super) struct Reached {
    pub upstreams: BTreeMap<String, Arc<UpstreamConfig>>,
    pub models: BTreeMap<String, ModelConfig>,
    pub routes: Vec<RouteConfig>,
}

/// `durability`: of routes that do not say.
pub(super) fn routes(root: Section<'_, '_>, folder: &Path, model_roots: &[PathBuf], durability: Durability) -> Reached {
    let mut upstreams = BTreeMap::new();
    for (name, section) in root.sections("upstreams") {
        check_name(&section, &name, "upstream");
        if name.value == EMBEDDED {
            section.problem_at(name.at, format!("`{EMBEDDED}` is what the embedded runtime is called"));
        }
        if let Some(upstream) = upstreams::upstream(&section, &name.value, folder) {
            upstreams.insert(name.value, Arc::new(upstream));
        }
        section.finish();
    }
    let mut models = BTreeMap::new();
    for (name, section) in root.sections("models") {
        check_name(&section, &name, "model");
        let model = models::model(&section, &name.value, &upstreams, model_roots);
        section.finish();
        models.insert(name.value, model);
    }

    let mut routes: Vec<RouteConfig> = Vec::new();
    for (name, section) in root.sections("routes") {
        check_name(&section, &name, "route");
        if models.get(&name.value).is_some_and(|model| model.public) {
            section.problem_at(
                name.at,
                format!("`{}` is also the name of a public model; clients could not tell them apart", name.value),
            );
        }
        let split = split(&section, &models);
        let fallback = section.strings("fallback").unwrap_or_default();
        for name in &fallback {
            check_model(&section, "fallback", name, &models);
        }
        let cache = section.section("cache").map(|section| {
            let rule = CacheRule {
                ttl: section.duration("ttl").unwrap_or(CACHE_TTL),
                sampled: section.boolean("sampled").unwrap_or(false),
            };
            section.finish();
            rule
        });
        let shadow = section.section("shadow").and_then(|section| shadow_rule(section, &models));
        let sticky = match section.strings("sticky") {
            Some(units) => units.into_iter().filter_map(|unit| sticky_unit(&section, unit)).collect(),
            None => vec![Unit::User, Unit::Key],
        };
        let durability = super::gateway::durability(&section).unwrap_or(durability);
        let priority = section.word("priority", &Priority::WORDS).and_then(Priority::parse).unwrap_or_default();
        let timeouts = section.section("timeouts").map(timeouts).unwrap_or_default();
        section.finish();
        let fallback = fallback.into_iter().map(|name| name.value).collect();
        let name = name.value;
        routes.push(RouteConfig { name, split, sticky, fallback, cache, shadow, priority, timeouts, durability });
    }
    if routes.is_empty() && !models.values().any(|model| model.public) {
        root.problem("there is nothing that a client could call: add a `[routes.NAME]` with a `split`");
    }
    root.finish();
    Reached { upstreams, models, routes }
}

fn shadow_rule(section: Section<'_, '_>, models: &BTreeMap<String, ModelConfig>) -> Option<ShadowRule> {
    let variant = section.string("variant");
    let sample = section.number("sample");
    if let Some(sample) = &sample
        && !(0.0..=1.0).contains(&sample.value)
    {
        section.problem_at(sample.at, format!("`{}.sample` must be a number from 0 to 1", section.name()));
    }
    match &variant {
        Some(variant) => check_model(&section, "variant", variant, models),
        None => section.problem(format!("`{}` needs a `variant`: who gets the copies", section.name())),
    }
    section.finish();
    Some(ShadowRule { variant: variant?.value, sample: sample.map_or(1.0, |sample| sample.value) })
}

fn timeouts(section: Section<'_, '_>) -> Timeouts {
    let default = Timeouts::default();
    let first_token = section.duration("first_token").unwrap_or(default.first_token);
    let queue = section.duration("queue");
    if queue.is_some_and(|queue| queue >= first_token) {
        section.problem(format!(
            "`{0}.queue` is not shorter than `{0}.first_token`, so it limits nothing",
            section.name()
        ));
    }
    let timeouts = Timeouts {
        // The other half is for reading the prompt.
        queue: queue.unwrap_or(first_token / 2),
        first_token,
        idle: section.duration("idle").unwrap_or(default.idle),
        total: section.duration("total").unwrap_or(default.total),
    };
    section.finish();
    timeouts
}

fn check_model(section: &Section<'_, '_>, key: &str, name: &At<String>, models: &BTreeMap<String, ModelConfig>) {
    if !models.contains_key(&name.value) {
        let hint = did_you_mean(&name.value, models.keys().map(String::as_str));
        section.problem_at(
            name.at,
            format!("`{}.{key}` names `{}`, which is no model here{hint}", section.name(), name.value),
        );
    }
}

fn split(section: &Section<'_, '_>, models: &BTreeMap<String, ModelConfig>) -> Vec<(String, u32)> {
    let Some(weights) = section.weights("split") else {
        section.problem(format!("`{}` needs a `split`, such as {{ glimmer-1 = 90, glimmer-2 = 10 }}", section.name()));
        return Vec::new();
    };
    for (name, _) in &weights {
        check_model(section, "split", name, models);
    }
    if weights.iter().all(|(_, weight)| *weight == 0) {
        section
            .problem(format!("`{}.split` gives nobody a share: at least one weight must be above 0", section.name()));
    }
    weights.into_iter().map(|(name, weight)| (name.value, weight)).collect()
}

fn sticky_unit(section: &Section<'_, '_>, unit: At<String>) -> Option<Unit> {
    match unit.value.as_str() {
        "user" => return Some(Unit::User),
        "key" => return Some(Unit::Key),
        _ => {}
    }
    if let Some(header) = unit.value.strip_prefix("header:")
        && http::HeaderName::from_bytes(header.as_bytes()).is_ok()
    {
        return Some(Unit::Header(header.to_ascii_lowercase()));
    }
    section.problem_at(
        unit.at,
        format!("`{}.sticky` may name \"header:…\", \"user\" and \"key\", not \"{}\"", section.name(), unit.value),
    );
    None
}

fn check_name(section: &Section<'_, '_>, name: &At<String>, kind: &str) {
    let fine = !name.value.is_empty()
        && name.value.len() <= NAME_CHARS_MAX
        && name.value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        && name.value != "none";
    if !fine {
        section.problem_at(
            name.at,
            format!(
                "`{}` cannot name a {kind}: use at most {NAME_CHARS_MAX} letters, digits, '-', '_' or '.'",
                name.value
            ),
        );
    }
}
