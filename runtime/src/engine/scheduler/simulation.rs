//! The scheduler, the block pool and the prefix cache with a fake model and a fake clock: a world that checks after every
//! step that what must hold does.

mod checks;

use super::{
    Ask, History, Limits, Plan, Scheduler, SequenceId, Work,
    gap::{Gaps, Sizes},
};
use crate::engine::request::Class;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::{Duration, Instant},
};

/// What the fake model leaves in the pool for a token: a hash over all tokens up to it, and whose it is.
type Cell = (u64, u64);

/// The truth about a sequence.
pub(super) struct Truth {
    pub ask: Ask,
    pub tokens: Vec<u32>,
    /// For each token a hash over all up to it.
    marks: Vec<u64>,
    /// None while it waits, or begins as a copy of another.
    pub computed: Option<usize>,
    pub was_admitted: bool,
    has_progressed: bool,
    /// Steps since it last had work, of those in which it could have.
    idle_steps: u64,
    preempted: Option<Instant>,
    /// Choices of one request share this number.
    group: SequenceId,
}

impl Truth {
    fn push(&mut self, token: u32) {
        let last = self.marks.last().copied().unwrap_or(0x9e37_79b9);
        self.marks.push((last ^ u64::from(token)).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29));
        self.tokens.push(token);
    }

    fn is_shadow(&self) -> bool {
        self.ask.class == Class::Shadow
    }

    fn bound(&self) -> usize {
        self.ask.prompt_tokens + self.ask.max_tokens
    }
}

impl History for BTreeMap<SequenceId, Truth> {
    fn tokens(&self, id: SequenceId) -> &[u32] {
        &self[&id].tokens
    }
}

pub(super) struct World {
    pub scheduler: Scheduler,
    limits: Limits,
    pub now: Instant,
    pub alive: BTreeMap<SequenceId, Truth>,
    cells: Vec<Cell>,
    next: SequenceId,
    pub steps: u64,
    /// Sampling fails now and then, for one choice and not for another.
    pub is_flaky: bool,
    /// Everything fits and all users are of one class: nobody is passed, so nothing but their turn keeps them waiting.
    pub is_roomy: bool,
    pub failures: u64,
    pub preemptions: u64,
    pub copies: u64,
    pub cached_tokens: u64,
    /// Per tenant, as it should be charged.
    pub worked: HashMap<u64, u64>,
    sizes: Sizes,
    pub gaps: Gaps,
}

impl World {
    pub fn new(limits: Limits, blocks: u32) -> World {
        World {
            scheduler: Scheduler::new(limits, blocks),
            limits,
            now: Instant::now(),
            alive: BTreeMap::new(),
            cells: vec![(0, 0); blocks as usize * limits.block_tokens],
            next: 0,
            steps: 0,
            is_flaky: false,
            is_roomy: false,
            failures: 0,
            preemptions: 0,
            copies: 0,
            cached_tokens: 0,
            worked: HashMap::new(),
            sizes: Sizes::default(),
            gaps: Gaps::default(),
        }
    }

    /// Queues `choices` sequences; the number of the first.
    pub fn submit(
        &mut self,
        prompt: &[u32],
        max_tokens: usize,
        (tenant, class): (u64, Class),
        deadline: Option<Duration>,
        choices: u64,
    ) -> SequenceId {
        let ask = self.ask(prompt, max_tokens, (tenant, class), deadline);
        self.submit_ask(prompt, ask, choices)
    }

    /// Queues a prompt whose tokens are scored from `from` on.
    pub fn submit_scored(&mut self, prompt: &[u32], from: usize, (tenant, class): (u64, Class)) -> SequenceId {
        let ask = Ask { scored_from: Some(from), ..self.ask(prompt, 1, (tenant, class), None) };
        self.submit_ask(prompt, ask, 1)
    }

    fn ask(&self, prompt: &[u32], max_tokens: usize, (tenant, class): (u64, Class), deadline: Option<Duration>) -> Ask {
        Ask {
            prompt_tokens: prompt.len(),
            max_tokens,
            tenant,
            salt: u128::from(tenant).to_le_bytes(),
            class,
            submitted: self.now,
            deadline: deadline.map(|patience| self.now + patience),
            scored_from: None,
        }
    }

    fn submit_ask(&mut self, prompt: &[u32], ask: Ask, choices: u64) -> SequenceId {
        let first = self.next;
        self.next += choices;
        self.sizes.note(prompt.len(), ask.max_tokens * choices as usize);
        for id in first..self.next {
            let (tokens, marks) = Default::default();
            let mut truth = Truth {
                ask,
                tokens,
                marks,
                computed: None,
                was_admitted: false,
                has_progressed: false,
                idle_steps: 0,
                preempted: None,
                group: first,
            };
            prompt.iter().for_each(|&token| truth.push(token));
            self.alive.insert(id, truth);
        }
        self.scheduler.submit(first, (first + 1..self.next).collect(), ask);
        first
    }

    pub fn remove(&mut self, id: SequenceId) {
        let Some(gone) = self.alive.remove(&id) else { return };
        let heirs: Vec<SequenceId> = self.scheduler.forks(id).to_vec();
        self.scheduler.remove(id);
        // The first choice that waited for its prompt goes on in its place.
        if let Some(heir) = heirs.first().and_then(|id| self.alive.get_mut(id)) {
            heir.computed = gone.computed;
        }
    }

