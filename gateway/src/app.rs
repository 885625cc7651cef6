//! What serves: the stages, and the snapshot of the configuration that they work from.
//!
//! A request pins one snapshot. A reload builds the next one beside it and swaps the pointer, or changes nothing. State
//! (limits, keys, the ledger) lives outside the snapshot, so a reload forgives and forgets nothing.

use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::admission::Admission;
use crate::auth::Auth;
use crate::config::problem::Problems;
use crate::config::{Config, Overrides, RouteConfig, Timeouts, Unit};
use crate::dispatch::Backends;
use crate::models::{Loaded, Models};
use crate::observe::Observe;
use crate::observe::metrics::Metrics;
use crate::ports::{Clock, Tokenize};
use crate::routing::{Routing, Target};

/// A configuration with everything built that it describes.
pub struct Snapshot {
    pub config: Config,
    pub routing: Routing,
    pub backends: Backends,
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
    pub observe: Arc<Observe>,
    pub metrics: Arc<Metrics>,
    pub models: Models,
    pub ledger: Arc<crate::accounting::ledger::Ledger>,
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
            (
                "storage",
                config.gateway.data_dir != current.config.gateway.data_dir
                    || config.gateway.wal_bytes_max != current.config.gateway.wal_bytes_max,
            ),
            (
                "models.threads, models.kv_cache or models.queue_max",
                config.gateway.engine != current.config.gateway.engine,
            ),
            (
                "telemetry",
                config.gateway.access_log != current.config.gateway.access_log
                    || config.gateway.traces != current.config.gateway.traces,
            ),
        ] {
            if changed {
                tracing::warn!("`{what}` changed in {}; that takes a restart", self.config_path.display());
            }
        }
        let loaded = self.models.load(&config.models);
        // At a start a broken model is set aside; a reload must not make things worse than they are.
        if let Some((name, why)) = loaded.iter().find_map(|(name, outcome)| Some((name, outcome.as_ref().err()?))) {
            self.models.retain(&current.config.models);
            return Err(ReloadError::Model(format!("model `{name}`: {why}")));
        }
        let hash = config.hash.clone();
        let next = Snapshot::build(config, &loaded, self.clock.now_ns() / 1_000_000_000);
        self.models.retain(&next.config.models);
        self.models.show(&loaded);
        self.metrics.config(&hash);
        self.snapshot.store(Arc::new(next));
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
    pub fn build(config: Config, loaded: &Loaded, since: i64) -> Snapshot {
        for model in config.unpriced() {
            tracing::warn!(%model, "this model has no price, so it is free");
        }
        let mut backends = Backends::default();
        for (name, outcome) in loaded {
            if let Ok(model) = outcome {
                backends.0.insert(name.clone(), model.clone());
            }
        }
        let target = |name: &str| {
            let model = config.models.get(name);
            Target {
                variant: name.to_owned(),
                model: name.to_owned(),
                price: config.prices.models.get(name).copied().unwrap_or_default(),
                output_max: model.map_or(0, |model| u64::from(model.output_max)),
                tokenize: backends.0.get(name).map(|model| model.clone() as Arc<dyn Tokenize>),
            }
        };
        let mut routing = Routing::default();
        for route in &config.routes {
            let targets = route.split.iter().map(|(name, _)| target(name)).collect();
            routing.add(route.clone(), targets);
        }
        // A public model is a route to itself.
        for (name, _) in config.models.iter().filter(|(_, model)| model.public) {
            let route = RouteConfig {
                name: name.clone(),
                split: vec![(name.clone(), 1)],
                sticky: vec![Unit::Key],
                timeouts: Timeouts::default(),
            };
            routing.add(route, vec![target(name)]);
        }
        Snapshot { routing, backends, since, config }
    }
}
