//! `bench engine`: the embedded engine beside llama.cpp, mistral.rs and transformers, on the same weights, cores and
//! threads, in turn.
//!
//! Weights are random in the shapes of two real models (`peers/weights.py`), so what is measured is speed and memory
//! alone. `bench engine speed` and its like run one part.

mod clients;
mod llama;
mod models;
mod ours;

use std::path::Path;
use std::process::Command;

use serde_json::{Map, Value, json};

use super::report::{Rounds, Spread, publish};
use llama::Llama;
use models::{File, Model};
use ours::Engine;

const ROUNDS: usize = 3;
const PROMPT_TOKENS: u32 = 512;
const DEPTH: u32 = 128;
const DECODED: u32 = 64;
/// Bytes for keys and values: more than any part needs.
const POOL: usize = 256 << 20;
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

/// The parts, each of one file of one model.
type Part = fn(&Path, &Model, &File, &Llama) -> Vec<Row>;
const PARTS: [(&str, Part); 4] = [("speed", speed), ("memory", memory), ("prefix", prefix), ("clients", clients)];

pub fn run(root: &Path, part: Option<&str>) {
    // The one part that is a process of its own: nothing was in its memory before.
    if let (Some("resident"), Some(file)) = (part, std::env::args().nth(3)) {
        return println!("{}", Engine::start(file.as_ref(), POOL).resident());
    }
    let parts: Vec<_> = PARTS.into_iter().filter(|(name, _)| part.is_none_or(|part| part == *name)).collect();
    if parts.is_empty() {
        return println!("the parts of the section `engine` are: {}", PARTS.map(|(name, _)| name).join(", "));
    }
    let Some(llama) = Llama::find() else {
        return println!("the section `engine` needs llama.cpp, which `tools/setup.sh bench` builds");
    };
    let models = models::prepare(root);
    for (name, part) in parts {
        measure(root, name, part, &models, &llama);
    }
}

