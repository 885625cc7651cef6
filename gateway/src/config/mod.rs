//! `gateway.toml` + `routes.toml` + `prices.toml` → one `Config`, or every problem at once with its file and line.
//!
//! Read and validated by the same code for `serve`, `check` and reloads. What needs the outside world (loading a model,
//! binding a port) happens later, in `snapshot` and `server`.

pub mod problem;
mod reader;
pub mod secret;
mod traces;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::accounting::core::{NanoUsd, PicoPerToken, Price};
use problem::{Problems, did_you_mean};
use reader::{At, Section, Source};
use secret::Secret;
pub use traces::{OtlpConfig, SinkKind, TraceSink};

/// Everything the three files say.
#[derive(Clone, Debug)]
pub struct Config {
    pub gateway: GatewayConfig,
    pub upstreams: BTreeMap<String, Arc<UpstreamConfig>>,
    pub models: BTreeMap<String, ModelConfig>,
    /// In the order of the file.
    pub routes: Vec<RouteConfig>,
    pub prices: PricesConfig,
    /// First 12 hex digits of a hash over the three files' bytes.
    pub hash: String,
    /// The files that were read, to be watched.
    pub files: Vec<PathBuf>,
}

#[derive(Clone, Debug)]
pub struct GatewayConfig {
    pub data: SocketAddr,
    pub admin: SocketAddr,
    pub threads: usize,
    pub body_bytes_max: usize,
    pub listen: ListenConfig,
    /// How long after SIGTERM new requests are still served.
    pub pre_drain: Duration,
    /// How long after that running ones may finish.
    pub drain: Duration,
    pub data_dir: PathBuf,
    pub wal_bytes_max: u64,
    pub model_roots: Vec<PathBuf>,
    pub engine: EngineConfig,
    pub limits: Limits,
    pub cache_bytes_max: u64,
    pub shadow: ShadowConfig,
    pub access_log: AccessLogTo,
    /// `production`, `staging`, …: where these requests happen.
    pub environment: Option<String>,
    pub traces: Vec<TraceSink>,
}

/// What one key may do. A key may have limits of its own instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub requests_per_minute: u32,
    pub tokens_per_minute: u32,
    /// Requests at a time.
    pub concurrency: u32,
    /// What it may spend on a UTC day.
    pub per_day: NanoUsd,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            requests_per_minute: 600,
            tokens_per_minute: 200_000,
            concurrency: 64,
            per_day: NanoUsd(5_000_000_000),
        }
    }
}

/// Whom the data listener lets in, and how they speak.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenConfig {
    /// HTTP/2 with prior knowledge, beside HTTP/1.
    pub http2: bool,
    /// `None`: a share of the files that the process may open.
    pub connections_max: Option<usize>,
    /// `None`: half of the above.
    pub connections_per_ip: Option<usize>,
    /// From a head's first byte to its last.
    pub head_timeout: Duration,
}

impl Default for ListenConfig {
    fn default() -> Self {
        ListenConfig {
            http2: false,
            connections_max: None,
            connections_per_ip: None,
            head_timeout: Duration::from_secs(10),
        }
    }
}

/// No limit is above these, in files and in the key store.
pub const REQUESTS_PER_MINUTE_MAX: u32 = 1_000_000;
pub const TOKENS_PER_MINUTE_MAX: u32 = 1_000_000_000;
pub const CONCURRENCY_MAX: u32 = 10_000;

/// What the embedded runtime may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    pub threads: usize,
    /// KV cache of each model.
    pub kv_bytes: u64,
    pub waiting_max: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccessLogTo {
    Stdout,
    Off,
}

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

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// The folder, found in one of the model roots.
    Folder(PathBuf),
    Upstream {
        upstream: String,
        /// What the model is called there.
        name: String,
        context: Option<u64>,
    },
}

impl ModelSource {
    pub fn folder(&self) -> Option<&Path> {
        match self {
            ModelSource::Folder(folder) => Some(folder),
            ModelSource::Upstream { .. } => None,
        }
    }
}

impl std::fmt::Display for ModelSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ModelSource::Folder(folder) => write!(f, "{}", folder.display()),
            ModelSource::Upstream { upstream, name, .. } => write!(f, "{name} at {upstream}"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelConfig {
    pub source: ModelSource,
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
    pub timeouts: Timeouts,
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

/// How many copies may run and wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShadowConfig {
    pub concurrency: usize,
    pub queue_max: usize,
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
    pub first_token: Duration,
    pub idle: Duration,
    pub total: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            first_token: Duration::from_secs(30),
            idle: Duration::from_secs(30),
            total: Duration::from_secs(300),
        }
    }
}

#[derive(Clone, Debug, Default)]
pub struct PricesConfig {
    pub version: String,
    pub models: BTreeMap<String, Price>,
}

