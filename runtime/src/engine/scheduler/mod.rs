//! Decides what runs in the next step. Pure: no tensors, no channels, and the time comes in as an argument.
//!
//! A sequence has some tokens, of which some are computed; it needs the rest computed and then samples one more. There
//! are no phases: a prompt, an answer and what is computed again differ only in how many tokens are missing.
//!
//! A step: every decoding sequence gets its next token; prompts share what is left of the step, in chunks (`budget`);
//! then whoever waits is admitted (`admission`). Blocks are taken for the tokens there are, so more is admitted than
//! could grow to its bound; when blocks run out somebody gives up theirs (`preempt`) and computes its tokens again later,
//! mostly from the cache. What could not finish even alone is refused before it comes here.
//!
//! Several choices for one prompt: one computes it, the others begin as copies of it, sharing its blocks.
//!
//! Shadows are apart: nobody waits for their answer. One is admitted and computed only while no other sequence waits or
//! runs, and gives up its place when somebody needs it, so that it delays others by the step that is under way.

mod admission;
mod budget;
mod entry;
mod fairness;
#[cfg(test)]
mod gap;
#[cfg(test)]
mod million;
mod plan;
mod preempt;
mod queue;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use super::request::Class;
use crate::{
    kv::block_pool::{BlockPool, Blocks},
    report::PrefixReport,
};
pub(crate) use budget::SCORED_ROWS_MAX;
use budget::{Budget, CostModel, Load};
use entry::Entry;
use fairness::{OUTPUT_WEIGHT, Tenants};
pub(crate) use plan::{Admitted, Ask, Limits, Plan, Work};
use queue::Queue;
use std::time::{Duration, Instant};

pub(crate) type SequenceId = u64;

/// Where the scheduler looks up a sequence's tokens: prompt and output so far.
pub(crate) trait History {
    fn tokens(&self, id: SequenceId) -> &[u32];
}

pub(crate) struct Scheduler {
    limits: Limits,
    pool: BlockPool,
    waiting: Queue,
    running: Vec<Entry>,
    tenants: Tenants,
    cost: CostModel,
    prefix: PrefixReport,
}

impl Scheduler {
    pub fn new(limits: Limits, blocks: u32) -> Scheduler {
        let pool_tokens = u64::from(blocks) * limits.block_tokens as u64;
        Scheduler {
            limits,
            pool: BlockPool::new(blocks),
            waiting: Queue::default(),
            running: Vec::new(),
            // By about so much those who run get ahead of those who wait.
            tenants: Tenants::new(pool_tokens * OUTPUT_WEIGHT),
            cost: CostModel::default(),
            prefix: PrefixReport::default(),
        }
    }

    /// Queues a request of one choice or more. The caller has made sure that one fits into the whole pool.
    pub fn submit(&mut self, id: SequenceId, forks: Vec<SequenceId>, ask: Ask) {
        // Nobody asked for a shadow: it is not held against its tenant.
        if ask.class != Class::Shadow {
            self.tenants.enter(ask.tenant, 1 + forks.len());
        }
        self.queue(Entry::new(id, forks, ask, self.limits.block_tokens));
    }

    /// `users_elsewhere`: somebody waits for an answer of another model, whose step comes after this one.
    pub fn plan(&mut self, now: Instant, users_elsewhere: bool, history: &dyn History) -> Plan {
        let mut plan = Plan { expired: self.expire(now), ..Plan::default() };
        let shadows_too = !(users_elsewhere || self.has_users()) || seeded!(ShadowBesideUsers);
        if self.limits.preempt_always {
            self.preempt_all(&mut plan);
        }
        self.grow(shadows_too, &mut plan);

        let may_run = |entry: &Entry| shadows_too || !entry.is_shadow();
        let decoding = self.running.iter().filter(|entry| may_run(entry) && entry.missing() == 1);
        plan.work = decoding.map(|entry| entry.work(1)).collect();
        let left = self.limits.step_tokens - if seeded!(DecodeOutsideBudget) { 0 } else { plan.work.len() };
        // Out of the scheduler for as long as the budget reads it.
        let cost = std::mem::take(&mut self.cost);
        let mut budget = Budget::new(&cost, left, &plan.work, self.limits.itl_target);
        let mut reading: Vec<&Entry> =
            self.running.iter().filter(|entry| may_run(entry) && entry.missing() > 1).collect();
        reading.sort_by_key(|entry| self.order(entry, now));
        for entry in reading {
            plan.work.extend(self.chunk(entry, &mut budget));
        }
        let mut line = self.line(now, shadows_too);
        while self.admit(now, &mut line, &budget, history, &mut plan) {
            let newest = self.running.last();
            plan.work.extend(newest.and_then(|entry| self.chunk(entry, &mut budget)));
        }
        self.cost = cost;
        plan
    }

    fn chunk(&self, entry: &Entry, budget: &mut Budget) -> Option<Work> {
        let want = entry.missing().min(self.limits.prefill_chunk);
        let count = budget.take(entry.computed, want, entry.ask.scored_from);
        (count > 0).then(|| entry.work(count))
    }

    /// A step with this work took so long.
    pub fn observe(&mut self, work: &[Work], took: Duration) {
        self.cost.observe(Load::of(work), took);
    }

