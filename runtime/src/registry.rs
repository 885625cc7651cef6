//! The handles a caller holds: [`Runtime`] starts the engine and loads models, [`Model`] turns requests into streams.

pub(crate) mod embedder;

use crate::{
    engine::{
        self, Command, ModelId, Roster,
        events::{Generation, Refusal},
        forward::{Forward, Llm},
        request::{Class, Request},
        scheduler::Limits,
        sequence::{Sequence, Vocabulary},
        stats::Stats,
        stepper::Stepper,
    },
    kernels::{batch::BLOCK_TOKENS, cpu::kernel_name},
    model::{decoder::Decoder, kv_pools::block_bytes, spec::ModelSpec},
    report::Report,
    sampling::params::SamplingParams,
    settings::Settings,
    text::{Message, TemplateError, TextError, folder::TextSide},
    weights::{Tensors, WeightError, folder, safetensors::Checkpoint},
};
use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{Sender, channel},
    },
    thread::JoinHandle,
    time::Instant,
};

/// Shadows enter a queue only while it is shorter than this.
const SHADOWS_WAITING_MAX: usize = 8;

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("setting {name} {why}")]
    BadSetting { name: &'static str, why: String },
    #[error("cannot start the engine thread: {0}")]
    Thread(std::io::Error),
}

/// Why a model folder could not be served. Every message names the file.
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

    /// Validates, loads and warms a model folder in Hugging Face layout. Blocks until the model is ready: call it where
    /// blocking is allowed. Other models keep serving meanwhile.
    pub fn load(&self, name: &str, folder: &Path) -> Result<Model, LoadError> {
        let started = Instant::now();
        let parts = Parts::read(folder, &self.0.settings)?;
        self.serve(name, folder, parts, started)
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
        };
        let vocab = parts.forward.vocab() as u32;
        let stats = Arc::new(Stats::new(
            name,
            &parts.digest,
            parts.blocks,
            parts.weights_bytes,
            parts.kv_bytes,
            started.elapsed(),
        ));
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
            stats,
        })))
    }
}

/// What a folder gives.
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
    kv_bytes: u64,
}

impl Parts {
    fn read(folder: &Path, settings: &Settings) -> Result<Parts, LoadError> {
        let file = |name: &str| folder.join(name);
        let blame = |name: &str| {
            let file = file(name);
            move |why: String| LoadError::File { file, why }
        };
        let config = folder::require_json(&file("config.json"))?;
        let mut spec = ModelSpec::from_config(&config).map_err(blame("config.json"))?;
        let mut defaults = SamplingParams::default();
        if let Some(generation) = folder::read_json(&file("generation_config.json"))? {
            defaults = SamplingParams::from_generation_config(&generation).map_err(blame("generation_config.json"))?;
            spec.add_end(generation.get("eos_token_id")).map_err(blame("generation_config.json"))?;
        }
        let text = TextSide::read(folder, spec.vocab)?;

        let block = block_bytes(&spec, settings.kv_dtype);
        let useful = settings.running_max.saturating_mul(spec.context.div_ceil(BLOCK_TOKENS));
        let blocks = (settings.kv_bytes / block).min(useful).min(u32::MAX as usize / BLOCK_TOKENS);
        if blocks == 0 {
            let why = format!(
                "{BLOCK_TOKENS} tokens of this model need {block} bytes of KV memory, kv_bytes is {}",
                settings.kv_bytes
            );
            return Err(blame("config.json")(why));
        }
        let checkpoint = Checkpoint::open(folder)?;
        let decoder = Decoder::load(&spec, &checkpoint, spec.context.min(blocks * BLOCK_TOKENS))?;
        let weights_bytes = decoder.bytes() as u64;
        let mut files: Vec<PathBuf> = ["config.json", "generation_config.json"].map(file).into();
        files.extend(TextSide::files(folder));
        files.extend(checkpoint.files());
        let digest = folder::digest(&files)?;
        let (context, end) = (spec.context as u32, spec.end.clone());
        let llm = Llm::new(spec, decoder, settings.kv_dtype, blocks)
            .map_err(|error| blame("config.json")(error.to_string()))?;
        Ok(Parts {
            forward: Box::new(llm),
            text,
            end,
            defaults,
            digest,
            context,
            blocks: blocks as u32,
            weights_bytes,
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

    /// Hex blake3 over the folder's files.
    pub fn digest(&self) -> &str {
        &self.0.stats.digest
    }

    /// Most tokens of prompt and output together.
    pub fn context(&self) -> u32 {
        self.0.context
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

    /// Queues a request; never blocks. What can never be answered is refused here.
    pub fn generate(&self, request: Request) -> Result<Generation, Refusal> {
        let served = &self.0;
        self.check(&request)?;
        // Copies must not fill the places that users need.
        let places = match request.class {
            Class::Shadow => served.waiting_max.min(SHADOWS_WAITING_MAX),
            Class::Interactive | Class::Batch => served.waiting_max,
        };
        if !served.stats.enter_queue(places) {
            return Err(Refusal::Overloaded { retry_after: served.stats.retry_after() });
        }
        let submitted = Instant::now();
        let prompt_tokens = request.prompt.len() as u32;
        let (sequence, events) = Sequence::new(request, submitted);
        let flags = Arc::clone(&sequence.flags);
        let command = Command::Submit { id: served.id, sequence: Box::new(sequence) };
        if served.commands.send(command).is_err() {
            served.stats.leave_queue();
            return Err(Refusal::Draining);
        }
        Ok(Generation { events, flags, submitted, prompt_tokens, ended: false })
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
