//! Model versions: loaded once, kept while a configuration names them, shared by every route that uses them.

pub mod hub;
pub mod limits;
mod steps;
pub mod templates;
pub mod verify;
pub mod vet;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use glassgate_runtime as runtime;
use glassgate_runtime::Renders;
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::config::{Device, EngineConfig, ModelConfig, ModelSource, Quantize};
use crate::dispatch::Backend;
use crate::dispatch::embedded::{Embedded, EmbeddingModel};
use crate::observe::metrics::{EngineStep, Metrics};
use hub::Hub;
use templates::Templates;

/// What became of each model of a configuration.
pub type Loaded = BTreeMap<String, Result<Backend, String>>;

/// How models come in.
#[derive(Clone, Debug)]
pub struct Intake {
    pub hub: Hub,
    pub downloads: Downloads,
    /// This program, whose children look at a model's text first and render its chat template.
    pub program: PathBuf,
}

/// Whether a model that is not here yet is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Downloads {
    Allowed,
    /// For commands that only look.
    Refused,
}

/// Name, source, and how it is kept.
type Known = (String, String, Option<Quantize>);

pub struct Models {
    runtime: runtime::Runtime,
    metrics: Arc<Metrics>,
    intake: Intake,
    /// Models in service: a reload that does not touch them does not load them again.
    loaded: Mutex<HashMap<Known, Backend>>,
    /// Models that should serve and cannot.
    failed: Mutex<BTreeSet<String>>,
    /// Names that the metrics know: they read zero once the model is gone.
    seen: Mutex<BTreeSet<String>>,
}

impl Models {
    /// Starts the engine.
    ///
    /// # Errors
    /// In words for the operator.
    pub fn start(config: &EngineConfig, intake: Intake, metrics: Arc<Metrics>) -> Result<Models, String> {
        let settings = runtime::Settings {
            device: match config.device {
                Device::Auto => runtime::Device::Auto,
                Device::Cpu => runtime::Device::Cpu,
                Device::Cuda => runtime::Device::Cuda,
            },
            threads: config.threads,
            memory_max: config.memory_max,
            kv_bytes: usize::try_from(config.kv_bytes).unwrap_or(usize::MAX),
            waiting_max: config.waiting_max,
            itl_target: config.itl_target,
            sink: Some(Arc::new(EngineSink { metrics: metrics.clone(), itl_target: config.itl_target })),
            ..runtime::Settings::default()
        };
        let runtime = runtime::Runtime::start(settings).map_err(|error| error.to_string())?;
        Ok(Models {
            runtime,
            metrics,
            intake,
            loaded: Mutex::default(),
            failed: Mutex::default(),
            seen: Mutex::default(),
        })
    }

    /// Loads what is not loaded yet. Models that cannot be loaded do not keep the others from serving.
    pub fn load(&self, models: &BTreeMap<String, ModelConfig>) -> Loaded {
        let mut loaded = self.loaded.lock();
        models
            .iter()
            .filter(|(_, config)| config.source.is_embedded())
            .map(|(name, config)| {
                let known = (name.clone(), config.source.to_string(), config.quantize);
                if let Some(model) = loaded.get(&known) {
                    return (name.clone(), Ok(model.clone()));
                }
                let began = Instant::now();
                tracing::info!(model = %name, source = %config.source, "loading a model");
                let outcome = match self.path(&config.source).and_then(|path| self.load_one(name, &path, config.quantize)) {
                    Ok((model, digest, context)) => {
                        tracing::info!(model = %name, digest = &digest[..12.min(digest.len())], context, seconds = began.elapsed().as_secs_f64(), "model is ready");
                        self.metrics.runtime_load(name, began.elapsed());
                        loaded.insert(known, model.clone());
                        Ok(model)
                    }
                    Err(error) => {
                        tracing::error!(model = %name, %error, "model cannot be loaded; the others serve");
                        Err(error)
                    }
                };
                (name.clone(), outcome)
            })
            .collect()
    }

    /// Where the model's files are, by now, and worth a look.
    fn path(&self, source: &ModelSource) -> Result<PathBuf, String> {
        let Intake { hub, downloads, program } = &self.intake;
        let path = match (source, downloads) {
            (ModelSource::Local(path), _) => path.clone(),
            (ModelSource::Hub(reference), Downloads::Allowed) => hub.fetch(reference)?,
            (ModelSource::Hub(reference), Downloads::Refused) => hub
                .kept(reference)
                .ok_or_else(|| format!("{reference} is not here yet: glassgate models pull {reference}"))?,
            (ModelSource::Upstream { upstream, .. }, _) => return Err(format!("is at {upstream}")),
        };
        vet::vet(program, &path)?;
        Ok(path)
    }

