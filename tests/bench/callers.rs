//! What callers cost: instructions to know a key among few and among many, and memory for keys that there are not.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::load::{self, NUMBER};
use super::origin::{self, Manner};
use super::process::ourselves;
use super::report::{Rounds, publish, said};
use super::subject::{Subject, pin, raise_files};

const ROUNDS: usize = 3;
const KEYS: [usize; 3] = [10, 1_000, 100_000];
/// So often that what else the process does is nothing beside it.
const ASKED: usize = 100_000;

const CLIENTS: usize = 32;
/// What allocators and tables take at first.
const TRIED_BEFORE: usize = 20_000;
const TRIED: usize = 1_000_000;

pub fn run(root: &Path) {
    // Memory, so that 100,000 keys need no 100,000 syncs.
    let place = Path::new("/dev/shm");
    let place = if place.is_dir() { place.to_owned() } else { std::env::temp_dir() };
    let folders = KEYS.map(|count| {
        let folder = tempfile::tempdir_in(&place).unwrap();
        known_key(&mut Command::new(ourselves()), folder.path(), "make", count);
        folder
    });
    let mut rounds = Rounds::default();
    for _ in 0..ROUNDS {
        let mut round = Map::new();
        for (count, folder) in KEYS.iter().zip(&folders) {
            let each = (instructions(folder.path(), ASKED) - instructions(folder.path(), 0)) / ASKED as f64;
            round.insert(count.to_string(), json!(each));
        }
        round.insert("tried".to_owned(), json!(tried()));
        rounds.0.push(Value::Object(round));
    }
    let [few, some, many] = KEYS.map(|count| count.to_string());
    let table = [
        (format!("instructions to know a key: {some} keys / {few}"), rounds.over(&some, &few)),
        (format!("instructions to know a key: {many} keys / {few}"), rounds.over(&many, &few)),
        (format!("instructions to know a key among {few}"), rounds.of(&few)),
        (format!("instructions to know a key among {many}"), rounds.of(&many)),
        (format!("resident after {TRIED} unknown keys / after {TRIED_BEFORE}"), rounds.of("tried")),
    ];
    let facts = json!({
        "instructions": "cachegrind's, of a whole process less those of one that asks nothing",
        "valgrind": said("valgrind", &["--version"]),
    });
    publish(root, "callers.json", &table, facts);
}

fn known_key(command: &mut Command, folder: &Path, what: &str, count: usize) -> String {
    let output = command.arg("known-key").arg(folder).arg(what).arg(count.to_string()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    said
}

fn instructions(folder: &Path, asked: usize) -> f64 {
    let mut command = Command::new("valgrind");
    command.args(["--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]);
    let said = known_key(command.arg(ourselves()), folder, "ask", asked);
    let line = said.lines().find(|line| line.contains("I refs") || line.contains("I   refs"));
    let line = line.unwrap_or_else(|| panic!("cachegrind counts nothing: {said}"));
    line.rsplit(' ').next().unwrap().replace(',', "").parse().unwrap()
}

/// Resident memory after many keys that nobody has, over that after a few.
fn tried() -> f64 {
    raise_files();
    pin(1);
    let executor = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let subject = Subject::start("guessed", origin::start());
    let key = format!("gg-abcd{NUMBER}-{}", "a".repeat(40));
    let request = Arc::new(load::request(Manner::Whole, &key).unknown());
    let ask = |count| executor.block_on(load::ask(subject.process.address, &request, CLIENTS, count));
    ask(TRIED_BEFORE);
    let before = subject.process.resident_mib();
    ask(TRIED);
    subject.process.resident_mib() / before
}
