//! How likely tokens were: natural logarithms of the model's own distribution, before anything was done to it.

use crate::kernels::cpu::largest;
use std::cmp::Ordering;

/// What a request learns of one of its tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    pub id: u32,
    pub logprob: f32,
    /// The most likely tokens with their log-probabilities, the best first; as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// ln Σ exp(logits), so that `logit - normalizer` is a log-probability. Summed in f64.
pub(crate) fn normalizer(logits: &[f32]) -> f64 {
    let best = largest(logits);
    let sum: f64 = logits.iter().map(|&logit| f64::from((logit - best).exp())).sum();
    f64::from(best) + sum.ln()
}

/// Of token `id` in a row of logits, with the `count` most likely ones.
pub(crate) fn logprobs(logits: &[f32], id: u32, count: usize) -> Logprobs {
    let normalizer = normalizer(logits);
    let of = |logit: f32| (f64::from(logit) - normalizer) as f32;
    let mut top = if count < logits.len() { best(logits, count) } else { ranked(logits) };
    top.iter_mut().for_each(|(_, logit)| *logit = of(*logit));
    Logprobs { id, logprob: logits.get(id as usize).map_or(f32::NEG_INFINITY, |&logit| of(logit)), top }
}

/// All of them, the best first; of equals the lower id.
fn ranked(logits: &[f32]) -> Vec<(u32, f32)> {
    let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    all
}

/// The first of them, for a small `count`.
fn best(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    let is_before = |a: f32, b: f32| a.total_cmp(&b) == Ordering::Greater;
    for (&logit, id) in logits.iter().zip(0..) {
        if top.len() == count && top.last().is_none_or(|&(_, worst)| !is_before(logit, worst)) {
            continue;
        }
        // Behind its equals: the lower id comes first.
        let at = top.partition_point(|&(_, other)| !is_before(logit, other));
        top.insert(at, (id, logit));
        top.truncate(count);
    }
    top
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_of_them_are_the_first_of_all() {
        let logits: Vec<f32> = (0..200u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 26) as f32).collect();
        let all = logprobs(&logits, 7, logits.len()).top;
        assert_eq!(all.len(), logits.len());
        assert!((all.iter().map(|(_, logprob)| f64::from(logprob.exp())).sum::<f64>() - 1.0).abs() < 1e-5);
        for count in [0, 1, 20, 199] {
            assert_eq!(logprobs(&logits, 7, count).top, all[..count]);
        }
    }
}
