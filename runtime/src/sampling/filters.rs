//! Temperature, top-k, top-p, min-p, and the draw among what is left.

use super::params::SamplingParams;
use std::cmp::Ordering;

struct Candidate {
    logit: f32,
    id: u32,
    /// Probability after temperature, as a share of the best one's.
    weight: f32,
}

/// The best first, the lower id first among equals, so that every cut is the same on every run.
fn best_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

/// Chooses by `point` in [0, 1). None if no logit is above minus infinity.
pub(super) fn draw(params: &SamplingParams, logits: &[f32], point: f64) -> Option<u32> {
    let best = logits.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    // Dividing the difference, not the logit, cannot overflow to infinity however small the temperature.
    let weight = |logit: f32| ((logit - best) / params.temperature).exp();
    let possible = logits.iter().zip(0..).filter(|(logit, _)| **logit > f32::NEG_INFINITY);
    let mut candidates: Vec<Candidate> =
        possible.map(|(&logit, id)| Candidate { logit, id, weight: weight(logit) }).collect();

    let top_k = params.top_k as usize;
    if top_k > 0 && top_k < candidates.len() {
        sort_front(&mut candidates, 0, top_k);
        candidates.truncate(top_k);
    }
    if params.top_p < 1.0 {
        let goal = f64::from(params.top_p) * total(&candidates);
        let count = nucleus(&mut candidates, goal);
        candidates.truncate(count);
    }
    if params.min_p > 0.0 {
        candidates.retain(|candidate| candidate.weight >= params.min_p);
    }

    let mut left = point * total(&candidates);
    for candidate in &candidates {
        left -= f64::from(candidate.weight);
        if left < 0.0 {
            return Some(candidate.id);
        }
    }
    // Rounding may leave a hair of the last one.
    candidates.last().map(|candidate| candidate.id)
}

fn total(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| f64::from(candidate.weight)).sum()
}

/// How many of the best are sorted at first: enough for most cuts, little beside a vocabulary.
const FIRST_LOOK: usize = 64;

/// Given that the best `from` candidates are in front and in order, makes it so for the best `to`.
fn sort_front(candidates: &mut [Candidate], from: usize, to: usize) {
    let (rest, count) = (&mut candidates[from..], to - from);
    if 0 < count && count < rest.len() {
        rest.select_nth_unstable_by(count - 1, best_first);
    }
    rest[..count].sort_unstable_by(best_first);
}

/// How many of the best it takes to reach `goal`; they are then in front and in order.
fn nucleus(candidates: &mut [Candidate], goal: f64) -> usize {
    let mut sum = 0.0;
    let mut sorted = 0;
    while sorted < candidates.len() {
        let next = (sorted * 4).max(FIRST_LOOK).min(candidates.len());
        sort_front(candidates, sorted, next);
        for (at, candidate) in candidates.iter().enumerate().take(next).skip(sorted) {
            sum += f64::from(candidate.weight);
            if sum >= goal {
                return at + 1;
            }
        }
        sorted = next;
    }
    candidates.len()
}
