//! Rules beside the limits of every key: who shares them, what they forgive, and a race for one of them.

use jiff::tz::TimeZone;

use super::*;
use crate::api::limit::{Dimension, Only, Per};

fn rule(name: &str, of: Of, per: Option<Per>, limit: u64, by: &[Dimension]) -> Rule {
    let plain = Defaults::default().per_day().as_ref().clone();
    Rule { name: name.to_owned(), limit, of, per, by: by.to_vec(), ..plain }
}

#[test]
fn a_rule_is_shared_by_those_it_names_and_by_nobody_else() {
    let minute = Some(Per::Minute);
    let rules = [
        rule("tenants", Of::Tokens, minute, 100, &[Dimension::Tenant]),
        rule("models", Of::Requests, minute, 3, &[Dimension::Key, Dimension::Model]),
        Rule {
            only: vec![(Only::By(Dimension::Route), "other".into())],
            ..rule("others", Of::Requests, minute, 1, &[])
        },
        rule("answers", Of::OutputTokens, minute, 90, &[]),
        rule("prompts", Of::InputTokens, minute, 1, &[]),
    ];
    let world = World::new(LIMITS, &rules, &[]);
    let bob = Caller::for_tests("bob", OwnLimits::default());
    let (mut alices, mut bobs) = (world.knock(&alice()).unwrap(), world.knock(&bob).unwrap());
    // Nothing is read of a prompt, so `prompts` lets all in; all is written of an answer.
    assert!(said_no(world.admit(&mut alices, 91).err(), "answers"));
    drop(world.admit(&mut alices, 90).unwrap());
    world.admit(&mut alices, 60).unwrap().start().settle(Outcome::Answered, spent(60), true).unwrap();
    assert_eq!(bobs.quotas().tokens.limit, 100, "the tightest limit is told");
    let refusal = world.admit(&mut bobs, 41).err().unwrap();
    assert_eq!(refusal.reached().unwrap().scope(), "everybody", "of two that have no room, the one that takes longer");
    assert_eq!(figures(world.admit(&mut bobs, 31).err()), ("answers".into(), 90, 60, 0, 31));
    // By key and model: one key's requests leave the other's whole.
    for _ in 0..2 {
        world.admit(&mut alices, 0).unwrap().start().settle(Outcome::Answered, spent(0), true).unwrap();
    }
    assert!(said_no(world.admit(&mut alices, 0).err(), "models"));
    assert!(world.admit(&mut bobs, 1).is_ok());
    let text = world.metrics.encode();
    let denied = |labels: &str| text.contains(&format!("{{decision=\"denied\",{labels}}}"));
    assert!(denied("kind=\"requests\",scope=\"key_model\"") && denied("kind=\"output_tokens\",scope=\"everybody\""));
}

#[test]
fn a_limit_of_requests_at_a_time_by_model_is_free_again_when_one_is_settled() {
    let world = World::new(LIMITS, &[rule("one", Of::Concurrency, None, 1, &[Dimension::Model])], &[]);
    let (mut first, mut second) = (world.knock(&alice()).unwrap(), world.knock(&alice()).unwrap());
    let running = world.admit(&mut first, 1).unwrap().start();
    let refusal = world.admit(&mut second, 1).err().unwrap();
    assert_eq!(refusal.retry_after(), Some(Duration::from_secs(1)));
    assert_eq!(figures(Some(refusal)), ("one".into(), 1, 0, 1, 1));
    running.settle(Outcome::Answered, spent(1), true).unwrap();
    assert!(world.admit(&mut second, 1).is_ok());
}

#[test]
fn a_limit_of_others_decides_nothing() {
    let only = vec![(Only::By(Dimension::Tenant), "other".to_owned())];
    let rules = [
        Rule { only: only.clone(), ..rule("places", Of::Concurrency, None, 1, &[]) },
        Rule { only, ..rule("requests", Of::Requests, Some(Per::Second), 1, &[]) },
    ];
    let world = World::new(LIMITS, &rules, &[]);
    let mut doors = [world.knock(&alice()).unwrap(), world.knock(&alice()).unwrap()];
    for door in &mut doors {
        drop(world.admit(door, 1).unwrap());
    }
    assert!(!world.metrics.encode().contains("scope=\"everybody\""));
}

#[test]
fn what_was_spent_before_the_start_counts_for_every_calendar() {
    let calendar = |name: &str, of, per, limit, by: &[Dimension]| rule(name, of, Some(per), limit, by);
    let rules = [
        calendar("tenant-month", Of::Usd, Per::Month, 700, &[Dimension::Tenant]),
        Rule { zone: TimeZone::get("Asia/Tokyo").unwrap(), ..calendar("tokyo", Of::Usd, Per::Day, 5_000, &[]) },
    ];
    let world = World::new(LIMITS, &rules, &[("alice", 500), ("bob", 100)]);
    let mut door = world.knock(&alice()).unwrap();
    assert_eq!(figures(world.admit(&mut door, 101).err()), ("tenant-month".into(), 700, 600, 0, 101));
    assert!(world.admit(&mut door, 100).is_ok());
}

