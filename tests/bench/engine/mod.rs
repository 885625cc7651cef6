//! `bench engine`: the embedded engine beside llama.cpp, on the same weights, cores and threads, in turn.
//!
//! Weights are random in the shapes of two real models (`peers/weights.py`), so what is measured is speed and memory
//! alone. `bench engine speed` and its like run one part.

mod clients;
mod llama;
mod models;
mod ours;

use std::path::Path;

use serde_json::{Map, Value, json};

use super::report::{Rounds, Spread, publish};
use llama::Llama;
use ours::Engine;

const ROUNDS: usize = 3;
const PROMPT_TOKENS: u32 = 512;
const DEPTH: u32 = 128;
const DECODED: u32 = 64;
/// A prompt that many requests begin with.
const PREFIX_TOKENS: u32 = 1000;

/// A figure, what it is to reach, and whether more is better.
struct Row(String, Spread, Option<Target>);

#[derive(Clone, Copy)]
enum Target {
    AtLeast(f64),
    AtMost(f64),
}

impl Target {
    fn is_met(self, value: f64) -> bool {
        match self {
            Target::AtLeast(least) => value >= least,
            Target::AtMost(most) => value <= most,
        }
    }

    fn said(self) -> String {
        match self {
            Target::AtLeast(least) => format!(">= {least}"),
            Target::AtMost(most) => format!("<= {most}"),
        }
    }
}

pub fn run(root: &Path, part: Option<&str>) {
    let is_asked = |name: &str| part.is_none_or(|part| part == name);
    let models = models::prepare(root);
    let peer = Llama::find();
    if peer.is_none() {
        println!("llama.cpp is missing (`tools/setup.sh bench` builds it): its figures are left out");
    }
    let mut rows = Vec::new();
    for model in &models {
        for file in &model.files {
            let engine = Engine::start(&file.path);
            let name = format!("{} {}", model.name, file.kind);
            if is_asked("speed") {
                speed(&name, &engine, peer.as_ref(), &file.path, &mut rows);
            }
            if is_asked("prefix") {
                prefix(&name, &engine, &mut rows);
            }
            if is_asked("clients") {
                let reached = clients::run(&engine, peer.as_ref(), &file.path, ROUNDS);
                let overhead = reached.of("overhead_percent");
                if peer.is_some() {
                    let ratio = reached.over("ours", "llama");
                    rows.push(Row(format!("{name}: 8 clients, / llama-server"), ratio, Some(Target::AtLeast(1.5))));
                }
                rows.push(Row(format!("{name}: 8 clients, tokens/s"), reached.of("ours"), None));
                rows.push(Row(format!("{name}: outside the forward, %"), overhead, Some(Target::AtMost(3.0))));
            }
            if is_asked("memory") {
                let ratio = engine.resident_bytes() / engine.accounted_bytes();
                rows.push(Row(format!("{name}: resident / accounted"), [ratio; 3], Some(Target::AtMost(1.15))));
            }
        }
    }
    let mut targets = Map::new();
    for Row(name, [median, ..], target) in &rows {
        let Some(target) = target else { continue };
        let verdict = if target.is_met(*median) { "met" } else { "MISSED" };
        println!("{verdict:6} {name}: {median:.2} ({})", target.said());
        targets.insert(name.clone(), json!({"target": target.said(), "met": target.is_met(*median)}));
    }
    let table: Vec<_> = rows.into_iter().map(|Row(name, spread, _)| (name, spread)).collect();
    let facts = json!({"rounds": ROUNDS, "threads": ours::threads(), "targets": Value::Object(targets)});
    // A part alone must not take the others' place.
    let file = part.map_or("engine.json".to_owned(), |part| format!("engine-{part}.json"));
    publish(root, &file, &table, facts);
}

/// Decode and prefill of one sequence, in tokens a second.
fn speed(name: &str, engine: &Engine, peer: Option<&Llama>, file: &Path, rows: &mut Vec<Row>) {
    let mut rounds = Rounds::default();
    for round in 0..=ROUNDS {
        let (prefill, decode) = (engine.prefill(PROMPT_TOKENS), engine.decode(DEPTH, DECODED));
        let mut measured = json!({"prefill": prefill, "decode": decode});
        measured["gigabytes"] = (decode * engine.weight_bytes() / 1e9).into();
        measured["bandwidth"] = ours::read_bandwidth().into();
        if let Some(peer) = peer {
            let (prefill, decode) = peer.speed(file, PROMPT_TOKENS, DEPTH, DECODED);
            measured["llama_prefill"] = prefill.into();
            measured["llama_decode"] = decode.into();
        }
        // The first round warms caches and clocks.
        if round > 0 {
            rounds.0.push(measured);
        }
    }
    if peer.is_some() {
        let decode = rounds.over("decode", "llama_decode");
        let prefill = rounds.over("prefill", "llama_prefill");
        rows.push(Row(format!("{name}: decode, / llama.cpp"), decode, Some(Target::AtLeast(1.0))));
        rows.push(Row(format!("{name}: prefill, / llama.cpp"), prefill, Some(Target::AtLeast(0.8))));
    }
    let share = rounds.over("gigabytes", "bandwidth");
    rows.push(Row(format!("{name}: share of read bandwidth"), share, Some(Target::AtLeast(0.85))));
    rows.push(Row(format!("{name}: decode, tokens/s"), rounds.of("decode"), None));
    rows.push(Row(format!("{name}: prefill, tokens/s"), rounds.of("prefill"), None));
}

/// Time to the first token of a prompt that was there before.
fn prefix(name: &str, engine: &Engine, rows: &mut Vec<Row>) {
    let mut rounds = Rounds::default();
    for _ in 0..ROUNDS {
        let (cold, warm) = engine.again(PREFIX_TOKENS);
        rounds.0.push(json!({"cold": cold, "warm": warm}));
    }
    rows.push(Row(format!("{name}: first token, warm / cold prefix"), rounds.over("warm", "cold"), None));
}
