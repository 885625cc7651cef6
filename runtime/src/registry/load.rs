//! From files to a model in service: what it will take is known and set aside before the first tensor is read.

use super::{
    Model, Runtime, Served,
    placement::{Placed, Shape},
};
use crate::{
    engine::{
        Command,
        forward::Forward,
        roster::Resident,
        scheduler::{Limits, SCORED_ROWS_MAX},
        sequence::Vocabulary,
        stats::{Loaded, Stats},
        stepper::Stepper,
    },
    grammar::Grammars,
    kernels::{batch::BLOCK_TOKENS, ops::block_bytes},
    memory::Memory,
    model::{layout, spec::ModelSpec},
    report::WeightKind,
    sampling::params::SamplingParams,
    settings::{LoadOptions, Renders, Settings},
    source::Source,
    text::folder::TextSide,
    weights::{Tensors, WeightError, folder, quantize::Quantized},
};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering, mpsc::channel},
};

/// Why a model could not be served. Every message names the file.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{}: {why}", file.display())]
    File { file: PathBuf, why: String },
    #[error("{}: the model loaded but its first step failed: {why}", folder.display())]
    Warm { folder: PathBuf, why: String },
    /// Refused before anything was read into memory.
    #[error("{}: {why}", path.display())]
    NoRoom { path: PathBuf, why: String },
    #[error("the engine stopped")]
    Stopped,
}

impl From<WeightError> for LoadError {
    fn from(WeightError { file, why }: WeightError) -> LoadError {
        LoadError::File { file, why }
    }
}

impl Runtime {
    /// Validates, loads and warms a model: a folder in Hugging Face layout or a `.gguf` file. Blocks until the model is
    /// ready: call it where blocking is allowed. Other models keep serving meanwhile, one of the same name too.
    pub fn load(&self, name: &str, path: &Path, options: &LoadOptions) -> Result<Model, LoadError> {
        let settings = &self.0.settings;
        let Files { spec, text, defaults, tensors, files, config } = Files::read(path, options.renders)?;
        let blocks = blocks(&spec, settings).map_err(|why| LoadError::File { file: config, why })?;
        let positions = spec.context.min(blocks * BLOCK_TOKENS);
        let quantized = options.quantize.map(|to| Quantized::new(tensors.as_ref(), to));
        let tensors: &dyn Tensors = match &quantized {
            Some(quantized) => quantized,
            None => tensors.as_ref(),
        };
        let kv = (blocks * spec.layers.len() * block_bytes(spec.heads(), settings.activations)) as u64;
        // Every token has a slot in the pool; whoever samples wants one row, and who is scored some.
        let tokens = settings.step_tokens.min(blocks * BLOCK_TOKENS);
        let step = layout::Step { tokens, rows: tokens.min(settings.running_max.saturating_add(SCORED_ROWS_MAX + 1)) };
        let memory = Memory { kv, ..layout::memory(&spec, tensors, positions, &step)? };
        let resident = self.admit(name, path, blocks as u32, memory)?;

        let (end, context) = (spec.end.clone(), spec.context as u32);
        let shape = Shape { spec, tensors, positions, activations: settings.activations, blocks };
        let Placed { forward, kinds } = self.0.placement.place(shape)?;
        let weights = kinds.into_iter();
        let weights = weights.map(|(kind, bytes)| WeightKind { kind: kind.name(), bytes: bytes as u64 }).collect();
        let mut digest = folder::digest(&files)?;
        if let Some(to) = options.quantize {
            // The same files, other answers.
            digest = blake3::hash(format!("{digest} {to:?}").as_bytes()).to_hex().to_string();
        }
        let exceptions = quantized.map(Quantized::exceptions).unwrap_or_default();
        for exception in &exceptions {
            tracing::warn!(model = name, "not quantised as asked: {exception}");
        }
        resident.stats.warming(Loaded { digest, weights, exceptions });
        self.serve(path, resident, forward, text, Asks { end, context, defaults })
    }

