//! The handles a caller holds: [`Runtime`] starts the engine and loads models, [`Model`] turns requests into streams.

pub(crate) mod embedder;
mod score;

use crate::{
    engine::{
        self, Command, ModelId, Roster,
        events::{Event, Generation, Refusal},
        forward::{Forward, Llm},
        request::{Class, Request},
        scheduler::Limits,
        sequence::{Sequence, Vocabulary},
        stats::Stats,
        stepper::Stepper,
    },
    grammar::{BadGrammar, Constraint, Grammar, Grammars},
    kernels::{batch::BLOCK_TOKENS, cpu::kernel_name},
    model::{decoder::Decoder, kv_pools::block_bytes, spec::ModelSpec},
    report::{Report, StepRecord, WeightKind},
    sampling::params::SamplingParams,
    settings::{LoadOptions, Settings},
    source::Source,
    text::{Message, TemplateError, TextError, folder::TextSide},
    weights::{WeightError, folder, quantize::Quantized},
};
use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{Sender, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

pub use score::ScoreError;

/// Shadows enter a queue only while it is shorter than this.
const SHADOWS_WAITING_MAX: usize = 8;

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("setting {name} {why}")]
    BadSetting { name: &'static str, why: String },
    #[error("cannot start the engine thread: {0}")]
    Thread(std::io::Error),
}

/// Why a model could not be served. Every message names the file.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{}: {why}", file.display())]
    File { file: PathBuf, why: String },
    #[error("{}: the model loaded but its first step failed: {why}", folder.display())]
    Warm { folder: PathBuf, why: String },
    #[error("the engine stopped")]
    Stopped,
}

impl From<WeightError> for LoadError {
    fn from(WeightError { file, why }: WeightError) -> LoadError {
        LoadError::File { file, why }
    }
}

/// The engine of this machine's CPU. When the last handle is dropped, running requests end as cancelled and the
/// engine's thread ends; dropping waits for that, at most one step.
#[derive(Clone)]
pub struct Runtime(Arc<Handle>);

struct Handle {
    settings: Settings,
    commands: Sender<Command>,
    thread: Mutex<Option<JoinHandle<()>>>,
    roster: Roster,
    next_model: AtomicU64,
}

impl Drop for Handle {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Stop);
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        // A sink may own the last handle: the engine's thread cannot wait for itself.
        if let Some(thread) = thread.filter(|thread| thread.thread().id() != std::thread::current().id()) {
            let _ = thread.join();
        }
    }
}

impl Runtime {
    pub fn start(settings: Settings) -> Result<Runtime, StartError> {
        settings.validate()?;
        let roster = Roster::default();
        let (commands, thread) =
            engine::start(settings.threads, settings.sink.clone(), Arc::clone(&roster)).map_err(StartError::Thread)?;
        let thread = Mutex::new(Some(thread));
        Ok(Runtime(Arc::new(Handle { settings, commands, thread, roster, next_model: AtomicU64::new(0) })))
    }

    /// Validates, loads and warms a model: a folder in Hugging Face layout or a `.gguf` file. Blocks until the model is
    /// ready: call it where blocking is allowed. Other models keep serving meanwhile.
    pub fn load(&self, name: &str, source: &Path, options: &LoadOptions) -> Result<Model, LoadError> {
        let started = Instant::now();
        let parts = Parts::read(source, &self.0.settings, options)?;
        for exception in &parts.exceptions {
            tracing::warn!(model = name, "not quantised as asked: {exception}");
        }
        self.serve(name, source, parts, started)
    }

    /// The last steps of the models with this name, oldest first for each: at most 4,096 of one.
    pub fn steps(&self, model: &str) -> Vec<StepRecord> {
        let roster = self.0.roster.lock().unwrap_or_else(PoisonError::into_inner);
        roster.iter().filter(|stats| stats.name == model).flat_map(|stats| stats.records()).collect()
    }

    pub fn report(&self) -> Report {
        let roster = self.0.roster.lock().unwrap_or_else(PoisonError::into_inner);
        Report { models: roster.iter().map(|stats| stats.report()).collect(), kernel: kernel_name() }
    }

