//! What must hold after every step.

use super::{
    super::{Plan, admission::patience, budget::PROMPT_TOKENS_MIN, entry::Entry, fairness::OUTPUT_WEIGHT},
    Truth, World,
};
use std::{
    collections::{BTreeSet, HashSet},
    time::Duration,
};

/// Nobody but shadows waits longer for admission than its class's patience and this, in a queue as short as a test's.
const SLACK: Duration = Duration::from_secs(20);
/// Nobody who runs is without work for longer: the longest prompts before it in pieces of the least size.
const IDLE_STEPS_MAX: u64 = 500;

impl World {
    pub(super) fn take_note(&mut self, plan: &Plan) {
        for id in &plan.expired {
            let truth = self.alive.remove(id).expect("an expired sequence was alive");
            assert!(!truth.was_admitted && truth.ask.deadline.is_some_and(|deadline| deadline <= self.now));
        }
        let is_late = |truth: &&Truth| !truth.was_admitted && truth.ask.deadline.is_some_and(|d| d <= self.now);
        assert!(!self.alive.values().any(|truth| is_late(&truth)), "a deadline passed unnoticed");
        for id in &plan.preempted {
            let truth = self.alive.get_mut(id).expect("a preempted sequence is alive");
            assert!(truth.has_progressed || truth.is_shadow(), "preempted before its blocks were of any use");
            assert!(truth.computed.take().is_some(), "preempted while it waited");
            truth.preempted = Some(self.now);
            self.preemptions += 1;
        }
        for admitted in &plan.admitted {
            let truth = self.alive.get_mut(&admitted.id).expect("an admitted sequence is alive");
            assert!(truth.computed.is_none());
            let has_work = plan.work.iter().any(|work| work.id == admitted.id);
            assert!(has_work || !admitted.owns_prompt, "admitted to a step that has nothing for it");
            assert!(admitted.cached < truth.tokens.len(), "nothing is left to compute");
            if !truth.was_admitted && !truth.is_shadow() {
                let waited = self.now - truth.ask.submitted;
                let bound = patience(truth.ask.class).expect("not a shadow") + SLACK;
                assert!(waited <= bound, "a {:?} request waited for {waited:?}", truth.ask.class);
            }
            if let Some(preempted) = truth.preempted.take().filter(|_| !truth.is_shadow()) {
                let waited = self.now - preempted;
                let bound = patience(truth.ask.class).expect("not a shadow") + SLACK;
                assert!(waited <= bound, "a preempted {:?} request waited for {waited:?}", truth.ask.class);
            }
            if admitted.owns_prompt {
                truth.computed = Some(admitted.cached);
                truth.has_progressed = false;
                if !truth.was_admitted && !truth.is_shadow() {
                    *self.worked.entry(truth.ask.tenant).or_default() += (truth.tokens.len() - admitted.cached) as u64;
                }
                self.cached_tokens += admitted.cached as u64;
            }
            truth.was_admitted = true;
        }
    }

