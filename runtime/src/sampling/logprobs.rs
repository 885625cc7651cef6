//! How likely tokens were: natural logarithms of the model's own distribution, before anything was done to it.

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
    let best = logits.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    let sum: f64 = logits.iter().map(|&logit| f64::from((logit - best).exp())).sum();
    f64::from(best) + sum.ln()
}

/// Of token `id` in a row of logits, with the `count` most likely ones.
pub(crate) fn logprobs(logits: &[f32], id: u32, count: usize) -> Logprobs {
    let normalizer = normalizer(logits);
    let of = |logit: f32| (f64::from(logit) - normalizer) as f32;
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
    top.iter_mut().for_each(|(_, logit)| *logit = of(*logit));
    Logprobs { id, logprob: logits.get(id as usize).map_or(f32::NEG_INFINITY, |&logit| of(logit)), top }
}
