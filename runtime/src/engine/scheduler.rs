//! Decides what runs in the next step. Pure: no tensors, no channels, and the time comes in as an argument.
//!
//! A sequence has some tokens, of which some are computed; it needs the rest computed and then samples one more. There
//! are no phases: a prompt and an answer differ only in how many tokens are missing. Blocks for the whole bound are
//! taken at admission, so whatever was admitted can finish.
//!
//! Order of admission: first whoever waits longer than its class should, oldest first; then by class; within a class
//! the tenant that was served least. The first in this order that does not fit holds back the others: its blocks come
//! free as running sequences end, so everybody's wait is bounded.
//!
//! Shadows are apart: nobody waits for their answer. One is admitted and computed only while no other sequence waits or
//! runs, and gives up its place when somebody needs it, so that it delays others by the step that is under way.

use super::request::Class;
use crate::kv::block_pool::{BlockPool, Blocks};
use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

pub(crate) type SequenceId = u64;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub step_tokens: usize,
    pub prefill_chunk: usize,
    pub running_max: usize,
    pub block_tokens: usize,
}

/// What the scheduler needs to know of a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask {
    pub prompt_tokens: usize,
    pub max_tokens: usize,
    pub tenant: u64,
    pub class: Class,
    pub submitted: Instant,
    pub deadline: Option<Instant>,
}

/// One step.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Their deadline passed in the queue; they are forgotten.
    pub expired: Vec<SequenceId>,
    pub admitted: Vec<SequenceId>,
    /// Shadows that made way; they are forgotten.
    pub evicted: Vec<SequenceId>,
    /// Decoding sequences first.
    pub work: Vec<Work>,
}

/// Tokens `first..first + count` of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Work {
    pub id: SequenceId,
    pub first: usize,
    pub count: usize,
    /// The last of them is the sequence's last token: sample after it.
    pub samples: bool,
}

struct Waiting {
    id: SequenceId,
    ask: Ask,
}

struct Running {
    id: SequenceId,
    class: Class,
    tenant: u64,
    tokens: usize,
    computed: usize,
    blocks: Blocks,
}

/// What a tenant has been given, in weighted tokens, and how many of its sequences wait or run.
#[derive(Default)]
struct Tenant {
    served: u64,
    active: usize,
}

/// An output token costs a step of its own; a prompt token shares one with many.
const OUTPUT_WEIGHT: u64 = 2;

/// Idle tenants remembered at most. Beyond it they are forgotten, and return as if they had had the least.
const IDLE_TENANTS_MAX: usize = 4096;

/// How long a class may be passed over; shadows for ever.
fn patience(class: Class) -> Option<Duration> {
    match class {
        Class::Interactive => Some(Duration::from_secs(10)),
        Class::Batch => Some(Duration::from_secs(30)),
        Class::Shadow => None,
    }
}

pub(crate) struct Scheduler {
    limits: Limits,
    pool: BlockPool,
    waiting: Vec<Waiting>,
    /// In the order of admission.
    running: Vec<Running>,
    tenants: HashMap<u64, Tenant>,
    /// The least that any active tenant was given so far. Nobody returns from idling with less: an idle hour is not saved
    /// up.
    floor: u64,
}

impl Scheduler {
    pub fn new(limits: Limits, blocks: u32) -> Scheduler {
        Scheduler {
            limits,
            pool: BlockPool::new(blocks),
            waiting: Vec::new(),
            running: Vec::new(),
            tenants: HashMap::new(),
            floor: 0,
        }
    }

    /// Queues a request. The caller has made sure that it fits into the whole pool.
    pub fn submit(&mut self, id: SequenceId, ask: Ask) {
        self.raise_floor();
        // Nobody asked for a shadow: it is not held against its tenant.
        if ask.class != Class::Shadow {
            let tenant = self.tenants.entry(ask.tenant).or_default();
            if tenant.active == 0 {
                tenant.served = tenant.served.max(self.floor);
            }
            tenant.active += 1;
        }
        self.waiting.push(Waiting { id, ask });
    }

    /// `users_elsewhere`: somebody waits for an answer of another model, whose step comes after this one.
    pub fn plan(&mut self, now: Instant, users_elsewhere: bool) -> Plan {
        let mut plan = Plan { expired: self.expire(now), ..Plan::default() };
        while let Some(id) = self.admit(now, users_elsewhere, &mut plan.evicted) {
            plan.admitted.push(id);
        }
        let is_busy = users_elsewhere || self.is_busy();
        let mut budget = self.limits.step_tokens;
        for decode in [true, false] {
            for sequence in self.running.iter().filter(|sequence| sequence.class != Class::Shadow || !is_busy) {
                let missing = sequence.tokens - sequence.computed;
                if (missing == 1) != decode {
                    continue;
                }
                let count = missing.min(self.limits.prefill_chunk).min(budget);
                if count > 0 {
                    budget -= count;
                    plan.work.push(Work {
                        id: sequence.id,
                        first: sequence.computed,
                        count,
                        samples: count == missing,
                    });
                }
            }
        }
        plan
    }

    fn expire(&mut self, now: Instant) -> Vec<SequenceId> {
        let late = |waiting: &Waiting| waiting.ask.deadline.is_some_and(|deadline| deadline <= now);
        let gone: Vec<Waiting> = self.waiting.extract_if(.., |waiting| late(waiting)).collect();
        gone.into_iter()
            .map(|waiting| {
                self.leave(waiting.ask.class, waiting.ask.tenant);
                waiting.id
            })
            .collect()
    }

