//! What the scheduler promises, one world for each promise.

use super::{
    Limits, SequenceId, Work,
    admission::{PASSING, patience},
    budget::SCORED_ROWS_MAX,
    fairness::IDLE_TENANTS_MAX,
    simulation::World,
};
use crate::engine::request::Class;
use std::time::Duration;

const CLASSES: [Class; 3] = [Class::Interactive, Class::Batch, Class::Shadow];

pub(super) fn limits(step_tokens: usize, prefill_chunk: usize, running_max: usize) -> Limits {
    let itl_target = Duration::from_secs(1);
    Limits { step_tokens, prefill_chunk, running_max, block_tokens: 32, itl_target, preempt_always: false }
}

/// A request whose prompt is like no other.
fn ask(world: &mut World, prompt: usize, output: usize, tenant: u64, class: Class) -> SequenceId {
    let own = 1000 + world.alive.last_key_value().map_or(0, |(id, _)| *id as u32) + world.steps as u32 * 1000;
    world.submit(&vec![own; prompt], output, (tenant, class), None, 1)
}

fn admitted(world: &mut World) -> Vec<SequenceId> {
    world.step().admitted.iter().map(|admitted| admitted.id).collect()
}

#[test]
fn decoding_goes_first_and_prompts_share_the_rest() {
    let mut world = World::new(limits(20, 16, 4), 100);
    let first = ask(&mut world, 1, 50, 0, Class::Interactive);
    world.step();
    let second = ask(&mut world, 100, 5, 0, Class::Interactive);
    let third = ask(&mut world, 100, 5, 0, Class::Interactive);
    let work: Vec<(u64, usize)> = world.step().work.iter().map(|work| (work.id, work.count)).collect();
    assert_eq!(work, [(first, 1), (second, 16), (third, 3)]);
}

#[test]
fn a_long_prompt_is_read_in_pieces_that_keep_the_next_token_in_time() {
    let mut world = World::new(Limits { itl_target: Duration::from_millis(12), ..limits(256, 256, 4) }, 100);
    ask(&mut world, 10, 500, 0, Class::Interactive);
    for n in 0..30 {
        ask(&mut world, 10 + 3 * n, 5, 0, Class::Interactive);
        world.step();
    }
    let long = ask(&mut world, 1500, 5, 0, Class::Interactive);
    let mut pieces = Vec::new();
    while world.alive.get(&long).is_some_and(|truth| truth.tokens.len() == 1500) {
        pieces.extend(world.step().work.iter().filter(|work| work.id == long).map(|work| work.count));
    }
    // 8 ms are left for tokens of 200 µs each, most of the time.
    assert!(pieces.len() > 30 && pieces.iter().all(|&count| count < 48), "{pieces:?}");
}

#[test]
fn interactive_goes_before_batch_before_shadow() {
    let mut world = World::new(limits(64, 64, 1), 100);
    let [shadow, batch, interactive] = [2, 1, 0].map(|class| ask(&mut world, 4, 2, class as u64, CLASSES[class]));
    let mut order = Vec::new();
    while !world.alive.is_empty() {
        order.extend(admitted(&mut world));
    }
    assert_eq!(order, [interactive, batch, shadow]);
}

#[test]
fn a_tenant_that_floods_does_not_starve_another() {
    let mut world = World::new(limits(64, 64, 2), 100);
    for _ in 0..50 {
        ask(&mut world, 10, 10, 1, Class::Interactive);
    }
    for _ in 0..30 {
        world.step();
    }
    let late = ask(&mut world, 10, 10, 2, Class::Interactive);
    let mut before = Vec::new();
    while !before.contains(&late) {
        before.extend(admitted(&mut world));
    }
    assert!(before.len() <= 2, "{} of the flood went before", before.len() - 1);
}

/// A flood of more than anybody's patience, and then another tenant's request.
pub(super) fn a_flood_before_another() {
    let mut world = World::new(limits(64, 64, 2), 100);
    for _ in 0..1200 {
        ask(&mut world, 10, 20, 1, Class::Interactive);
    }
    let begun = world.now;
    while world.now - begun < 2 * patience(Class::Interactive).expect("not a shadow") {
        world.step();
    }
    assert!(world.scheduler.waiting() > 500, "the flood is over");
    let late = ask(&mut world, 10, 10, 2, Class::Interactive);
    let mut before = Vec::new();
    while !before.contains(&late) {
        before.extend(admitted(&mut world));
        assert!(before.len() <= 2, "the flood goes before");
    }
}

