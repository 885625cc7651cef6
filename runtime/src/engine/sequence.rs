//! One request inside the engine: its tokens, how the next one is chosen, how tokens become text, and what the client
//! is told.

use super::{
    events::{Event, Failure, FinishReason, Flags},
    places::Place,
    request::Request,
    scheduler::{Ask, Work},
};
use crate::{
    report::Timeline,
    sampling::{
        Sampler, Unsampled, best_if_sound,
        logprobs::{Logprobs, logprobs},
        stop::StopScanner,
    },
    text::detokenize::{Detokenizer, TokenBytes},
};
use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// What a model's text side gives to every one of its sequences.
pub(crate) struct Vocabulary {
    pub bytes: Arc<TokenBytes>,
    /// Tokens that end an answer.
    pub end: Vec<u32>,
}

/// How an answer ends.
pub(crate) enum Ending {
    Finished(FinishReason),
    Failed(Failure),
}

pub(crate) struct Sequence {
    /// Prompt and output.
    pub tokens: Vec<u32>,
    /// How many of `tokens` the client knows.
    told: usize,
    /// Of the tokens that the client does not know, if it wants them.
    logprobs: Vec<Logprobs>,
    /// How many of the likeliest a score tells for each place.
    scored_top: usize,
    /// In the queue, until it first leaves it.
    pub place: Option<Place>,
    pub flags: Arc<Flags>,
    ask: Ask,
    ignore_eos: bool,
    sampler: Sampler,
    detokenizer: Detokenizer,
    stops: StopScanner,
    events: mpsc::Sender<Event>,
    admitted: Option<Instant>,
    first_token: Option<Instant>,
    /// How many of `tokens` were computed at some time.
    reached: usize,
    pub preemptions: u32,
    cached_tokens: usize,
    prefill_chunks: u32,
    steps: u32,
    batch_max: u32,
    /// Σ over its steps.
    batch_sum: u64,
    compute: Duration,
}

/// Events beyond one for each token: the ending.
const EVENTS_EXTRA: usize = 1;

impl Sequence {
    /// The sequence and the channel's other end. The channel holds every event there can ever be, so sending never
    /// waits, however slow the client; tokio allocates its places as they are used.
    pub fn new(request: Request, submitted: Instant) -> (Sequence, mpsc::Receiver<Event>) {
        let (events, receiver) = mpsc::channel(request.max_tokens as usize + EVENTS_EXTRA);
        let ask = Ask {
            prompt_tokens: request.prompt.len(),
            max_tokens: request.max_tokens as usize,
            tenant: request.tenant,
            salt: request.salt,
            class: request.class,
            submitted,
            deadline: request.deadline,
            scored_from: None,
        };
        let sequence = Sequence {
            // Where a grammar ends there is nothing to go on with.
            ignore_eos: request.ignore_eos && request.params.grammar.is_none(),
            sampler: Sampler::new(request.params, &request.prompt),
            told: request.prompt.len(),
            tokens: request.prompt,
            logprobs: Vec::new(),
            scored_top: 0,
            place: None,
            flags: Arc::default(),
            ask,
            detokenizer: Detokenizer::default(),
            stops: StopScanner::new(request.stop),
            events,
            admitted: None,
            first_token: None,
            reached: 0,
            preemptions: 0,
            cached_tokens: 0,
            prefill_chunks: 0,
            steps: 0,
            batch_max: 0,
            batch_sum: 0,
            compute: Duration::ZERO,
        };
        (sequence, receiver)
    }

    /// Makes it one that only tells how likely its tokens are: those of its prompt from `first` on, and `last` behind
    /// them; and for each place the `top` likeliest. It ends without a token, and its ending tells them all.
    pub fn scoring(mut self, first: usize, last: u32, top: usize) -> Sequence {
        self.tokens.push(last);
        self.told = self.tokens.len();
        self.ask.scored_from = Some(first);
        self.scored_top = top;
        self
    }

    pub fn ask(&self) -> Ask {
        self.ask
    }

    /// False: it had been admitted before.
    pub fn admit(&mut self, now: Instant, cached_tokens: usize) -> bool {
        let is_first = self.admitted.is_none();
        if is_first {
            (self.admitted, self.cached_tokens) = (Some(now), cached_tokens);
            self.place = None;
        }
        is_first
    }

    pub fn is_admitted(&self) -> bool {
        self.admitted.is_some()
    }

    /// How many tokens of this work are computed again, belong to the prompt, and were sampled.
    pub fn parts(&self, work: &Work) -> [usize; 3] {
        let upto = |end: usize| end.clamp(work.first, work.first + work.count);
        let (again, prompt) = (upto(self.reached), upto(self.ask.prompt_tokens.max(self.reached)));
        [again - work.first, prompt - again, work.first + work.count - prompt]
    }

    /// It took part in a step of `batch` sequences; `share`: of the step's time.
    pub fn account(&mut self, work: &Work, share: Duration, batch: u32) {
        self.compute += share;
        self.steps += 1;
        self.batch_max = self.batch_max.max(batch);
        self.batch_sum += u64::from(batch);
        self.prefill_chunks += u32::from(work.first < self.ask.prompt_tokens);
    }

