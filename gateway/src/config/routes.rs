//! `routes.toml`: what clients reach, and who answers them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::NAME_CHARS_MAX;
use super::problem::did_you_mean;
use super::reader::{At, Section};
use super::secret::Secret;
use crate::accounting::settlement::Durability;
use crate::exchange::EMBEDDED;
use crate::models::hub::{Reference, SCHEME};
use crate::ports::Priority;

/// A server that speaks OpenAI's dialect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamConfig {
    pub name: String,
    pub tls: bool,
    pub host: String,
    pub port: u16,
    /// The path that every call begins with, without a slash at its end.
    pub base: String,
    pub api_key: Option<Secret>,
    /// Certificates (PEM) to trust instead of the system's.
    pub ca: Option<PathBuf>,
    /// HTTP/2: negotiated over TLS, presumed without.
    pub http2: bool,
    pub connect: Duration,
}

impl UpstreamConfig {
    pub fn url(&self) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://{}:{}{}", self.host, self.port, self.base)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// The folder or `.gguf` file, found in one of the model roots.
    Local(PathBuf),
    /// Downloaded when it is first needed.
    Hub(Reference),
    Upstream {
        upstream: String,
        /// What the model is called there.
        name: String,
        context: Option<u64>,
    },
}

impl ModelSource {
    /// Whether the embedded runtime serves it.
    pub fn is_embedded(&self) -> bool {
        !matches!(self, ModelSource::Upstream { .. })
    }
}