/// Names appear in labels, headers and file names.
const NAME_CHARS_MAX: usize = 64;
/// Tokens a request may produce when nobody says otherwise.
const OUTPUT_MAX: u32 = 1024;
const CACHE_TTL: Duration = Duration::from_secs(600);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// The provider of models that run in this process.
pub const EMBEDDED: &str = "glassgate";

/// What the command line may override.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    pub data_dir: Option<PathBuf>,
    pub listen: Option<SocketAddr>,
    pub admin: Option<SocketAddr>,
}

impl Config {
    /// Models that cost nothing because nobody gave them a price.
    pub fn unpriced(&self) -> impl Iterator<Item = &str> {
        self.models.keys().filter(|name| !self.prices.models.contains_key(*name)).map(String::as_str)
    }

    /// Reads the three files.
    ///
    /// # Errors
    /// Every problem found, in all three.
    pub fn load(path: &Path, overrides: &Overrides) -> Result<Config, Problems> {
        Self::load_with_keys(path, overrides).map(|(config, _)| config)
    }

    /// As `load`, and every key that the reader knows, for the test of the reference file.
    pub fn load_with_keys(path: &Path, overrides: &Overrides) -> Result<(Config, BTreeSet<String>), Problems> {
        let mut problems = Problems::default();
        let mut keys = BTreeSet::new();
        let mut hash = blake3::Hasher::new();
        let mut files = Vec::new();
        let mut read = |path: &Path, problems: &mut Problems| -> String {
            files.push(path.to_owned());
            match std::fs::read_to_string(path) {
                Ok(text) => {
                    hash.update(&(text.len() as u64).to_le_bytes());
                    hash.update(text.as_bytes());
                    text
                }
                Err(error) => {
                    problems.add(path, 0, format!("cannot be read: {error}"));
                    String::new()
                }
            }
        };
        let mut finish = |source: Source<'_>, problems: &mut Problems| {
            let (found, asked) = source.into_parts();
            for problem in found.0 {
                problems.add(&problem.file, problem.line, problem.what);
            }
            keys.extend(asked);
        };
        let folder = folder_of(path);

        let text = read(path, &mut problems);
        let source = Source::new(path, &text);
        let table = source.parse();
        let (mut gateway, routes_path, prices_path) = gateway(source.root(&table), folder);
        finish(source, &mut problems);
        if let Some(data_dir) = &overrides.data_dir {
            gateway.data_dir.clone_from(data_dir);
        }
        gateway.data = overrides.listen.unwrap_or(gateway.data);
        gateway.admin = overrides.admin.unwrap_or(gateway.admin);
        if !gateway.admin.ip().is_loopback() {
            let what = format!(
                "the admin address {} is not on loopback, but /metrics and the probes are open there",
                gateway.admin
            );
            problems.add(path, 0, what);
        }

        let text = read(&routes_path, &mut problems);
        let source = Source::new(&routes_path, &text);
        let table = source.parse();
        let Reached { upstreams, models, routes } =
            routes(source.root(&table), folder_of(&routes_path), &gateway.model_roots);
        finish(source, &mut problems);

        let text = read(&prices_path, &mut problems);
        let source = Source::new(&prices_path, &text);
        let table = source.parse();
        let prices = prices(source.root(&table), &models);
        finish(source, &mut problems);

        if !problems.0.is_empty() {
            return Err(problems);
        }
        let hash = hash.finalize().to_hex()[..12].to_owned();
        Ok((Config { gateway, upstreams, models, routes, prices, hash, files }, keys))
    }
}

