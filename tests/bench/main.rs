//! `make bench`: what the gateway costs and what batching gains, as ratios of figures taken in turn in one run.
//!
//! Absolute figures depend on the machine and its mood; each ratio is formed within a round, and median, minimum and
//! maximum over the rounds are printed and written to `tests/bench/results/`. An argument (`embeddings`, `engine`, `ledger`,
//! `serving`, `callers`, `governed`, `upstream`) runs that section alone, and one after `engine` (`speed`, `memory`, `prefix`,
//! `clients`) that part of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a benchmark that cannot go on should stop")]

mod callers;
mod embeddings;
mod engine;
mod governed;
mod known_key;
mod latency;
mod ledger;
mod load;
mod origin;
#[path = "../support/postgres.rs"]
#[allow(dead_code, reason = "tests do more to it")]
mod postgres;
mod process;
mod python;
mod report;
#[path = "../support/server.rs"]
#[allow(dead_code, reason = "tests do more to it")]
mod server;
mod serving;
mod subject;
mod ungoverned;
mod upstream;

use std::path::Path;
use std::time::Duration;

/// As the gateway's own: some of this runs as a gateway.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Whatever hangs, it ends.
const PATIENCE: Duration = Duration::from_secs(2 * 3600);
const SECTIONS: [&str; 7] = ["embeddings", "engine", "ledger", "serving", "callers", "governed", "upstream"];

fn main() {
    // What it measures and what is no program of its own.
    match std::env::args().nth(1).as_deref() {
        Some("ungoverned") => ungoverned::serve(),
        Some("known-key") => known_key::run(),
        _ => measure(),
    }
}

fn measure() {
    std::thread::spawn(|| {
        std::thread::sleep(PATIENCE);
        eprintln!("the benchmark did not end within {PATIENCE:?}");
        std::process::exit(1);
    });
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let part = std::env::args().nth(1);
    if let Some(part) = part.as_deref().filter(|part| !SECTIONS.contains(part)) {
        return println!("there is no section `{part}`: {}", SECTIONS.join(", "));
    }
    let is_asked = |name: &str| part.as_deref().is_none_or(|part| part == name);
    if is_asked("embeddings") {
        embeddings::run(root);
    }
    if is_asked("engine") {
        engine::run(root, std::env::args().nth(2).as_deref());
    }
    if is_asked("ledger") {
        ledger::run(root);
    }
    if is_asked("serving") {
        serving::run(root);
    }
    // Last: they pin this process.
    if is_asked("callers") {
        callers::run(root);
    }
    if is_asked("governed") {
        governed::run(root);
    }
    if is_asked("upstream") {
        upstream::run(root);
    }
}
