//! Who gives up their blocks when there are none left for a next token: the lowest class, then the tenant that was
//! served most, then the youngest. What is lost is computed again, mostly from the cache.

use super::{Entry, Plan, Scheduler, SequenceId};
use crate::engine::request::Class;

/// Sorts before another whose blocks are taken before its own.
type Rank = (Class, u64, SequenceId);

impl Scheduler {
    fn rank(&self, entry: &Entry) -> Rank {
        (entry.ask.class, self.tenants.served(entry.ask.tenant), entry.id)
    }

    /// Makes sure that every decoding sequence owns the block that its next token goes to. The first in rank go first, and
    /// the last in rank pay: so the very first always gets on, and whoever got a block here keeps it for this step.
    pub(super) fn grow(&mut self, shadows_too: bool, plan: &mut Plan) {
        let decoding = self
            .running
            .iter()
            .filter(|entry| entry.has_progressed && entry.missing() == 1 && (shadows_too || !entry.is_shadow()));
        let mut order: Vec<(Rank, SequenceId)> = decoding.map(|entry| (self.rank(entry), entry.id)).collect();
        order.sort_unstable();
        for (_, id) in order {
            // It may have paid for another.
            while let Some(at) = self.running.iter().position(|entry| entry.id == id) {
                if self.grow_one(at, plan) {
                    break;
                }
                let Some(victim) = self.victim() else { break };
                self.preempt(victim, plan);
            }
        }
    }

    fn grow_one(&mut self, at: usize, plan: &mut Plan) -> bool {
        let entry = &mut self.running[at];
        let block = entry.computed / self.limits.block_tokens;
        if block == entry.blocks.len() {
            return self.pool.take(&mut entry.blocks, 1);
        }
        let copy = self.pool.make_own(&mut entry.blocks, block);
        plan.copies.extend(copy.flatten());
        copy.is_some()
    }

    /// The last in rank of those that have something to show for their blocks. Whoever needs a block to grow is one.
    fn victim(&self) -> Option<usize> {
        let may = |entry: &Entry| entry.has_progressed || entry.is_shadow() || seeded!(PreemptedWithoutProgress);
        let candidates = self.running.iter().enumerate().filter(|(_, entry)| may(entry));
        candidates.max_by_key(|(_, entry)| self.rank(entry)).map(|(at, _)| at)
    }

    /// As if blocks ran out with every token.
    pub(super) fn preempt_all(&mut self, plan: &mut Plan) {
        while let Some(at) = self.running.iter().position(|entry| entry.has_progressed) {
            self.preempt(at, plan);
        }
    }
}
