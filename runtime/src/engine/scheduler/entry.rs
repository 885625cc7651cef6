//! A sequence as the scheduler knows it.

use super::{Ask, SequenceId, Work, budget::before_rows};
use crate::{
    engine::request::Class,
    kv::{block_pool::Blocks, prefix::Chain},
};
use std::time::Instant;

/// A sequence that waits or runs.
pub(super) struct Entry {
    pub id: SequenceId,
    pub ask: Ask,
    pub tokens: usize,
    pub computed: usize,
    /// None while it waits.
    pub blocks: Blocks,
    pub chain: Chain,
    /// Choices that begin as copies of this one when its prompt is computed. Until then they wait and run with it.
    pub forks: Vec<SequenceId>,
    /// It had blocks before: its prompt is paid for and its deadline is kept.
    pub has_started: bool,
    /// It gained a token since it got its blocks. Before, they are not taken from it: nothing would ever end.
    pub has_progressed: bool,
    /// When it was first found not to fit, and every time since.
    pub blocked_since: Option<Instant>,
}

impl Entry {
    pub fn new(id: SequenceId, forks: Vec<SequenceId>, ask: Ask, block_tokens: usize) -> Entry {
        Entry {
            id,
            ask,
            tokens: ask.prompt_tokens,
            computed: 0,
            blocks: Blocks::default(),
            chain: Chain::new(ask.salt, block_tokens),
            forks,
            has_started: false,
            has_progressed: false,
            blocked_since: None,
        }
    }

    /// It is this sequence, or one that begins as its copy.
    pub fn holds(&self, id: SequenceId) -> bool {
        self.id == id || self.forks.contains(&id)
    }

    pub fn is_shadow(&self) -> bool {
        self.ask.class == Class::Shadow
    }

    pub fn missing(&self) -> usize {
        self.tokens - self.computed
    }

    pub fn work(&self, count: usize) -> Work {
        let samples = count == self.missing();
        let rows = match self.ask.scored_from {
            Some(_) => count.saturating_sub(before_rows(self.computed, self.ask.scored_from)),
            None => usize::from(samples),
        };
        Work { id: self.id, first: self.computed, count, samples, rows }
    }
}