fn gateway(root: Section<'_, '_>, folder: &Path) -> (GatewayConfig, PathBuf, PathBuf) {
    let beside =
        |name: Option<At<String>>, default: &str| folder.join(name.map_or(default.to_owned(), |name| name.value));
    let routes = beside(root.string("routes"), "routes.toml");
    let prices = beside(root.string("prices"), "prices.toml");
    let mut config = GatewayConfig {
        data: SocketAddr::from(([127, 0, 0, 1], 8080)),
        admin: SocketAddr::from(([127, 0, 0, 1], 8081)),
        threads: 1,
        body_bytes_max: 4 << 20,
        listen: ListenConfig::default(),
        pre_drain: Duration::from_secs(5),
        drain: Duration::from_secs(30),
        data_dir: folder.join("../data"),
        wal_bytes_max: 64 << 20,
        model_roots: vec![folder.join("../models")],
        engine: EngineConfig { threads: spare_cores(), kv_bytes: 32 << 20, waiting_max: 256 },
        limits: Limits::default(),
        cache_bytes_max: 64 << 20,
        shadow: ShadowConfig { concurrency: 4, queue_max: 256 },
        access_log: AccessLogTo::Stdout,
        environment: None,
        traces: Vec::new(),
    };
    if let Some(listen) = root.section("listen") {
        let address = |key| {
            let text = listen.string(key)?;
            let parsed = text.value.parse().ok();
            if parsed.is_none() {
                listen.problem_at(
                    text.at,
                    format!(
                        "`listen.{key}` must be an address and port such as \"127.0.0.1:8080\", not \"{}\"",
                        text.value
                    ),
                );
            }
            parsed
        };
        config.data = address("data").unwrap_or(config.data);
        config.admin = address("admin").unwrap_or(config.admin);
        config.threads = listen.integer("threads", 1..=256).map_or(config.threads, |n| n as usize);
        config.body_bytes_max = listen.bytes("body_max", 1 << 10).map_or(config.body_bytes_max, |n| n as usize);
        config.listen = listening(&listen);
        config.pre_drain = listen.duration_or_none("pre_drain").unwrap_or(config.pre_drain);
        config.drain = listen.duration_or_none("drain").unwrap_or(config.drain);
        listen.finish();
    }
    if let Some(storage) = root.section("storage") {
        config.data_dir = storage.string("data_dir").map_or(config.data_dir, |text| folder.join(text.value));
        // Only one kind of durability exists so far; the key is here so that a file can say which it counts on.
        storage.word("durability", &["process"]);
        config.wal_bytes_max = storage.bytes("wal_max", 2 << 10).map_or(config.wal_bytes_max, |n| n);
        storage.finish();
    }
    if let Some(models) = root.section("models") {
        if let Some(roots) = models.strings("roots") {
            config.model_roots = roots.iter().map(|root| folder.join(&root.value)).collect();
        }
        models.word("device", &["auto", "cpu"]);
        config.engine.threads = models.integer("threads", 1..=256).map_or(config.engine.threads, |n| n as usize);
        config.engine.kv_bytes = models.bytes("kv_cache", 1 << 20).unwrap_or(config.engine.kv_bytes);
        config.engine.waiting_max =
            models.integer("queue_max", 1..=100_000).map_or(config.engine.waiting_max, |n| n as usize);
        models.finish();
    }
    if let Some(section) = root.section("limits") {
        config.limits = limits(section);
    }
    if let Some(cache) = root.section("cache") {
        config.cache_bytes_max = cache.bytes("max", 1 << 10).unwrap_or(config.cache_bytes_max);
        cache.finish();
    }
    if let Some(shadow) = root.section("shadow") {
        let concurrency = shadow.integer("concurrency", 1..=1_000);
        config.shadow.concurrency = concurrency.map_or(config.shadow.concurrency, |n| n as usize);
        let queue_max = shadow.integer("queue_max", 1..=100_000);
        config.shadow.queue_max = queue_max.map_or(config.shadow.queue_max, |n| n as usize);
        shadow.finish();
    }
    if let Some(telemetry) = root.section("telemetry") {
        config.access_log = match telemetry.word("access_log", &["stdout", "off"]) {
            Some("off") => AccessLogTo::Off,
            _ => AccessLogTo::Stdout,
        };
        config.environment = environment(&telemetry);
        config.traces = traces::traces(&telemetry);
        telemetry.finish();
    }
    root.finish();
    (config, routes, prices)
}

fn limits(section: Section<'_, '_>) -> Limits {
    let default = Limits::default();
    let number = |key, max: u32, default| section.integer(key, 1..=u64::from(max)).map_or(default, |n| n as u32);
    let limits = Limits {
        requests_per_minute: number("requests_per_minute", REQUESTS_PER_MINUTE_MAX, default.requests_per_minute),
        tokens_per_minute: number("tokens_per_minute", TOKENS_PER_MINUTE_MAX, default.tokens_per_minute),
        concurrency: number("concurrency", CONCURRENCY_MAX, default.concurrency),
        per_day: section.number("usd_per_day").map_or(default.per_day, |usd| {
            NanoUsd::from_usd(usd.value).unwrap_or_else(|why| {
                section.problem_at(usd.at, format!("`limits.usd_per_day` {why}"));
                default.per_day
            })
        }),
    };
    section.finish();
    limits
}

/// A name that every backend takes: Langfuse silently puts others under "default".
fn environment(telemetry: &Section<'_, '_>) -> Option<String> {
    let name = telemetry.string("environment")?;
    let fine = (1..=40).contains(&name.value.len())
        && name.value.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte))
        && !name.value.starts_with("langfuse");
    if !fine {
        telemetry.problem_at(
            name.at,
            "`telemetry.environment` must be at most 40 of a-z, 0-9, '-' and '_', and not begin with \"langfuse\"",
        );
    }
    Some(name.value)
}

