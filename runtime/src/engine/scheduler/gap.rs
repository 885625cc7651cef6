//! Whether tenants that always have something waiting are served alike, whatever their requests are like.
//!
//! Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024, arXiv 2401.00588): over any time in which two
//! tenants are backlogged, what they were served differs by at most 2·U, with U = max(w_p·L_input, w_q·M) for the longest
//! prompt and the M tokens that fit into the batch. The argument: who is admitted has had no more than whoever waits, and
//! then gets ahead by what may still come of its running requests and no more, before it is admitted again.
//!
//! Here no memory is set aside for outputs, so what may still come is bounded by the places and not by the pool: for the
//! requests with the longest prompt and with the most output, all choices together, U = w_p·L_input +
//! w_q·running_max·L_output. Beyond the paper, a tenant whose oldest request goes first because it was given nothing for
//! so long gets ahead by one more, and whoever begins to wait may be behind by its credit: 2·(U + one request) + credit.
//!
//! It is promised while everything fits: who does not is passed by others for a while, and catches up later.

use super::{
    fairness::{OUTPUT_WEIGHT, PROMPT_WEIGHT},
    simulation::World,
    tests::limits,
};
use crate::engine::request::Class;
use std::collections::{BTreeMap, BTreeSet};

/// The largest requests of one world.
#[derive(Default)]
pub(super) struct Sizes {
    prompt_tokens: u64,
    /// Of all choices.
    output_tokens: u64,
}

impl Sizes {
    pub fn note(&mut self, prompt_tokens: usize, output_tokens: usize) {
        self.prompt_tokens = self.prompt_tokens.max(prompt_tokens as u64);
        self.output_tokens = self.output_tokens.max(output_tokens as u64);
    }

    /// How unlike two backlogged tenants may be served, in weighted tokens.
    pub fn gap_max(&self, running_max: usize, credit: u64) -> u64 {
        let (prompt, output) = (PROMPT_WEIGHT * self.prompt_tokens, OUTPUT_WEIGHT * self.output_tokens);
        2 * (prompt + running_max as u64 * output + prompt + output) + credit
    }
}

#[derive(Default)]
pub(super) struct Gaps {
    /// Of two tenants, for as long as both are backlogged: the least and the most that the first was ahead, and the steps.
    windows: BTreeMap<(u64, u64), (i64, i64, u64)>,
    /// Steps of the longest.
    pub longest: u64,
}

impl Gaps {
    /// After a step. `backlogged`: those of whom something waited in it; `served`: what each tenant was given so far;
    /// `bound`: the gap that is fair.
    pub fn check(&mut self, backlogged: &BTreeSet<u64>, served: impl Fn(u64) -> u64, bound: u64) {
        self.windows.retain(|(a, b), _| backlogged.contains(a) && backlogged.contains(b));
        for (&a, &b) in backlogged.iter().flat_map(|a| backlogged.range(a + 1..).map(move |b| (a, b))) {
            let lead = served(a) as i64 - served(b) as i64;
            let (least, most, steps) = self.windows.entry((a, b)).or_insert((lead, lead, 0));
            (*least, *most, *steps) = (lead.min(*least), lead.max(*most), *steps + 1);
            self.longest = self.longest.max(*steps);
            let gap = most.abs_diff(*least);
            assert!(
                gap <= bound,
                "backlogged tenants {a} and {b} were served unlike by {gap}, at most {bound} is fair"
            );
        }
    }
}

/// For a long time one tenant has little to ask for and another everything there is; then both have.
pub(super) fn much_after_little() {
    let mut world = World::new(limits(64, 64, 8), 60);
    world.is_roomy = true;
    for step in 0..6000 {
        let is_met = |world: &World, tenant| match (tenant, step < 3000) {
            (0, true) => world.entries_of(tenant, false) >= 2,
            _ => world.entries_of(tenant, true) >= 8,
        };
        for tenant in 0..2 {
            while !is_met(&world, tenant) {
                // Of different lengths: they do not all end at once.
                let output = 40 + world.alive.len() * 7 % 20;
                world.submit(&[step; 10], output, (tenant, Class::Interactive), None, 1);
            }
        }
        world.step();
    }
    assert!(world.gaps.longest >= 2900);
}

#[test]
fn what_a_tenant_had_no_need_of_is_not_saved_up() {
    much_after_little();
}
