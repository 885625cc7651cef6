//! `gateway.toml`: how the process runs.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::auth::AuthConfig;
use super::limits::{self, Common, Limits, Written};
use super::reader::{At, Section};
use super::secret::Secret;
use super::traces::{self, TraceSink};
use crate::accounting::ledger::Settings;
use crate::accounting::ledger::store::Database;
use crate::accounting::settlement::Durability;
use crate::admission::core::rule::{Rule, Sharing};
use crate::auth::store::Location;
use crate::data_dir::DataDir;
use crate::database::postgres::Target;
use crate::network::Network;

#[derive(Clone, Debug)]
pub struct GatewayConfig {
    pub data: SocketAddr,
    pub admin: SocketAddr,
    /// For `/admin`, beside the one that every start makes.
    pub admin_token: Option<Secret>,
    /// What the admin listener may be called beside its loopback address.
    pub admin_hosts: Vec<String>,
    pub threads: usize,
    pub body_bytes_max: usize,
    pub listen: ListenConfig,
    /// How clients are spoken to; `None`: in the clear.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// How long after SIGTERM new requests are still served.
    pub pre_drain: Duration,
    /// How long after that running ones may finish.
    pub drain: Duration,
    pub data_dir: PathBuf,
    /// Where the ledger's rows and the key store are kept, if not in the data folder.
    pub database: Option<Arc<Target>>,
    pub ledger: Settings,
    /// Of routes that do not say.
    pub durability: Durability,
    /// Where gateways count together.
    pub redis: Option<RedisConfig>,
    pub common: Common,
    pub model_roots: Vec<PathBuf>,
    pub engine: EngineConfig,
    /// How long requests may go on with a model that a reload has replaced or removed.
    pub models_drain: Duration,
    pub auth: AuthConfig,
    pub limits: Limits,
    /// How gateways share the limits of every key; `None`: each counts for itself.
    pub limits_shared: Option<Sharing>,
    /// Beside the limits of every key, in the order of the file.
    pub rules: Vec<Arc<Rule>>,
    pub cache_bytes_max: u64,
    pub shadow: ShadowConfig,
    pub access_log: AccessLogTo,
    /// `production`, `staging`, …: where these requests happen.
    pub environment: Option<String>,
    pub traces: Vec<TraceSink>,
}

impl GatewayConfig {
    /// Where the ledger's rows are kept.
    pub fn store(&self) -> Database {
        self.database.clone().map_or_else(|| Database::of(&self.data_dir), Database::Postgres)
    }

    /// Where keys, tenants and rules are kept.
    pub fn key_store(&self, data_dir: &DataDir) -> Location {
        self.database.clone().map_or_else(|| Location::File(data_dir.keys()), Location::Postgres)
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

/// A store of counters that several gateways share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisConfig {
    /// With a password in it, perhaps.
    pub url: Secret,
    /// How long a request waits for its answer.
    pub deadline: Duration,
}

/// What the embedded runtime may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    pub device: Device,
    pub threads: usize,
    /// What all models may take together; `None`: nearly all that the machine has left at the start.
    pub memory_max: Option<u64>,
    /// KV cache of each model.
    pub kv_bytes: u64,
    pub waiting_max: usize,
    /// How long the next token of whoever is being answered may take, while others' prompts are read.
    pub itl_target: Duration,
}

/// Where embedded models run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Auto,
    Cpu,
    Cuda,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccessLogTo {
    Stdout,
    Off,
}

/// How many copies may run and wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShadowConfig {
    pub concurrency: usize,
    pub queue_max: usize,
}

/// What the gateway's file says, and where the others are.
pub(super) struct Read {
    pub config: GatewayConfig,
    pub routes: PathBuf,
    pub prices: PathBuf,
    pub written: Vec<Written>,
}

