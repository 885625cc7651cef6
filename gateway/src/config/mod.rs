//! `gateway.toml` + `routes.toml` + `prices.toml` → one `Config`, or every problem at once with its file and line.
//!
//! Read and validated by the same code for `serve`, `check` and reloads. What needs the outside world (loading a model,
//! binding a port) happens later, in `snapshot` and `server`.

mod auth;
mod database;
mod gateway;
mod limits;
mod models;
mod prices;
pub mod problem;
mod reader;
mod routes;
pub mod secret;
mod tls;
mod traces;
mod upstreams;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use auth::{AuthConfig, JwtConfig, JwtKeys};
pub use database::{database_of, pepper_of};
pub use gateway::{AccessLogTo, Device, EngineConfig, GatewayConfig, ListenConfig, RedisConfig, ShadowConfig};
pub use limits::{
    CONCURRENCY_MAX, Common, Limits, REQUESTS_PER_MINUTE_MAX, RULES_MAX, TOKENS_PER_MINUTE_MAX, check_rule, stored_rule,
};
pub use models::{ModelConfig, ModelSource, Quantize};
pub use prices::PricesConfig;
use problem::Problems;
pub use problem::did_you_mean;
use reader::Source;
pub use routes::{CacheRule, RouteConfig, ShadowRule, Timeouts, Unit};
pub use traces::{OtlpConfig, SinkKind, TraceSink};
pub use upstreams::UpstreamConfig;

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

/// Names appear in labels, headers and file names.
const NAME_CHARS_MAX: usize = 64;

/// What the command line may override.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    pub data_dir: Option<PathBuf>,
    pub listen: Option<SocketAddr>,
    pub admin: Option<SocketAddr>,
    /// Searched before those that the file names.
    pub model_roots: Vec<PathBuf>,
    /// The running program, which looks at models and renders their templates in children of its own.
    pub program: PathBuf,
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
        let gateway::Read { config: mut gateway, routes: routes_path, prices: prices_path, written } =
            gateway::gateway(source.root(&table), folder, &mut |file: PathBuf| read(&file, &mut problems));
        // Its rules name what the other files say.
        let gateway_source = source;
        if let Some(data_dir) = &overrides.data_dir {
            gateway.data_dir.clone_from(data_dir);
        }
        gateway.model_roots.splice(..0, overrides.model_roots.iter().cloned());
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
        let routes::Reached { upstreams, models, routes } =
            routes::routes(source.root(&table), folder_of(&routes_path), &gateway.model_roots, gateway.durability);
        limits::check(&written, &routes, &models, |at, what| gateway_source.problem(at, what));
        finish(gateway_source, &mut problems);
        finish(source, &mut problems);

        let text = read(&prices_path, &mut problems);
        let source = Source::new(&prices_path, &text);
        let table = source.parse();
        let prices = prices::prices(source.root(&table), &models);
        finish(source, &mut problems);

        if !problems.0.is_empty() {
            return Err(problems);
        }
        let hash = hash.finalize().to_hex()[..12].to_owned();
        Ok((Config { gateway, upstreams, models, routes, prices, hash, files }, keys))
    }
}

/// Paths are relative to the file that names them.
fn folder_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("."))
}
