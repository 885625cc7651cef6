//! The scheduler with a fake model and a fake clock.

use super::{Ask, Limits, Plan, Scheduler};
use crate::engine::request::Class;
use proptest::prelude::*;
use std::{
    collections::{BTreeMap, HashSet},
    time::{Duration, Instant},
};

const CLASSES: [Class; 3] = [Class::Interactive, Class::Batch, Class::Shadow];

/// A scheduler, the truth about its sequences, and the time. Checks every plan.
struct Simulation {
    scheduler: Scheduler,
    limits: Limits,
    now: Instant,
    /// id → (ask, tokens, computed); computed is None while it waits.
    alive: BTreeMap<u64, (Ask, usize, Option<usize>)>,
    next: u64,
}

impl Simulation {
    fn new(limits: Limits, blocks: u32) -> Simulation {
        Simulation {
            scheduler: Scheduler::new(limits, blocks),
            limits,
            now: Instant::now(),
            alive: BTreeMap::new(),
            next: 0,
        }
    }

    fn submit(
        &mut self,
        prompt_tokens: usize,
        max_tokens: usize,
        tenant: u64,
        class: Class,
        patience: Option<Duration>,
    ) -> u64 {
        let deadline = patience.map(|patience| self.now + patience);
        let ask = Ask { prompt_tokens, max_tokens, tenant, class, submitted: self.now, deadline };
        self.scheduler.submit(self.next, ask);
        self.alive.insert(self.next, (ask, prompt_tokens, None));
        self.next += 1;
        self.next - 1
    }

    fn remove(&mut self, id: u64) {
        self.scheduler.remove(id);
        self.alive.remove(&id);
    }

    /// One step of a model that takes a millisecond; every sequence runs to its bound.
    fn step(&mut self) -> Plan {
        self.now += Duration::from_millis(1);
        let plan = self.scheduler.plan(self.now, false);
        for id in &plan.expired {
            let (ask, _, computed) = self.alive.remove(id).expect("an expired sequence was alive");
            assert!(computed.is_none() && ask.deadline.is_some_and(|deadline| deadline <= self.now));
        }
        for id in &plan.evicted {
            let (ask, ..) = self.alive.remove(id).expect("an evicted sequence was alive");
            assert_eq!(ask.class, Class::Shadow);
            assert!(!plan.admitted.is_empty(), "evicted for nobody");
        }
        for id in &plan.admitted {
            self.alive.get_mut(id).expect("an admitted sequence is alive").2 = Some(0);
        }
        let mut budget = self.limits.step_tokens;
        let mut seen = HashSet::new();
        for work in &plan.work {
            assert!(seen.insert(work.id), "a sequence comes twice");
            let (_, tokens, computed) = self.alive[&work.id];
            assert_eq!(Some(work.first), computed, "not where the last step ended");
            assert!(work.count >= 1 && work.count <= self.limits.prefill_chunk && work.first + work.count <= tokens);
            assert_eq!(work.samples, work.first + work.count == tokens);
            budget = budget.checked_sub(work.count).expect("more tokens than the step's budget");
        }
        let others =
            |(ask, _, computed): &&(Ask, usize, Option<usize>)| ask.class != Class::Shadow && computed.is_some();
        let is_busy = self.alive.values().filter(others).count() > 0;
        for work in &plan.work {
            let is_shadow = self.alive[&work.id].0.class == Class::Shadow;
            assert!(!(is_shadow && is_busy), "a shadow shares a step with somebody who waits for an answer");
        }
        let decoding = self.alive.iter().filter(|(_, (ask, tokens, computed))| {
            computed.is_some_and(|c| c + 1 == *tokens) && (ask.class != Class::Shadow || !is_busy)
        });
        for (id, _) in decoding {
            assert!(seen.contains(id), "a decoding sequence was left out");
        }
        self.check_blocks();
        for work in &plan.work {
            self.scheduler.advance(work, work.samples);
            let (ask, tokens, computed) = self.alive.get_mut(&work.id).expect("alive");
            *computed = Some(work.first + work.count);
            *tokens += usize::from(work.samples);
            if *tokens == ask.prompt_tokens + ask.max_tokens {
                self.remove(work.id);
            }
        }
        plan
    }

    fn check_blocks(&self) {
        let mut owned = HashSet::new();
        for (id, (ask, _, computed)) in &self.alive {
            let table = self.scheduler.table(*id);
            let need = (ask.prompt_tokens + ask.max_tokens).div_ceil(self.limits.block_tokens);
            assert_eq!(table.len(), if computed.is_some() { need } else { 0 });
            assert!(table.iter().all(|&block| owned.insert(block)), "a block has two owners");
        }
        assert_eq!(owned.len(), self.scheduler.blocks_used() as usize, "a block has no owner");
        let running = self.alive.values().filter(|(_, _, computed)| computed.is_some()).count();
        assert_eq!((self.scheduler.running(), self.scheduler.waiting()), (running, self.alive.len() - running));
        assert!(running <= self.limits.running_max);
    }

