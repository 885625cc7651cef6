//! What the embedded runtime tells: the families `runtime_*`.

use std::time::Duration;

use super::Metrics;

impl Metrics {
    pub fn runtime_queue(&self, model: &str, class: &str, queued: Duration) {
        self.runtime_queue.with_label_values(&[model, class]).observe(queued.as_secs_f64());
    }

    pub fn runtime_step(&self, model: &str, step: &EngineStep) {
        let phase = if step.prefill_tokens > 0 { "prefill" } else { "decode" };
        let duration: Duration = step.parts.iter().filter(|(part, _)| *part != "gap").map(|(_, took)| *took).sum();
        self.runtime_step.with_label_values(&[model, phase]).observe(duration.as_secs_f64());
        for (part, took) in step.parts {
            self.runtime_step_parts.with_label_values(&[model, part]).inc_by(took.as_secs_f64());
        }
        for (pace, is) in [("in_time", !step.is_late), ("late", step.is_late)] {
            let counter = self.runtime_decode_steps.with_label_values(&[model, pace]);
            counter.inc_by(u64::from(is && step.decode_tokens > 0));
        }
        for (result, tokens) in step.prefix {
            self.runtime_prefix_tokens.with_label_values(&[model, result]).inc_by(tokens);
        }
        self.runtime_preemptions.with_label_values(&[model]).inc_by(step.preempted);
        self.runtime_recomputed_tokens.with_label_values(&[model]).inc_by(step.recomputed_tokens);
        self.runtime_batch.with_label_values(&[model]).observe(step.sequences as f64);
        self.runtime_prompt_tokens.with_label_values(&[model]).inc_by(step.prefill_tokens);
        self.runtime_generated_tokens.with_label_values(&[model]).inc_by(step.sampled_tokens);
        self.runtime_load_now(model, step.running, step.waiting, step.kv_blocks_used, step.kv_blocks_total);
    }

    /// How full the engine is now.
    pub fn runtime_load_now(&self, model: &str, running: u64, waiting: u64, kv_used: u64, kv_total: u64) {
        self.runtime_requests.with_label_values(&[model, "running"]).set(running as i64);
        self.runtime_requests.with_label_values(&[model, "waiting"]).set(waiting as i64);
        self.runtime_kv_blocks.with_label_values(&[model, "used"]).set(kv_used as i64);
        self.runtime_kv_blocks.with_label_values(&[model, "free"]).set(kv_total.saturating_sub(kv_used) as i64);
    }

    /// Who waits, by class, and whether the engine gets on.
    pub fn runtime_progress<'a>(
        &self,
        model: &str,
        queued: impl Iterator<Item = (&'a str, u64)>,
        stuck: [(&str, bool); 2],
        in_step: Duration,
    ) {
        for (class, count) in queued {
            self.runtime_queued.with_label_values(&[model, class]).set(count as i64);
        }
        for (why, is) in stuck {
            self.runtime_stuck.with_label_values(&[model, why]).set(i64::from(is));
        }
        self.runtime_in_step.with_label_values(&[model]).set(in_step.as_secs_f64());
    }

    pub fn runtime_failure(&self, model: &str) {
        self.runtime_failures.with_label_values(&[model]).inc();
    }

    pub fn runtime_model_state(&self, model: &str, state: &str, versions: u64) {
        self.runtime_models.with_label_values(&[model, state]).set(versions as i64);
    }

    pub fn runtime_model_memory(&self, model: &str, parts: [(&str, u64); 4]) {
        for (part, bytes) in parts {
            self.runtime_memory.with_label_values(&[model, part]).set(bytes as i64);
        }
    }

    pub fn runtime_load(&self, model: &str, took: Duration) {
        self.runtime_load.with_label_values(&[model]).set(took.as_secs_f64());
        self.runtime_failures.with_label_values(&[model]);
    }
}

/// What the engine says of one step, in numbers that a metric can take.
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineStep {
    /// Where its time went, and how long it was since the one before.
    pub parts: [(&'static str, Duration); 5],
    /// It took longer than who waits for a next token should.
    pub is_late: bool,
    pub sequences: u64,
    pub prefill_tokens: u64,
    pub decode_tokens: u64,
    pub recomputed_tokens: u64,
    /// The prompts that were admitted, by what was known of them.
    pub prefix: [(&'static str, u64); 3],
    pub preempted: u64,
    pub sampled_tokens: u64,
    pub running: u64,
    pub waiting: u64,
    pub kv_blocks_used: u64,
    pub kv_blocks_total: u64,
}
