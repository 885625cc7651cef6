//! How likely a model finds a text that is given, in one reading of it.

use super::Model;
use crate::{
    engine::{
        events::{Event, Failure, FinishReason, Refusal},
        request::{Class, Request},
        sequence::Sequence,
    },
    sampling::{logprobs::Logprobs, params::SamplingParams},
};

/// Why a continuation was not scored.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ScoreError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Failed(#[from] Failure),
}

impl Model {
    /// How likely the model finds each token of `continuation` after the prompt and the tokens before it, with the `top`
    /// that it finds the likeliest there; [`Model::vocab`] gives whole distributions, 8 bytes a token of the vocabulary.
    /// Reads both as one prompt, in the class of batches. Dropping the future cancels.
    pub async fn score(
        &self,
        prompt: &[u32],
        continuation: &[u32],
        top: u32,
        tenant: u64,
    ) -> Result<Vec<Logprobs>, ScoreError> {
        let Some((&last, rest)) = continuation.split_last() else { return Ok(Vec::new()) };
        if prompt.is_empty() {
            return Err(Refusal::EmptyPrompt.into());
        }
        let request = Request {
            prompt: [prompt, rest].concat(),
            // The scheduler's place for a token that is never sampled.
            max_tokens: 1,
            params: SamplingParams::default(),
            stop: Vec::new(),
            ignore_eos: false,
            tenant,
            // Nothing of it is shared.
            salt: [0; 16],
            class: Class::Batch,
            deadline: None,
        };
        self.check(&request)?;
        if last >= self.0.vocab {
            return Err(Refusal::UnknownToken { id: last, vocab: self.0.vocab }.into());
        }
        let sequences = self.submit(1, &request, |_, submitted| {
            let (sequence, events) = Sequence::new(request.clone(), submitted);
            (sequence.scoring(prompt.len(), last, top as usize), events)
        })?;
        let Some(mut generation) = sequences.into_iter().next() else { return Err(Refusal::Draining.into()) };
        loop {
            match generation.next().await {
                Some(Event::Finished { reason: FinishReason::Stop, logprobs, .. }) => return Ok(logprobs),
                Some(Event::Failed { failure, .. }) => return Err(failure.into()),
                Some(Event::Text { .. }) => {}
                Some(Event::Finished { .. }) | None => return Err(Failure::EngineStopped.into()),
            }
        }
    }
}
