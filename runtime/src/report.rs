//! What the engine tells about itself and about each request: plain structs, and the one trait that receives them.

use crate::{engine::request::Class, memory::Memory};
use std::time::{Duration, Instant};

/// Receives every step's record on the engine thread. Must return quickly and never block.
pub trait Sink: Send + Sync {
    fn step(&self, model: &str, step: &StepRecord);
}

/// One step of one model. The durations from `gap` to `emit` are disjoint and follow each other.
#[derive(Clone, Copy, Debug, Default)]
pub struct StepRecord {
    /// Since this engine's last step ended, or since work arrived if it was idle: other models' steps and bookkeeping.
    pub gap: Duration,
    /// Choosing what to run and laying out the batch.
    pub build: Duration,
    pub forward: Duration,
    pub sample: Duration,
    /// Detokenising, scanning for stop strings, handing text to clients.
    pub emit: Duration,
    /// When it began, since the model's load began.
    pub at: Duration,
    /// What it was planned to take, up to the choice of tokens; zero before anything was learnt.
    pub expected: Duration,
    pub prefill_tokens: u32,
    pub decode_tokens: u32,
    /// Computed before, and lost with the blocks of a preempted sequence. Not among the two above.
    pub recomputed_tokens: u32,
    /// Of the prompts that were admitted with this step.
    pub admitted_tokens: u32,
    /// Those of them that were found in the prefix cache.
    pub cached_tokens: u32,
    /// Those of them that a pool of twice the size would have found too.
    pub regretted_tokens: u32,
    /// Tokens that were chosen: one for each sequence whose prompt is computed.
    pub sampled_tokens: u32,
    /// Sequences that took part.
    pub sequences: u32,
    /// Sequences that gave up their blocks for others.
    pub preempted: u32,
    /// Sequences that hold KV blocks after the step.
    pub running: u32,
    pub waiting: u32,
    pub kv_blocks_used: u32,
    pub kv_blocks_total: u32,
    /// Sequences that this step failed: 0, or all that took part.
    pub failed: u32,
}

/// What happened to one request, and when.
#[derive(Clone, Debug)]
pub struct Timeline {
    pub submitted: Instant,
    /// When it got its KV blocks. None: it never left the queue.
    pub admitted: Option<Instant>,
    pub first_token: Option<Instant>,
    pub finished: Instant,
    pub prompt_tokens: u32,
    /// All sampled tokens, the end token included.
    pub output_tokens: u32,
    /// Steps in which part of the prompt was computed.
    pub prefill_chunks: u32,
    /// Steps it took part in.
    pub steps: u32,
    /// The largest number of sequences it shared a step with, itself included.
    pub batch_max: u32,
    /// As `batch_max`, on average over its steps.
    pub batch_mean: f32,
    /// Tokens of the prompt that were in the prefix cache when it was admitted.
    pub cached_tokens: u32,
    /// How often it gave up its blocks for others.
    pub preemptions: u32,
    /// Its share of the steps' time, by tokens.
    pub compute: Duration,
}

impl Timeline {
    /// From submission until admission (or the end, if it never was admitted).
    pub fn queue(&self) -> Duration {
        self.admitted.unwrap_or(self.finished).saturating_duration_since(self.submitted)
    }

    /// From admission until the first token; None before it.
    pub fn prefill(&self) -> Option<Duration> {
        Some(self.first_token?.saturating_duration_since(self.admitted?))
    }

    /// From the first token until the end; None without a token.
    pub fn decode(&self) -> Option<Duration> {
        Some(self.finished.saturating_duration_since(self.first_token?))
    }
}

/// What happened to one request for embeddings, and when.
#[derive(Clone, Debug)]
pub struct EmbedTimeline {
    pub submitted: Instant,
    /// When the first of its texts was taken into a batch. None: it never left the queue.
    pub started: Option<Instant>,
    pub finished: Instant,
    /// Of all its texts.
    pub tokens: u64,
    /// Batches that it took part in.
    pub batches: u32,
    /// Texts in the largest of them, its own included.
    pub texts_max: u32,
    /// Its share of the batches' time, by tokens.
    pub compute: Duration,
}