    /// Sets memory aside, or says why that cannot be.
    pub(super) fn admit(&self, name: &str, path: &Path, blocks: u32, memory: Memory) -> Result<Resident, LoadError> {
        let admitted = self.0.roster.admit(Stats::new(name, blocks, memory));
        admitted.map_err(|why| LoadError::NoRoom { path: path.to_owned(), why })
    }

    fn serve(
        &self,
        path: &Path,
        resident: Resident,
        forward: Box<dyn Forward>,
        text: TextSide,
        Asks { end, context, defaults }: Asks,
    ) -> Result<Model, LoadError> {
        let settings = &self.0.settings;
        let limits = Limits {
            step_tokens: settings.step_tokens,
            prefill_chunk: settings.prefill_chunk,
            running_max: settings.running_max,
            block_tokens: BLOCK_TOKENS,
            itl_target: settings.itl_target,
            preempt_always: settings.preempt_always,
        };
        let vocab = forward.vocab() as u32;
        let grammars = Grammars::new(text.tokenizer().bytes(), end.clone(), vocab as usize);
        let vocabulary = Vocabulary { bytes: text.tokenizer().bytes(), end };
        let stats = Arc::clone(&resident.stats);
        let stepper = Box::new(Stepper::new(forward, limits, vocabulary, Arc::clone(&stats)));
        let id = self.0.next_model.fetch_add(1, Ordering::Relaxed);
        let (ready, answer) = channel();
        self.0.commands.send(Command::Add { id, stepper, resident, ready }).map_err(|_| LoadError::Stopped)?;
        let warmed = answer.recv().map_err(|_| LoadError::Stopped)?;
        warmed.map_err(|why| LoadError::Warm { folder: path.to_owned(), why })?;
        let commands = self.0.commands.clone();
        let waiting_max = settings.waiting_max;
        Ok(Model(Arc::new(Served { id, commands, waiting_max, context, vocab, defaults, text, grammars, stats })))
    }
}

/// What requests are held to.
struct Asks {
    /// Tokens that end an answer.
    end: Vec<u32>,
    context: u32,
    defaults: SamplingParams,
}

/// What a model's files say, short of the weights' numbers.
struct Files {
    spec: ModelSpec,
    text: TextSide,
    defaults: SamplingParams,
    tensors: Box<dyn Tensors>,
    /// All that shape an answer.
    files: Vec<PathBuf>,
    config: PathBuf,
}

impl Files {
    fn read(path: &Path, renders: Renders) -> Result<Files, LoadError> {
        let source = Source::open(path)?;
        let (config, fields) = source.config()?;
        let blame = |file: &Path| {
            let file = file.to_owned();
            move |why: String| LoadError::File { file, why }
        };
        let mut spec = ModelSpec::from_config(&fields).map_err(blame(&config))?;
        let mut defaults = SamplingParams::default();
        if let Some((file, generation)) = source.generation()? {
            defaults = SamplingParams::from_generation_config(&generation).map_err(blame(&file))?;
            spec.add_end(generation.get("eos_token_id")).map_err(blame(&file))?;
        }
        let text = source.text(spec.vocab, renders)?;
        let (tensors, files) = source.weights()?;
        Ok(Files { spec, text, defaults, tensors, files, config })
    }
}

/// Blocks of the KV pool: as many as there is memory for, but no more than can be in use.
fn blocks(spec: &ModelSpec, settings: &Settings) -> Result<usize, String> {
    let block = spec.layers.len() * block_bytes(spec.heads(), settings.activations);
    let useful = settings.running_max.saturating_mul(spec.context.div_ceil(BLOCK_TOKENS));
    match (settings.kv_bytes / block).min(useful).min(u32::MAX as usize / BLOCK_TOKENS) {
        0 => Err(format!(
            "{BLOCK_TOKENS} tokens of this model need {block} bytes of KV memory, kv_bytes is {}",
            settings.kv_bytes
        )),
        blocks => Ok(blocks),
    }
}
