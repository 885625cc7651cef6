//! Makes tokens that were there before less likely.

use super::params::SamplingParams;
use std::collections::HashMap;

pub(super) fn are_on(params: &SamplingParams) -> bool {
    params.repetition_penalty != 1.0 || params.frequency_penalty != 0.0 || params.presence_penalty != 0.0
}

/// `seen`: token → occurrences in the output (0: only in the prompt). Repetition counts prompt and output, the other
/// two the output only.
pub(super) fn apply(params: &SamplingParams, seen: &HashMap<u32, u32>, logits: &mut [f32]) {
    for (&id, &count) in seen {
        let Some(logit) = logits.get_mut(id as usize) else { continue };
        *logit = if *logit > 0.0 { *logit / params.repetition_penalty } else { *logit * params.repetition_penalty };
        if count > 0 {
            *logit -= params.frequency_penalty * count as f32 + params.presence_penalty;
        }
    }
}
