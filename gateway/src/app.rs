//! What serves: the stages, and the snapshot of the configuration that they work from.
//!
//! A request pins one snapshot. A reload builds the next one beside it and swaps the pointer, or changes nothing. State
//! (limits, keys, the ledger) lives outside the snapshot, so a reload forgives and forgets nothing.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::accounting::price::Prices;
use crate::accounting::settlement::Costs;
use crate::admission::Admission;
use crate::auth::Auth;
use crate::cache::Cache;
use crate::config::problem::Problems;
use crate::config::{Config, ModelConfig, ModelSource, Overrides, RouteConfig, Timeouts, Unit};
use crate::control::Control;
use crate::dispatch::upstream::{Servers, UpstreamModel, Upstreams};
use crate::dispatch::{Backend, Backends};
use crate::exchange::EMBEDDED;
use crate::models::{Loaded, Models};
use crate::observe::Observe;
use crate::observe::metrics::{Metrics, Served};
use crate::ports::{Clock, Priority};
use crate::routing::{Entry, Reads, Routing, Target};
use crate::shadow::Shadows;

/// A configuration with everything built that it describes.
pub struct Snapshot {
    pub config: Config,
    pub routing: Routing,
    pub backends: Arc<Backends>,
    /// Unix seconds since which it serves.
    pub since: i64,
}

/// How far the end has come. It only moves forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Serving,
    /// We say that we are going, so that no more is sent to us, and serve what comes all the same.
    Leaving,
    /// New requests are refused; running ones may finish.
    Draining,
    /// What still runs is cut.
    Cut,
}

pub struct App {
    pub snapshot: ArcSwap<Snapshot>,
    pub auth: Auth,
    pub admission: Admission,
    pub cache: Arc<Cache>,
    pub shadows: Arc<Shadows>,
    pub observe: Arc<Observe>,
    pub metrics: Arc<Metrics>,
    pub models: Models,
    pub upstreams: Upstreams,
    pub ledger: Arc<crate::accounting::ledger::Ledger>,
    pub control: Control,
    pub clock: Arc<dyn Clock>,
    pub phase: watch::Sender<Phase>,
    pub config_path: PathBuf,
    pub overrides: Overrides,
    /// Held while reloading: one at a time.
    pub reloading: Mutex<()>,
    /// Why the last reload was rejected, to be shown.
    pub rejected: Mutex<Option<String>>,
}

/// Why a reload changed nothing.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    #[error("{0}")]
    Config(#[from] Problems),
    #[error("{0}")]
    Model(String),
    #[error("{0}")]
    Upstream(String),
    #[error("{0}")]
    Issuer(String),
}

impl App {
    /// Reads the files again and, if all is well, serves from them. Returns the hash that serves now.
    ///
    /// # Errors
    /// Every problem of the files, or the first model that cannot be loaded. Nothing has changed then.
    pub fn reload(&self) -> Result<String, ReloadError> {
        let _one_at_a_time = self.reloading.lock();
        let outcome = self.try_reload();
        *self.rejected.lock() = outcome.as_ref().err().map(ToString::to_string);
        self.metrics.reload(outcome.is_ok());
        match &outcome {
            Ok(hash) => tracing::info!(%hash, "configuration applied"),
            Err(error) => tracing::error!("configuration rejected, the old one keeps serving:\n{error}"),
        }
        outcome
    }

    fn try_reload(&self) -> Result<String, ReloadError> {
        let config = Config::load(&self.config_path, &self.overrides)?;
        let current = self.snapshot.load();
        // The same files again may still mend something: a model that could not be loaded the last time.
        if config.hash == current.config.hash && current.backends.0.len() == config.models.len() {
            return Ok(config.hash);
        }
        for (what, changed) in [
            (
                "listen",
                config.gateway.data != current.config.gateway.data
                    || config.gateway.admin != current.config.gateway.admin
                    || config.gateway.threads != current.config.gateway.threads
                    || config.gateway.listen != current.config.gateway.listen,
            ),
            ("auth.pepper", config.gateway.auth.pepper != current.config.gateway.auth.pepper),
            (
                "storage",
                config.gateway.store() != current.config.gateway.store()
                    || config.gateway.data_dir != current.config.gateway.data_dir
                    || config.gateway.ledger != current.config.gateway.ledger
                    || config.gateway.redis != current.config.gateway.redis,
            ),
            (
                "models.threads, models.memory_max, models.kv_cache, models.queue_max or models.itl_target",
                config.gateway.engine != current.config.gateway.engine,
            ),
            (
                "cache or shadow",
                config.gateway.cache_bytes_max != current.config.gateway.cache_bytes_max
                    || config.gateway.shadow != current.config.gateway.shadow,
            ),
            (
                "telemetry",
                config.gateway.access_log != current.config.gateway.access_log
                    || config.gateway.environment != current.config.gateway.environment
                    || config.gateway.traces != current.config.gateway.traces,
            ),
        ] {
            if changed {
                tracing::warn!("`{what}` changed in {}; that takes a restart", self.config_path.display());
            }
        }
        let servers = self.upstreams.open(&config.upstreams).map_err(ReloadError::Upstream)?;
        let issuers = self.auth.open_issuers(&config.gateway.auth.jwt).map_err(ReloadError::Issuer)?;
        let loaded = self.models.load(&config.models);
        // At a start a broken model is set aside; a reload must not make things worse than they are.
        if let Some((name, why)) = loaded.iter().find_map(|(name, outcome)| Some((name, outcome.as_ref().err()?))) {
            self.models.retain(&current.config.models, Instant::now());
            return Err(ReloadError::Model(format!("model `{name}`: {why}")));
        }
        let hash = config.hash.clone();
        let next = Snapshot::build(config, &loaded, &servers, self.clock.now_ns() / 1_000_000_000);
        let next = Arc::new(next);
        self.upstreams.retain(servers);
        self.models.show(&loaded);
        next.show(&self.metrics);
        self.auth.trust(issuers);
        self.auth.bind(&next.config.gateway.rules, next.config.gateway.common);
        self.admission.share(next.config.gateway.limits_shared);
        self.snapshot.store(next.clone());
        // After the switch: who comes now is not sent to those that go.
        self.models.retain(&next.config.models, Instant::now() + next.config.gateway.models_drain);
        Ok(hash)
    }

    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Ends when what runs is to be cut.
    pub async fn cut(&self) {
        // It cannot fail: the sender is ours.
        let _ = self.phase.subscribe().wait_for(|phase| *phase == Phase::Cut).await;
    }