    /// The client asked to stop, or is gone.
    pub fn is_cancelled(&self) -> bool {
        self.flags.cancelled.load(Ordering::Acquire) || self.events.is_closed()
    }

    /// This work is done, for it or for the one that it begins as a copy of. Takes its rows' logits, `vocab` numbers each:
    /// chooses the next token, or scores the given ones. They are scratch afterwards.
    pub fn read(&mut self, work: &Work, logits: &mut [f32], vocab: usize) -> Option<Result<u32, Failure>> {
        self.reached = self.reached.max(work.first + work.count);
        let Some(from) = self.ask.scored_from else {
            return work.samples.then(|| self.sample(logits));
        };
        for (row, at) in logits.chunks_exact(vocab).zip(work.first + work.count - work.rows + 1..) {
            if best_if_sound(row).is_none() {
                return Some(Err(Failure::NotFinite));
            }
            // What is computed a second time is known.
            if at - from == self.logprobs.len() {
                self.logprobs.push(logprobs(row, self.tokens[at], self.scored_top));
            }
        }
        None
    }

    /// Nothing is left to be scored.
    pub fn is_scored(&self) -> bool {
        self.ask.scored_from.is_some_and(|from| self.logprobs.len() == self.tokens.len() - from)
    }

    /// What comes next has to keep to a grammar.
    pub fn is_constrained(&self) -> bool {
        self.sampler.is_constrained()
    }

    /// Makes the mask of the next token, which depends on no logits.
    pub fn prepare(&mut self) {
        self.sampler.prepare();
    }

    /// Chooses the next token and counts it. `logits` is scratch afterwards.
    fn sample(&mut self, logits: &mut [f32]) -> Result<u32, Failure> {
        let sampled = self.sampler.sample(logits).map_err(|why| match why {
            Unsampled::NotFinite => Failure::NotFinite,
            Unsampled::Grammar(why) => Failure::Grammar(why.0),
        })?;
        self.tokens.push(sampled.id);
        self.logprobs.extend(sampled.logprobs);
        self.flags.produced.fetch_add(1, Ordering::AcqRel);
        Ok(sampled.id)
    }

    /// Hands the newest token's text to the client. Some: the answer is over.
    pub fn emit(&mut self, id: u32, vocabulary: &Vocabulary, now: Instant) -> Option<Ending> {
        self.first_token.get_or_insert(now);
        let mut shown = String::new();
        let ending = self.advance_text(id, vocabulary, &mut shown);
        if shown.is_empty() {
            return ending;
        }
        // There is room for every event, so an error means that the client is gone.
        let (tokens, logprobs) = (self.untold(), std::mem::take(&mut self.logprobs));
        let sent = self.events.try_send(Event::Text { text: shown, tokens, logprobs });
        if sent.is_ok() { ending } else { Some(Ending::Finished(FinishReason::Cancelled)) }
    }

    fn advance_text(&mut self, id: u32, vocabulary: &Vocabulary, shown: &mut String) -> Option<Ending> {
        let stop = Some(Ending::Finished(FinishReason::Stop));
        let ended = !self.ignore_eos && vocabulary.end.contains(&id);
        let full = self.produced() as usize >= self.ask.max_tokens;
        let mut text = String::new();
        if ended {
            self.logprobs.pop();
        } else {
            self.detokenizer.push(vocabulary.bytes.of(id), &mut text);
        }
        if ended || full {
            self.detokenizer.finish(&mut text);
        }
        if self.stops.push(&text, shown) {
            return stop;
        }
        if !ended && !full {
            return None;
        }
        self.stops.finish(shown);
        if ended { stop } else { Some(Ending::Finished(FinishReason::Length)) }
    }

    /// Tells the client how it ended. A client that is gone is not told.
    pub fn end(mut self, ending: Ending) {
        let timeline = Timeline {
            submitted: self.ask.submitted,
            admitted: self.admitted,
            first_token: self.first_token,
            finished: Instant::now(),
            prompt_tokens: self.ask.prompt_tokens as u32,
            output_tokens: self.produced(),
            prefill_chunks: self.prefill_chunks,
            steps: self.steps,
            batch_max: self.batch_max,
            batch_mean: self.batch_sum as f32 / self.steps.max(1) as f32,
            cached_tokens: self.cached_tokens as u32,
            preemptions: self.preemptions,
            compute: self.compute,
        };
        let event = match ending {
            Ending::Finished(reason) => {
                let (tokens, logprobs) = (self.untold(), std::mem::take(&mut self.logprobs));
                Event::Finished { reason, tokens, logprobs, timeline }
            }
            Ending::Failed(failure) => Event::Failed { failure, timeline },
        };
        let _ = self.events.try_send(event);
    }

    /// The tokens that were sampled since this was last asked.
    fn untold(&mut self) -> Vec<u32> {
        let tokens = self.tokens[self.told..].to_vec();
        self.told = self.tokens.len();
        tokens
    }

    fn produced(&self) -> u32 {
        self.flags.produced.load(Ordering::Acquire)
    }
}