    /// Loads a model that writes, outside of what serves; it renders its template in this process.
    ///
    /// # Errors
    /// In words for the operator.
    pub fn open(&self, name: &str, source: &ModelSource, quantize: Option<Quantize>) -> Result<runtime::Model, String> {
        let path = self.path(source)?;
        if runtime::is_embedder(&path).map_err(|error| error.to_string())? {
            return Err(format!("{source} makes embeddings; only models that write can be asked"));
        }
        self.runtime.load(name, &path, &options(quantize, Renders::Here)).map_err(|error| error.to_string())
    }

    pub fn report(&self) -> runtime::Report {
        self.runtime.report()
    }

    /// A model of whichever kind its files are, its digest, and how many tokens it reads.
    fn load_one(&self, name: &str, path: &Path, quantize: Option<Quantize>) -> Result<(Backend, String, u32), String> {
        let metrics = self.metrics.clone();
        let why = |error: runtime::LoadError| error.to_string();
        if runtime::is_embedder(path).map_err(why)? {
            if quantize.is_some() {
                return Err("quantize: embedding models are kept as their files store them; remove the key".to_owned());
            }
            let model = self.runtime.load_embedder(name, path).map_err(why)?;
            let (digest, context) = (model.digest().to_owned(), model.context());
            return Ok((Backend::Embeddings(Arc::new(EmbeddingModel::new(model, metrics))), digest, context));
        }
        let model = self.runtime.load(name, path, &options(quantize, Renders::Elsewhere)).map_err(why)?;
        let start = |source| Templates::start(&self.intake.program, name, source);
        let templates = model.template().map(start).transpose();
        let templates = templates.map_err(|error| format!("its templates cannot be rendered: {error}"))?;
        let (digest, context) = (model.digest().to_owned(), model.context());
        Ok((Backend::Embedded(Arc::new(Embedded::new(model, templates, metrics))), digest, context))
    }

    /// Says which of the models that should serve do.
    pub fn show(&self, loaded: &Loaded) {
        let failed = loaded.iter().filter(|(_, outcome)| outcome.is_err()).map(|(name, _)| name.clone());
        *self.failed.lock() = failed.collect();
        self.observe_states();
    }

    /// Forgets models that no configuration names any more. Requests that still run on them may until `cut_at`.
    pub fn retain(&self, models: &BTreeMap<String, ModelConfig>, cut_at: Instant) {
        let mut loaded = self.loaded.lock();
        let is_gone = |(name, source, quantize): &Known| {
            let config = models.get(name).filter(|config| config.quantize == *quantize);
            config.is_none_or(|config| config.source.to_string() != *source)
        };
        for ((name, source, _), model) in loaded.extract_if(|known, _| is_gone(known)) {
            let cut_in = cut_at.saturating_duration_since(Instant::now());
            tracing::info!(model = %name, %source, seconds = cut_in.as_secs_f64(), "unloading a model; who is on it may finish within");
            match model {
                Backend::Embedded(model) => model.drain(cut_at),
                Backend::Embeddings(model) => model.drain(cut_at),
                Backend::Upstream(_) => {}
            }
        }
    }

    /// Every state of every model that is here, should be here, or was.
    fn observe_states(&self) {
        let report = self.runtime.report();
        let failed = self.failed.lock().clone();
        let mut seen = self.seen.lock();
        seen.extend(report.models.iter().map(|model| model.name.clone()).chain(failed.iter().cloned()));
        for name in seen.iter() {
            let versions = report.models.iter().filter(|model| model.name == *name);
            for state in runtime::ModelState::ALL {
                let count = versions.clone().filter(|model| model.state == state).count();
                self.metrics.runtime_model_state(name, state.name(), count as u64);
            }
            self.metrics.runtime_model_state(name, "failed", u64::from(failed.contains(name)));
            let sum = |of: fn(&runtime::Memory) -> u64| versions.clone().map(|model| of(&model.memory)).sum::<u64>();
            self.metrics.runtime_model_memory(
                name,
                [
                    ("weights", sum(|memory| memory.weights)),
                    ("tables", sum(|memory| memory.tables)),
                    ("kv", sum(|memory| memory.kv)),
                    ("workspace", sum(|memory| memory.workspace)),
                ],
            );
        }
    }