    /// Why the gateway should get no traffic, if it should not.
    pub fn unready(&self) -> Option<&'static str> {
        if self.phase() > Phase::Serving {
            Some("shutting down")
        } else if !self.auth.directory().is_known() {
            Some("the key store has not been read yet")
        } else if !self.ledger.is_healthy() {
            Some("the ledger cannot be written")
        } else if self.snapshot.load().backends.0.is_empty() {
            Some("no model is able to serve")
        } else {
            None
        }
    }
}

impl Snapshot {
    /// Shows what serves: also what nobody has asked for yet reads zero.
    pub fn show(&self, metrics: &Metrics) {
        let config = &self.config;
        metrics.config(&config.hash);
        let is_unpriced = |name: &str| config.unpriced().any(|unpriced| unpriced == name);
        metrics.unpriced(config.models.keys().map(|name| (name.as_str(), is_unpriced(name))));
        for RouteConfig { name: route, split, fallback, cache, .. } in &config.routes {
            let first = split.iter().map(|(name, _)| (name, "primary"));
            for (name, role) in first.chain(fallback.iter().map(|name| (name, "fallback"))) {
                metrics.serves(Served { route, model: name, variant: name }, role, cache.is_some());
            }
        }
        for (name, _) in config.models.iter().filter(|(_, model)| model.public) {
            metrics.serves(Served { route: name, model: name, variant: name }, "primary", false);
        }
    }

    pub fn build(config: Config, loaded: &Loaded, servers: &Servers, since: i64) -> Snapshot {
        for model in config.unpriced() {
            tracing::warn!(%model, "this model has no price, so it is free");
        }
        let mut backends = Backends::default();
        for (name, model) in &config.models {
            let backend = match &model.source {
                ModelSource::Local(_) | ModelSource::Hub(_) => {
                    loaded.get(name).and_then(|outcome| outcome.as_ref().ok()).cloned()
                }
                ModelSource::Upstream { upstream, name, .. } => servers
                    .get(upstream)
                    .map(|server| Backend::Upstream(Arc::new(UpstreamModel::new(server.clone(), name.clone())))),
            };
            if let Some(backend) = backend {
                backends.0.insert(name.clone(), backend);
            }
        }
        let targets: BTreeMap<&str, Arc<Target>> = config
            .models
            .iter()
            .map(|(name, model)| (name.as_str(), Arc::new(target(&config, name, model, &backends))))
            .collect();
        let named = |name: &String| targets.get(name.as_str()).cloned();
        let mut routing = Routing::default();
        for route in &config.routes {
            routing.add(Entry {
                targets: route.split.iter().filter_map(|(name, _)| named(name)).collect(),
                fallback: route.fallback.iter().filter_map(named).collect(),
                shadow: route.shadow.as_ref().and_then(|rule| named(&rule.variant)),
                config: route.clone(),
            });
        }
        // A public model is a route to itself.
        for (name, _) in config.models.iter().filter(|(_, model)| model.public) {
            let config = RouteConfig {
                name: name.clone(),
                split: vec![(name.clone(), 1)],
                sticky: vec![Unit::Key],
                fallback: Vec::new(),
                cache: None,
                shadow: None,
                priority: Priority::default(),
                timeouts: Timeouts::default(),
                durability: config.gateway.durability,
            };
            routing.add(Entry {
                config,
                targets: named(name).into_iter().collect(),
                fallback: Vec::new(),
                shadow: None,
            });
        }
        Snapshot { routing, backends: Arc::new(backends), since, config }
    }
}

fn target(config: &Config, name: &str, model: &ModelConfig, backends: &Backends) -> Target {
    let (provider, costs, reads, server, identity) = match (&model.source, backends.0.get(name)) {
        (ModelSource::Upstream { upstream, context, .. }, _) => {
            let there = config.upstreams.get(upstream);
            let server = there.map(|there| (there.host.clone(), there.port));
            let identity = there.map(|there| format!("{} at {}", model.source, there.url())).unwrap_or_default();
            (upstream.as_str(), Costs::Tokens, Reads::Elsewhere { context: *context }, server, identity)
        }
        (_, Some(Backend::Embedded(model))) => {
            (EMBEDDED, Costs::DeviceTime, Reads::Here(model.clone()), None, model.digest().to_owned())
        }
        (_, Some(Backend::Embeddings(model))) => {
            let reads = Reads::Embeds { tokenize: model.clone(), dimensions: model.dimensions() };
            (EMBEDDED, Costs::DeviceTime, reads, None, model.digest().to_owned())
        }
        (ModelSource::Local(_) | ModelSource::Hub(_), _) => {
            (EMBEDDED, Costs::DeviceTime, Reads::Never, None, String::new())
        }
    };
    Target {
        variant: name.to_owned(),
        model: name.to_owned(),
        provider: provider.to_owned(),
        identity,
        prices: config.prices.models.get(name).cloned().unwrap_or_else(Prices::missing),
        costs,
        output_max: u64::from(model.output_max),
        reads,
        server,
    }
}
