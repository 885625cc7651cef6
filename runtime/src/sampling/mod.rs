//! From a row of logits to the next token, and when the text says stop. Names no tensor library.
//!
//! The order: grammar, bias, penalties, temperature, top-k, top-p, min-p, draw. A draw depends on the request's seed and
//! on how many tokens it has sampled, on nothing else: not on the batch, not on time.

mod filters;
pub(crate) mod logprobs;
pub(crate) mod params;
mod penalties;
mod philox;
pub(crate) mod stop;

use crate::{
    grammar::{BadGrammar, Grammar, GrammarState},
    kernels::cpu::{largest, largest_up_to},
};
use logprobs::{Logprobs, logprobs};
use params::SamplingParams;
use std::collections::HashMap;

/// Why there is no next token.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Unsampled {
    /// A logit was not a number: the model is broken, or its weights are.
    NotFinite,
    /// The grammar has become too much, or allows none of the tokens that the model does.
    Grammar(BadGrammar),
}

/// The best logit of a row that a model in order could have given. Minus infinity is a legal "never"; one number must be
/// above it.
pub(crate) fn best_if_sound(logits: &[f32]) -> Option<f32> {
    largest_up_to(logits, LOGIT_MAX).filter(|&best| best > f32::NEG_INFINITY)
}

/// No model comes near it, and a penalty could turn more into infinity.
const LOGIT_MAX: f32 = 1e30;

/// The next token.
#[derive(Debug, PartialEq)]
pub(crate) struct Sampled {
    pub id: u32,
    /// If they were asked for.
    pub logprobs: Option<Logprobs>,
}

/// One sequence's sampling state.
#[derive(Debug)]
pub(crate) struct Sampler {
    params: SamplingParams,
    /// Tokens seen in the prompt or the output → how often in the output. Empty when no penalty asks for it.
    seen: HashMap<u32, u32>,
    /// None before the first token: a queued request holds no state, which may be megabytes.
    grammar: Option<GrammarState>,
    drawn: u64,
}

impl Sampler {
    /// `params` must have been validated.
    pub fn new(params: SamplingParams, prompt: &[u32]) -> Sampler {
        let mut sampler = Sampler { params, seen: HashMap::new(), grammar: None, drawn: 0 };
        if sampler.params.repetition_penalty != 1.0 {
            sampler.seen.extend(prompt.iter().map(|&id| (id, 0)));
        }
        sampler
    }

    pub fn is_constrained(&self) -> bool {
        self.params.grammar.is_some()
    }

    /// Does what can be done for the next token before its logits are there.
    pub fn prepare(&mut self) {
        if self.grammar.is_none() {
            self.grammar = self.params.grammar.as_ref().map(Grammar::begin);
        }
        if let Some(grammar) = &mut self.grammar {
            grammar.prepare();
        }
    }

    /// Chooses the next token. `logits` is scratch afterwards.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<Sampled, Unsampled> {
        let mut best = best_if_sound(logits).ok_or(Unsampled::NotFinite)?;
        let raw = self.params.logprobs.map(|count| (logits.to_vec(), count as usize));
        self.prepare();
        if let Some(grammar) = &mut self.grammar {
            grammar.mask(logits).map_err(Unsampled::Grammar)?;
        }
        for &(id, bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit += bias;
            }
        }
        penalties::apply(&self.params, &self.seen, logits);
        if self.grammar.is_some() || !self.params.logit_bias.is_empty() || penalties::are_on(&self.params) {
            best = largest(logits);
        }
        let id = if best == f32::NEG_INFINITY {
            None
        } else if self.params.temperature == 0.0 {
            // The lowest id among the most likely.
            logits.iter().position(|&logit| logit == best).map(|id| id as u32)
        } else {
            let point = philox::uniform(self.params.seed, self.drawn);
            filters::draw(&self.params, logits, best, point)
        };
        let id = id.ok_or_else(|| match self.grammar {
            Some(_) => Unsampled::Grammar(BadGrammar("allows none of the tokens that the model does".to_owned())),
            None => Unsampled::NotFinite,
        })?;
        self.drawn += 1;
        if penalties::are_on(&self.params) {
            *self.seen.entry(id).or_default() += 1;
        }
        if let Some(grammar) = &mut self.grammar {
            grammar.accept(id).map_err(Unsampled::Grammar)?;
        }
        Ok(Sampled { id, logprobs: raw.map(|(raw, count)| logprobs(&raw, id, count)) })
    }
}

#[cfg(test)]
mod tests;
