//! The embedded engine in this process.

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use glassgate_runtime as runtime;

/// Of the machine: nobody else works here meanwhile.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Ids that no other prompt of this process begins with; none is a control token.
pub fn ids(count: u32) -> Vec<u32> {
    static PROMPTS: AtomicU32 = AtomicU32::new(0);
    let prompt = PROMPTS.fetch_add(1, Ordering::Relaxed);
    (0..count).map(|i| 1000 + (i.wrapping_mul(7919).wrapping_add(prompt.wrapping_mul(104_729))) % 100_000).collect()
}

pub struct Engine {
    runtime: runtime::Runtime,
    model: runtime::Model,
    /// Resident before the load.
    before: f64,
    waiter: tokio::runtime::Runtime,
}

impl Engine {
    pub fn start(file: &Path, kv_bytes: usize) -> Engine {
        let before = resident();
        let settings = runtime::Settings { threads: threads(), kv_bytes, ..runtime::Settings::default() };
        let runtime = runtime::Runtime::start(settings).unwrap();
        let model = runtime.load("model", file, &runtime::LoadOptions::default()).unwrap();
        let waiter = tokio::runtime::Builder::new_current_thread().build().unwrap();
        Engine { runtime, model, before, waiter }
    }

    pub fn weight_bytes(&self) -> f64 {
        self.runtime.report().models[0].memory.weights as f64
    }

    /// Bytes that this process took since before the load, over those of the weights and the KV pool, once every block of
    /// the pool was written.
    pub fn resident(&self) -> f64 {
        let mut cached = 0;
        loop {
            self.prefill(super::PREFIX_TOKENS);
            let now = self.runtime.report().models[0].kv_blocks_cached;
            if now <= cached {
                break;
            }
            cached = now;
        }
        let kv = self.runtime.report().models[0].memory.kv as f64;
        (resident() - self.before) / (self.weight_bytes() + kv)
    }

    /// When the last step began, since the load.
    pub fn last_step(&self) -> Duration {
        self.runtime.steps("model").last().map_or(Duration::ZERO, |step| step.at)
    }

    /// Prompt tokens a second.
    pub fn prefill(&self, prompt: u32) -> f64 {
        let timeline = self.waiter.block_on(self.timeline(ids(prompt), 1, 0.0));
        f64::from(prompt) / timeline.prefill().unwrap().as_secs_f64()
    }

    /// Output tokens a second, after a prompt of `depth` tokens.
    pub fn decode(&self, depth: u32, tokens: u32) -> f64 {
        let timeline = self.waiter.block_on(self.timeline(ids(depth), tokens + 1, 0.0));
        f64::from(tokens) / timeline.decode().unwrap().as_secs_f64()
    }

    /// Whole answers a second: prefill of `prompt` tokens, then `tokens` of output.
    pub fn answers_per_s(&self, prompt: u32, tokens: u32) -> f64 {
        let began = Instant::now();
        self.waiter.block_on(self.answer(prompt, tokens, 0.0));
        1.0 / began.elapsed().as_secs_f64()
    }

    /// Seconds to the first token of a new prompt, and of the same once more.
    pub fn again(&self, prompt: u32) -> (f64, f64) {
        let ids = ids(prompt);
        let first = || {
            let timeline = self.waiter.block_on(self.timeline(ids.clone(), 1, 0.0));
            (timeline.first_token.unwrap() - timeline.submitted).as_secs_f64()
        };
        (first(), first())
    }

    pub async fn answer(&self, prompt: u32, tokens: u32, temperature: f32) {
        self.timeline(ids(prompt), tokens, temperature).await;
    }

    /// Of the time in steps that began later than `after`, what was not the forward, in percent. Gaps count: other work is
    /// waited for.
    pub fn overhead_percent(&self, after: Duration) -> f64 {
        let steps: Vec<_> = self.runtime.steps("model").into_iter().filter(|step| step.at > after).collect();
        let sum = |of: fn(&runtime::StepRecord) -> Duration| steps.iter().map(of).sum::<Duration>().as_secs_f64();
        let outside = sum(|step| step.gap + step.build + step.sample + step.emit);
        100.0 * outside / (outside + sum(|step| step.forward))
    }

    async fn timeline(&self, prompt: Vec<u32>, max_tokens: u32, temperature: f32) -> runtime::Timeline {
        let request = runtime::Request {
            prompt,
            max_tokens,
            params: runtime::SamplingParams { temperature, ..self.model.defaults().clone() },
            stop: Vec::new(),
            ignore_eos: true,
            tenant: 0,
            salt: [0; 16],
            class: runtime::Class::Interactive,
            deadline: None,
        };
        let mut generation = self.model.generate(request).unwrap();
        loop {
            match generation.next().await.unwrap() {
                runtime::Event::Text { .. } => {}
                runtime::Event::Finished { timeline, .. } => return timeline,
                runtime::Event::Failed { failure, .. } => panic!("{failure}"),
            }
        }
    }
}

/// Bytes of this process in memory.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() * 1024.0
}

/// Gigabytes a second that all threads together read from memory: the best of a few passes over far more than a cache
/// holds.
pub fn read_bandwidth() -> f64 {
    const WORDS: usize = 1 << 27;
    let words = vec![1u64; WORDS];
    let pass = || {
        let began = Instant::now();
        std::thread::scope(|scope| {
            for part in words.chunks(WORDS.div_ceil(threads())) {
                scope.spawn(move || {
                    // Eight sums at a time: one alone would wait for its additions.
                    let sums = part.as_chunks::<8>().0.iter().fold([0u64; 8], |mut sums, words| {
                        sums.iter_mut().zip(words).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
                        sums
                    });
                    std::hint::black_box(sums);
                });
            }
        });
        size_of_val(words.as_slice()) as f64 / began.elapsed().as_secs_f64() / 1e9
    };
    (0..3).map(|_| pass()).fold(0.0, f64::max)
}