    pub fn rewind(&mut self) {
        self.scheduler.rewind();
        self.cells.fill((0, 0));
        self.alive.values_mut().for_each(|truth| truth.computed = None);
        assert_eq!(self.scheduler.pool().used(), 0, "blocks are still owned");
    }

    /// One step; every sequence runs to its bound.
    pub fn step(&mut self) -> Plan {
        self.step_beside(false)
    }

    /// `users_elsewhere`: of another model.
    pub fn step_beside(&mut self, users_elsewhere: bool) -> Plan {
        self.steps += 1;
        let plan = self.scheduler.plan(self.now, users_elsewhere, &self.alive);
        self.take_note(&plan);
        self.copies += plan.copies.len() as u64;
        for copy in &plan.copies {
            let block = self.limits.block_tokens;
            let from = copy.from as usize * block;
            self.cells.copy_within(from..from + block, copy.to as usize * block);
        }
        self.check_blocks();
        self.check_work(&plan, users_elsewhere);
        for work in &plan.work {
            self.compute(work);
        }
        let took = self.duration(&plan.work);
        if !plan.work.is_empty() {
            self.scheduler.observe(&plan.work, took);
        }
        self.now += took;
        let backlogged = self.scheduler.waiting.iter().filter(|entry| !entry.is_shadow());
        let backlogged: BTreeSet<u64> = backlogged.map(|entry| entry.ask.tenant).collect();
        for work in &plan.work {
            self.advance(work);
        }
        if self.is_roomy {
            self.check_gaps(backlogged);
        }
        plan
    }

    pub fn entries_of(&self, tenant: u64, waiting_only: bool) -> usize {
        let running = self.scheduler.running.iter().filter(|_| !waiting_only);
        self.scheduler.waiting.iter().chain(running).filter(|entry| entry.ask.tenant == tenant).count()
    }

    /// 4 ms, 200 µs for each token, 1 µs for each thousand keys.
    fn duration(&self, work: &[Work]) -> Duration {
        let micros: usize = work.iter().map(|work| 200 * work.count + work.count * work.first / 1000).sum();
        Duration::from_micros(4000 + micros as u64)
    }

    /// What the model does: it reads every earlier token's cell, and writes its own.
    fn compute(&mut self, work: &Work) {
        let truth = &self.alive[&work.id];
        let table = self.scheduler.table(work.id);
        let slot = |at: usize| {
            table[at / self.limits.block_tokens] as usize * self.limits.block_tokens + at % self.limits.block_tokens
        };
        // All of them at the beginning and at the end, where something could have changed since the last look.
        let is_first = !truth.has_progressed || work.count > 1;
        let is_last = truth.tokens.len() + 1 >= truth.bound();
        let from = if is_first || is_last { 0 } else { work.first.saturating_sub(2) };
        for at in from..work.first {
            assert_eq!(self.cells[slot(at)], (truth.marks[at], truth.ask.tenant), "another's or a lost token at {at}");
        }
        for at in work.first..work.first + work.count {
            self.cells[slot(at)] = (truth.marks[at], truth.ask.tenant);
        }
    }

    fn advance(&mut self, work: &Work) {
        let forks = if work.samples { self.scheduler.forks(work.id).to_vec() } else { Vec::new() };
        let computed = work.first + work.count;
        let (mut sampled, mut over) = (Vec::new(), Vec::new());
        for &id in std::iter::once(&work.id).chain(&forks) {
            let truth = self.alive.get_mut(&id).expect("alive");
            truth.computed = Some(computed);
            if !work.samples {
                continue;
            }
            let chosen = truth.marks[truth.marks.len() - 1].wrapping_mul(2 * id + 1);
            let fails = self.is_flaky && chosen.is_multiple_of(61);
            self.failures += u64::from(fails);
            if fails || truth.ask.scored_from.is_some() {
                over.push(id);
                continue;
            }
            truth.push((chosen >> 60) as u32);
            truth.has_progressed = true;
            sampled.push(id);
            if !truth.is_shadow() {
                *self.worked.entry(truth.ask.tenant).or_default() += 2;
            }
        }
        self.scheduler.advance(work, &sampled, &self.alive);
        over.into_iter().for_each(|id| self.remove(id));
        for id in forks {
            if self.scheduler.table(id).is_empty()
                && let Some(truth) = self.alive.get_mut(&id)
            {
                truth.computed = None;
            }
            self.end_if_full(id);
        }
        self.end_if_full(work.id);
    }

    fn end_if_full(&mut self, id: SequenceId) {
        if self.alive.get(&id).is_some_and(|truth| truth.tokens.len() == truth.bound()) {
            self.remove(id);
        }
    }

    /// Steps until nothing is left.
    pub fn drain(&mut self) {
        while !self.alive.is_empty() {
            self.step();
        }
        assert_eq!(self.scheduler.pool().used(), 0, "blocks are left over");
        assert_eq!((self.scheduler.running(), self.scheduler.waiting()), (0, 0));
        assert!(self.scheduler.tenants.all().all(|tenant| tenant.active == 0), "a tenant is remembered as active");
    }
}
