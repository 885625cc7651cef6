//! The engine's events of one request as an answer: its sequences beside each other, and what they used in all.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use glassgate_runtime as runtime;

use crate::accounting::core::Usage;
use crate::accounting::row::UsageSource;
use crate::answer::{Chunk, Chunks, End, Ended, EngineTimes, Finish, Part};
use crate::api::openai::logprobs::{Place, Token, render};
use crate::api::openai::request::Op;
use crate::observe::metrics::Metrics;
use crate::refusal::Refusal;

/// One choice.
pub struct Sequence {
    generation: runtime::Generation,
    /// Characters of the tokens whose log-probabilities were told.
    told_chars: usize,
    has_told: bool,
    has_ended: bool,
    ending: Option<(runtime::FinishReason, runtime::Timeline)>,
}

impl Sequence {
    pub fn new(generation: runtime::Generation) -> Sequence {
        Sequence { generation, told_chars: 0, has_told: false, has_ended: false, ending: None }
    }
}

/// One answer of independent sequences.
pub struct Stream {
    pub sequences: Vec<Sequence>,
    /// Who is asked first next time, so that none hides the others.
    pub turn: usize,
    /// Sequences of each prompt, which follow each other.
    pub choices: usize,
    pub class: &'static str,
    /// How long it was allowed to wait.
    pub queue: Duration,
    pub tells_tokens: bool,
    pub tells_logprobs: bool,
    pub op: Op,
    /// The field that asks for a form.
    pub form: Option<&'static str>,
    pub failed: Option<Refusal>,
    pub model: runtime::Model,
    pub metrics: Arc<Metrics>,
}

impl Stream {
    fn part(&mut self, index: usize, text: String, mut tokens: Vec<u32>, logprobs: &[runtime::Logprobs]) -> Chunk {
        if !self.tells_tokens {
            tokens.clear();
        }
        let places: Vec<Place> = logprobs.iter().map(|told| self.place(told)).collect();
        let is_due = !places.is_empty() || self.owes_logprobs(index);
        let sequence = &mut self.sequences[index];
        sequence.has_told |= is_due;
        let logprobs = is_due.then(|| render(self.op, &places, &mut sequence.told_chars)).flatten();
        Chunk::Part(Part { tokens, logprobs, ..Part::text(index as u32, text) })
    }

    /// Who asks is told something, if only that there was no token.
    fn owes_logprobs(&self, index: usize) -> bool {
        self.tells_logprobs && !self.sequences[index].has_told
    }

    fn place(&self, told: &runtime::Logprobs) -> Place {
        let token = |id: u32, logprob: f32| match self.model.control_token(id) {
            Some(name) => Token { bytes: None, name: name.to_owned(), logprob },
            None => Token { bytes: Some(self.model.token_bytes(id).to_vec()), name: String::new(), logprob },
        };
        let top = told.top.iter().map(|&(id, logprob)| token(id, logprob)).collect();
        Place { chosen: token(told.id, told.logprob), top }
    }

    /// The end of all, once each has ended.
    fn end(&mut self) -> Chunk {
        let (mut output, mut times) = (0, EngineTimes::default());
        for sequence in &self.sequences {
            let Some((_, timeline)) = &sequence.ending else {
                output += u64::from(sequence.generation.produced());
                continue;
            };
            self.metrics.runtime_queue(self.model.name(), self.class, timeline.queue());
            output += u64::from(timeline.output_tokens);
            times.queue = times.queue.max(timeline.queue());
            times.prefill = times.prefill.max(timeline.prefill());
            times.decode = times.decode.max(timeline.decode());
            times.compute += timeline.compute;
            times.steps = times.steps.max(timeline.steps);
            times.prefill_chunks = times.prefill_chunks.max(timeline.prefill_chunks);
            times.batch_max = times.batch_max.max(timeline.batch_max);
            times.preemptions += timeline.preemptions;
        }
        times.cached_tokens = self.cached();
        let is_cut = self
            .sequences
            .iter()
            .any(|sequence| matches!(sequence.ending, None | Some((runtime::FinishReason::Cancelled, _))));
        let how = match self.failed.take() {
            Some(refusal) => Ended::Failed(refusal),
            None if is_cut => Ended::Cancelled,
            None => Ended::Finished(
                self.sequences
                    .iter()
                    .map(|sequence| match sequence.ending {
                        Some((runtime::FinishReason::Length, _)) => Finish::Length,
                        _ => Finish::Stop,
                    })
                    .collect(),
            ),
        };
        let usage = Usage {
            input: self.read().saturating_sub(times.cached_tokens),
            cache_read: times.cached_tokens,
            ..Usage::tokens(0, output)
        };
        Chunk::End(End { how, usage, source: UsageSource::Counted, service: None, engine: Some(times) })
    }