#[test]
fn a_flood_longer_than_anybodys_patience_holds_nobody_up() {
    a_flood_before_another();
}

/// Two tenants that always have work get the same within a bound, however their requests differ in size.
pub(super) fn two_backlogged_tenants() {
    let mut world = World::new(limits(64, 64, 4), 30);
    for _ in 0..4000 {
        for (tenant, (prompt, output)) in [(0, (200, 5)), (1, (5, 40))] {
            let mut own = world.alive.values().filter(|truth| truth.ask.tenant == tenant);
            if own.all(|truth| truth.computed.is_some()) {
                ask(&mut world, prompt, output, tenant, Class::Interactive);
            }
        }
        world.step();
        let [a, b] = [0, 1].map(|tenant| world.worked.get(&tenant).copied().unwrap_or(0));
        // One request of each may be ahead for each place there is.
        assert!(a.abs_diff(b) <= 4 * 210 * 2, "{a} and {b}");
    }
    assert!(world.worked[&0] > 10_000);
}

#[test]
fn tenants_are_served_alike() {
    two_backlogged_tenants();
}

#[test]
fn a_shadow_runs_only_when_nobody_else_does_and_makes_way_at_once() {
    // Ten blocks, of which the shadow's prompt takes five.
    let mut world = World::new(limits(160, 160, 4), 10);
    let shadow = ask(&mut world, 150, 20, 0, Class::Shadow);
    assert_eq!(admitted(&mut world), [shadow]);
    // A user whose request fits beside it: the shadow waits, with what it has.
    let user = ask(&mut world, 10, 3, 1, Class::Interactive);
    while world.alive.contains_key(&user) {
        let plan = world.step();
        assert!(plan.preempted.is_empty() && plan.work.iter().all(|work| work.id == user));
    }
    assert!(world.step().work.iter().all(|work| work.id == shadow), "and goes on where it was");
    // Nor does it run while users of another model wait for their turn.
    let plan = world.scheduler.plan(world.now, true, &world.alive);
    assert!(plan.work.is_empty() && plan.preempted.is_empty());
    // One who needs its blocks gets them in the very next step.
    let large = ask(&mut world, 200, 50, 1, Class::Interactive);
    let plan = world.step();
    assert_eq!((plan.preempted, plan.admitted[0].id, plan.work[0].count), (vec![shadow], large, 160));
    // While users are served, no shadow begins.
    while world.alive.contains_key(&large) {
        assert!(!admitted(&mut world).contains(&shadow));
    }
    assert!(admitted(&mut world).contains(&shadow));
    world.drain();
}

/// Endless interactive work from ever new tenants, and still a batch request is served once its patience is over.
#[test]
fn nobody_waits_for_ever() {
    let mut world = World::new(limits(8, 8, 2), 20);
    for class in [Class::Interactive, Class::Batch] {
        let patient = ask(&mut world, 30, 10, 0, class);
        let submitted = world.now;
        let mut tenant = 1;
        loop {
            while world.scheduler.waiting() < 5 {
                ask(&mut world, 20, 10, tenant, Class::Interactive);
                tenant += 1;
            }
            if admitted(&mut world).contains(&patient) {
                break;
            }
            // After its patience only those who waited as long go before it, and each takes a bounded time.
            let bound = patience(class).expect("not a shadow") + Duration::from_secs(10);
            assert!(world.now - submitted < bound, "{class:?}");
        }
    }
}

/// A large request is passed by small ones, but not for ever.
pub(super) fn a_large_one_among_small_ones() {
    let mut world = World::new(limits(64, 64, 16), 10);
    for _ in 0..5 {
        ask(&mut world, 30, 30, 1, Class::Interactive);
    }
    world.step();
    let large = ask(&mut world, 290, 20, 1, Class::Interactive);
    let submitted = world.now;
    let mut passed = 0;
    loop {
        ask(&mut world, 20, 10, 1, Class::Interactive);
        let admitted = admitted(&mut world);
        if admitted.contains(&large) {
            break;
        }
        passed += admitted.len();
        assert!(world.now - submitted < PASSING + Duration::from_secs(1), "passed over by {passed}");
    }
    assert!(passed > 0, "nobody made use of the blocks meanwhile");
}

