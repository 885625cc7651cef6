//! Who gets blocks next.
//!
//! Order: by class, where a request that waited longer than its class should counts as interactive; within a class the
//! tenant that was served least. A tenant that got nothing at all for so long has its oldest request served first: a flood
//! of one holds nobody up, and ever new tenants do not hold up an old one. The first in this order that does not fit is
//! passed by those that do, but not for long: then it holds them back, and its blocks come free as running sequences end,
//! so everybody's wait is bounded.

use super::{Admitted, Entry, History, Plan, Scheduler, SequenceId, budget::Budget, fairness::PROMPT_WEIGHT};
use crate::{
    engine::request::Class,
    kv::{block_pool::Blocks, prefix::Content},
};
use std::{
    cmp::Reverse,
    collections::BinaryHeap,
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

/// How long a request lets others pass since it was first found not to fit.
pub(super) const PASSING: Duration = Duration::from_secs(1);

/// Requests that may be passed in one step: each costs a look into the cache.
const PASSED_MAX: usize = 8;

/// Sorts before another that is to be served after it: (its tenant got something lately, class, what the tenant was served,
/// since when it waits, its number).
type Order = (bool, Class, u64, Instant, SequenceId);

/// Who may be admitted in one step.
pub(super) struct Line {
    /// What they were when the step was planned, the first on top: within a step an order only goes up.
    orders: BinaryHeap<Reverse<Order>>,
    passed: usize,
}

impl Scheduler {
    pub(super) fn order(&self, entry: &Entry, now: Instant) -> Order {
        let Entry { ask, id, .. } = entry;
        let is_over = |since: Instant| {
            patience(ask.class).is_some_and(|patience| now.saturating_duration_since(since) >= patience)
        };
        let is_overdue = is_over(ask.submitted);
        let is_starved = self.tenants.last_admitted(ask.tenant).is_none_or(is_over);
        if is_overdue && (is_starved || seeded!(FloodServedFirst)) {
            return (false, Class::Interactive, 0, ask.submitted, *id);
        }
        let class = if is_overdue { Class::Interactive } else { ask.class };
        (true, class, self.tenants.served(ask.tenant), ask.submitted, *id)
    }

    pub(super) fn expire(&mut self, now: Instant) -> Vec<SequenceId> {
        let mut expired = Vec::new();
        while !seeded!(DeadlineIgnored)
            && let Some(gone) = self.waiting.late(now).and_then(|id| self.unqueue(id))
        {
            for id in std::iter::once(gone.id).chain(gone.forks) {
                self.leave(gone.ask);
                expired.push(id);
            }
        }
        expired
    }

    pub(super) fn line(&self, now: Instant, shadows_too: bool) -> Line {
        let orders = if self.has_place() {
            self.waiting
                .iter()
                .filter(|entry| shadows_too || !entry.is_shadow())
                .filter(|entry| entry.ask.class != Class::Batch || !seeded!(ClassForgotten))
                .map(|entry| Reverse(self.order(entry, now)))
                .collect()
        } else {
            BinaryHeap::new()
        };
        Line { orders, passed: 0 }
    }

    /// For a user; a shadow makes way.
    fn has_place(&self) -> bool {
        self.running.len() < self.limits.running_max || self.running.iter().any(Entry::is_shadow)
    }

    fn next_in(&self, line: &mut Line, now: Instant) -> Option<SequenceId> {
        loop {
            let Reverse((.., id)) = line.orders.pop()?;
            let order = self.order(self.waiting.get(id)?, now);
            if line.orders.peek().is_none_or(|Reverse(next)| order < *next) {
                return Some(id);
            }
            line.orders.push(Reverse(order));
        }
    }

    /// Moves the next sequence from waiting to the end of running, if there is one and there is room for it and for a token
    /// of it in this step.
    pub(super) fn admit(
        &mut self,
        now: Instant,
        line: &mut Line,
        budget: &Budget,
        history: &dyn History,
        plan: &mut Plan,
    ) -> bool {
        while self.has_place() && line.passed < PASSED_MAX {
            let Some(id) = self.next_in(line, now) else { return false };
            let Some(entry) = self.waiting.get(id) else { return false };
            if !budget.is_open(entry.tokens, entry.ask.scored_from) && !seeded!(AdmittedWithoutTime) {
                return false;
            }
            if !budget.has_rows(entry.ask.scored_from) {
                continue;
            }
            if self.place(id, now, history, plan) {
                return true;
            }
            line.passed += 1;
            // Making room may have put shadows behind it, never before.
            let blocked = self.waiting.get_mut(id).map(|entry| *entry.blocked_since.get_or_insert(now));
            let is_passed_for_long = blocked.is_some_and(|since| now.saturating_duration_since(since) >= PASSING);
            if is_passed_for_long && !seeded!(HeadPassedForEver) {
                return false;
            }
        }
        false
    }

    /// Gives a waiting sequence blocks for the tokens it has, as far as possible those that hold them already, and leaves
    /// one for each running sequence to grow into.
    fn place(&mut self, id: SequenceId, now: Instant, history: &dyn History, plan: &mut Plan) -> bool {
        let Some(entry) = self.waiting.get_mut(id) else { return false };
        let (is_user, forks) = (!entry.is_shadow(), entry.forks.len());
        let block_tokens = self.limits.block_tokens;
        let mut blocks = Blocks::default();
        // At least its last token is computed: the next one is sampled from that. To score takes every row.
        let usable = match entry.ask.scored_from {
            Some(_) => 0,
            None => entry.tokens - usize::from(!seeded!(WholePromptFound)),
        };
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
        let Some(mut entry) = self.unqueue(id) else { return false };
        entry.blocks = blocks;
        entry.computed = found * block_tokens;
        entry.has_progressed = false;
        entry.blocked_since = None;
        self.tenants.note_admission(entry.ask.tenant, now);
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
            let free = if seeded!(CachedTokensCharged) { 0 } else { entry.computed };
            self.tenants.charge(entry.ask.tenant, (entry.tokens - free) as u64 * PROMPT_WEIGHT);
        }
        if entry.ask.scored_from.is_some() {
            return 0;
        }
        let block_tokens = self.limits.block_tokens;
        let missed = entry.computed / block_tokens..(entry.tokens - 1) / block_tokens;
        // What is still there behind a lost block would be found with it.
        let index = self.pool.index();
        let was_held = |content: Content| index.was_evicted(content.key) || index.find(content).is_some();
        let lost = missed.take_while(|&block| was_held(entry.chain.content(block, tokens))).count();
        let regretted = lost * block_tokens;
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
            self.queue(entry);
        }
    }
}
