//! From a row of logits to the next token, and when the text says stop. Names no tensor library.
//!
//! The order: penalties, temperature, top-k, top-p, min-p, draw. A draw depends on the request's seed and on how many
//! tokens it has sampled, on nothing else: not on the batch, not on time.

mod filters;
pub(crate) mod params;
mod penalties;
mod philox;
pub(crate) mod stop;

use params::SamplingParams;
use std::collections::HashMap;

/// A logit was not a number: the model is broken, or its weights are.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NotFinite;

/// One sequence's sampling state.
#[derive(Debug)]
pub(crate) struct Sampler {
    params: SamplingParams,
    /// Tokens seen in the prompt or the output → how often in the output. Empty when no penalty asks for it.
    seen: HashMap<u32, u32>,
    drawn: u64,
}

impl Sampler {
    /// `params` must have been validated.
    pub fn new(params: SamplingParams, prompt: &[u32]) -> Sampler {
        let mut sampler = Sampler { params, seen: HashMap::new(), drawn: 0 };
        if sampler.params.repetition_penalty != 1.0 {
            sampler.seen.extend(prompt.iter().map(|&id| (id, 0)));
        }
        sampler
    }

    /// Chooses the next token. `logits` is scratch afterwards.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<u32, NotFinite> {
        penalties::apply(&self.params, &self.seen, logits);
        // Minus infinity is a legal "never"; a row needs one number above it.
        if logits.iter().any(|l| l.is_nan() || *l == f32::INFINITY) {
            return Err(NotFinite);
        }
        let id = if self.params.temperature == 0.0 {
            highest(logits)
        } else {
            let point = philox::uniform(self.params.seed, self.drawn);
            filters::draw(&self.params, logits, point)
        };
        let id = id.ok_or(NotFinite)?;
        self.drawn += 1;
        if penalties::are_on(&self.params) {
            *self.seen.entry(id).or_default() += 1;
        }
        Ok(id)
    }
}

/// The lowest id among the most likely.
fn highest(logits: &[f32]) -> Option<u32> {
    let mut best = (f32::NEG_INFINITY, None);
    for (id, &logit) in logits.iter().enumerate() {
        if logit > best.0 {
            best = (logit, Some(id as u32));
        }
    }
    best.1
}

#[cfg(test)]
mod tests;