    /// What the engine holds, for people and their programs.
    pub fn told(&self) -> Value {
        let report = self.runtime.report();
        let model = |model: &runtime::ModelReport| {
            let kinds: Vec<&str> = model.weights.iter().map(|weights| weights.kind).collect();
            let memory = &model.memory;
            json!({
                "name": model.name, "state": model.state.name(), "digest": model.digest, "kinds": kinds.join(", "),
                "memory_bytes": {
                    "weights": memory.weights, "tables": memory.tables, "kv": memory.kv,
                    "workspace": memory.workspace, "total": memory.held(),
                },
                "running": model.running, "waiting": model.waiting,
                "tokens_per_second": model.tokens_per_second, "load_seconds": model.load_seconds,
            })
        };
        json!({
            "kernel": report.kernel, "memory_max_bytes": report.memory_max,
            "models": report.models.iter().map(model).collect::<Vec<_>>(),
        })
    }

    /// The last steps of a model of the engine, oldest first, each as a JSON object.
    ///
    /// # Errors
    /// The names that there are, if this is none of them.
    pub fn steps(&self, model: &str) -> Result<Vec<Value>, Vec<String>> {
        let names: Vec<String> = self.runtime.report().models.into_iter().map(|model| model.name).collect();
        let is_known = names.iter().any(|name| name == model);
        if is_known { Ok(self.runtime.steps(model).iter().map(steps::line).collect()) } else { Err(names) }
    }

    /// Copies the engine's gauges to the metrics: between steps nobody else does.
    pub fn observe(&self) {
        self.observe_states();
        for model in self.runtime.report().models {
            self.metrics.runtime_load_now(
                &model.name,
                u64::from(model.running),
                u64::from(model.waiting),
                u64::from(model.kv_blocks_used),
                u64::from(model.kv_blocks_total),
            );
            let queued = model.waiting_by_class.iter().map(|(class, count)| (class_name(*class), u64::from(*count)));
            let is = |why| model.stuck == Some(why);
            let stuck =
                [("shadows_wait", is(runtime::Stuck::ShadowsWait)), ("nobody_fits", is(runtime::Stuck::NobodyFits))];
            self.metrics.runtime_progress(&model.name, queued, stuck, model.in_step.unwrap_or_default());
        }
    }
}

fn options(quantize: Option<Quantize>, renders: Renders) -> runtime::LoadOptions {
    let quantize = quantize.map(|quantize| match quantize {
        Quantize::Q8_0 => runtime::Quantize::Q8_0,
        Quantize::Q4K => runtime::Quantize::Q4K,
    });
    runtime::LoadOptions { quantize, renders }
}

fn class_name(class: runtime::Class) -> &'static str {
    match class {
        runtime::Class::Interactive => "interactive",
        runtime::Class::Batch => "batch",
        runtime::Class::Shadow => "shadow",
    }
}

/// The engine's steps as metrics.
struct EngineSink {
    metrics: Arc<Metrics>,
    itl_target: Duration,
}

impl runtime::Sink for EngineSink {
    fn step(&self, model: &str, step: &runtime::StepRecord) {
        let missed = step.admitted_tokens.saturating_sub(step.cached_tokens + step.regretted_tokens);
        self.metrics.runtime_step(
            model,
            &EngineStep {
                parts: [
                    ("gap", step.gap),
                    ("build", step.build),
                    ("forward", step.forward),
                    ("sample", step.sample),
                    ("emit", step.emit),
                ],
                is_late: step.build + step.forward + step.sample > self.itl_target,
                sequences: u64::from(step.sequences),
                prefill_tokens: u64::from(step.prefill_tokens),
                decode_tokens: u64::from(step.decode_tokens),
                recomputed_tokens: u64::from(step.recomputed_tokens),
                prefix: [
                    ("hit", u64::from(step.cached_tokens)),
                    ("regretted", u64::from(step.regretted_tokens)),
                    ("miss", u64::from(missed)),
                ],
                preempted: u64::from(step.preempted),
                sampled_tokens: u64::from(step.sampled_tokens),
                running: u64::from(step.running),
                waiting: u64::from(step.waiting),
                kv_blocks_used: u64::from(step.kv_blocks_used),
                kv_blocks_total: u64::from(step.kv_blocks_total),
            },
        );
    }
}
