//! The numbers one model shares between its engine and whoever asks: written by the engine thread, read anywhere.

use crate::{
    engine::request::Class,
    report::{ModelReport, PrefixReport, StepRecord, Stuck, WeightKind},
};
use std::{
    collections::VecDeque,
    sync::{
        Mutex, PoisonError,
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

#[derive(Debug)]
pub(crate) struct Stats {
    pub name: String,
    pub digest: String,
    loaded: Instant,
    /// Submitted and not yet seen by the engine. Raised by the caller's thread.
    entering: AtomicU32,
    /// Those that the engine has seen and that have no blocks.
    queued: AtomicU32,
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
    pub weights_bytes: u64,
    pub weights: Vec<WeightKind>,
    pub exceptions: Vec<String>,
    pub kv_bytes: u64,
    pub load_seconds: f64,
}

impl Stats {
    pub fn new(name: &str, digest: &str, blocks: u32, weights_bytes: u64, kv_bytes: u64, load: Duration) -> Stats {
        Stats {
            name: name.to_owned(),
            digest: digest.to_owned(),
            loaded: Instant::now(),
            entering: AtomicU32::new(0),
            queued: AtomicU32::new(0),
            snapshot: Mutex::default(),
            records: Mutex::default(),
            blocks_total: blocks,
            prompt_tokens: AtomicU64::new(0),
            generated_tokens: AtomicU64::new(0),
            steps: AtomicU64::new(0),
            preemptions: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            pace_micros: AtomicU64::new(0),
            weights_bytes,
            weights: Vec::new(),
            exceptions: Vec::new(),
            kv_bytes,
            load_seconds: load.as_secs_f64(),
        }
    }

    /// Takes `count` places in the queue, or none if there are fewer.
    pub fn enter_queue(&self, count: u32, waiting_max: usize) -> bool {
        let enter = |entering: u32| {
            let entering = entering.checked_add(count)?;
            let waiting = u64::from(entering) + u64::from(self.queued.load(SeqCst));
            (waiting <= waiting_max as u64).then_some(entering)
        };
        self.entering.fetch_update(SeqCst, SeqCst, enter).is_ok()
    }

    /// The engine has seen `count` of those that entered, and counts them itself. `queued` goes up before `entering` goes
    /// down: the places are never given to others in between.
    pub fn leave_entrance(&self, count: u32) {
        self.entering.fetch_sub(count, SeqCst);
    }

    /// Sequences without blocks.
    pub fn waiting(&self) -> u32 {
        self.entering.load(SeqCst) + self.queued.load(SeqCst)
    }

    pub fn publish(&self, queued: u32, snapshot: Snapshot) {
        self.queued.store(queued, SeqCst);
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
        now.saturating_duration_since(self.loaded)
    }

    /// Somebody left the queue who had needed the device for so long.
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
        ModelReport {
            name: self.name.clone(),
            digest: self.digest.clone(),
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
            steps: self.steps.load(Relaxed),
            failures: self.failures.load(Relaxed),
            weights_bytes: self.weights_bytes,
            weights: self.weights.clone(),
            exceptions: self.exceptions.clone(),
            kv_bytes: self.kv_bytes,
            load_seconds: self.load_seconds,
        }
    }
}
