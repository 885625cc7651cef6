//! Temperature, top-k, top-p, min-p, and the draw among what is left.

use super::params::SamplingParams;
use crate::kernels::cpu::{PART, weigh};
use std::cmp::Ordering;

struct Candidate {
    id: u32,
    /// Probability after temperature, as a share of the best one's.
    weight: f32,
}

/// The best first, the lower id first among equals, so that every cut is the same on every run.
fn best_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id))
}

/// Chooses by `point` in [0, 1). `best`: the largest logit, above minus infinity. `logits` is scratch afterwards.
pub(super) fn draw(params: &SamplingParams, logits: &mut [f32], best: f32, point: f64) -> Option<u32> {
    let sums = weigh(logits, best, params.temperature);
    let weights = Weights { each: logits, sums };
    if params.top_k == 0 && params.top_p >= 1.0 && params.min_p == 0.0 {
        return weights.pick(point);
    }

    let mut candidates = candidates(params, &weights);
    let total = |candidates: &[Candidate]| candidates.iter().map(|candidate| f64::from(candidate.weight)).sum();
    let top_k = params.top_k as usize;
    let mut all = weights.total();
    if top_k > 0 {
        let count = top_k.min(candidates.len());
        sort_front(&mut candidates, 0, count);
        candidates.truncate(count);
        all = total(&candidates);
    }
    if params.top_p < 1.0 {
        let count = nucleus(&mut candidates, f64::from(params.top_p) * all);
        candidates.truncate(count);
    }
    if params.min_p > 0.0 {
        candidates.retain(|candidate| candidate.weight >= params.min_p);
    }
    let mut left = point * total(&candidates);
    let chosen = candidates.iter().find(|candidate| {
        left -= f64::from(candidate.weight);
        left < 0.0
    });
    // Rounding may leave a hair of the last one.
    chosen.or(candidates.last()).map(|candidate| candidate.id)
}

/// Enough of the best for every cut, in the order of their ids: the rest of a vocabulary is looked at, not collected.
fn candidates(params: &SamplingParams, weights: &Weights<'_>) -> Vec<Candidate> {
    let at_least = |least: f32| -> Vec<Candidate> {
        let possible = weights.each.iter().zip(0..).filter(|(weight, _)| **weight >= least);
        possible.map(|(&weight, id)| Candidate { id, weight }).collect()
    };
    let goal = f64::from(params.top_p) * weights.total();
    let is_enough = |candidates: &[Candidate]| match params.top_k {
        0 => candidates.iter().map(|candidate| f64::from(candidate.weight)).sum::<f64>() >= goal,
        top_k => candidates.len() >= top_k as usize,
    };
    if params.top_k == 0 && params.top_p >= 1.0 {
        return at_least(params.min_p);
    }
    let looks = [1e-2, 1e-4, 1e-8].into_iter().map(at_least);
    looks.into_iter().find(|candidates| is_enough(candidates)).unwrap_or_else(|| at_least(f32::MIN_POSITIVE))
}

/// A row after temperature, and what each [`PART`] of it adds up to.
struct Weights<'a> {
    each: &'a [f32],
    sums: Vec<f64>,
}

impl Weights<'_> {
    fn total(&self) -> f64 {
        self.sums.iter().sum()
    }

    /// Among all of them.
    fn pick(&self, point: f64) -> Option<u32> {
        let mut left = point * self.total();
        for ((part, sum), first) in self.each.chunks(PART).zip(&self.sums).zip((0..).step_by(PART)) {
            if left >= *sum {
                left -= sum;
                continue;
            }
            for (&weight, id) in part.iter().zip(first..) {
                left -= f64::from(weight);
                if left < 0.0 {
                    return Some(id);
                }
            }
        }
        // Rounding may leave a hair of the last one.
        self.each.iter().rposition(|&weight| weight > 0.0).map(|id| id as u32)
    }
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