impl std::fmt::Display for ModelSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ModelSource::Local(path) => write!(f, "{}", path.display()),
            ModelSource::Hub(reference) => write!(f, "{reference}"),
            ModelSource::Upstream { upstream, name, .. } => write!(f, "{name} at {upstream}"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Quantize {
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_k")]
    Q4K,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelConfig {
    pub source: ModelSource,
    /// What the embedded runtime makes of the weights while it reads them.
    pub quantize: Option<Quantize>,
    /// Whether clients may ask for it by its own name.
    pub public: bool,
    pub output_max: u32,
}

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

/// Tokens a request may produce when nobody says otherwise.
const OUTPUT_MAX: u32 = 1024;
const CACHE_TTL: Duration = Duration::from_secs(600);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

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
        if let Some(upstream) = upstream(&section, &name.value, folder) {
            upstreams.insert(name.value, Arc::new(upstream));
        }
        section.finish();
    }
    let mut models = BTreeMap::new();
    for (name, section) in root.sections("models") {
        check_name(&section, &name, "model");
        let source = model_source(&section, &name.value, &upstreams, model_roots);
        let model = ModelConfig {
            quantize: quantize(&section, &source),
            source,
            public: section.boolean("public").unwrap_or(false),
            output_max: section.integer("output_max", 1..=1_000_000).map_or(OUTPUT_MAX, |n| n as u32),
        };
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

fn upstream(section: &Section<'_, '_>, name: &str, folder: &Path) -> Option<UpstreamConfig> {
    let key = section.string("api_key");
    let ca = section.string("ca").map(|ca| folder.join(ca.value));
    let http2 = section.boolean("http2").unwrap_or(false);
    let connect = section.duration("connect_timeout").unwrap_or(CONNECT_TIMEOUT);
    let api_key = key.and_then(|key| secret(section, "api_key", key));
    let Some(url) = section.string("url") else {
        section.problem(format!("`{}` needs a `url` such as \"https://api.openai.com/v1\"", section.name()));
        return None;
    };
    let parsed = url.value.parse::<http::Uri>().ok().filter(|uri| uri.query().is_none());
    let scheme = parsed.as_ref().and_then(http::Uri::scheme_str);
    let (Some(uri), Some(tls)) = (
        &parsed,
        scheme.and_then(|scheme| match scheme {
            "https" => Some(true),
            "http" => Some(false),
            _ => None,
        }),
    ) else {
        section.problem_at(
            url.at,
            format!(
                "`{}.url` must be a URL such as \"https://api.openai.com/v1\", not \"{}\"",
                section.name(),
                url.value
            ),
        );
        return None;
    };
    if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        section.problem_at(url.at, format!("`{}.url` must not hold a password; use `api_key`", section.name()));
    }
    Some(UpstreamConfig {
        name: name.to_owned(),
        tls,
        host: uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned(),
        port: uri.port_u16().unwrap_or(if tls { 443 } else { 80 }),
        base: uri.path().trim_end_matches('/').to_owned(),
        api_key,
        ca,
        http2,
        connect,
    })
}

/// Secrets are named, not written down: files end up in git and in pictures.
fn secret(section: &Section<'_, '_>, key: &str, named: At<String>) -> Option<Secret> {
    let name = format!("{}.{key}", section.name());
    if !named.value.starts_with("env:") {
        section.problem_at(named.at, format!("`{name}` must name where the secret is, such as \"env:OPENAI_API_KEY\""));
        return None;
    }
    section.resolve(&named)
}

fn model_source(
    section: &Section<'_, '_>,
    name: &str,
    upstreams: &BTreeMap<String, Arc<UpstreamConfig>>,
    model_roots: &[PathBuf],
) -> ModelSource {
    let (source, upstream) = (section.string("source"), section.string("upstream"));
    let there = section.string("name");
    let context = section.integer("context", 1..=100_000_000);
    if let Some(upstream) = upstream {
        if !upstreams.contains_key(&upstream.value) {
            let hint = did_you_mean(&upstream.value, upstreams.keys().map(String::as_str));
            section.problem_at(
                upstream.at,
                format!("`{}.upstream` names `{}`, which is no upstream here{hint}", section.name(), upstream.value),
            );
        }
        if let Some(source) = source {
            section.problem_at(source.at, format!("`{}` has both a `source` and an `upstream`", section.name()));
        }
        let name = there.map_or(name.to_owned(), |name| name.value);
        return ModelSource::Upstream { upstream: upstream.value, name, context };
    }
    if there.is_some() || context.is_some() {
        section.problem(format!("`{}`: `name` and `context` belong to a model of an `upstream`", section.name()));
    }
    match source {
        Some(source) if source.value.starts_with(SCHEME) => match Reference::parse(&source.value) {
            Ok(reference) => ModelSource::Hub(reference),
            Err(why) => {
                section.problem_at(source.at, format!("`{}.source`: {why}", section.name()));
                ModelSource::Local(PathBuf::new())
            }
        },
        Some(source) => ModelSource::Local(find_model(section, &source, model_roots).unwrap_or_default()),
        None => {
            section.problem(format!(
                "`{}` needs a `source` (a folder or .gguf file in one of the model roots, or hf://…) or an `upstream`",
                section.name()
            ));
            ModelSource::Local(PathBuf::new())
        }
    }
}

/// `quantize`, or the names that Hugging Face libraries have for the same.
fn quantize(section: &Section<'_, '_>, source: &ModelSource) -> Option<Quantize> {
    let word = section.word("quantize", &["q8_0", "q4_k"]).map(|word| match word {
        "q4_k" => Quantize::Q4K,
        _ => Quantize::Q8_0,
    });
    let eight = section.boolean("load_in_8bit").unwrap_or(false).then_some(Quantize::Q8_0);
    let four = section.boolean("load_in_4bit").unwrap_or(false).then_some(Quantize::Q4K);
    let asked: Vec<Quantize> = [word, eight, four].into_iter().flatten().collect();
    if asked.iter().any(|other| *other != asked[0]) {
        section.problem(format!("`{}` asks for 8 bits and for 4: keep one of them", section.name()));
    }
    if !asked.is_empty() && !source.is_embedded() {
        section.problem(format!("`{}`: only a model with a `source` can be quantised here", section.name()));
    }
    asked.first().copied()
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

/// A folder in Hugging Face layout, or a GGUF file.
fn is_model(path: &Path) -> bool {
    path.join("config.json").is_file()
        || path.extension().is_some_and(|extension| extension == "gguf") && path.is_file()
}

/// Finds a model below the roots, and nowhere else.
fn find_model(section: &Section<'_, '_>, source: &At<String>, roots: &[PathBuf]) -> Option<PathBuf> {
    let relative = Path::new(&source.value);
    if relative.components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
        section.problem_at(
            source.at,
            format!(
                "`{}.source` must be the name of a folder or .gguf file inside a model root, not \"{}\"",
                section.name(),
                source.value
            ),
        );
        return None;
    }
    let found = roots.iter().map(|root| root.join(relative)).find(|path| is_model(path));
    if found.is_none() {
        let known: Vec<String> = roots
            .iter()
            .flat_map(|root| std::fs::read_dir(root).into_iter().flatten())
            .filter_map(|entry| entry.ok().filter(|entry| is_model(&entry.path()))?.file_name().into_string().ok())
            .collect();
        let roots = roots.iter().map(|root| root.display().to_string()).collect::<Vec<_>>().join(", ");
        section.problem_at(
            source.at,
            format!(
                "there is no model \"{}\" (a folder with a config.json) in {roots}{}",
                source.value,
                did_you_mean(&source.value, known.iter().map(String::as_str))
            ),
        );
    }
    found
}