    /// Tokens of the prompts that were admitted, each once: of one that left the queue without it nothing was read.
    fn read(&self) -> u64 {
        let prompt = |choices: &[Sequence]| {
            let mut admitted = choices.iter().filter_map(|sequence| sequence.ending.as_ref());
            admitted.find(|(_, timeline)| timeline.admitted.is_some()).map(|(_, timeline)| timeline.prompt_tokens)
        };
        self.sequences.chunks(self.choices.max(1)).filter_map(prompt).map(u64::from).sum()
    }

    /// Prompt tokens that did not have to be computed. The choices of a prompt share what was found of it.
    fn cached(&self) -> u64 {
        let found = |sequence: &Sequence| sequence.ending.as_ref().map_or(0, |(_, timeline)| timeline.cached_tokens);
        let prompts = self.sequences.chunks(self.choices.max(1));
        prompts.map(|choices| choices.iter().map(found).max().map_or(0, u64::from)).sum()
    }

    fn end_one(&mut self, index: usize, ending: Option<(runtime::FinishReason, runtime::Timeline)>) {
        (self.sequences[index].has_ended, self.sequences[index].ending) = (true, ending);
    }

    fn fail(&mut self, index: usize, refusal: Refusal, timeline: Option<runtime::Timeline>) {
        self.metrics.runtime_failure(self.model.name());
        self.give_up(index, refusal, timeline);
    }

    /// One came to nothing: the others have no use any more.
    fn give_up(&mut self, index: usize, refusal: Refusal, timeline: Option<runtime::Timeline>) {
        self.failed = Some(refusal);
        self.end_one(index, timeline.map(|timeline| (runtime::FinishReason::Cancelled, timeline)));
        self.cancel();
    }
}

impl Chunks for Stream {
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Chunk> {
        let count = self.sequences.len();
        let mut asked = 0;
        while asked < count {
            let index = (self.turn + asked) % count;
            if self.sequences[index].has_ended {
                asked += 1;
                continue;
            }
            let Poll::Ready(event) = self.sequences[index].generation.poll_next(context) else {
                asked += 1;
                continue;
            };
            match event {
                Some(runtime::Event::Text { text, tokens, logprobs }) => {
                    self.turn = (index + 1) % count;
                    return Poll::Ready(self.part(index, text, tokens, &logprobs));
                }
                Some(runtime::Event::Finished { reason, tokens, mut logprobs, timeline }) => {
                    self.end_one(index, Some((reason, timeline)));
                    // A stop string is no part of the answer, as little as an end token.
                    if reason == runtime::FinishReason::Stop {
                        logprobs.clear();
                    }
                    // The end token makes no text.
                    let has_tokens = self.tells_tokens && !tokens.is_empty();
                    if has_tokens || !logprobs.is_empty() || self.owes_logprobs(index) {
                        return Poll::Ready(self.part(index, String::new(), tokens, &logprobs));
                    }
                }
                Some(runtime::Event::Failed { failure, timeline }) => {
                    if failure == runtime::Failure::DeadlineExceeded {
                        let (limit, retry_after) = (self.queue, self.model.retry_after());
                        self.give_up(index, Refusal::QueuedTooLong { limit, retry_after }, Some(timeline));
                        continue;
                    }
                    tracing::error!(model = self.model.name(), %failure, "a sequence failed in the engine");
                    let refusal = match (failure, self.form) {
                        // It can be compiled and still be more than a step may cost.
                        (runtime::Failure::Grammar(why), Some(field)) => {
                            Refusal::BadParam { param: field.into(), why: format!("could not be followed: {why}") }
                        }
                        (runtime::Failure::Unloaded, _) => {
                            Refusal::ModelUnavailable { model: self.model.name().to_owned() }
                        }
                        _ => Refusal::EngineFailed,
                    };
                    self.fail(index, refusal, Some(timeline));
                }
                // The engine promises a last event; without one it is gone.
                None => self.fail(index, Refusal::EngineFailed, None),
            }
        }
        match self.sequences.iter().all(|sequence| sequence.has_ended) {
            true => Poll::Ready(self.end()),
            false => Poll::Pending,
        }
    }

    fn cancel(&mut self) {
        for sequence in &mut self.sequences {
            sequence.generation.cancel();
        }
    }
}