    fn serve(&self, name: &str, folder: &Path, parts: Parts, started: Instant) -> Result<Model, LoadError> {
        let settings = &self.0.settings;
        let limits = Limits {
            step_tokens: settings.step_tokens,
            prefill_chunk: settings.prefill_chunk,
            running_max: settings.running_max,
            block_tokens: BLOCK_TOKENS,
            itl_target: settings.itl_target,
            preempt_always: settings.preempt_always,
        };
        let vocab = parts.forward.vocab() as u32;
        let mut stats =
            Stats::new(name, &parts.digest, parts.blocks, parts.weights_bytes, parts.kv_bytes, started.elapsed());
        stats.weights = parts.weights;
        stats.exceptions = parts.exceptions;
        let stats = Arc::new(stats);
        let grammars = Grammars::new(parts.text.tokenizer().bytes(), parts.end.clone(), vocab as usize);
        let vocabulary = Vocabulary { bytes: parts.text.tokenizer().bytes(), end: parts.end };
        let stepper = Box::new(Stepper::new(parts.forward, limits, vocabulary, Arc::clone(&stats)));
        let id = self.0.next_model.fetch_add(1, Ordering::Relaxed);
        let (ready, answer) = channel();
        self.0.commands.send(Command::Add { id, stepper, ready }).map_err(|_| LoadError::Stopped)?;
        let warmed = answer.recv().map_err(|_| LoadError::Stopped)?;
        warmed.map_err(|why| LoadError::Warm { folder: folder.to_owned(), why })?;
        Ok(Model(Arc::new(Served {
            id,
            commands: self.0.commands.clone(),
            waiting_max: settings.waiting_max,
            context: parts.context,
            vocab,
            defaults: parts.defaults,
            text: parts.text,
            grammars,
            stats,
        })))
    }
}

/// What a model's files give.
struct Parts {
    forward: Box<dyn Forward>,
    text: TextSide,
    /// Tokens that end an answer.
    end: Vec<u32>,
    defaults: SamplingParams,
    digest: String,
    context: u32,
    blocks: u32,
    weights_bytes: u64,
    weights: Vec<WeightKind>,
    exceptions: Vec<String>,
    kv_bytes: u64,
}

impl Parts {
    fn read(path: &Path, settings: &Settings, options: &LoadOptions) -> Result<Parts, LoadError> {
        let source = Source::open(path)?;
        let (config_file, config) = source.config()?;
        let blame = |file: &Path| {
            let file = file.to_owned();
            move |why: String| LoadError::File { file, why }
        };
        let mut spec = ModelSpec::from_config(&config).map_err(blame(&config_file))?;
        let mut defaults = SamplingParams::default();
        if let Some((file, generation)) = source.generation()? {
            defaults = SamplingParams::from_generation_config(&generation).map_err(blame(&file))?;
            spec.add_end(generation.get("eos_token_id")).map_err(blame(&file))?;
        }
        let text = source.text(spec.vocab)?;

        let block = block_bytes(&spec, settings.kv_dtype);
        let useful = settings.running_max.saturating_mul(spec.context.div_ceil(BLOCK_TOKENS));
        let blocks = (settings.kv_bytes / block).min(useful).min(u32::MAX as usize / BLOCK_TOKENS);
        if blocks == 0 {
            let why = format!(
                "{BLOCK_TOKENS} tokens of this model need {block} bytes of KV memory, kv_bytes is {}",
                settings.kv_bytes
            );
            return Err(blame(&config_file)(why));
        }
        let (tensors, files) = source.weights()?;
        let positions = spec.context.min(blocks * BLOCK_TOKENS);
        let (decoder, exceptions) = match options.quantize {
            None => (Decoder::load(&spec, tensors.as_ref(), positions)?, Vec::new()),
            Some(to) => {
                let quantized = Quantized::new(tensors.as_ref(), to);
                (Decoder::load(&spec, &quantized, positions)?, quantized.exceptions())
            }
        };
        let weights_bytes = decoder.bytes() as u64;
        let weights =
            decoder.kinds().into_iter().map(|(kind, bytes)| WeightKind { kind: kind.name(), bytes: bytes as u64 });
        let weights = weights.collect();
        let mut digest = folder::digest(&files)?;
        if let Some(to) = options.quantize {
            // The same files, other answers.
            digest = blake3::hash(format!("{digest} {to:?}").as_bytes()).to_hex().to_string();
        }
        let (context, end) = (spec.context as u32, spec.end.clone());
        let llm = Llm::new(spec, decoder, settings.kv_dtype, blocks)
            .map_err(|error| blame(&config_file)(error.to_string()))?;
        Ok(Parts {
            forward: Box::new(llm),
            text,
            end,
            defaults,
            digest,
            context,
            blocks: blocks as u32,
            weights_bytes,
            weights,
            exceptions,
            kv_bytes: (blocks * block) as u64,
        })
    }
}

/// A loaded model. When the last clone is dropped no further request can come: running ones finish, then the memory is
/// freed.
#[derive(Clone)]
pub struct Model(Arc<Served>);

struct Served {
    id: ModelId,
    commands: Sender<Command>,
    waiting_max: usize,
    context: u32,
    vocab: u32,
    defaults: SamplingParams,
    text: TextSide,
    grammars: Grammars,
    stats: Arc<Stats>,
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Retire { id: self.id });
    }
}

impl Model {
    pub fn name(&self) -> &str {
        &self.0.stats.name
    }