#[test]
fn a_soft_limit_lets_in_and_tells() {
    let soft = Rule { mode: Mode::Soft, ..rule("soft", Of::Usd, Some(Per::Day), 50, &[Dimension::Tenant]) };
    let world = World::new(LIMITS, &[soft], &[]);
    let mut door = world.knock(&alice()).unwrap();
    let warned = |door: &Door| door.headers().into_iter().find(|(name, _)| *name == "x-glassgate-budget-warning");
    world.admit(&mut door, 40).unwrap().start().settle(Outcome::Answered, spent(40), true).unwrap();
    assert_eq!(warned(&door), None);
    let ticket = world.admit(&mut door, 20).unwrap();
    assert_eq!(warned(&door).unwrap().1, "soft 0.000000060/0.000000050");
    drop(ticket);
    assert!(world.metrics.encode().contains("gateway_budget_exceeded_total{mode=\"soft\",rule=\"soft\"} 1"));
}

#[test]
fn a_strict_budget_reserves_the_bound_and_bills_no_more_than_it() {
    let strict = Rule { strict: true, ..rule("strict", Of::Usd, Some(Per::Day), 300, &[Dimension::Key]) };
    let world = World::new(LIMITS, &[strict], &[]);
    let mut door = world.knock(&alice()).unwrap();
    assert!(door.is_strict());
    let bounded = || {
        let terms = world.terms(20);
        Terms { bound: Some(Most { tokens: 100, cost: NanoUsd(100), ..terms.most }), ..terms }
    };
    let ask = |door: &mut Door| now(world.admission.admit(door, bounded(), Arc::default()));
    let running = ask(&mut door).unwrap().start();
    assert_eq!(running.spent_so_far().usage.output, 20, "the row keeps the estimate");
    // A server that says more than can be true is paid for that by us.
    let receipt = running.settle(Outcome::Answered, spent(250), true).unwrap();
    assert_eq!((receipt.billed, receipt.unbilled, receipt.provider_cost), (NanoUsd(100), NanoUsd(150), NanoUsd(250)));
    assert!(world.metrics.encode().contains("gateway_unbilled_usd_total 0.000000150"));
    let two = [ask(&mut door).unwrap(), ask(&mut door).unwrap()];
    assert_eq!(figures(ask(&mut door).err()), ("strict".into(), 300, 100, 200, 100));
    drop(two);
    assert!(ask(&mut door).is_ok());
}

#[test]
fn a_rule_that_was_edited_counts_on_beside_requests_that_began_before_the_edit() {
    let mut world = World::new(LIMITS, &[rule("edited", Of::Tokens, Some(Per::Minute), 100, &[])], &[]);
    let mut before = world.knock(&alice()).unwrap();
    // By tenant now: that is another count.
    world.rules = vec![Arc::new(rule("edited", Of::Tokens, Some(Per::Minute), 100, &[Dimension::Tenant]))];
    let mut after = world.knock(&alice()).unwrap();
    world.admit(&mut after, 80).unwrap().start().settle(Outcome::Answered, spent(80), true).unwrap();
    world.admit(&mut before, 30).unwrap().start().settle(Outcome::Answered, spent(30), true).unwrap();
    assert_eq!(figures(world.admit(&mut after, 21).err()), ("edited".into(), 100, 80, 0, 21));
    assert_eq!(figures(world.admit(&mut before, 71).err()), ("edited".into(), 100, 30, 0, 71));
}

#[test]
fn a_hundred_thousand_racing_reservations_overshoot_a_strict_budget_by_nothing() {
    const BUDGET: u64 = 1_000_000;
    let time = Arc::new(Time::new(Arc::new(Hands(Mutex::new((20_000 * DAY, Instant::now()))))));
    let local: Local = Local::new(time, Arc::default());
    let by = [Dimension::Tenant];
    let rules = [
        Rule { strict: true, ..rule("month", Of::Usd, Some(Per::Month), BUDGET, &by) },
        rule("day", Of::Usd, Some(Per::Day), BUDGET + 7, &[Dimension::Key]),
        rule("tokens", Of::Tokens, Some(Per::Minute), u64::from(u32::MAX), &[]),
    ];
    let rules = rules.map(Arc::new);
    let asks = |key: u64, amount: u64| -> Vec<Ask> {
        let subjects = Subjects { key: format!("key-{key}"), ..Subjects::default() };
        let ask = |rule: &Arc<Rule>| {
            let bound = Bound { rule: rule.clone(), limit: rule.limit };
            bound.ask(&subjects, amount, Duration::from_secs(1), 20_000 * DAY, 20_000 * DAY)
        };
        rules.iter().map(ask).collect()
    };
    let billed = std::sync::atomic::AtomicU64::new(0);
    let refused = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let (local, asks, billed, refused) = (&local, &asks, &billed, &refused);
            scope.spawn(move || {
                for i in 0..12_500u64 {
                    // Some ask for the rules the other way round: nobody waits for anybody.
                    let mut wanted = asks(i % 5, 1 + (i * 31 + thread) % 90);
                    if i % 2 == 0 {
                        wanted.reverse();
                    }
                    let Ok(grant) = now(local.reserve(&wanted)) else {
                        refused.fetch_add(1, Ordering::Relaxed);
                        continue;
                    };
                    if i % 7 == 0 {
                        continue;
                    }
                    let used = wanted[0].amount * (i % 4) / 3;
                    billed.fetch_add(used, Ordering::Relaxed);
                    grant.settle(&|_| used);
                }
            });
        }
    });
    let (billed, refused) = (billed.into_inner(), refused.into_inner());
    assert!(billed <= BUDGET, "overshot by {}", billed - BUDGET);
    assert!(refused > 1_000 && billed > BUDGET - 90, "this proved nothing: {billed} billed, {refused} refused");
    let state = local.state(&asks(0, 0)[0]);
    assert_eq!((state.used, state.held), (billed, 0));
}