/// `read` reads a file that is then watched.
pub(super) fn gateway(root: Section<'_, '_>, folder: &Path, read: &mut impl FnMut(PathBuf) -> String) -> Read {
    let beside =
        |name: Option<At<String>>, default: &str| folder.join(name.map_or(default.to_owned(), |name| name.value));
    let routes = beside(root.string("routes"), "routes.toml");
    let prices = beside(root.string("prices"), "prices.toml");
    let mut config = GatewayConfig {
        data: SocketAddr::from(([127, 0, 0, 1], 8080)),
        admin: SocketAddr::from(([127, 0, 0, 1], 8081)),
        admin_token: None,
        admin_hosts: Vec::new(),
        threads: 1,
        body_bytes_max: 4 << 20,
        listen: ListenConfig::default(),
        tls: None,
        pre_drain: Duration::from_secs(5),
        drain: Duration::from_secs(30),
        data_dir: folder.join("../data"),
        database: None,
        ledger: Settings::default(),
        durability: Durability::Process,
        redis: None,
        common: Common::default(),
        model_roots: vec![folder.join("../models")],
        engine: EngineConfig {
            device: Device::Auto,
            threads: spare_cores(),
            memory_max: None,
            kv_bytes: 32 << 20,
            waiting_max: 256,
            itl_target: Duration::from_millis(50),
        },
        models_drain: Duration::from_secs(300),
        auth: AuthConfig::default(),
        limits: Limits::default(),
        limits_shared: None,
        rules: Vec::new(),
        cache_bytes_max: 64 << 20,
        shadow: ShadowConfig { concurrency: 4, queue_max: 256 },
        access_log: AccessLogTo::Stdout,
        environment: None,
        traces: Vec::new(),
    };
    let mut trusted_proxies = Vec::new();
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
        config.tls = super::tls::tls(&listen, config.listen.http2, folder, read);
        trusted_proxies = networks(&listen, "trusted_proxies");
        config.pre_drain = listen.duration_or_none("pre_drain").unwrap_or(config.pre_drain);
        config.drain = listen.duration_or_none("drain").unwrap_or(config.drain);
        listen.finish();
    }
    if let Some(admin) = root.section("admin") {
        config.admin_token = admin_token(&admin);
        let hosts = admin.strings("hosts").unwrap_or_default();
        config.admin_hosts = hosts.into_iter().map(|host| host.value).collect();
        admin.finish();
    }
    config.auth = AuthConfig { trusted_proxies, ..super::auth::auth(&root, folder, read) };
    if let Some(storage) = root.section("storage") {
        config.data_dir = storage.string("data_dir").map_or(config.data_dir, |text| folder.join(text.value));
        config.database = super::database::database(&storage, folder, read);
        config.durability = durability(&storage).unwrap_or(config.durability);
        let Settings { bytes_max, commit_every, .. } = Settings::default();
        config.ledger = Settings {
            bytes_max: storage.bytes("wal_max", 3 << 10).unwrap_or(bytes_max),
            commit_every: storage.duration_or_none("commit_every").unwrap_or(commit_every),
            retain: super::database::months(&storage, "retain"),
        };
        if config.ledger.commit_every > COMMIT_EVERY_MAX {
            storage.problem("`storage.commit_every` is above \"1s\", and every answer of a route with power durability waits for it");
        }
        config.redis = redis(&storage);
        config.common.has_store = config.redis.is_some();
        storage.finish();
    }
    if let Some(models) = root.section("models") {
        if let Some(roots) = models.strings("roots") {
            config.model_roots = roots.iter().map(|root| folder.join(&root.value)).collect();
        }
        config.engine.device = match models.word("device", &["auto", "cpu", "cuda"]) {
            Some("cpu") => Device::Cpu,
            Some("cuda") => Device::Cuda,
            _ => Device::Auto,
        };
        config.engine.threads = models.integer("threads", 1..=256).map_or(config.engine.threads, |n| n as usize);
        config.engine.memory_max = models.bytes("memory_max", 1 << 20);
        config.models_drain = models.duration("drain").unwrap_or(config.models_drain);
        config.engine.kv_bytes = models.bytes("kv_cache", 1 << 20).unwrap_or(config.engine.kv_bytes);
        config.engine.waiting_max =
            models.integer("queue_max", 1..=100_000).map_or(config.engine.waiting_max, |n| n as usize);
        config.engine.itl_target = models.duration("itl_target").unwrap_or(config.engine.itl_target);
        models.finish();
    }
    let mut written = Vec::new();
    if let Some(section) = root.section("limits") {
        (config.limits, config.limits_shared, written) = limits::limits(section, &mut config.common);
        config.rules = written.iter().map(|written| written.rule.clone()).collect();
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
    Read { config, routes, prices, written }
}

fn redis(storage: &Section<'_, '_>) -> Option<RedisConfig> {
    let deadline = storage.duration("redis_deadline");
    let Some(url) = storage.string("redis") else {
        if deadline.is_some() {
            storage.problem("`storage.redis_deadline` means something beside `redis`");
        }
        return None;
    };
    let at = url.at;
    let url = storage.resolve(&url)?;
    // It is not shown: there may be a password in it.
    if !["redis://", "rediss://"].iter().any(|scheme| url.expose().starts_with(scheme)) {
        storage.problem_at(at, "`storage.redis` must begin with redis:// or rediss://");
    }
    Some(RedisConfig { url, deadline: deadline.unwrap_or(REDIS_DEADLINE) })
}

/// A request that has to ask waits so long at the most.
const REDIS_DEADLINE: Duration = Duration::from_millis(20);

/// As many as the random ones have: nobody guesses it.
const TOKEN_BYTES_MIN: usize = 32;

fn admin_token(section: &Section<'_, '_>) -> Option<Secret> {
    let text = section.string("token")?;
    if !text.value.starts_with("env:") {
        section.problem_at(
            text.at,
            "`admin.token` is read from the environment, as \"env:GLASSGATE_ADMIN_TOKEN\": files are shared",
        );
        return None;
    }
    let token = section.resolve(&text)?;
    if token.expose().len() < TOKEN_BYTES_MIN {
        section.problem_at(text.at, format!("`admin.token` must have at least {TOKEN_BYTES_MIN} bytes"));
    }
    Some(token)
}

/// Answers wait for it.
const COMMIT_EVERY_MAX: Duration = Duration::from_secs(1);

/// What a section says of how durable a row must be.
pub(super) fn durability(section: &Section<'_, '_>) -> Option<Durability> {
    section.word("durability", &["process", "power"]).map(|word| match word {
        "power" => Durability::Power,
        _ => Durability::Process,
    })
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

fn networks(section: &Section<'_, '_>, key: &str) -> Vec<Network> {
    let parse = |text: &At<String>| {
        let network = text.value.parse();
        network
            .map_err(|why| section.problem_at(text.at, format!("`{}.{key}`: \"{}\" {why}", section.name(), text.value)))
            .ok()
    };
    section.strings(key).unwrap_or_default().iter().filter_map(parse).collect()
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