    /// Hex blake3 over the model's files, and over how the weights are quantised if they are.
    pub fn digest(&self) -> &str {
        &self.0.stats.digest
    }

    /// Most tokens of prompt and output together.
    pub fn context(&self) -> u32 {
        self.0.context
    }

    /// When a request that finds no place now is likely to find one.
    pub fn retry_after(&self) -> Duration {
        self.0.stats.retry_after()
    }

    /// What the folder's `generation_config.json` asks for.
    pub fn defaults(&self) -> &SamplingParams {
        &self.0.defaults
    }

    /// The conversation in the model's chat template. Control tokens in messages are marked as text; only
    /// [`Model::tokenize`] understands these marks.
    pub fn prompt(&self, messages: &[Message]) -> Result<String, TemplateError> {
        self.0.text.prompt(messages)
    }

    /// Ids of a rendered prompt; adds no tokens of its own.
    pub fn tokenize(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.0.text.encode(text)
    }

    /// The bytes that a token stands for; none for a control token.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.0.text.tokenizer().bytes_of(id)
    }

    /// A control token as the model's template writes it.
    pub fn control_token(&self, id: u32) -> Option<&str> {
        self.0.text.tokenizer().control_text(id)
    }

    /// Makes a constraint ready for this model's requests, at once if it was lately made. Works for up to a second on
    /// what strangers wrote: call it where blocking is allowed.
    pub fn grammar(&self, constraint: &Constraint) -> Result<Grammar, BadGrammar> {
        self.0.grammars.compile(constraint)
    }

    /// Queues a request; never blocks. What can never be answered is refused here.
    pub fn generate(&self, request: Request) -> Result<Generation, Refusal> {
        let mut choices = self.generate_many(request, 1)?;
        choices.pop().ok_or(Refusal::Draining)
    }

    /// As [`Model::generate`], `n` answers to one prompt, which is computed once. The k-th, from 0, samples with the
    /// request's seed plus k: it is what a request of its own with that seed would give.
    pub fn generate_many(&self, request: Request, n: u32) -> Result<Vec<Generation>, Refusal> {
        self.check(&request)?;
        self.submit(n, request.class, request.prompt.len() as u32, |k, submitted| {
            let seed = request.params.seed.wrapping_add(u64::from(k));
            let params = SamplingParams { seed, ..request.params.clone() };
            Sequence::new(Request { params, ..request.clone() }, submitted)
        })
    }

    /// Queues `n` sequences that begin with the same `prompt_tokens`, the k-th as `make` gives it.
    fn submit(
        &self,
        n: u32,
        class: Class,
        prompt_tokens: u32,
        make: impl Fn(u32, Instant) -> (Sequence, mpsc::Receiver<Event>),
    ) -> Result<Vec<Generation>, Refusal> {
        let served = &self.0;
        // Copies must not fill the places that users need.
        let places = match class {
            Class::Shadow => served.waiting_max.min(SHADOWS_WAITING_MAX),
            Class::Interactive | Class::Batch => served.waiting_max,
        };
        if !served.stats.enter_queue(n, places) {
            return Err(Refusal::Overloaded { retry_after: served.stats.retry_after() });
        }
        let submitted = Instant::now();
        let (choices, generations) = (0..n)
            .map(|k| {
                let (sequence, events) = make(k, submitted);
                let flags = Arc::clone(&sequence.flags);
                (sequence, Generation { events, flags, submitted, prompt_tokens, ended: false })
            })
            .unzip();
        if served.commands.send(Command::Submit { id: served.id, choices }).is_err() {
            served.stats.leave_entrance(n);
            return Err(Refusal::Draining);
        }
        Ok(generations)
    }

    fn check(&self, request: &Request) -> Result<(), Refusal> {
        request.params.validate()?;
        let (context, vocab) = (self.0.context, self.0.vocab);
        if request.prompt.is_empty() {
            return Err(Refusal::EmptyPrompt);
        }
        if request.max_tokens == 0 {
            return Err(Refusal::NothingToGenerate);
        }
        if let Some(&id) = request.prompt.iter().find(|&&id| id >= vocab) {
            return Err(Refusal::UnknownToken { id, vocab });
        }
        if let Some(&(id, _)) = request.params.logit_bias.iter().find(|&&(id, _)| id >= vocab) {
            return Err(Refusal::UnknownBias { id, vocab });
        }
        let prompt = u32::try_from(request.prompt.len()).unwrap_or(u32::MAX);
        let need_tokens = prompt.saturating_add(request.max_tokens);
        if need_tokens > context {
            return Err(Refusal::OverContext { prompt, max_tokens: request.max_tokens, context });
        }
        let total_tokens = self.0.stats.blocks_total * BLOCK_TOKENS as u32;
        if need_tokens > total_tokens {
            return Err(Refusal::NeverFits { need_tokens, total_tokens });
        }
        Ok(())
    }
}
