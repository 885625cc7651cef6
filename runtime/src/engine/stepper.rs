//! One model's engine: holds its sequences and takes one step at a time.
//!
//! A step that panics or fails ends the requests that took part in it and no others: the KV pool is made anew, the
//! weights stay, and sequences that sat the step out compute their tokens again.

use super::{
    events::{Failure, FinishReason},
    forward::Forward,
    scheduler::{Limits, Plan, Scheduler, SequenceId, Work},
    sequence::{Ending, Sequence, Vocabulary},
    stats::Stats,
};
use crate::{
    kernels::batch::StepBatch,
    report::{Sink, StepRecord},
};
use std::{
    any::Any,
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

pub(crate) struct Stepper {
    forward: Box<dyn Forward>,
    scheduler: Scheduler,
    /// In the order of submission.
    sequences: BTreeMap<SequenceId, Sequence>,
    next_id: SequenceId,
    vocabulary: Vocabulary,
    stats: Arc<Stats>,
    /// The last reset failed; try again before the next step.
    broken: bool,
    /// When the last step ended, or work arrived at an idle engine.
    since: Instant,
    last_end: Option<Instant>,
}

impl Stepper {
    pub fn new(forward: Box<dyn Forward>, limits: Limits, vocabulary: Vocabulary, stats: Arc<Stats>) -> Stepper {
        Stepper {
            scheduler: Scheduler::new(limits, stats.blocks_total),
            forward,
            sequences: BTreeMap::new(),
            next_id: 0,
            vocabulary,
            stats,
            broken: false,
            since: Instant::now(),
            last_end: None,
        }
    }

    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    pub fn submit(&mut self, sequence: Sequence) {
        if self.is_idle() {
            // A night without work is not how long a place takes to come free.
            self.last_end = None;
            self.since = Instant::now();
        }
        self.scheduler.submit(self.next_id, sequence.ask());
        self.sequences.insert(self.next_id, sequence);
        self.next_id += 1;
    }

    /// One token through the model, to touch what a first request would otherwise wait for.
    pub fn warm(&mut self) -> Result<(), String> {
        let mut batch = StepBatch::default();
        batch.push(&[0], 0, &[0], true);
        let outcome = catch_unwind(AssertUnwindSafe(|| self.forward.forward(batch)));
        let logits = outcome.unwrap_or_else(|panic| Err(message(&*panic)))?;
        if logits.iter().any(|logit| !logit.is_finite()) {
            return Err("logits are not finite".to_owned());
        }
        Ok(())
    }

    /// Whether anybody waits for an answer.
    pub fn has_users(&self) -> bool {
        self.scheduler.has_users()
    }

    /// Runs one step, if there is anything to run. False: nothing was. `users_elsewhere`: another model's users wait for
    /// their turn.
    pub fn step(&mut self, users_elsewhere: bool, sink: Option<&Arc<dyn Sink>>) -> bool {
        let started = Instant::now();
        self.sweep_cancelled();
        let plan = self.scheduler.plan(started, users_elsewhere);
        self.note_queue(&plan, started);
        if plan.work.is_empty() {
            self.publish();
            return false;
        }
        let mut record = StepRecord { gap: started.saturating_duration_since(self.since), ..StepRecord::default() };
        self.count(&plan, &mut record);
        let outcome = catch_unwind(AssertUnwindSafe(|| self.run(&plan, started, &mut record)));
        if let Err(why) = outcome.unwrap_or_else(|panic| Err(message(&*panic))) {
            tracing::error!(model = %self.stats.name, %why, "a step failed");
            record.failed = self.recover(&plan, &why);
        }
        self.stats.steps.fetch_add(1, Relaxed);
        self.publish();
        record.running = self.scheduler.running() as u32;
        record.waiting = self.scheduler.waiting() as u32;
        record.kv_blocks_used = self.scheduler.blocks_used();
        record.kv_blocks_total = self.scheduler.blocks_total();
        self.since = Instant::now();
        if let Some(sink) = sink {
            // Not our code: it must not end the one thread that serves every model.
            if catch_unwind(AssertUnwindSafe(|| sink.step(&self.stats.name, &record))).is_err() {
                tracing::error!(model = %self.stats.name, "whoever receives the engine's records panicked");
            }
        }
        true
    }

    /// Ends everything, for a runtime that stops.
    pub fn cancel_all(&mut self) {
        for id in self.sequences.keys().copied().collect::<Vec<_>>() {
            self.end(id, Ending::Finished(FinishReason::Cancelled));
        }
        self.publish();
    }

    /// Lays out the batch, runs the model, samples, and tells the clients.
    fn run(&mut self, plan: &Plan, started: Instant, record: &mut StepRecord) -> Result<(), String> {
        if self.broken {
            self.forward.reset()?;
            self.broken = false;
        }
        let batch = self.batch(&plan.work);
        let total = batch.tokens();
        let built = Instant::now();
        record.build = built.saturating_duration_since(started);

        let mut logits = self.forward.forward(batch)?;
        let computed = Instant::now();
        record.forward = computed.saturating_duration_since(built);

        let vocab = self.forward.vocab();
        let mut rest = logits.as_mut_slice();
        let mut sampled = Vec::with_capacity(plan.work.len());
        for work in &plan.work {
            let mut token = None;
            if let Some(sequence) = self.sequences.get_mut(&work.id) {
                let rows = rest.split_off_mut(..sequence.rows(work) * vocab);
                let rows = rows.ok_or("the model gave fewer rows than were asked for")?;
                token = sequence.read(work, rows, vocab);
            }
            self.scheduler.advance(work, token.as_ref().is_some_and(Result::is_ok));
            sampled.push((work, token));
        }
        let chosen = Instant::now();
        record.sample = chosen.saturating_duration_since(computed);

        let spent = chosen.saturating_duration_since(started);
        for (work, token) in sampled {
            self.account(work, spent.mul_f64(work.count as f64 / total as f64), plan.work.len() as u32);
            let ending = match token {
                None => {
                    let scored = self.sequences.get(&work.id).is_some_and(Sequence::is_scored);
                    scored.then_some(Ending::Finished(FinishReason::Stop))
                }
                Some(Err(failure)) => Some(Ending::Failed(failure)),
                Some(Ok(id)) => {
                    self.stats.generated_tokens.fetch_add(1, Relaxed);
                    record.sampled_tokens += 1;
                    self.sequences.get_mut(&work.id).and_then(|sequence| sequence.emit(id, &self.vocabulary, chosen))
                }
            };
            if let Some(ending) = ending {
                self.end(work.id, ending);
            }
        }
        record.emit = chosen.elapsed();
        Ok(())
    }

    fn batch(&self, work: &[Work]) -> StepBatch {
        let mut batch = StepBatch::default();
        for work in work {
            if let Some(sequence) = self.sequences.get(&work.id) {
                let ids = &sequence.tokens[work.first..work.first + work.count];
                batch.push(ids, work.first, self.scheduler.table(work.id), false);
                batch.select_last(sequence.rows(work));
            }
        }
        batch
    }

    fn sweep_cancelled(&mut self) {
        let gone: Vec<SequenceId> =
            self.sequences.iter().filter(|(_, sequence)| sequence.is_cancelled()).map(|(&id, _)| id).collect();
        for id in gone {
            self.end(id, Ending::Finished(FinishReason::Cancelled));
        }
    }

    fn note_queue(&mut self, plan: &Plan, now: Instant) {
        for &id in &plan.expired {
            self.end(id, Ending::Failed(Failure::DeadlineExceeded));
        }
        for &id in &plan.evicted {
            self.end(id, Ending::Finished(FinishReason::Cancelled));
        }
        for id in &plan.admitted {
            if let Some(sequence) = self.sequences.get_mut(id) {
                sequence.admit(now);
                self.stats.leave_queue();
                self.stats.prompt_tokens.fetch_add(sequence.ask().prompt_tokens as u64, Relaxed);
            }
        }
    }

    fn count(&self, plan: &Plan, record: &mut StepRecord) {
        record.sequences = plan.work.len() as u32;
        for work in &plan.work {
            let Some(sequence) = self.sequences.get(&work.id) else { continue };
            let prompt = sequence.prompt_part(work.first, work.count);
            record.prefill_tokens += prompt as u32;
            record.decode_tokens += (work.count - prompt) as u32;
        }
    }

    fn account(&mut self, work: &Work, share: Duration, batch: u32) {
        let Some(sequence) = self.sequences.get_mut(&work.id) else { return };
        sequence.compute += share;
        sequence.steps += 1;
        sequence.batch_max = sequence.batch_max.max(batch);
        if sequence.prompt_part(work.first, work.count) > 0 {
            sequence.prefill_chunks += 1;
        }
    }

    /// Fails who took part in a bad step, and prepares the others to go on. How many failed.
    fn recover(&mut self, plan: &Plan, why: &str) -> u32 {
        let mut failed = 0;
        for work in &plan.work {
            if self.sequences.contains_key(&work.id) {
                self.end(work.id, Ending::Failed(Failure::Step(why.to_owned())));
                failed += 1;
            }
        }
        self.scheduler.rewind();
        let reset = catch_unwind(AssertUnwindSafe(|| self.forward.reset()));
        self.broken = !matches!(reset, Ok(Ok(())));
        failed
    }

    fn end(&mut self, id: SequenceId, ending: Ending) {
        self.scheduler.remove(id);
        let Some(sequence) = self.sequences.remove(&id) else { return };
        if sequence.is_admitted() {
            self.note_pace();
        } else {
            self.stats.leave_queue();
        }
        if matches!(ending, Ending::Failed(_)) {
            self.stats.failures.fetch_add(1, Relaxed);
        }
        // Whoever hears of the end and then asks for a report should find the blocks free.
        self.publish();
        sequence.end(ending);
    }

    fn note_pace(&mut self) {
        let now = Instant::now();
        if let Some(last) = self.last_end.replace(now)
            && self.scheduler.waiting() > 0
        {
            let micros = now.saturating_duration_since(last).as_micros() as u64;
            let smooth = self.stats.pace_micros.load(Relaxed);
            self.stats.pace_micros.store(if smooth == 0 { micros } else { (7 * smooth + micros) / 8 }, Relaxed);
        }
    }

    fn publish(&self) {
        self.stats.running.store(self.scheduler.running() as u32, Relaxed);
        self.stats.blocks_used.store(self.scheduler.blocks_used(), Relaxed);
    }
}

/// What a panic said.
fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
    format!("panic: {}", text.unwrap_or("of unknown kind"))
}
