//! A hop to a remote server: the gateway beside pingora with nothing on top and beside nginx, in front of one origin that
//! answers at once.
//!
//! What is measured has a core to itself (`subject.rs`).

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::load::{self, Client};
use super::origin::{self, EVENTS, Manner};
use super::process;
use super::report::{Rounds, Spread, publish, said};
use super::subject::{
    KEPT, Load, PACED, Subject, WHOLE, busy, cpu, measure, pin, raise_files, rate, reads, undisturbed,
};

const ROUNDS: usize = 7;
const LOADS: [Load; 4] = [
    WHOLE,
    ("request, 1 client", Manner::Whole, 1, 3_000, 1),
    PACED,
    ("event at once, 32 clients", Manner::Burst, 32, 1_600, EVENTS),
];

const IDLE_STREAMS: usize = 2_000;
const IDLE_ROUNDS: usize = 3;
/// Allocators give back what was only passed through.
const IDLE_SETTLE: Duration = Duration::from_secs(12);

/// The gateway as it is compared; `full` is what it costs to watch everything.
const KINDS: [&str; 5] = ["nginx", "bare", "smg", "gateway", "full"];
/// Those whose memory is looked at.
const LEAN: [&str; 4] = ["nginx", "bare", "smg", "gateway"];

/// Requests to the route that has a cache: all the same, or each like no other.
const CACHED: [(&str, bool); 2] = [("hit, 32 clients", false), ("miss, 32 clients", true)];
const CACHED_CLIENTS: usize = 32;
const CACHED_ANSWERS: usize = 16_000;

pub fn run(root: &Path) {
    raise_files();
    pin(1);
    let executor = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let origin = origin::start();

    let subjects: Vec<Subject> = KINDS.iter().map(|kind| Subject::start(kind, origin)).collect();
    let round_of = |round: &mut Map<String, Value>| {
        measure(&subjects, &LOADS, &executor, round);
        for subject in subjects.iter().filter(|subject| subject.kind == "gateway") {
            for (name, is_numbered) in CACHED {
                let request = load::to(KEPT, false, is_numbered, &subject.key);
                let before = origin::answered();
                subject.measure(&executor, (name, request, CACHED_CLIENTS, CACHED_ANSWERS, 1), round);
                let asked = origin::answered() - before;
                let is_what_it_says = if is_numbered { asked == CACHED_ANSWERS } else { asked <= 1 };
                assert!(is_what_it_says, "{name}: the origin was asked {asked} times");
            }
        }
    };
    let (rounds, machine) = undisturbed(&subjects, ROUNDS, round_of);
    drop(subjects);

    let mut table: Vec<(String, Spread)> = Vec::new();
    for (name, ..) in LOADS {
        for (a, b) in
            [("gateway", "bare"), ("gateway", "nginx"), ("bare", "nginx"), ("gateway", "smg"), ("full", "gateway")]
        {
            table.push((format!("{a} / {b}, CPU per {name}"), rounds.over(&cpu(a, name), &cpu(b, name))));
        }
    }
    for (name, ..) in LOADS {
        for kind in KINDS {
            table.push((format!("{kind}: CPU µs per {name}"), rounds.of(&cpu(kind, name))));
        }
    }
    for (name, _, _, _, events) in LOADS {
        for kind in KINDS {
            if events > 1 {
                table.push((format!("{kind}: reads per {name}"), rounds.of(&reads(kind, name))));
            } else {
                table.push((format!("{kind}: share of its core, {name}"), rounds.of(&busy(kind, name))));
            }
        }
    }
    let [(hit, _), (miss, _)] = CACHED;
    let figures = [("answers a second", rate as fn(&str, &str) -> String), ("CPU", cpu)];
    for (what, figure) in figures {
        table.push((
            format!("gateway: hit / miss, {what}"),
            rounds.over(&figure("gateway", hit), &figure("gateway", miss)),
        ));
    }
    for (name, _) in CACHED {
        table.push((format!("gateway: CPU µs per {name}"), rounds.of(&cpu("gateway", name))));
        table.push((format!("gateway: answers a second, {name}"), rounds.of(&rate("gateway", name))));
        table.push((format!("gateway: share of its core, {name}"), rounds.of(&busy("gateway", name))));
    }
    idle_memory(&executor, origin, &mut table);
    let facts = json!({
        "machine": machine,
        "events_per_answer": EVENTS,
        "idle_streams": IDLE_STREAMS,
        "gateway": "key, limits, budget, ledger, metrics, 1 % of traces to a file, access log off",
        "full": "the same with every trace and the access log, to files",
        "bare": "tests/bench/bare.rs",
        "nginx": nginx_version(),
        "smg": said(process::peer("smg").to_str().unwrap(), &["--version"]),
    });
    publish(root, "upstream.json", &table, facts);
}

/// What each stream costs in memory while nothing happens on it. Each time in a process of its own, because allocators
/// remember.
fn idle_memory(executor: &tokio::runtime::Runtime, origin: SocketAddr, table: &mut Vec<(String, Spread)>) {
    let mut rounds = Rounds::default();
    for _ in 0..IDLE_ROUNDS {
        let mut round = Map::new();
        for kind in LEAN {
            let subject = Subject::start(kind, origin);
            let request = load::request(Manner::Idle, &subject.key);
            let warm = Arc::new(load::request(Manner::Burst, &subject.key));
            executor.block_on(load::ask(subject.process.address, &warm, 8, 64));
            std::thread::sleep(IDLE_SETTLE);
            let (resident, share) = subject.process.memory();
            let streams = executor.block_on(async {
                let mut streams = Vec::new();
                for _ in 0..IDLE_STREAMS {
                    let mut stream = Client::connect(subject.process.address).await;
                    stream.begin(&request).await;
                    streams.push(stream);
                }
                tokio::time::sleep(IDLE_SETTLE).await;
                streams
            });
            let (resident_then, share_then) = subject.process.memory();
            drop(streams);
            let each = |before: f64, then: f64| json!((then - before) / IDLE_STREAMS as f64);
            round.insert(format!("{kind} rss"), each(resident, resident_then));
            round.insert(format!("{kind} pss"), each(share, share_then));
        }
        rounds.0.push(Value::Object(round));
    }
    for (a, b) in [("gateway", "bare"), ("gateway", "nginx"), ("bare", "nginx"), ("gateway", "smg")] {
        let name = format!("{a} / {b}, resident per idle stream");
        table.push((name, rounds.over(&format!("{a} rss"), &format!("{b} rss"))));
    }
    for kind in LEAN {
        table.push((format!("{kind}: resident KiB per idle stream"), rounds.of(&format!("{kind} rss"))));
        table.push((format!("{kind}: PSS KiB per idle stream"), rounds.of(&format!("{kind} pss"))));
    }
}

fn nginx_version() -> String {
    // It says so on stderr.
    let output = Command::new("nginx").env("PATH", process::path()).arg("-v").output().unwrap();
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}