impl EmbedTimeline {
    /// Of a request that begins to wait now.
    pub(crate) fn begin(texts: &[Vec<u32>]) -> EmbedTimeline {
        let submitted = Instant::now();
        EmbedTimeline {
            submitted,
            started: None,
            finished: submitted,
            tokens: texts.iter().map(|text| text.len() as u64).sum(),
            batches: 0,
            texts_max: 0,
            compute: Duration::ZERO,
        }
    }

    /// From submission until a batch took its first text (or the end, if none did).
    pub fn queue(&self) -> Duration {
        self.started.unwrap_or(self.finished).saturating_duration_since(self.submitted)
    }
}

/// The state of the runtime at one moment.
#[derive(Clone, Debug)]
pub struct Report {
    /// In the order in which their loads began; a draining model stays until its memory is free.
    pub models: Vec<ModelReport>,
    /// Bytes that they may take together.
    pub memory_max: u64,
    /// The instruction set the kernels chose on this machine.
    pub kernel: &'static str,
}

/// The matrices of a model that are kept in one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightKind {
    /// As in `bf16` or `q4_k`.
    pub kind: &'static str,
    /// In memory.
    pub bytes: u64,
}

/// What the prefix cache was good for, since the load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixReport {
    /// Prompt tokens of admitted requests.
    pub looked_up_tokens: u64,
    /// Those of them that did not have to be computed.
    pub found_tokens: u64,
    /// Those of them that would have been found in a pool twice the size.
    pub regretted_tokens: u64,
    /// Blocks that were used for something else while they could still be found.
    pub evicted_blocks: u64,
}

/// Why sequences wait and none runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stuck {
    /// Only shadows are here, and users of another model are served.
    ShadowsWait,
    /// Nobody fits and nobody runs who could make room. There is no such state: it is a mistake in the engine.
    NobodyFits,
}

/// Where a model version is in its life. One that is unloaded is in no report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelState {
    /// Its files are read; its memory is set aside.
    Loading,
    /// Its first step, of which nobody sees anything.
    Warming,
    Ready,
    /// Nobody new is sent here; who is here may finish.
    Draining,
}

impl ModelState {
    pub const ALL: [ModelState; 4] =
        [ModelState::Loading, ModelState::Warming, ModelState::Ready, ModelState::Draining];

    pub fn name(self) -> &'static str {
        match self {
            ModelState::Loading => "loading",
            ModelState::Warming => "warming",
            ModelState::Ready => "ready",
            ModelState::Draining => "draining",
        }
    }
}

#[derive(Clone, Debug)]
pub struct ModelReport {
    pub name: String,
    pub state: ModelState,
    /// Empty while it loads.
    pub digest: String,
    pub memory: Memory,
    pub running: u32,
    pub waiting: u32,
    /// Those that wait as of the last step, by class.
    pub waiting_by_class: [(Class, u32); 3],
    pub kv_blocks_used: u32,
    pub kv_blocks_total: u32,
    /// Full blocks that are found by what they hold, used ones among them.
    pub kv_blocks_cached: u32,
    pub prefix: PrefixReport,
    /// Sequences that gave up their blocks for others, since the load.
    pub preemptions: u64,
    /// Why nothing runs though something waits.
    pub stuck: Option<Stuck>,
    /// How long the step under way has been going on.
    pub in_step: Option<Duration>,
    /// Prompt tokens of admitted requests, since the load.
    pub prompt_tokens: u64,
    /// Sampled tokens since the load.
    pub generated_tokens: u64,
    /// Tokens sampled for each second of the last steps, those of other models left out; 0 before the first.
    pub tokens_per_second: f64,
    pub steps: u64,
    /// Requests that ended in `Failed` since the load.
    pub failures: u64,
    /// How the matrices are kept, by kind.
    pub weights: Vec<WeightKind>,
    /// Matrices that could not be quantised as asked, and why.
    pub exceptions: Vec<String>,
    pub load_seconds: f64,
}