    /// Steps until nothing is left; fails if a step brings nothing forward.
    fn drain(&mut self) -> usize {
        let mut steps = 0;
        while !self.alive.is_empty() {
            let plan = self.step();
            assert!(
                !plan.work.is_empty() || !plan.expired.is_empty() || !plan.evicted.is_empty(),
                "deadlock with {} sequences",
                self.alive.len()
            );
            steps += 1;
        }
        steps
    }
}

fn limits(step_tokens: usize, prefill_chunk: usize, running_max: usize) -> Limits {
    Limits { step_tokens, prefill_chunk, running_max, block_tokens: 32 }
}

#[derive(Clone, Debug)]
enum Act {
    Submit { prompt: usize, output: usize, tenant: u64, class: usize, deadline_ms: Option<u64> },
    Step(usize),
    Cancel(usize),
    Rewind,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let submit = (1usize..200, 1usize..60, 0u64..4, 0usize..3, proptest::option::weighted(0.2, 0u64..50)).prop_map(
        |(prompt, output, tenant, class, deadline_ms)| Act::Submit { prompt, output, tenant, class, deadline_ms },
    );
    let act = prop_oneof![6 => submit, 6 => (1usize..9).prop_map(Act::Step), 2 => (0usize..99).prop_map(Act::Cancel), 1 => Just(Act::Rewind)];
    proptest::collection::vec(act, 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn blocks_are_conserved_and_everything_ends(
        acts in acts(), running_max in 1usize..9, step_extra in 1usize..70, chunk in 1usize..70, blocks in 9u32..40,
    ) {
        let mut simulation = Simulation::new(limits(running_max + step_extra, chunk, running_max), blocks);
        for act in acts {
            match act {
                Act::Submit { prompt, output, tenant, class, deadline_ms } => {
                    // The door refuses what cannot fit; the smallest pool here holds 288 tokens.
                    let patience = deadline_ms.map(Duration::from_millis);
                    simulation.submit(prompt, output, tenant, CLASSES[class], patience);
                }
                Act::Step(times) => (0..times).for_each(|_| { simulation.step(); }),
                Act::Cancel(nth) => if let Some(&id) = simulation.alive.keys().nth(nth % 9) { simulation.remove(id) },
                Act::Rewind => {
                    simulation.scheduler.rewind();
                    for (_, _, computed) in simulation.alive.values_mut() {
                        *computed = computed.map(|_| 0);
                    }
                }
            }
        }
        let bound: usize = simulation.alive.values().map(|(ask, ..)| ask.prompt_tokens + 2 * ask.max_tokens + 1).sum();
        let steps = simulation.drain();
        prop_assert!(steps <= bound, "{} steps for work of {}", steps, bound);
        prop_assert_eq!(simulation.scheduler.blocks_used(), 0);
        prop_assert!(simulation.scheduler.tenants.values().all(|tenant| tenant.active == 0));
    }
}

#[test]
fn decoding_goes_first_and_prompts_share_the_rest() {
    let mut simulation = Simulation::new(limits(20, 16, 4), 100);
    let first = simulation.submit(1, 50, 0, Class::Interactive, None);
    simulation.step();
    let second = simulation.submit(100, 5, 0, Class::Interactive, None);
    let third = simulation.submit(100, 5, 0, Class::Interactive, None);
    let plan = simulation.step();
    let work: Vec<(u64, usize)> = plan.work.iter().map(|work| (work.id, work.count)).collect();
    assert_eq!(work, [(first, 1), (second, 16), (third, 3)]);
}

#[test]
fn interactive_goes_before_batch_before_shadow() {
    let mut simulation = Simulation::new(limits(64, 64, 1), 100);
    let [shadow, batch, interactive] =
        [2, 1, 0].map(|class| simulation.submit(4, 2, class as u64, CLASSES[class], None));
    let mut order = Vec::new();
    while !simulation.alive.is_empty() {
        order.extend(simulation.step().admitted);
    }
    assert_eq!(order, [interactive, batch, shadow]);
}

#[test]
fn a_tenant_that_floods_does_not_starve_another() {
    let mut simulation = Simulation::new(limits(64, 64, 2), 100);
    for _ in 0..50 {
        simulation.submit(10, 10, 1, Class::Interactive, None);
    }
    for _ in 0..30 {
        simulation.step();
    }
    let late = simulation.submit(10, 10, 2, Class::Interactive, None);
    let mut admitted = Vec::new();
    while !admitted.contains(&late) {
        admitted.extend(simulation.step().admitted);
    }
    assert!(admitted.len() <= 2, "{} of the flood went before", admitted.len() - 1);
}

/// Two tenants that always have work get the same within a bound, however their requests differ in size.
#[test]
fn tenants_are_served_alike() {
    let mut simulation = Simulation::new(limits(64, 64, 4), 100);
    let mut served = [0usize; 2];
    for _ in 0..4000 {
        for (tenant, (prompt, output)) in [(0, (200, 5)), (1, (5, 40))] {
            let waits = simulation.alive.values().any(|(ask, _, computed)| ask.tenant == tenant && computed.is_none());
            if !waits {
                simulation.submit(prompt, output, tenant, Class::Interactive, None);
            }
        }
        simulation.step();
        served = [0, 1].map(|tenant| simulation.scheduler.tenants[&tenant].served as usize);
    }
    let [a, b] = served;
    // One request of each may be ahead for each place there is.
    assert!(a.abs_diff(b) <= 4 * 210 * 2, "{a} and {b}");
    assert!(a > 10_000);
}

#[test]
fn a_shadow_runs_only_when_nobody_else_does_and_makes_way_at_once() {
    // Ten blocks: one shadow of 160 tokens takes five of them.
    let mut simulation = Simulation::new(limits(64, 64, 4), 10);
    let shadow = simulation.submit(60, 100, 0, Class::Shadow, None);
    let plan = simulation.step();
    assert_eq!((plan.admitted, plan.work.len()), (vec![shadow], 1));
    // A user whose request fits beside it: the shadow waits, with what it has.
    let user = simulation.submit(10, 3, 1, Class::Interactive, None);
    for _ in 0..3 {
        assert!(simulation.step().work.iter().all(|work| work.id == user));
    }
    assert!(simulation.step().work.iter().all(|work| work.id == shadow), "and goes on where it was");
    // Nor does it run while users of another model wait for their turn.
    let plan = simulation.scheduler.plan(simulation.now, true);
    assert!(plan.work.is_empty() && plan.evicted.is_empty());
    // One who needs its blocks gets them in the very next step.
    let large = simulation.submit(200, 50, 1, Class::Interactive, None);
    let plan = simulation.step();
    assert_eq!((plan.evicted, plan.admitted), (vec![shadow], vec![large]));
    // While users are served, no shadow begins.
    let next = simulation.submit(1, 1, 0, Class::Shadow, None);
    while simulation.alive.contains_key(&large) {
        assert!(!simulation.step().admitted.contains(&next));
    }
    assert!(simulation.step().admitted.contains(&next));
}

/// Endless interactive work from ever new tenants, and still a batch request is served once its patience is over.
#[test]
fn nobody_waits_for_ever() {
    let mut simulation = Simulation::new(limits(8, 8, 2), 20);
    for class in [Class::Interactive, Class::Batch] {
        let patient = simulation.submit(30, 10, 0, class, None);
        let submitted = simulation.now;
        let mut tenant = 1;
        loop {
            while simulation.scheduler.waiting() < 5 {
                simulation.submit(20, 10, tenant, Class::Interactive, None);
                tenant += 1;
            }
            if simulation.step().admitted.contains(&patient) {
                break;
            }
            simulation.now += Duration::from_millis(20);
            // After its patience only those who waited as long go before it, and each takes a bounded time.
            let patience = super::patience(class).unwrap();
            assert!(simulation.now - submitted < patience + Duration::from_secs(10), "{class:?}");
        }
    }
}

/// A large request at the head is not passed by small ones for ever.
#[test]
fn a_large_request_gets_its_blocks() {
    let mut simulation = Simulation::new(limits(64, 64, 16), 10);
    for _ in 0..5 {
        simulation.submit(30, 30, 1, Class::Interactive, None);
    }
    simulation.step();
    let large = simulation.submit(200, 120, 2, Class::Interactive, None);
    let mut steps = 0;
    loop {
        simulation.submit(20, 10, 1, Class::Interactive, None);
        steps += 1;
        if simulation.step().admitted.contains(&large) {
            break;
        }
        assert!(steps < 100, "passed over for {steps} steps");
    }
}

#[test]
fn a_deadline_in_the_queue_is_kept_to_the_step() {
    let mut simulation = Simulation::new(limits(64, 64, 1), 100);
    simulation.submit(1, 50, 0, Class::Interactive, None);
    let late = simulation.submit(1, 1, 0, Class::Interactive, Some(Duration::from_millis(5)));
    let expired: Vec<usize> = (1..=10).filter(|_| simulation.step().expired.contains(&late)).collect();
    assert_eq!(expired, [5]);
}

#[test]
fn forgotten_work_is_done_again_and_idle_tenants_are_forgotten() {
    let mut simulation = Simulation::new(limits(64, 16, 4), 100);
    let id = simulation.submit(20, 5, 7, Class::Interactive, None);
    simulation.step();
    simulation.step();
    simulation.scheduler.rewind();
    simulation.alive.get_mut(&id).expect("alive").2 = Some(0);
    let plan = simulation.step();
    assert_eq!((plan.work[0].first, plan.work[0].count, plan.work[0].samples), (0, 16, false));
    simulation.drain();
    for tenant in 0..10_000 {
        let id = simulation.submit(1, 1, tenant, Class::Interactive, None);
        simulation.remove(id);
    }
    assert!(simulation.scheduler.tenants.len() <= super::IDLE_TENANTS_MAX);
}