    pub(super) fn check_work(&mut self, plan: &Plan, users_elsewhere: bool) {
        let mut budget = self.limits.step_tokens;
        let mut seen = HashSet::new();
        let is_busy = users_elsewhere || self.alive.values().any(|truth| !truth.is_shadow());
        let (mut read, mut is_awaited) = (0, false);
        for work in &plan.work {
            assert!(seen.insert(work.id), "a sequence comes twice");
            let truth = self.alive.get(&work.id).expect("a sequence that is over has work");
            assert_eq!(Some(work.first), truth.computed, "not where the last step ended");
            let tokens = truth.tokens.len();
            assert!(work.count >= 1 && work.count <= self.limits.prefill_chunk && work.first + work.count <= tokens);
            assert_eq!(work.samples, work.first + work.count == tokens);
            let rows = match truth.ask.scored_from {
                Some(from) => (work.first..work.first + work.count).filter(|row| row + 1 >= from).count(),
                None => usize::from(work.samples),
            };
            assert_eq!(work.rows, rows);
            budget = budget.checked_sub(work.count).expect("more tokens than the step's budget");
            assert!(!(truth.is_shadow() && is_busy), "a shadow shares a step with somebody who waits for an answer");
            for block in
                work.first / self.limits.block_tokens..=(work.first + work.count - 1) / self.limits.block_tokens
            {
                let block = self.scheduler.table(work.id)[block];
                let pool = self.scheduler.pool();
                assert!(pool.owners(block) == 1 && !pool.is_published(block), "a shared block would be written to");
            }
            let is_new = plan.admitted.iter().any(|admitted| admitted.id == work.id);
            if tokens - work.first > 1 || is_new {
                read += work.count;
            } else {
                is_awaited = true;
            }
        }
        let decoding = |truth: &Truth| {
            truth.has_progressed && truth.computed.is_some_and(|computed| computed + 1 == truth.tokens.len())
        };
        for (id, _) in self.alive.iter().filter(|(_, truth)| decoding(truth) && !(truth.is_shadow() && is_busy)) {
            assert!(seen.contains(id), "a decoding sequence was left out");
        }
        if is_awaited && read > PROMPT_TOKENS_MIN {
            let expected = self.scheduler.expected(&plan.work);
            assert!(expected <= self.limits.itl_target + Duration::from_micros(50), "{expected:?} is too long a step");
        }
        let nothing = plan.work.is_empty() && plan.expired.is_empty();
        let may_run = |truth: &Truth| !(truth.is_shadow() && is_busy);
        assert!(!nothing || !self.alive.values().any(may_run), "deadlock with {} sequences", self.alive.len());
        for (id, truth) in self.alive.iter_mut().filter(|(_, truth)| may_run(truth)) {
            let is_idle = truth.computed.is_some() && !seen.contains(id);
            truth.idle_steps = if is_idle { truth.idle_steps + 1 } else { 0 };
            assert!(truth.idle_steps <= IDLE_STEPS_MAX, "a running sequence has no work");
        }
    }

    pub(super) fn check_blocks(&self) {
        let pool = self.scheduler.pool();
        let mut owners = vec![(0, None); pool.total() as usize];
        let mut known = self.scheduler.waiting();
        for (id, truth) in &self.alive {
            let table = self.scheduler.table(*id);
            if table.is_empty() {
                continue;
            }
            known += 1 + self.scheduler.forks(*id).len();
            for &block in table {
                let (count, group) = &mut owners[block as usize];
                *count += 1;
                let related = group.replace(truth.group).is_none_or(|other| other == truth.group);
                assert!(related || pool.is_published(block), "strangers share a block that is still written to");
            }
        }
        assert_eq!(known, self.alive.len(), "a sequence was lost, or was not forgotten");
        let mut used = 0;
        for (block, (count, _)) in owners.iter().enumerate() {
            assert_eq!(pool.owners(block as u32), *count, "block {block} has other owners than it thinks");
            used += u32::from(*count > 0);
        }
        assert_eq!((pool.used(), pool.free()), (used, (pool.total() - used) as usize), "a block is lost or free twice");
        assert!(self.scheduler.running() <= self.limits.running_max);
    }

    /// Those of whom something waited for its turn in the step that is over.
    pub(super) fn check_gaps(&mut self, backlogged: BTreeSet<u64>) {
        let is_passed = |entry: &Entry| entry.blocked_since.is_some() && !entry.is_shadow();
        assert!(!self.scheduler.waiting.iter().any(is_passed), "not a roomy world");
        let served = |tenant| self.worked.get(&tenant).copied().unwrap_or(0);
        let credit = OUTPUT_WEIGHT * self.cells.len() as u64;
        self.gaps.check(&backlogged, served, self.sizes.gap_max(self.limits.running_max, credit));
    }
}