#[test]
fn a_large_request_gets_its_blocks() {
    a_large_one_among_small_ones();
}

/// The time that a request waited for its turn is no time in which it did not fit.
#[test]
fn a_large_request_that_waited_for_its_turn_still_lets_others_pass_at_first() {
    let mut world = World::new(limits(64, 64, 4), 10);
    ask(&mut world, 30, 200, 1, Class::Interactive);
    for _ in 0..2 {
        ask(&mut world, 30, 270, 1, Class::Interactive);
    }
    world.step();
    let large = ask(&mut world, 250, 20, 1, Class::Batch);
    // Places are short, not blocks: nobody looks whether it fits.
    ask(&mut world, 1, 20, 1, Class::Interactive);
    world.now += PASSING;
    world.step();
    while world.scheduler.running() == 4 {
        world.step();
    }
    let small = ask(&mut world, 10, 10, 1, Class::Batch);
    let admitted = admitted(&mut world);
    assert!(!admitted.contains(&large) && admitted.contains(&small), "{admitted:?}");
}

#[test]
fn a_deadline_in_the_queue_is_kept_to_the_step() {
    let mut world = World::new(limits(64, 64, 1), 100);
    ask(&mut world, 1, 50, 0, Class::Interactive);
    let late = world.submit(&[1], 1, (0, Class::Interactive), Some(Duration::from_millis(18)), 1);
    // A step with one token takes 4.2 ms.
    let expired: Vec<usize> = (1..=10).filter(|_| world.step().expired.contains(&late)).collect();
    assert_eq!(expired, [6]);
}

#[test]
fn forgotten_work_is_done_again_and_idle_tenants_are_forgotten() {
    let mut world = World::new(limits(64, 16, 4), 100);
    ask(&mut world, 40, 5, 7, Class::Interactive);
    for _ in 0..3 {
        world.step();
    }
    world.rewind();
    let Work { first, count, samples, .. } = world.step().work[0];
    assert_eq!((first, count, samples), (0, 16, false));
    world.drain();
    for tenant in 0..10_000 {
        let id = ask(&mut world, 1, 1, tenant, Class::Interactive);
        world.remove(id);
    }
    assert!(world.scheduler.tenants.all().count() <= IDLE_TENANTS_MAX);
}

#[test]
fn a_prompt_that_was_seen_is_found_up_to_its_last_token() {
    let mut world = World::new(limits(500, 500, 4), 100);
    let prompt: Vec<u32> = (0..96).collect();
    let mut cached = |tenant, prompt: &[u32]| {
        world.submit(prompt, 3, (tenant, Class::Interactive), None, 1);
        let plan = world.step();
        world.drain();
        plan.admitted[0].cached
    };
    assert_eq!(cached(1, &prompt), 0);
    assert_eq!(cached(1, &prompt), 64, "the next token is sampled from the last one, so that is computed");
    assert_eq!(cached(1, &[&prompt[..], &[5]].concat()), 96);
    assert_eq!(cached(1, &prompt[..40]), 32);
    assert_eq!(cached(2, &prompt), 0, "another tenant's");
    let counts = world.scheduler.prefix();
    assert_eq!((counts.looked_up_tokens, counts.found_tokens), (96 * 3 + 97 + 40, 64 + 96 + 32));
}

#[test]
fn what_is_scored_takes_nothing_from_the_cache_and_leaves_nothing_there() {
    let mut world = World::new(limits(500, 500, 4), 12);
    let prompt: Vec<u32> = (0..96).collect();
    world.submit(&prompt, 3, (1, Class::Interactive), None, 1);
    world.drain();
    for n in 1..10 {
        let other: Vec<u32> = (1000 * n..1000 * n + 120).collect();
        world.submit_scored(&other, 5, (2, Class::Batch));
        world.submit_scored(&prompt, 40, (1, Class::Batch));
        world.drain();
    }
    world.submit(&prompt, 3, (1, Class::Interactive), None, 1);
    assert_eq!(world.step().admitted[0].cached, 64, "nobody's prompt was lost for it");
    world.drain();
    assert_eq!((world.cached_tokens, world.scheduler.prefix().evicted_blocks), (64, 0));
}

