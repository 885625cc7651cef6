//! The engine's record of a step as JSON.

use glassgate_runtime::StepRecord;
use serde_json::{Value, json};

/// Times are microseconds; `at_us` counts from when the model was loaded.
pub fn line(step: &StepRecord) -> Value {
    json!({
        "at_us": step.at.as_micros() as u64,
        "gap_us": step.gap.as_micros() as u64,
        "build_us": step.build.as_micros() as u64,
        "forward_us": step.forward.as_micros() as u64,
        "sample_us": step.sample.as_micros() as u64,
        "emit_us": step.emit.as_micros() as u64,
        "expected_us": step.expected.as_micros() as u64,
        "prefill_tokens": step.prefill_tokens,
        "decode_tokens": step.decode_tokens,
        "recomputed_tokens": step.recomputed_tokens,
        "sampled_tokens": step.sampled_tokens,
        "admitted_tokens": step.admitted_tokens,
        "cached_tokens": step.cached_tokens,
        "regretted_tokens": step.regretted_tokens,
        "sequences": step.sequences,
        "preempted": step.preempted,
        "running": step.running,
        "waiting": step.waiting,
        "kv_blocks_used": step.kv_blocks_used,
        "kv_blocks_total": step.kv_blocks_total,
        "failed": step.failed,
    })
}
