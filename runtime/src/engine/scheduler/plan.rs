//! What the scheduler is told of a request, and what it answers: the plan of one step.

use super::SequenceId;
use crate::{
    engine::request::Class,
    kv::{block_pool::BlockCopy, prefix::Salt},
};
use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub step_tokens: usize,
    pub prefill_chunk: usize,
    pub running_max: usize,
    pub block_tokens: usize,
    /// How long a step may take while somebody decodes.
    pub itl_target: Duration,
    /// Take every sequence's blocks away after each token: for tests of what must not make a difference.
    pub preempt_always: bool,
}

/// What the scheduler needs to know of a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask {
    pub prompt_tokens: usize,
    pub max_tokens: usize,
    pub tenant: u64,
    pub salt: Salt,
    pub class: Class,
    pub submitted: Instant,
    pub deadline: Option<Instant>,
    /// Some: the tokens from here on, which is not the first, are scored, and none is sampled. Nothing of it is found in
    /// the cache, where rows are missing, nor left there, where others would lose what they come back to.
    pub scored_from: Option<usize>,
}

/// One step.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Their deadline passed in the queue; they are forgotten.
    pub expired: Vec<SequenceId>,
    /// They gave up their blocks and wait again.
    pub preempted: Vec<SequenceId>,
    pub admitted: Vec<Admitted>,
    /// To be made in this order, before the work.
    pub copies: Vec<BlockCopy>,
    /// Decoding sequences first.
    pub work: Vec<Work>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Admitted {
    pub id: SequenceId,
    /// Tokens that were found in the cache.
    pub cached: usize,
    /// Tokens that a pool of twice the size would have found too.
    pub regretted: usize,
    /// Not a choice that begins as another's copy.
    pub owns_prompt: bool,
}

/// Tokens `first..first + count` of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Work {
    pub id: SequenceId,
    pub first: usize,
    pub count: usize,
    /// The last of them is the sequence's last token: sample after it.
    pub samples: bool,
    /// How many of the last of them need logits.
    pub rows: usize,
}