#[test]
fn rows_are_scored_a_few_in_a_step() {
    let mut world = World::new(limits(500, 500, 4), 100);
    let scored: Vec<u32> = (0..200).collect();
    let first = world.submit_scored(&scored, 101, (1, Class::Batch));
    world.submit_scored(&scored, 1, (2, Class::Batch));
    let plan = world.step();
    assert_eq!(
        plan.work,
        [Work { id: first, first: 0, count: 100 + SCORED_ROWS_MAX, samples: false, rows: SCORED_ROWS_MAX }]
    );
    let mut rows = 0;
    while !world.alive.is_empty() {
        let step: usize = world.step().work.iter().map(|work| work.rows).sum();
        assert!(step <= SCORED_ROWS_MAX);
        rows += step;
    }
    assert_eq!(rows, 100 - SCORED_ROWS_MAX + 200, "every row once");
}

pub(super) fn a_choice_fails_at_its_beginning() {
    for bad in 0..3 {
        let mut world = World::new(limits(200, 200, 8), 100);
        let first = world.submit(&(0..70).collect::<Vec<_>>(), 10, (1, Class::Interactive), None, 3);
        let plan = world.scheduler.plan(world.now, false, &world.alive);
        let sampled: Vec<SequenceId> = (first..first + 3).filter(|id| *id != first + bad).collect();
        world.scheduler.advance(&plan.work[0], &sampled, &world.alive);
        world.scheduler.remove(first + bad);
        let plan = world.scheduler.plan(world.now, false, &world.alive);
        let work: Vec<_> = plan.work.iter().map(|work| (work.id, work.first, work.count)).collect();
        assert_eq!(work, sampled.iter().map(|&id| (id, 70, 1)).collect::<Vec<_>>());
    }
}

#[test]
fn a_choice_that_fails_at_its_beginning_takes_no_other_with_it() {
    a_choice_fails_at_its_beginning();
}

#[test]
fn choices_share_their_prompt_and_no_more() {
    let mut world = World::new(limits(200, 200, 8), 100);
    let first = world.submit(&(0..70).collect::<Vec<_>>(), 10, (1, Class::Interactive), None, 4);
    let plan = world.step();
    assert_eq!(plan.work, [Work { id: first, first: 0, count: 70, samples: true, rows: 1 }], "computed once");
    assert_eq!(world.worked[&1], 70 + 4 * 2, "and paid for once");
    assert_eq!((world.scheduler.running(), world.scheduler.pool().used()), (4, 3));
    let plan = world.step();
    assert_eq!((plan.work.len(), plan.copies.len()), (4, 3), "the last one keeps the block they all began in");
    assert_eq!(world.scheduler.pool().used(), 2 + 4);
    world.drain();
    // Without places for all of them, the others follow.
    let mut world = World::new(limits(200, 200, 2), 100);
    world.submit(&(0..70).collect::<Vec<_>>(), 10, (1, Class::Interactive), None, 4);
    world.step();
    assert_eq!((world.scheduler.running(), world.scheduler.waiting()), (2, 2));
    world.drain();
    // The first is cancelled while it reads: the others go on from there.
    let mut world = World::new(limits(200, 32, 8), 100);
    let first = world.submit(&(0..70).collect::<Vec<_>>(), 10, (1, Class::Interactive), None, 3);
    world.step();
    world.remove(first);
    assert_eq!(world.step().work, [Work { id: first + 1, first: 32, count: 32, samples: false, rows: 0 }]);
    world.drain();
}

#[test]
fn who_gives_up_blocks_is_the_lowest_class_then_the_best_served_tenant_then_the_youngest() {
    for (classes, tenants, pays) in [([0, 1, 0], [1, 1, 1], 1), ([0, 0, 0], [1, 2, 3], 2), ([0, 0, 0], [1, 1, 1], 2)] {
        let mut world = World::new(limits(100, 100, 8), 6);
        let ids = [0, 1, 2].map(|n| ask(&mut world, 30 + usize::from(n == pays), 60, tenants[n], CLASSES[classes[n]]));
        let preempted = (0..100).find_map(|_| world.step().preempted.first().copied());
        assert_eq!(preempted, Some(ids[pays]));
        world.drain();
    }
}

#[test]
fn a_sequence_that_could_never_run_beside_others_runs_alone() {
    let mut world = World::new(limits(100, 100, 8), 10);
    for tenant in 0..6 {
        ask(&mut world, 100, 220, tenant, Class::Interactive);
    }
    world.drain();
    assert!(world.preemptions > 0);
}
