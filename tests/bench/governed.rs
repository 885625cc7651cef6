//! What governing costs: a key, four limits and a budget reserved and settled, and a durable row, beside the same gateway
//! that keeps no count and writes no row (`ungoverned.rs`).

use std::path::Path;

use serde_json::{Map, Value, json};

use super::origin;
use super::report::{Rounds, Spread, publish};
use super::subject::{Load, PACED, Subject, WHOLE, cpu, measure, pin, raise_files, rate, undisturbed};

const ROUNDS: usize = 7;
/// `power`: each row is synced before its answer says what was used.
const KINDS: [&str; 3] = ["ungoverned", "governed", "power"];
const LOADS: [Load; 2] = [WHOLE, PACED];

pub fn run(root: &Path) {
    raise_files();
    pin(1);
    let executor = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let origin = origin::start();
    let subjects: Vec<Subject> = KINDS.iter().map(|kind| Subject::start(kind, origin)).collect();
    let round_of = |round: &mut Map<String, Value>| measure(&subjects, &LOADS, &executor, round);
    let (rounds, machine) = undisturbed(&subjects, ROUNDS, round_of);
    let facts = json!({
        "machine": machine,
        "governed": "four limits by key and a budget by tenant; each row is written before its answer ends",
        "power": "the same, and each row is synced",
        "ungoverned": "tests/bench/ungoverned.rs: the key is looked up, nothing is counted, no row is written",
    });
    publish(root, "governed.json", &table(&rounds), facts);
}

fn table(rounds: &Rounds) -> Vec<(String, Spread)> {
    let mut table = Vec::new();
    for (name, ..) in LOADS {
        for kind in ["governed", "power"] {
            let over = rounds.over(&cpu(kind, name), &cpu("ungoverned", name));
            table.push((format!("{kind} / ungoverned, CPU per {name}"), over));
        }
        for kind in KINDS {
            table.push((format!("{kind}: CPU µs per {name}"), rounds.of(&cpu(kind, name))));
            table.push((format!("{kind}: answers a second, {name}"), rounds.of(&rate(kind, name))));
        }
    }
    table
}