    /// How long a step with this work should take.
    pub fn expected(&self, work: &[Work]) -> Duration {
        Duration::from_secs_f64(self.cost.micros(Load::of(work)) / 1e6)
    }

    /// The step with this work is done. `sampled`: to whom it gave one more token, of the sequence and those that begin as
    /// its copies; the others are over, and will be removed before the next step.
    pub fn advance(&mut self, work: &Work, sampled: &[SequenceId], history: &dyn History) {
        let Some(at) = self.running.iter().position(|entry| entry.id == work.id) else { return };
        let entry = &mut self.running[at];
        let full = entry.computed / self.limits.block_tokens;
        entry.computed += work.count;
        if entry.ask.scored_from.is_none() {
            for block in full..entry.computed / self.limits.block_tokens {
                let content = entry.chain.content(block, history.tokens(work.id));
                self.pool.publish(entry.blocks.numbers()[block], content);
            }
        }
        if !work.samples {
            return;
        }
        let tokens = entry.tokens;
        let has_token = sampled.contains(&work.id);
        entry.tokens += usize::from(has_token);
        entry.has_progressed = has_token;
        let forks = std::mem::take(&mut entry.forks);
        self.charge_output(at, sampled.len() as u64);
        for id in forks {
            let has_token = if seeded!(ForksFollowTheFirst) { has_token } else { sampled.contains(&id) };
            self.fork(at, id, tokens, has_token);
        }
    }

    /// A choice begins where the `at`-th running sequence is, which had so many tokens, with one of its own.
    fn fork(&mut self, at: usize, id: SequenceId, tokens: usize, has_token: bool) {
        let Entry { ask, computed, ref blocks, ref chain, .. } = self.running[at];
        let has_place = self.running.len() < self.limits.running_max;
        let entry = Entry {
            id,
            ask,
            tokens: tokens + usize::from(has_token),
            computed: if has_place { computed } else { 0 },
            blocks: if has_place { self.pool.share(blocks) } else { Blocks::default() },
            chain: chain.clone(),
            forks: Vec::new(),
            has_started: true,
            has_progressed: has_place && has_token,
            blocked_since: None,
        };
        if has_place { self.running.push(entry) } else { self.queue(entry) }
    }

    fn charge_output(&mut self, at: usize, tokens: u64) {
        let entry = &self.running[at];
        if !entry.is_shadow() && !seeded!(OutputNotCharged) {
            self.tenants.charge(entry.ask.tenant, tokens * OUTPUT_WEIGHT);
        }
    }

    /// The pool's contents are lost: whoever ran waits, and nothing is found in the cache.
    pub fn rewind(&mut self) {
        while let Some(mut entry) = self.running.pop() {
            self.pool.give_back(std::mem::take(&mut entry.blocks));
            entry.computed = 0;
            self.queue(entry);
        }
        self.pool.forget();
    }

    /// The sequence is over, wherever it was. Choices that waited for its prompt go on without it.
    pub fn remove(&mut self, id: SequenceId) {
        let at = self.running.iter().position(|entry| entry.holds(id));
        let found = at.map(|at| self.running.remove(at)).or_else(|| self.unqueue(id));
        let Some(mut entry) = found else { return };
        self.leave(entry.ask);
        if entry.id != id {
            entry.forks.retain(|&fork| fork != id || seeded!(CancelLostInFork));
        } else if !entry.forks.is_empty() {
            entry.id = entry.forks.remove(0);
        } else if at.is_some() || !seeded!(CancelLostInQueue) {
            if !seeded!(LeakOnCancel) {
                self.pool.give_back(entry.blocks);
            }
            return;
        }
        match at {
            Some(at) => self.running.insert(at, entry),
            None => self.queue(entry),
        }
    }

    fn queue(&mut self, entry: Entry) {
        if !entry.is_shadow() {
            self.tenants.queue(entry.ask.tenant);
        }
        self.waiting.push(entry);
    }

    fn unqueue(&mut self, id: SequenceId) -> Option<Entry> {
        let entry = self.waiting.take(id)?;
        if !entry.is_shadow() {
            self.tenants.unqueue(entry.ask.tenant);
        }
        Some(entry)
    }

    fn leave(&mut self, ask: Ask) {
        if ask.class != Class::Shadow {
            self.tenants.leave(ask.tenant);
        }
    }

    /// Choices that wait for this sequence's prompt.
    pub fn forks(&self, id: SequenceId) -> &[SequenceId] {
        self.running.iter().find(|entry| entry.id == id).map_or(&[], |entry| &entry.forks)
    }

    /// The blocks of a running sequence; none for any other.
    pub fn table(&self, id: SequenceId) -> &[u32] {
        self.running.iter().find(|entry| entry.id == id).map_or(&[], |entry| entry.blocks.numbers())
    }

    /// Whether anybody but shadows waits or runs.
    pub fn has_users(&self) -> bool {
        self.waiting.len() > self.waiting.in_class(Class::Shadow) || self.running.iter().any(|entry| !entry.is_shadow())
    }

    pub fn running(&self) -> usize {
        self.running.len()
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn waiting_in(&self, class: Class) -> usize {
        self.waiting.in_class(class)
    }

    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    pub fn prefix(&self) -> PrefixReport {
        PrefixReport { evicted_blocks: self.pool.index().evicted(), ..self.prefix }
    }
}