fn listening(section: &Section<'_, '_>) -> ListenConfig {
    let default = ListenConfig::default();
    let connections = |key| section.integer(key, 1..=1_000_000).map(|n| n as usize);
    let (most, per_ip) = (connections("connections_max"), connections("connections_per_ip"));
    if most.zip(per_ip).is_some_and(|(most, per_ip)| per_ip > most) {
        section.problem("`listen.connections_per_ip` is larger than `listen.connections_max`, so it limits nothing");
    }
    ListenConfig {
        http2: section.boolean("http2").unwrap_or(default.http2),
        connections_max: most,
        connections_per_ip: per_ip,
        head_timeout: section.duration("head_timeout").unwrap_or(default.head_timeout),
    }
}

/// One core is left to the proxy, where there are two.
fn spare_cores() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get().saturating_sub(1).max(1))
}

/// Paths are relative to the file that names them.
fn folder_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("."))
}

/// What the routes file says.
struct Reached {
    upstreams: BTreeMap<String, Arc<UpstreamConfig>>,
    models: BTreeMap<String, ModelConfig>,
    routes: Vec<RouteConfig>,
}

fn routes(root: Section<'_, '_>, folder: &Path, model_roots: &[PathBuf]) -> Reached {
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
        let model = ModelConfig {
            source: model_source(&section, &name.value, &upstreams, model_roots),
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
        let mut timeouts = Timeouts::default();
        if let Some(section) = section.section("timeouts") {
            timeouts.first_token = section.duration("first_token").unwrap_or(timeouts.first_token);
            timeouts.idle = section.duration("idle").unwrap_or(timeouts.idle);
            timeouts.total = section.duration("total").unwrap_or(timeouts.total);
            section.finish();
        }
        section.finish();
        let fallback = fallback.into_iter().map(|name| name.value).collect();
        routes.push(RouteConfig { name: name.value, split, sticky, fallback, cache, shadow, timeouts });
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
        Some(source) => ModelSource::Folder(find_model(section, &source, model_roots).unwrap_or_default()),
        None => {
            section.problem(format!(
                "`{}` needs a `source` (a folder in one of the model roots) or an `upstream`",
                section.name()
            ));
            ModelSource::Folder(PathBuf::new())
        }
    }
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

/// Finds a model's folder below the roots, and nowhere else.
fn find_model(section: &Section<'_, '_>, source: &At<String>, roots: &[PathBuf]) -> Option<PathBuf> {
    let relative = Path::new(&source.value);
    if relative.components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
        section.problem_at(
            source.at,
            format!(
                "`{}.source` must be the name of a folder inside a model root, not \"{}\"",
                section.name(),
                source.value
            ),
        );
        return None;
    }
    let found = roots.iter().map(|root| root.join(relative)).find(|folder| folder.join("config.json").is_file());
    if found.is_none() {
        let known: Vec<String> = roots
            .iter()
            .flat_map(|root| std::fs::read_dir(root).into_iter().flatten())
            .filter_map(|entry| {
                entry.ok().filter(|entry| entry.path().join("config.json").is_file())?.file_name().into_string().ok()
            })
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

fn prices(root: Section<'_, '_>, models: &BTreeMap<String, ModelConfig>) -> PricesConfig {
    let version = root.string("version");
    if version.as_ref().is_none_or(|version| version.value.is_empty() || version.value.len() > NAME_CHARS_MAX) {
        root.problem("`version` is missing or too long: it goes onto every ledger row, so give prices a date such as \"2026-11-01\"");
    }
    let mut prices =
        PricesConfig { version: version.map_or(String::new(), |version| version.value), models: BTreeMap::new() };
    for (name, section) in root.sections("models") {
        if !models.contains_key(&name.value) {
            let hint = did_you_mean(&name.value, models.keys().map(String::as_str));
            section.problem_at(name.at, format!("there is no model `{}` in the routes file{hint}", name.value));
        }
        let price = |key: &str| -> Option<PicoPerToken> {
            let usd = section.number(key)?;
            match PicoPerToken::from_usd_per_million(usd.value) {
                Ok(price) => Some(price),
                Err(why) => {
                    section.problem_at(usd.at, format!("`{}.{key}` {why}", section.name()));
                    None
                }
            }
        };
        let (input, output) = (price("input").unwrap_or_default(), price("output").unwrap_or_default());
        let device_hour = section.number("device_hour").map_or(NanoUsd(0), |usd| {
            NanoUsd::from_usd(usd.value).unwrap_or_else(|why| {
                section.problem_at(usd.at, format!("`{}.device_hour` {why}", section.name()));
                NanoUsd(0)
            })
        });
        let cache_read = price("cache_read").unwrap_or(input);
        section.finish();
        prices.models.insert(
            name.value,
            Price { input, cache_read, cache_write: input, output, reasoning: output, device_hour },
        );
    }
    root.finish();
    prices
}
