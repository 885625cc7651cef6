//! One model's engine: holds its sequences and takes one step at a time.
//!
//! A step that panics or fails ends the requests that took part in it and no others: the KV pool is made anew, the
//! weights stay, and sequences that sat the step out compute their tokens again.

use super::{
    events::{Failure, FinishReason},
    forward::Forward,
    masks, message,
    request::Class,
    scheduler::{History, Limits, Plan, Scheduler, SequenceId, Work},
    sequence::{Ending, Sequence, Vocabulary},
    stats::{Snapshot, Stats},
};
use crate::{
    kernels::batch::StepBatch,
    report::{Sink, StepRecord, Stuck},
};
use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Instant,
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
    stuck: Option<Stuck>,
    step_began: Option<Instant>,
}

impl History for BTreeMap<SequenceId, Sequence> {
    fn tokens(&self, id: SequenceId) -> &[u32] {
        self.get(&id).map_or(&[], |sequence| &sequence.tokens)
    }
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
            stuck: None,
            step_began: None,
        }
    }

    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// One request: a sequence for each of its choices, all with the same prompt.
    pub fn submit(&mut self, choices: Vec<Sequence>) {
        let Some(ask) = choices.first().map(Sequence::ask) else { return };
        if self.is_idle() {
            // A night without work is not how long a place takes to come free.
            self.last_end = None;
            self.since = Instant::now();
        }
        let count = choices.len() as u32;
        let ids = self.next_id..self.next_id + u64::from(count);
        self.next_id = ids.end;
        self.scheduler.submit(ids.start, (ids.start + 1..ids.end).collect(), ask);
        self.sequences.extend(ids.zip(choices));
        self.publish();
        self.stats.leave_entrance(count);
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
        let plan = self.scheduler.plan(started, users_elsewhere, &self.sequences);
        let mut record = StepRecord {
            gap: started.saturating_duration_since(self.since),
            at: self.stats.since_load(started),
            expected: self.scheduler.expected(&plan.work),
            preempted: plan.preempted.len() as u32,
            ..StepRecord::default()
        };
        self.note_queue(&plan, started, &mut record);
        self.note_stuck(&plan, users_elsewhere);
        if plan.work.is_empty() {
            self.publish();
            return false;
        }
        self.step_began = Some(started);
        self.publish();
        self.count(&plan, &mut record);
        let participants: Vec<SequenceId> = plan.work.iter().flat_map(|work| self.with_forks(work)).collect();
        let outcome = catch_unwind(AssertUnwindSafe(|| self.run(&plan, started, &mut record)));
        if let Err(why) = outcome.unwrap_or_else(|panic| Err(message(&*panic))) {
            tracing::error!(model = %self.stats.name, %why, "a step failed");
            record.failed = self.recover(&participants, &why);
        }
        self.step_began = None;
        self.stats.steps.fetch_add(1, Relaxed);
        self.publish();
        record.running = self.scheduler.running() as u32;
        record.waiting = self.scheduler.waiting() as u32;
        record.kv_blocks_used = self.scheduler.pool().used();
        record.kv_blocks_total = self.scheduler.pool().total();
        self.stats.record(record);
        self.since = Instant::now();
        if let Some(sink) = sink {
            // Not our code: it must not end the one thread that serves every model.
            if catch_unwind(AssertUnwindSafe(|| sink.step(&self.stats.name, &record))).is_err() {
                tracing::error!(model = %self.stats.name, "whoever receives the engine's records panicked");
            }
        }
        true
    }

    /// Ends everything, for a runtime that stops or a model that has to go.
    pub fn end_all(&mut self, ending: impl Fn() -> Ending) {
        for id in self.sequences.keys().copied().collect::<Vec<_>>() {
            self.end(id, ending());
        }
        self.publish();
    }

    /// Lays out the batch, runs the model, samples, and tells the clients.
    fn run(&mut self, plan: &Plan, started: Instant, record: &mut StepRecord) -> Result<(), String> {
        if self.broken {
            self.forward.reset()?;
            self.broken = false;
        }
        self.forward.copy(&plan.copies)?;
        let batch = self.batch(&plan.work);
        let total = batch.tokens();
        let built = Instant::now();
        record.build = built.saturating_duration_since(started);

        let sampling: Vec<SequenceId> =
            plan.work.iter().filter(|work| work.samples).flat_map(|work| self.with_forks(work)).collect();
        let constrained =
            self.sequences.iter_mut().filter(|(id, sequence)| sequence.is_constrained() && sampling.contains(id));
        let constrained = constrained.map(|(_, sequence)| sequence).collect();
        let mut logits = masks::beside(constrained, || self.forward.forward(batch))?;
        let computed = Instant::now();
        record.forward = computed.saturating_duration_since(built);

        let vocab = self.forward.vocab();
        let mut rest = logits.as_mut_slice();
        let mut outcomes = Vec::with_capacity(plan.work.len());
        for work in &plan.work {
            let rows =
                rest.split_off_mut(..work.rows * vocab).ok_or("the model gave fewer rows than were asked for")?;
            let forks = if work.samples { self.scheduler.forks(work.id) } else { &[] };
            let mut sampled = Vec::with_capacity(1 + forks.len());
            for &id in forks.iter().chain([&work.id]) {
                let Some(sequence) = self.sequences.get_mut(&id) else { continue };
                // The same distribution for every choice: sampling changes what it is given.
                let mut copy = if id == work.id { Vec::new() } else { rows.to_vec() };
                let token = sequence.read(work, if id == work.id { &mut *rows } else { &mut copy }, vocab);
                if matches!(token, Some(Ok(_))) {
                    sampled.push(id);
                }
                outcomes.push((id, token));
            }
            self.scheduler.advance(work, &sampled, &self.sequences);
        }
        let chosen = Instant::now();
        record.sample = chosen.saturating_duration_since(computed);

        let spent = chosen.saturating_duration_since(started);
        self.scheduler.observe(&plan.work, spent);
        for work in &plan.work {
            let share = spent.mul_f64(work.count as f64 / total as f64);
            if let Some(sequence) = self.sequences.get_mut(&work.id) {
                sequence.account(work, share, plan.work.len() as u32);
            }
        }
        for (id, token) in outcomes {
            let ending = match token {
                None => {
                    let is_scored = self.sequences.get(&id).is_some_and(Sequence::is_scored);
                    is_scored.then_some(Ending::Finished(FinishReason::Stop))
                }
                Some(Err(failure)) => Some(Ending::Failed(failure)),
                Some(Ok(token)) => {
                    self.stats.generated_tokens.fetch_add(1, Relaxed);
                    record.sampled_tokens += 1;
                    self.sequences.get_mut(&id).and_then(|sequence| sequence.emit(token, &self.vocabulary, chosen))
                }
            };
            if let Some(ending) = ending {
                self.end(id, ending);
            }
        }
        record.emit = chosen.elapsed();
        Ok(())
    }

    /// Whoever waits for a prompt of this step shares its end, also after it began as a copy.
    fn with_forks(&self, work: &Work) -> impl Iterator<Item = SequenceId> {
        std::iter::once(work.id).chain(self.scheduler.forks(work.id).iter().copied())
    }

    fn batch(&self, work: &[Work]) -> StepBatch {
        let mut batch = StepBatch::default();
        for work in work {
            if let Some(sequence) = self.sequences.get(&work.id) {
                let ids = &sequence.tokens[work.first..work.first + work.count];
                batch.push(ids, work.first, self.scheduler.table(work.id), false);
                batch.select_last(work.rows);
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

    fn note_queue(&mut self, plan: &Plan, now: Instant, record: &mut StepRecord) {
        for &id in &plan.expired {
            self.end(id, Ending::Failed(Failure::DeadlineExceeded));
        }
        for id in &plan.preempted {
            self.stats.preemptions.fetch_add(1, Relaxed);
            if let Some(sequence) = self.sequences.get_mut(id) {
                sequence.preemptions += 1;
            }
        }
        for admitted in &plan.admitted {
            let Some(sequence) = self.sequences.get_mut(&admitted.id) else { continue };
            if sequence.admit(now, admitted.cached) && admitted.owns_prompt {
                let prompt = sequence.ask().prompt_tokens;
                self.stats.prompt_tokens.fetch_add(prompt as u64, Relaxed);
                record.admitted_tokens += prompt as u32;
                record.cached_tokens += admitted.cached as u32;
                record.regretted_tokens += admitted.regretted as u32;
            }
        }
    }

    /// Says why nothing runs, and says so loudly if it should not be.
    fn note_stuck(&mut self, plan: &Plan, users_elsewhere: bool) {
        let stuck = match plan.work.is_empty() && !self.is_idle() {
            false => None,
            true if users_elsewhere && !self.has_users() => Some(Stuck::ShadowsWait),
            true => Some(Stuck::NobodyFits),
        };
        if stuck == Some(Stuck::NobodyFits) && self.stuck != stuck {
            let (waiting, free) = (self.scheduler.waiting(), self.scheduler.pool().free());
            tracing::error!(model = %self.stats.name, waiting, free, "sequences wait, none runs and none fits");
        }
        self.stuck = stuck;
    }

    fn count(&self, plan: &Plan, record: &mut StepRecord) {
        record.sequences = plan.work.len() as u32;
        for work in &plan.work {
            let Some(sequence) = self.sequences.get(&work.id) else { continue };
            let [again, prompt, decoded] = sequence.parts(work).map(|tokens| tokens as u32);
            record.recomputed_tokens += again;
            record.prefill_tokens += prompt;
            record.decode_tokens += decoded;
        }
    }

    /// Fails who took part in a bad step, and prepares the others to go on. How many failed.
    fn recover(&mut self, participants: &[SequenceId], why: &str) -> u32 {
        let mut failed = 0;
        for &id in participants {
            if self.sequences.contains_key(&id) {
                self.end(id, Ending::Failed(Failure::Step(why.to_owned())));
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
            self.stats.note_pace(now.saturating_duration_since(last));
        }
    }

    fn publish(&self) {
        let pool = self.scheduler.pool();
        let snapshot = Snapshot {
            running: self.scheduler.running() as u32,
            waiting: Class::ALL.map(|class| self.scheduler.waiting_in(class) as u32),
            blocks_used: pool.used(),
            blocks_cached: pool.index().len() as u32,
            prefix: self.scheduler.prefix(),
            stuck: self.stuck,
            step_began: self.step_began,
        };
        self.stats.publish(snapshot);
    }
}
