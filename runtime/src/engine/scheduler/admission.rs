//! Who gets blocks next.
//!
//! Order: first whoever waits longer than its class should, oldest first; then by class; within a class the tenant that
//! was served least. The first in this order that does not fit is passed by those that do, but not for long: then it
//! holds them back, and its blocks come free as running sequences end, so everybody's wait is bounded.

use super::{Admitted, Entry, History, Plan, Scheduler, SequenceId, fairness::PROMPT_WEIGHT};
use crate::{engine::request::Class, kv::block_pool::Blocks};
use std::{
    mem::take,
    time::{Duration, Instant},
};

/// How long a class may be passed over; shadows for ever.
pub(super) fn patience(class: Class) -> Option<Duration> {
    match class {
        Class::Interactive => Some(Duration::from_secs(10)),
        Class::Batch => Some(Duration::from_secs(30)),
        Class::Shadow => None,
    }
}

/// How long a request that does not fit lets others pass.
pub(super) const PASSING: Duration = Duration::from_secs(1);

/// Requests that may be passed in one step: each costs a look into the cache.
const PASSED_MAX: usize = 8;

/// Sorts before another that is to be served after it. None sorts first.
type Order = (Option<(Class, u64)>, Instant, SequenceId);

impl Scheduler {
    pub(super) fn order(&self, entry: &Entry, now: Instant) -> Order {
        let waited = now.saturating_duration_since(entry.ask.submitted);
        let is_overdue = patience(entry.ask.class).is_some_and(|patience| waited >= patience);
        let turn = (!is_overdue).then(|| (entry.ask.class, self.tenants.served(entry.ask.tenant)));
        (turn, entry.ask.submitted, entry.id)
    }

    pub(super) fn expire(&mut self, now: Instant) -> Vec<SequenceId> {
        let is_late = |entry: &mut Entry| {
            !entry.has_started
                && entry.ask.deadline.is_some_and(|deadline| deadline <= now)
                && !seeded!(DeadlineIgnored)
        };
        let mut expired = Vec::new();
        for gone in self.waiting.extract_if(.., is_late).collect::<Vec<_>>() {
            for id in std::iter::once(gone.id).chain(gone.forks) {
                self.leave(gone.ask);
                expired.push(id);
            }
        }
        expired
    }

    /// Moves the next sequence from waiting to the end of running, if there is one and there is room.
    pub(super) fn admit(&mut self, now: Instant, shadows_too: bool, history: &dyn History, plan: &mut Plan) -> bool {
        if self.running.len() >= self.limits.running_max && !self.running.iter().any(Entry::is_shadow) {
            return false;
        }
        let mut order: Vec<(Order, SequenceId)> = self
            .waiting
            .iter()
            .filter(|entry| shadows_too || !entry.is_shadow())
            .filter(|entry| entry.ask.class != Class::Batch || !seeded!(ClassForgotten))
            .map(|entry| (self.order(entry, now), entry.id))
            .collect();
        order.sort_unstable();
        for (_, id) in order.into_iter().take(PASSED_MAX) {
            let Some(at) = self.waiting.iter().position(|entry| entry.id == id) else { continue };
            if self.place(at, history, plan) {
                return true;
            }
            // Making room may have put shadows behind it, never before.
            let waited = now.saturating_duration_since(self.waiting[at].ask.submitted);
            if waited >= PASSING && !seeded!(HeadPassedForEver) {
                return false;
            }
        }
        false
    }

    /// Gives the `at`-th waiting sequence blocks for the tokens it has, as far as possible those that hold them already,
    /// and leaves one for each running sequence to grow into.
    fn place(&mut self, at: usize, history: &dyn History, plan: &mut Plan) -> bool {
        let entry = &mut self.waiting[at];
        let (is_user, forks) = (!entry.is_shadow(), entry.forks.len());
        let block_tokens = self.limits.block_tokens;
        let mut blocks = Blocks::default();
        // At least its last token is computed: the next one is sampled from that.
        let usable = if seeded!(WholePromptFound) { entry.tokens } else { entry.tokens - 1 };
        let tokens = history.tokens(entry.id);
        let found = (0..usable / block_tokens)
            .take_while(|&block| self.pool.reuse(&mut blocks, entry.chain.content(block, tokens)))
            .count();
        let rest = entry.tokens.div_ceil(block_tokens) - found;
        loop {
            let beside = self.running.iter().filter(|running| !(is_user && running.is_shadow())).count();
            let headroom = if beside == 0 { 0 } else { beside + forks };
            let has_place = self.running.len() < self.limits.running_max;
            if has_place && rest + headroom <= self.pool.free() && self.pool.take(&mut blocks, rest) {
                break;
            }
            if !(is_user && self.preempt_shadow(plan)) {
                self.pool.give_back(blocks);
                return false;
            }
        }
        let mut entry = self.waiting.remove(at);
        entry.blocks = blocks;
        entry.computed = found * block_tokens;
        entry.has_progressed = false;
        let regretted = if entry.has_started { 0 } else { self.note_first(&mut entry, tokens) };
        let admitted = Admitted { id: entry.id, cached: entry.computed, regretted, owns_prompt: true };
        plan.admitted.push(admitted);
        plan.admitted.extend(entry.forks.iter().map(|&id| Admitted { id, owns_prompt: false, ..admitted }));
        self.running.push(entry);
        true
    }

    /// The prompt is paid for once, by what has to be computed of it. How much of that a larger pool would have saved.
    fn note_first(&mut self, entry: &mut Entry, tokens: &[u32]) -> usize {
        entry.has_started = true;
        if !entry.is_shadow() {
            self.tenants.charge(entry.ask.tenant, (entry.tokens - entry.computed) as u64 * PROMPT_WEIGHT);
        }
        let block_tokens = self.limits.block_tokens;
        let missed = entry.computed / block_tokens..(entry.tokens - 1) / block_tokens;
        let regretted = block_tokens
            * missed.take_while(|&block| self.pool.index().was_evicted(entry.chain.content(block, tokens).key)).count();
        self.prefix.looked_up_tokens += entry.tokens as u64;
        self.prefix.found_tokens += entry.computed as u64;
        self.prefix.regretted_tokens += regretted as u64;
        regretted
    }

    /// Puts the youngest shadow back into the queue, where the least is lost. False: none runs.
    fn preempt_shadow(&mut self, plan: &mut Plan) -> bool {
        let at = self.running.iter().rposition(Entry::is_shadow);
        at.inspect(|&at| self.preempt(at, plan)).is_some()
    }

    pub(super) fn preempt(&mut self, at: usize, plan: &mut Plan) {
        let mut entry = self.running.remove(at);
        self.pool.give_back(take(&mut entry.blocks));
        entry.computed = 0;
        plan.preempted.push(entry.id);
        if !seeded!(PreemptedForgotten) {
            self.waiting.push(entry);
        }
    }
}
