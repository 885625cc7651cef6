//! Conservation: after mixed traffic every witness tells the same story, and each leg of that check can fail.

mod faults;
mod traffic;
mod world;

use std::collections::BTreeMap;

use self::faults::FAULTS;
use self::traffic::{DECK, traffic};
use crate::support::evidence::Seen;

/// Prints how often each thing was there.
fn tell(what: &str, names: impl Iterator<Item = String>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    names.for_each(|name| *counts.entry(name).or_default() += 1);
    let list: Vec<String> = counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
    println!("{what}: {}", list.join(", "));
    counts
}

#[test]
fn every_witness_tells_the_same_story_and_each_leg_of_the_oracle_can_fail() {
    let evidence = traffic();
    let disagreements = evidence.disagreements();
    let first = disagreements.iter().take(40).cloned().collect::<Vec<_>>().join("\n");
    assert!(disagreements.is_empty(), "{} disagreements:\n{first}", disagreements.len());

    println!("{} requests, {} rows, {} spans", evidence.seen.len(), evidence.rows.len(), evidence.spans.len());
    assert!(evidence.seen.len() >= 2000);
    let kinds = tell("sent", evidence.seen.iter().map(|seen| seen.kind.to_owned()));
    assert!(DECK.iter().all(|(kind, _)| kinds.get(*kind).is_some_and(|count| *count >= 8)), "a kind is missing");
    let rows = || evidence.rows.iter();
    let outcomes = tell("rows", rows().map(|row| format!("{} {}", row.role, row.outcome)));
    let caches = tell("cache", rows().filter(|row| row.is_terminal()).map(|row| row.cache.clone()));
    let sources = tell("usage", rows().map(|row| format!("{} {}", row.provider, row.usage_source)));
    let calls = tell("calls", evidence.calls.iter().map(|call| call.server.to_owned()));
    let refusals = tell("refused", evidence.seen.iter().filter_map(|seen| seen.error_code.clone()));
    let left = tell("left", rows().filter(|row| row.outcome == "aborted").map(|row| row.provider.clone()));
    let variants = tell("variants", rows().map(|row| row.variant.clone()));
    // The traffic must be mixed to prove anything.
    for (counts, name, least) in [
        (&outcomes, "primary answered", 800),
        (&outcomes, "primary aborted", 80),
        (&outcomes, "primary failed", 60),
        (&outcomes, "primary failed_over", 100),
        (&outcomes, "primary released", 1),
        (&outcomes, "retry answered", 20),
        (&outcomes, "fallback failed_over", 20),
        (&outcomes, "fallback answered", 60),
        (&outcomes, "shadow answered", 60),
        (&outcomes, "shadow failed", 5),
        (&caches, "hit", 60),
        (&caches, "coalesced", 40),
        (&caches, "miss", 40),
        (&sources, "glassgate counted", 600),
        (&sources, "mock reported", 200),
        (&sources, "mock estimated", 30),
        (&calls, "mock", 400),
        (&calls, "spare", 60),
        (&calls, "mirror", 40),
        (&left, "glassgate", 60),
        (&left, "mock", 10),
        (&variants, "glimmer-1", 400),
        (&variants, "glimmer-2", 50),
        (&refusals, "invalid_api_key", 5),
        (&refusals, "missing_api_key", 5),
        (&refusals, "unknown_path", 5),
        (&refusals, "method_not_allowed", 5),
        (&refusals, "unsupported_media_type", 5),
        (&refusals, "invalid_parameter", 10),
        (&refusals, "invalid_json", 5),
        (&refusals, "model_not_found", 5),
        (&refusals, "context_length_exceeded", 5),
        (&refusals, "rate_limit_exceeded", 5),
        (&refusals, "tokens_limited", 5),
        (&refusals, "concurrency_limited", 5),
        (&refusals, "insufficient_quota", 5),
    ] {
        let count = counts.get(name).copied().unwrap_or(0);
        assert!(count >= least, "{name}: {count} are too few");
    }

    let is_stale = |seen: &&Seen| seen.kind == "stale";
    assert!(evidence.seen.iter().filter(is_stale).all(|seen| seen.status == 200), "a closed connection was noticed");

    for (number, (leg, damage)) in FAULTS.iter().enumerate() {
        let mut damaged = evidence.clone();
        damage(&mut damaged);
        let found = damaged.disagreements();
        assert!(
            found.iter().any(|line| line.starts_with(leg)),
            "fault {number} was not noticed by the leg `{leg}`: {found:?}"
        );
    }
}
