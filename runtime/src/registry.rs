//! The handles a caller holds: [`Runtime`] starts the engine and loads models, [`Model`] turns requests into streams.

pub(crate) mod embedder;
mod load;
mod placement;
mod score;

use crate::{
    engine::{
        self, Command, ModelId,
        events::{Event, Generation, Refusal},
        places::Most,
        request::{Class, Request},
        roster::Roster,
        sequence::Sequence,
        stats::Stats,
    },
    grammar::{BadGrammar, Constraint, Grammar, Grammars},
    kernels::batch::BLOCK_TOKENS,
    memory,
    report::{Report, StepRecord},
    sampling::params::SamplingParams,
    settings::Settings,
    text::{Message, TemplateError, TextError, folder::TextSide, template::TemplateSource},
};
use placement::Placement;
use std::{
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64, mpsc::Sender},
    thread::JoinHandle,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

pub use load::LoadError;
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

/// The engine of one of this machine's devices. When the last handle is dropped, running requests end as cancelled and the
/// engine's thread ends; dropping waits for that, at most one step.
#[derive(Clone)]
pub struct Runtime(Arc<Handle>);

struct Handle {
    settings: Settings,
    placement: Placement,
    commands: Sender<Command>,
    thread: Mutex<Option<JoinHandle<()>>>,
    roster: Arc<Roster>,
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
        let placement = Placement::choose(settings.device)?;
        let roster = Roster::new(settings.memory_max.or_else(memory::available).unwrap_or(u64::MAX));
        let (commands, thread) = engine::start(settings.threads, settings.sink.clone()).map_err(StartError::Thread)?;
        let thread = Mutex::new(Some(thread));
        Ok(Runtime(Arc::new(Handle { settings, placement, commands, thread, roster, next_model: AtomicU64::new(0) })))
    }

    /// The last steps of the models with this name, oldest first for each: at most 4,096 of one.
    pub fn steps(&self, model: &str) -> Vec<StepRecord> {
        let models = self.0.roster.models();
        models.iter().filter(|stats| stats.name == model).flat_map(|stats| stats.records()).collect()
    }

    pub fn report(&self) -> Report {
        let roster = &self.0.roster;
        let models = roster.models().iter().map(|stats| stats.report()).collect();
        Report { models, memory_max: roster.memory_max(), kernel: self.0.placement.kernel_name() }
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
        self.0.stats.digest()
    }

    /// Most tokens of prompt and output together.
    pub fn context(&self) -> u32 {
        self.0.context
    }

    /// How many token ids the model knows.
    pub fn vocab(&self) -> u32 {
        self.0.vocab
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

    /// The model's chat template, if it was loaded with [`crate::Renders::Elsewhere`].
    pub fn template(&self) -> Option<&TemplateSource> {
        self.0.text.template()
    }

    /// The conversation as [`Model::prompt`] hands it to the template, for who renders elsewhere.
    pub fn guarded(&self, messages: &[Message]) -> Vec<Message> {
        self.0.text.guarded(messages)
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

    /// Others serve instead. Who still has this handle may ask until `cut_at`; who is not answered by then fails as
    /// unloaded, and the memory is free. It is free sooner when the last handle is gone and everybody answered.
    pub fn drain(&self, cut_at: Instant) {
        let _ = self.0.commands.send(Command::Drain { id: self.0.id, cut_at });
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
        self.submit(n, &request, |k, submitted| {
            let seed = request.params.seed.wrapping_add(u64::from(k));
            let params = SamplingParams { seed, ..request.params.clone() };
            Sequence::new(Request { params, ..request.clone() }, submitted)
        })
    }

    /// Queues `n` sequences of this request, the k-th as `make` gives it.
    fn submit(
        &self,
        n: u32,
        request: &Request,
        make: impl Fn(u32, Instant) -> (Sequence, mpsc::Receiver<Event>),
    ) -> Result<Vec<Generation>, Refusal> {
        let served = &self.0;
        // Copies must not fill the places that users need.
        let most = match request.class {
            Class::Shadow => {
                let total = served.waiting_max.min(SHADOWS_WAITING_MAX) as u64;
                Most { total, tenant: total }
            }
            Class::Interactive | Class::Batch => Most::halves(served.waiting_max as u64),
        };
        let Some(mut places) = served.stats.enter_queue(request.tenant, n, most) else {
            return Err(Refusal::Overloaded { retry_after: served.stats.retry_after() });
        };
        let prompt_tokens = request.prompt.len() as u32;
        let submitted = Instant::now();
        let (choices, generations) = (0..n)
            .map(|k| {
                let (mut sequence, events) = make(k, submitted);
                sequence.place = Some(places.split());
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
