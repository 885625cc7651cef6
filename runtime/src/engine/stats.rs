//! The numbers one model shares between its engine and whoever asks: written by the engine thread, read anywhere.

use crate::report::ModelReport;
use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

#[derive(Debug)]
pub(crate) struct Stats {
    pub name: String,
    pub digest: String,
    pub running: AtomicU32,
    /// Submitted and not yet admitted: also those that the engine has not seen yet. Raised by the caller's thread.
    pub waiting: AtomicU32,
    pub blocks_used: AtomicU32,
    pub blocks_total: u32,
    pub prompt_tokens: AtomicU64,
    pub generated_tokens: AtomicU64,
    pub steps: AtomicU64,
    pub failures: AtomicU64,
    /// Microseconds between two sequences leaving a full engine, smoothed.
    pub pace_micros: AtomicU64,
    pub weights_bytes: u64,
    pub kv_bytes: u64,
    pub load_seconds: f64,
}

impl Stats {
    pub fn new(name: &str, digest: &str, blocks: u32, weights_bytes: u64, kv_bytes: u64, load: Duration) -> Stats {
        Stats {
            name: name.to_owned(),
            digest: digest.to_owned(),
            running: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
            blocks_used: AtomicU32::new(0),
            blocks_total: blocks,
            prompt_tokens: AtomicU64::new(0),
            generated_tokens: AtomicU64::new(0),
            steps: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            pace_micros: AtomicU64::new(0),
            weights_bytes,
            kv_bytes,
            load_seconds: load.as_secs_f64(),
        }
    }

    /// Takes a place in the queue; false if it is full.
    pub fn enter_queue(&self, waiting_max: usize) -> bool {
        self.waiting.fetch_update(Relaxed, Relaxed, |n| ((n as usize) < waiting_max).then_some(n + 1)).is_ok()
    }

    pub fn leave_queue(&self) {
        self.waiting.fetch_sub(1, Relaxed);
    }

    /// Somebody left the queue who had needed the device for so long.
    pub fn note_pace(&self, took: Duration) {
        let (micros, smooth) = (took.as_micros() as u64, self.pace_micros.load(Relaxed));
        self.pace_micros.store(if smooth == 0 { micros } else { (7 * smooth + micros) / 8 }, Relaxed);
    }

    /// When a place in the queue is likely to be free: a quarter of the queue from now.
    pub fn retry_after(&self) -> Duration {
        let ahead = u64::from(self.waiting.load(Relaxed)) / 4 + 1;
        let estimate = Duration::from_micros(ahead * self.pace_micros.load(Relaxed));
        estimate.clamp(Duration::from_millis(100), Duration::from_secs(60))
    }

    pub fn report(&self) -> ModelReport {
        ModelReport {
            name: self.name.clone(),
            digest: self.digest.clone(),
            running: self.running.load(Relaxed),
            waiting: self.waiting.load(Relaxed),
            kv_blocks_used: self.blocks_used.load(Relaxed),
            kv_blocks_total: self.blocks_total,
            prompt_tokens: self.prompt_tokens.load(Relaxed),
            generated_tokens: self.generated_tokens.load(Relaxed),
            steps: self.steps.load(Relaxed),
            failures: self.failures.load(Relaxed),
            weights_bytes: self.weights_bytes,
            kv_bytes: self.kv_bytes,
            load_seconds: self.load_seconds,
        }
    }
}
