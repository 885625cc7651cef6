//! Model versions: loaded once, kept while a configuration names them, shared by every route that uses them.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use glassgate_runtime as runtime;
use parking_lot::Mutex;

use crate::config::{EngineConfig, ModelConfig};
use crate::dispatch::Backend;
use crate::dispatch::embedded::{Embedded, EmbeddingModel};
use crate::observe::metrics::{EngineStep, Metrics};

/// What became of each model of a configuration.
pub type Loaded = BTreeMap<String, Result<Backend, String>>;

pub struct Models {
    runtime: runtime::Runtime,
    metrics: Arc<Metrics>,
    /// Models in service, by name and folder: a reload that does not touch them does not load them again.
    loaded: Mutex<HashMap<(String, PathBuf), Backend>>,
}

impl Models {
    /// Starts the engine.
    ///
    /// # Errors
    /// In words for the operator.
    pub fn start(config: &EngineConfig, metrics: Arc<Metrics>) -> Result<Models, String> {
        let settings = runtime::Settings {
            threads: config.threads,
            kv_bytes: usize::try_from(config.kv_bytes).unwrap_or(usize::MAX),
            waiting_max: config.waiting_max,
            sink: Some(Arc::new(EngineSink(metrics.clone()))),
            ..runtime::Settings::default()
        };
        let runtime = runtime::Runtime::start(settings).map_err(|error| error.to_string())?;
        Ok(Models { runtime, metrics, loaded: Mutex::default() })
    }

    /// Loads what is not loaded yet. Models that cannot be loaded do not keep the others from serving.
    pub fn load(&self, models: &BTreeMap<String, ModelConfig>) -> Loaded {
        let mut loaded = self.loaded.lock();
        models
            .iter()
            .filter_map(|(name, config)| Some((name, config.source.folder()?)))
            .map(|(name, folder)| {
                let known = (name.clone(), folder.to_owned());
                if let Some(model) = loaded.get(&known) {
                    return (name.clone(), Ok(model.clone()));
                }
                let began = Instant::now();
                let outcome = match self.load_one(name, folder) {
                    Ok((model, digest, context)) => {
                        tracing::info!(model = %name, digest = &digest[..12.min(digest.len())], context, seconds = began.elapsed().as_secs_f64(), "model is ready");
                        self.metrics.runtime_load(name, began.elapsed());
                        loaded.insert(known, model.clone());
                        Ok(model)
                    }
                    Err(error) => {
                        tracing::error!(model = %name, %error, "model cannot be loaded; the others serve");
                        Err(error.to_string())
                    }
                };
                (name.clone(), outcome)
            })
            .collect()
    }

    /// A model of whichever kind its folder is, its digest, and how many tokens it reads.
    fn load_one(&self, name: &str, folder: &Path) -> Result<(Backend, String, u32), runtime::LoadError> {
        let metrics = self.metrics.clone();
        if runtime::is_embedder(folder)? {
            let model = self.runtime.load_embedder(name, folder)?;
            let (digest, context) = (model.digest().to_owned(), model.context());
            return Ok((Backend::Embeddings(Arc::new(EmbeddingModel::new(model, metrics))), digest, context));
        }
        let model = self.runtime.load(name, folder)?;
        let (digest, context) = (model.digest().to_owned(), model.context());
        Ok((Backend::Embedded(Arc::new(Embedded::new(model, metrics))), digest, context))
    }

    /// Says which of the models that should serve do.
    pub fn show(&self, loaded: &Loaded) {
        self.metrics.runtime_models(loaded.iter().map(|(name, outcome)| (name.as_str(), outcome.is_ok())));
    }

    /// Forgets models that no configuration names any more; requests that still run on them end in peace.
    pub fn retain(&self, models: &BTreeMap<String, ModelConfig>) {
        let mut loaded = self.loaded.lock();
        loaded.retain(|(name, source), _| {
            models.get(name).and_then(|config| config.source.folder()) == Some(source.as_path())
        });
    }

    /// Copies the engine's gauges to the metrics: between steps nobody else does.
    pub fn observe(&self) {
        for model in self.runtime.report().models {
            self.metrics.runtime_load_now(
                &model.name,
                u64::from(model.running),
                u64::from(model.waiting),
                u64::from(model.kv_blocks_used),
                u64::from(model.kv_blocks_total),
            );
        }
    }
}

/// The engine's steps as metrics.
struct EngineSink(Arc<Metrics>);

impl runtime::Sink for EngineSink {
    fn step(&self, model: &str, step: &runtime::StepRecord) {
        self.0.runtime_step(
            model,
            &EngineStep {
                duration: step.build + step.forward + step.sample + step.emit,
                sequences: u64::from(step.sequences),
                prefill_tokens: u64::from(step.prefill_tokens),
                sampled_tokens: u64::from(step.sampled_tokens),
                running: u64::from(step.running),
                waiting: u64::from(step.waiting),
                kv_blocks_used: u64::from(step.kv_blocks_used),
                kv_blocks_total: u64::from(step.kv_blocks_total),
            },
        );
    }
}