    /// Moves the next sequence from waiting to running, if there is one and there is room.
    fn admit(&mut self, now: Instant, users_elsewhere: bool, evicted: &mut Vec<SequenceId>) -> Option<SequenceId> {
        let order = |waiting: &Waiting| {
            let Ask { class, tenant, submitted, .. } = waiting.ask;
            let waited = now.saturating_duration_since(submitted);
            let overdue = patience(class).is_some_and(|patience| waited >= patience);
            let turn = if overdue { None } else { Some((class, self.tenants.get(&tenant).map_or(0, |t| t.served))) };
            // None sorts first.
            (turn, submitted, waiting.id)
        };
        let (at, _) = self.waiting.iter().enumerate().min_by_key(|(_, waiting)| order(waiting))?;
        let ask = self.waiting[at].ask;
        let need = (ask.prompt_tokens + ask.max_tokens).div_ceil(self.limits.block_tokens);
        if ask.class == Class::Shadow && (users_elsewhere || self.is_busy()) {
            return None;
        }
        let blocks = loop {
            let has_place = self.running.len() < self.limits.running_max;
            if let Some(blocks) = has_place.then(|| self.pool.take(need)).flatten() {
                break blocks;
            }
            if ask.class == Class::Shadow || !self.would_fit(need) {
                return None;
            }
            // The youngest first: the least is lost.
            let at = self.running.iter().rposition(|running| running.class == Class::Shadow)?;
            let gone = self.running.remove(at);
            self.pool.give_back(gone.blocks);
            self.leave(gone.class, gone.tenant);
            evicted.push(gone.id);
        };
        let id = self.waiting.remove(at).id;
        self.running.push(Running {
            id,
            class: ask.class,
            tenant: ask.tenant,
            tokens: ask.prompt_tokens,
            computed: 0,
            blocks,
        });
        self.charge(ask.class, ask.tenant, ask.prompt_tokens as u64);
        Some(id)
    }

    /// Whether so many blocks and a place would be free without shadows.
    fn would_fit(&self, need: usize) -> bool {
        let others = self.running.iter().filter(|running| running.class != Class::Shadow);
        let (count, held) =
            others.fold((0, 0), |(count, held), running| (count + 1, held + running.blocks.numbers().len()));
        count < self.limits.running_max && held + need <= self.pool.total() as usize
    }

    /// Whether anybody but shadows waits or runs.
    pub fn has_users(&self) -> bool {
        self.is_busy() || self.waiting.iter().any(|waiting| waiting.ask.class != Class::Shadow)
    }

    /// Whether anybody but shadows runs.
    fn is_busy(&self) -> bool {
        self.running.iter().any(|running| running.class != Class::Shadow)
    }

    /// The step with this work is done; `sampled`: it gave the sequence one more token.
    pub fn advance(&mut self, work: &Work, sampled: bool) {
        let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.id == work.id) else { return };
        sequence.computed += work.count;
        let (class, tenant) = (sequence.class, sequence.tenant);
        if sampled {
            sequence.tokens += 1;
            self.charge(class, tenant, OUTPUT_WEIGHT);
        }
    }

    /// Forgets what was computed of every running sequence: the pool's contents are lost, the blocks stay theirs.
    pub fn rewind(&mut self) {
        for sequence in &mut self.running {
            sequence.computed = 0;
        }
    }

    /// The sequence is over, wherever it was.
    pub fn remove(&mut self, id: SequenceId) {
        if let Some(at) = self.running.iter().position(|sequence| sequence.id == id) {
            let gone = self.running.remove(at);
            self.pool.give_back(gone.blocks);
            self.leave(gone.class, gone.tenant);
        } else if let Some(at) = self.waiting.iter().position(|waiting| waiting.id == id) {
            let gone = self.waiting.remove(at);
            self.leave(gone.ask.class, gone.ask.tenant);
        }
    }

    /// The blocks of a running sequence; none for any other.
    pub fn table(&self, id: SequenceId) -> &[u32] {
        self.running.iter().find(|sequence| sequence.id == id).map_or(&[], |sequence| sequence.blocks.numbers())
    }

    pub fn running(&self) -> usize {
        self.running.len()
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn blocks_used(&self) -> u32 {
        self.pool.used()
    }

    pub fn blocks_total(&self) -> u32 {
        self.pool.total()
    }

    fn charge(&mut self, class: Class, tenant: u64, tokens: u64) {
        if class != Class::Shadow
            && let Some(tenant) = self.tenants.get_mut(&tenant)
        {
            tenant.served += tokens;
        }
    }

    fn raise_floor(&mut self) {
        let active = self.tenants.values().filter(|tenant| tenant.active > 0);
        self.floor = active.map(|tenant| tenant.served).min().unwrap_or(0).max(self.floor);
    }

    fn leave(&mut self, class: Class, tenant: u64) {
        self.raise_floor();
        if class != Class::Shadow
            && let Some(tenant) = self.tenants.get_mut(&tenant)
        {
            tenant.active -= 1;
        }
        // Who has had no more than the floor would return at the floor anyway.
        let floor = self.floor;
        let crowded = self.tenants.len() > IDLE_TENANTS_MAX;
        self.tenants.retain(|_, tenant| tenant.active > 0 || (tenant.served > floor && !crowded));
    }
}

#[cfg(test)]
mod tests;
