//! The numbers one model shares between its engine and whoever asks: written by the engine thread, read anywhere.

use super::{
    places::{Most, Place, Places},
    request::Class,
};
use crate::{
    memory::Memory,
    report::{ModelReport, ModelState, PrefixReport, StepRecord, Stuck, WeightKind},
};
use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{
            AtomicU32, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    time::{Duration, Instant},
};

/// Steps that are remembered.
const STEPS_MAX: usize = 4096;

/// What only the engine thread knows, as of its last step.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Snapshot {
    pub running: u32,
    /// In the order of `Class::ALL`.
    pub waiting: [u32; 3],
    pub blocks_used: u32,
    pub blocks_cached: u32,
    pub prefix: PrefixReport,
    pub stuck: Option<Stuck>,
    pub step_began: Option<Instant>,
}

/// What is known once the files are read.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub digest: String,
    pub weights: Vec<WeightKind>,
    pub exceptions: Vec<String>,
}

#[derive(Debug)]
pub(crate) struct Stats {
    pub name: String,
    pub memory: Memory,
    began: Instant,
    state: Mutex<ModelState>,
    loaded: OnceLock<(Loaded, Duration)>,
    /// Submitted and not yet seen by the engine. Raised by the caller's thread.
    entering: AtomicU32,
    /// Those that the engine has seen and that have no blocks.
    queued: AtomicU32,
    /// Of those that never had blocks.
    places: Arc<Places>,
    snapshot: Mutex<Snapshot>,
    records: Mutex<VecDeque<StepRecord>>,
    pub blocks_total: u32,
    pub prompt_tokens: AtomicU64,
    pub generated_tokens: AtomicU64,
    pub steps: AtomicU64,
    pub preemptions: AtomicU64,
    pub failures: AtomicU64,
    /// Microseconds between two sequences leaving a full engine, smoothed.
    pub pace_micros: AtomicU64,
}

impl Stats {
    /// Of a model that is about to load.
    pub fn new(name: &str, blocks: u32, memory: Memory) -> Stats {
        Stats {
            name: name.to_owned(),
            memory,
            began: Instant::now(),
            state: Mutex::new(ModelState::Loading),
            loaded: OnceLock::new(),
            entering: AtomicU32::new(0),
            queued: AtomicU32::new(0),
            places: Arc::default(),
            snapshot: Mutex::default(),
            records: Mutex::default(),
            blocks_total: blocks,
            prompt_tokens: AtomicU64::new(0),
            generated_tokens: AtomicU64::new(0),
            steps: AtomicU64::new(0),
            preemptions: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            pace_micros: AtomicU64::new(0),
        }
    }

    pub fn enter(&self, state: ModelState) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    pub fn state(&self) -> ModelState {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The files are read, the first step comes next. Nothing can have been loaded before.
    pub fn warming(&self, loaded: Loaded) {
        let _ = self.loaded.set((loaded, self.began.elapsed()));
        self.enter(ModelState::Warming);
    }

    /// Empty before the files are read.
    pub fn digest(&self) -> &str {
        self.loaded.get().map_or("", |(loaded, _)| &loaded.digest)
    }

    /// Bytes that are this model's at the moment, or will be.
    pub fn memory_now(&self) -> u64 {
        if self.state() == ModelState::Loading { self.memory.peak() } else { self.memory.held() }
    }

    /// Takes `count` places in the queue, or none if there are fewer.
    pub fn enter_queue(&self, tenant: u64, count: u32, most: Most) -> Option<Place> {
        let place = self.places.take(tenant, u64::from(count), most)?;
        self.entering.fetch_add(count, SeqCst);
        Some(place)
    }

    /// The engine has seen `count` of those that entered, and counts them itself. `queued` goes up before `entering` goes
    /// down: a report never misses them.
    pub fn leave_entrance(&self, count: u32) {
        self.entering.fetch_sub(count, SeqCst);
    }

    /// Sequences without blocks.
    pub fn waiting(&self) -> u32 {
        self.entering.load(SeqCst) + self.queued.load(SeqCst)
    }

    pub fn publish(&self, snapshot: Snapshot) {
        self.queued.store(snapshot.waiting.iter().sum(), SeqCst);
        *self.snapshot.lock().unwrap_or_else(PoisonError::into_inner) = snapshot;
    }

    pub fn record(&self, step: StepRecord) {
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        if records.len() == STEPS_MAX {
            records.pop_front();
        }
        records.push_back(step);
    }

    /// The last steps, oldest first.
    pub fn records(&self) -> Vec<StepRecord> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }

    pub fn since_load(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.began)
    }

    fn tokens_per_second(&self) -> f64 {
        let records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        let spent: Duration = records.iter().map(|step| step.build + step.forward + step.sample + step.emit).sum();
        let tokens: f64 = records.iter().map(|step| f64::from(step.sampled_tokens)).sum();
        if spent.is_zero() { 0.0 } else { tokens / spent.as_secs_f64() }
    }

    /// So long after the one before, somebody left a full engine.
    pub fn note_pace(&self, took: Duration) {
        let (micros, smooth) = (took.as_micros() as u64, self.pace_micros.load(Relaxed));
        self.pace_micros.store(if smooth == 0 { micros } else { (7 * smooth + micros) / 8 }, Relaxed);
    }

    /// When a place in the queue is likely to be free: a quarter of the queue from now.
    pub fn retry_after(&self) -> Duration {
        let ahead = u64::from(self.waiting()) / 4 + 1;
        let estimate = Duration::from_micros(ahead * self.pace_micros.load(Relaxed));
        estimate.clamp(Duration::from_millis(100), Duration::from_secs(60))
    }

    pub fn report(&self) -> ModelReport {
        let snapshot = *self.snapshot.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = self.loaded.get();
        ModelReport {
            name: self.name.clone(),
            state: self.state(),
            digest: self.digest().to_owned(),
            memory: self.memory,
            running: snapshot.running,
            waiting: self.waiting(),
            waiting_by_class: std::array::from_fn(|at| (Class::ALL[at], snapshot.waiting[at])),
            kv_blocks_used: snapshot.blocks_used,
            kv_blocks_total: self.blocks_total,
            kv_blocks_cached: snapshot.blocks_cached,
            prefix: snapshot.prefix,
            preemptions: self.preemptions.load(Relaxed),
            stuck: snapshot.stuck,
            in_step: snapshot.step_began.map(|began| began.elapsed()),
            prompt_tokens: self.prompt_tokens.load(Relaxed),
            generated_tokens: self.generated_tokens.load(Relaxed),
            tokens_per_second: self.tokens_per_second(),
            steps: self.steps.load(Relaxed),
            failures: self.failures.load(Relaxed),
            weights: loaded.map(|(loaded, _)| loaded.weights.clone()).unwrap_or_default(),
            exceptions: loaded.map(|(loaded, _)| loaded.exceptions.clone()).unwrap_or_default(),
            load_seconds: loaded.map_or(Duration::ZERO, |(_, took)| *took).as_secs_f64(),
        }
    }
}