/// One part of every file; a part alone does not take the others' place.
fn measure(root: &Path, part: &str, rows_of: Part, models: &[Model], llama: &Llama) {
    let mut rows = Vec::new();
    for (model, file) in models.iter().flat_map(|model| model.files.iter().map(move |file| (model, file))) {
        for Row(figure, spread, target) in rows_of(root, model, file, llama) {
            let name = format!("{} {}: {figure}", model.name, file.kind);
            println!("{name}: {:.2} [{:.2} … {:.2}]", spread[0], spread[1], spread[2]);
            rows.push(Row(name, spread, target));
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
    publish(root, &format!("engine-{part}.json"), &table, facts);
}

/// Rounds but for the first, which warms caches and clocks.
fn rounds(mut round: impl FnMut() -> Value) -> Rounds {
    round();
    Rounds((0..ROUNDS).map(|_| round()).collect())
}

/// Decode and prefill of one sequence, in tokens a second.
fn speed(_: &Path, _: &Model, file: &File, llama: &Llama) -> Vec<Row> {
    let engine = Engine::start(&file.path, POOL);
    let rounds = rounds(|| {
        let (prefill, decode) = (engine.prefill(PROMPT_TOKENS), engine.decode(DEPTH, DECODED));
        let (llama_prefill, llama_decode) = llama.speed(&file.path, PROMPT_TOKENS, DEPTH, DECODED);
        json!({"prefill": prefill, "decode": decode, "llama_prefill": llama_prefill, "llama_decode": llama_decode,
               "gigabytes": decode * engine.weight_bytes() / 1e9, "bandwidth": ours::read_bandwidth()})
    });
    vec![
        Row("decode / llama.cpp".into(), rounds.over("decode", "llama_decode"), Some(Target::AtLeast(1.0))),
        Row("prefill / llama.cpp".into(), rounds.over("prefill", "llama_prefill"), Some(Target::AtLeast(0.8))),
        Row("share of read bandwidth".into(), rounds.over("gigabytes", "bandwidth"), Some(Target::AtLeast(0.85))),
        Row("decode, tokens/s".into(), rounds.of("decode"), None),
        Row("prefill, tokens/s".into(), rounds.of("prefill"), None),
        Row("read bandwidth, GB/s".into(), rounds.of("bandwidth"), None),
    ]
}

/// Time to the first token of a prompt that was there before.
fn prefix(_: &Path, _: &Model, file: &File, _: &Llama) -> Vec<Row> {
    let engine = Engine::start(&file.path, POOL);
    let rounds = rounds(|| {
        let (cold, warm) = engine.again(PREFIX_TOKENS);
        json!({"cold": cold, "warm": warm})
    });
    vec![
        Row("first token, warm / cold prefix".into(), rounds.over("warm", "cold"), None),
        Row("first token, warm prefix, seconds".into(), rounds.of("warm"), None),
    ]
}

/// Eight clients of mixed lengths, and what the engine does beside the forward. Of the smaller model alone: the larger one
/// keeps the slowest of the peers busy for half an hour.
fn clients(root: &Path, model: &Model, file: &File, llama: &Llama) -> Vec<Row> {
    if !model.is_small {
        return Vec::new();
    }
    let engine = Engine::start(&file.path, POOL);
    let mut rows = vec![];
    let server = llama.serve(&file.path, clients::CLIENTS, 512);
    let reached = rounds(|| {
        let overhead = |temperature| {
            let before = engine.last_step();
            (clients::ours(&engine, temperature), engine.overhead_percent(before))
        };
        let ((ours, overhead_percent), (_, drawn_percent)) = (overhead(0.0), overhead(1.0));
        let llama = clients::llama(&server);
        json!({"ours": ours, "overhead_percent": overhead_percent, "drawn_percent": drawn_percent, "llama": llama})
    });
    drop(server);
    rows.push(Row("8 clients / llama-server".into(), reached.over("ours", "llama"), Some(Target::AtLeast(1.5))));
    rows.push(Row("8 clients, tokens/s".into(), reached.of("ours"), None));
    rows.push(Row("outside the forward, %".into(), reached.of("overhead_percent"), Some(Target::AtMost(3.0))));
    rows.push(Row("… at temperature 1, %".into(), reached.of("drawn_percent"), Some(Target::AtMost(3.0))));
    // These two read the folder that the file was made from.
    if file.is_original {
        let mut mistral = clients::Mistral::start(root, &model.folder);
        let reached = rounds(|| json!({"ours": clients::ours(&engine, 0.0), "mistral": mistral.tokens_per_s()}));
        drop(mistral);
        rows.push(Row("8 clients / mistral.rs".into(), reached.over("ours", "mistral"), Some(Target::AtLeast(2.0))));

        let mut transformers = clients::Transformers::start(root, &model.folder);
        let reached = rounds(|| {
            json!({"ours": clients::ours(&engine, 0.0), "transformers": transformers.tokens_per_s(clients::CLIENTS),
                   "alone": engine.answers_per_s(DEPTH, DECODED) * f64::from(DECODED), "transformers_alone": transformers.tokens_per_s(1)})
        });
        let alone = reached.over("alone", "transformers_alone");
        let together = reached.over("ours", "transformers");
        rows.push(Row("1 client / transformers".into(), alone, Some(Target::AtLeast(2.0))));
        rows.push(Row("8 clients / transformers in a batch".into(), together, Some(Target::AtLeast(2.0))));
    }
    rows
}

/// What a process takes for the model once its KV pool was filled. The same each time: once will do.
fn memory(_: &Path, _: &Model, file: &File, _: &Llama) -> Vec<Row> {
    let output = Command::new(std::env::current_exe().unwrap()).args(["engine", "resident"]).arg(&file.path).output();
    let ratio: f64 = String::from_utf8(output.unwrap().stdout).unwrap().trim().parse().unwrap();
    vec![Row("resident / (weights + KV)".into(), [ratio; 3], Some(Target::AtMost(1.15)))]
}
