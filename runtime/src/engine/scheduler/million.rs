//! A million steps of random work, and the same with mistakes seeded into the bookkeeping: each must be noticed.

use super::{
    Limits,
    gap::much_after_little,
    simulation::World,
    tests::{
        a_choice_fails_at_its_beginning, a_flood_before_another, a_large_one_among_small_ones, limits,
        two_backlogged_tenants,
    },
};
use crate::{
    engine::request::Class,
    fault::{Fault, seed},
};
use std::{panic::catch_unwind, time::Duration};

/// xorshift64*
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

#[derive(Default)]
struct Seen {
    steps: u64,
    failures: u64,
    preemptions: u64,
    copies: u64,
    cached_tokens: u64,
    /// Steps for which the same two tenants were backlogged at most.
    longest_rivalry: u64,
}

/// What some tenants ask for: prompt and output tokens at most, and choices.
const HABITS: [(usize, usize, u64); 3] = [(10, 60, 1), (200, 5, 1), (40, 30, 4)];

/// How much one asks for.
#[derive(Clone, Copy)]
enum Demand {
    Nothing,
    /// Something of it always runs, and seldom anything waits.
    Little,
    /// Something of it always waits.
    Everything,
}

impl Demand {
    fn any(random: &mut Random) -> Demand {
        [Demand::Nothing, Demand::Little, Demand::Everything, Demand::Everything][random.below(4)]
    }

    fn is_met(self, world: &World, tenant: u64) -> bool {
        let entries = |waiting_only| world.entries_of(tenant, waiting_only);
        match self {
            Demand::Nothing => true,
            Demand::Little => entries(false) >= 2,
            Demand::Everything => entries(true) >= 5,
        }
    }
}

/// One pool, one set of limits, and whoever comes.
fn episode(random: &mut Random, steps: u64, seen: &mut Seen) {
    let running_max = 1 + random.below(9);
    let step_tokens = running_max + 1 + random.below(80);
    let itl_target = Duration::from_millis([8, 1000][random.below(2)]);
    let limits = Limits {
        itl_target,
        preempt_always: random.one_in(10),
        ..limits(step_tokens, 1 + random.below(80), running_max)
    };
    let is_crowded = random.one_in(3);
    let blocks = if is_crowded { 12 * running_max + 12 } else { 10 + random.below(30) };
    let room = (blocks - 1) * 32;
    let mut world = World::new(limits, blocks as u32);
    (world.is_flaky, world.is_roomy) = (random.one_in(2), is_crowded);
    let mut earlier: Vec<u32> = Vec::new();
    let mut demands = HABITS.map(|_| Demand::any(random));
    while world.steps < steps {
        if is_crowded {
            crowd(random, &mut world, &mut demands);
        } else if world.alive.len() < 16 && random.one_in(3) {
            let (mut prompt, tenant) = (prompt(random, &earlier), random.below(4) as u64);
            // Now and then one that needs most of the pool.
            let most = if random.one_in(20) { room - 60 } else { room.min(260) - 60 };
            prompt.truncate(most);
            if most > 260 {
                prompt.resize(most, 77);
            }
            let class = [Class::Interactive, Class::Interactive, Class::Interactive, Class::Batch, Class::Shadow]
                [random.below(5)];
            let deadline = random.one_in(5).then(|| Duration::from_millis(random.below(400) as u64));
            let choices = if random.one_in(6) { 2 + random.below(3) as u64 } else { 1 };
            if random.one_in(12) {
                let from = 1 + random.below(prompt.len());
                world.submit_scored(&prompt, from, (tenant, class));
            } else {
                world.submit(&prompt, 1 + random.below(60), (tenant, class), deadline, choices);
            }
        }
        if random.one_in(30) && !world.alive.is_empty() {
            let nth = random.below(world.alive.len());
            let id = world.alive.keys().nth(nth).copied();
            let gone = id.and_then(|id| world.alive.get(&id).map(|truth| truth.tokens.clone()));
            earlier = gone.unwrap_or_default();
            id.into_iter().for_each(|id| world.remove(id));
        }
        if random.one_in(3000) {
            world.rewind();
        }
        world.step_beside(random.one_in(10));
    }
    world.drain();
    seen.steps += world.steps;
    seen.failures += world.failures;
    seen.preemptions += world.preemptions;
    seen.copies += world.copies;
    seen.cached_tokens += world.cached_tokens;
    seen.longest_rivalry = seen.longest_rivalry.max(world.gaps.longest);
}

/// Tenants of different habits, each for some time with much to ask for and for some time with little.
fn crowd(random: &mut Random, world: &mut World, demands: &mut [Demand]) {
    for ((tenant, demand), (prompt, output, choices)) in (0..).zip(demands).zip(HABITS) {
        if random.one_in(4000) {
            *demand = Demand::any(random);
        }
        while !demand.is_met(world, tenant) {
            // Each begins as the one before.
            let prompt = vec![2000; 1 + random.below(prompt)];
            let class = if random.one_in(20) { Class::Shadow } else { Class::Interactive };
            world.submit(&prompt, 1 + random.below(output), (tenant, class), None, choices);
        }
    }
}

/// One of a few beginnings that all tenants use, or what an earlier conversation said; then something else.
fn prompt(random: &mut Random, earlier: &[u32]) -> Vec<u32> {
    let mut prompt = match random.below(4) {
        0 if !earlier.is_empty() => earlier.to_vec(),
        family => (0..random.below(200) as u32).map(|at| at * 4 + family as u32).collect(),
    };
    prompt.truncate(180);
    if prompt.len() > 32 && random.one_in(4) {
        // Whole blocks, and nothing of its own.
        prompt.truncate(prompt.len() / 32 * 32);
        return prompt;
    }
    let own = random.below(50);
    prompt.extend((0..=own).map(|_| 1000 + random.below(3) as u32));
    prompt
}

fn random_worlds(episodes: u64, steps: u64) -> Seen {
    let (mut random, mut seen) = (Random(0x9e37_79b9_7f4a_7c15), Seen::default());
    (0..episodes).for_each(|_| episode(&mut random, steps, &mut seen));
    seen
}

#[test]
fn a_million_steps_break_no_promise() {
    let seen = random_worlds(50, 20_000);
    assert!(seen.steps >= 1_000_000);
    // Nothing of what could go wrong was left out.
    assert!(seen.failures > 1000);
    assert!(seen.preemptions > 10_000 && seen.copies > 1000 && seen.cached_tokens > 100_000);
    assert!(seen.longest_rivalry > 1000);
}

#[test]
fn every_seeded_mistake_is_noticed() {
    for fault in Fault::ALL {
        let outcome = catch_unwind(|| {
            seed(Some(fault));
            every_world();
        });
        seed(None);
        assert!(outcome.is_err(), "{fault:?} went unnoticed");
    }
    // And it was the mistakes that were noticed.
    every_world();
}

fn every_world() {
    two_backlogged_tenants();
    much_after_little();
    a_choice_fails_at_its_beginning();
    a_flood_before_another();
    a_large_one_among_small_ones();
    random_worlds(16, 10_000);
}
