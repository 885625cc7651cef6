//! What the operator decides about the engine, checked once at start. Nothing here is read again while serving.

use crate::{StartError, report::Sink};
use std::{sync::Arc, time::Duration};

/// Keeps candle's own pools small; the kernels' threads are [`Settings::threads`]. To be called first thing in `main`:
/// candle reads these variables once, at first use, and changing the environment beside other threads is undefined.
/// With another thread about, or where that cannot be seen, nothing is changed.
#[allow(unsafe_code)]
pub fn set_threads(engine_threads: usize) {
    let is_alone = std::fs::read_dir("/proc/self/task").is_ok_and(|threads| threads.count() == 1);
    if !is_alone {
        return;
    }
    let threads = engine_threads.max(1).to_string();
    for name in ["CANDLE_NUM_THREADS", "RAYON_NUM_THREADS"] {
        // SAFETY: this is the only thread, so nobody reads the environment meanwhile.
        unsafe { std::env::set_var(name, &threads) };
    }
}

/// The type to which keys and values are rounded when they are kept, and what weights in bf16 are multiplied with (on a
/// CPU). Sums are f32 with either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activations {
    F32,
    Bf16,
}

/// What plain weights become while they are read. Embedding table and output head become Q8_0 with either.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Quantize {
    /// 8 bits and a scale for each 32 weights: 8.5 bits a weight.
    Q8_0,
    /// 4 bits, with scales and minima for each 32 and each 256 weights: 4.6 bits a weight. A matrix whose width is no
    /// multiple of 256 becomes Q8_0.
    Q4K,
}

/// Where a model's chat template is rendered. Its steps are bounded, the memory that it takes is not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Renders {
    /// In this process, and once when the model is loaded.
    #[default]
    Here,
    /// By the caller, in a process that may be lost; here not even once.
    Elsewhere,
}

/// What the operator decides about one model.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadOptions {
    /// None: weights stay as the files store them.
    pub quantize: Option<Quantize>,
    pub renders: Renders,
}

/// Where models run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// On a CUDA device if this binary can use one and the machine has one, else on the processor.
    #[default]
    Auto,
    Cpu,
    Cuda,
}

#[derive(Clone)]
pub struct Settings {
    pub device: Device,
    /// Threads a step may use, the engine's own included. On a machine that others use too, fewer than its cores.
    pub threads: usize,
    /// Bytes that all models may take together, what their loads need for a moment included. None: nine tenths of what
    /// machine and control groups have left at the start.
    pub memory_max: Option<u64>,
    /// Bytes of KV pool for each model.
    pub kv_bytes: usize,
    pub activations: Activations,
    /// Most tokens (decode and prefill together) in one step.
    pub step_tokens: usize,
    /// Most prompt tokens of one sequence in one step: bounds how long a long prompt delays its neighbours' next token.
    pub prefill_chunk: usize,
    /// How long a step may take while somebody decodes: prompts beside them are read in chunks that keep to it.
    pub itl_target: Duration,
    /// Most sequences of one model that hold KV blocks at a time.
    pub running_max: usize,
    /// Most sequences of one model that wait for their first blocks, at most half of them of one tenant. Beyond it a
    /// request is refused as overloaded, unless it is one of many choices and nobody else waits.
    pub waiting_max: usize,
    /// Told about every step, on the engine thread: must return quickly and never block.
    pub sink: Option<Arc<dyn Sink>>,
    /// Takes every sequence's blocks away after each token, as if there were never enough: a test of what must not change
    /// any answer.
    #[doc(hidden)]
    pub preempt_always: bool,
}

impl Default for Settings {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Settings {
            device: Device::Auto,
            // One core is left to whoever feeds the engine.
            threads: cores.saturating_sub(1).max(1),
            memory_max: None,
            kv_bytes: 64 << 20,
            activations: Activations::Bf16,
            step_tokens: 256,
            prefill_chunk: 128,
            itl_target: Duration::from_millis(50),
            running_max: 64,
            waiting_max: 256,
            sink: None,
            preempt_always: false,
        }
    }
}

impl Settings {
    /// Says by name which setting is wrong and why.
    pub fn validate(&self) -> Result<(), StartError> {
        let bad = |name, why: &str| Err(StartError::BadSetting { name, why: why.to_owned() });
        if !(1..=1024).contains(&self.threads) {
            return bad("threads", "must lie between 1 and 1024");
        }
        if self.kv_bytes == 0 {
            return bad("kv_bytes", "must not be zero");
        }
        if self.prefill_chunk == 0 {
            return bad("prefill_chunk", "must not be zero");
        }
        if self.running_max == 0 {
            return bad("running_max", "must not be zero");
        }
        if self.waiting_max == 0 {
            return bad("waiting_max", "must not be zero");
        }
        if self.itl_target.is_zero() {
            return bad("itl_target", "must not be zero");
        }
        // Every running sequence may decode one token a step; without a rest no prompt would ever advance.
        if self.step_tokens <= self.running_max {
            return bad("step_tokens", "must be larger than running_max");
        }
        Ok(())
    }
}
