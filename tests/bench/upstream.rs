//! A hop to a remote server: the gateway beside pingora with nothing on top and beside nginx, in front of one origin that
//! answers at once.
//!
//! What is measured has core 0 to itself; clients and origin share core 1. CPU is user and system time of all threads,
//! until the process is at rest again.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_setaffinity};
use serde_json::{Map, Value, json};

use super::load::{self, Client};
use super::origin::{self, EVENTS, Manner};
use super::process::{self, Process};
use super::report::{Rounds, Spread, publish, said};

/// One for what is measured, one for who measures.
const CORES: usize = 2;
const ROUNDS: usize = 7;
/// A round in which others took more of the machine than this share is measured again …
const DISTURBED: f64 = 0.10;
/// … but not for ever: then it counts, and the results say so.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long the machine is looked at before a round.
const LOOK: Duration = Duration::from_millis(500);

/// What one figure is taken of: its name, how the origin answers, clients, answers, and events of the origin in each.
const LOADS: [(&str, Manner, usize, usize, usize); 4] = [
    ("request, 32 clients", Manner::Whole, 32, 16_000, 1),
    ("request, 1 client", Manner::Whole, 1, 3_000, 1),
    ("event one by one, 32 clients", Manner::Paced, 32, 96, EVENTS),
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

/// Requests to a route of the gateway that has a cache: all the same, or each like no other.
const KEPT: &str = "kept";
const CACHED: [(&str, bool); 2] = [("hit, 32 clients", false), ("miss, 32 clients", true)];
const CACHED_CLIENTS: usize = 32;
const CACHED_ANSWERS: usize = 16_000;

pub fn run(root: &Path) {
    raise_files();
    pin(1);
    let executor = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let origin = origin::start();

    let subjects: Vec<Subject> = KINDS.iter().map(|kind| Subject::start(kind, origin)).collect();
    let (mut rounds, mut others, mut discarded) = (Rounds::default(), Vec::new(), 0);
    let round_of = || {
        let mut round = Map::new();
        let machine = Machine::now(&subjects);
        for load in LOADS {
            for subject in &subjects {
                let (name, manner, clients, answers, events) = load;
                let request = load::request(manner, &subject.key);
                subject.measure(&executor, (name, request, clients, answers, events), &mut round);
            }
        }
        for subject in subjects.iter().filter(|subject| subject.kind == "gateway") {
            for (name, is_numbered) in CACHED {
                let request = load::to(KEPT, false, is_numbered, &subject.key);
                let before = origin::answered();
                subject.measure(&executor, (name, request, CACHED_CLIENTS, CACHED_ANSWERS, 1), &mut round);
                let asked = origin::answered() - before;
                let is_what_it_says = if is_numbered { asked == CACHED_ANSWERS } else { asked <= 1 };
                assert!(is_what_it_says, "{name}: the origin was asked {asked} times");
            }
        }
        (Value::Object(round), machine.others(&subjects))
    };
    // Warms caches and clocks.
    round_of();
    let began = Instant::now();
    while rounds.0.len() < ROUNDS {
        quiet(&subjects, began);
        let (round, share) = round_of();
        if share > DISTURBED && began.elapsed() < PATIENCE {
            discarded += 1;
            println!("a round in which others took {:.0} % of the machine is discarded", share * 100.0);
            continue;
        }
        rounds.0.push(round);
        others.push(share);
    }
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
        "rounds": ROUNDS,
        "rounds_discarded": discarded,
        "share_of_others": others,
        "kernel": said("uname", &["-r"]),
        "load_average": std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
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

/// Waits until others leave the machine alone.
fn quiet(subjects: &[Subject], began: Instant) {
    while began.elapsed() < PATIENCE {
        let machine = Machine::now(subjects);
        std::thread::sleep(LOOK);
        if machine.others(subjects) < DISTURBED {
            return;
        }
    }
}

fn cpu(kind: &str, load: &str) -> String {
    format!("{kind} cpu {load}")
}

fn busy(kind: &str, load: &str) -> String {
    format!("{kind} busy {load}")
}

fn rate(kind: &str, load: &str) -> String {
    format!("{kind} rate {load}")
}

fn reads(kind: &str, load: &str) -> String {
    format!("{kind} reads {load}")
}

/// One of those that are compared.
struct Subject {
    kind: &'static str,
    process: Process,
    key: String,
}

impl Subject {
    fn start(kind: &'static str, origin: SocketAddr) -> Subject {
        // Children inherit it.
        pin(0);
        let (process, key) = match kind {
            "nginx" => (Process::nginx(origin), String::new()),
            "bare" => (Process::bare(origin), String::new()),
            "smg" => (Process::smg(origin, "smg-key"), "smg-key".to_owned()),
            _ => Process::gateway(configured(origin, kind == "full")),
        };
        pin(1);
        Subject { kind, process, key }
    }

    fn measure(
        &self,
        executor: &tokio::runtime::Runtime,
        (name, request, clients, answers, events): (&str, load::Request, usize, usize, usize),
        round: &mut Map<String, Value>,
    ) {
        let request = Arc::new(request);
        let before = self.process.cpu_at_rest();
        let began = Instant::now();
        let seen = executor.block_on(load::ask(self.process.address, &request, clients, answers));
        let (wall, used) = (began.elapsed(), self.process.cpu() - before);
        let in_all = self.process.cpu_at_rest() - before;
        let count = (answers * events) as f64;
        round.insert(cpu(self.kind, name), json!(in_all.as_secs_f64() * 1e6 / count));
        round.insert(rate(self.kind, name), json!(answers as f64 / wall.as_secs_f64()));
        round.insert(busy(self.kind, name), json!(used.as_secs_f64() / wall.as_secs_f64()));
        round.insert(reads(self.kind, name), json!(seen as f64 / count));
    }
}

/// The folder of a gateway in front of the origin, with limits that nobody reaches.
fn configured(origin: SocketAddr, full: bool) -> tempfile::TempDir {
    let (log, sample) = if full { ("stdout", "1.0") } else { ("off", "0.01") };
    let gateway = format!(
        r#"
        routes = "routes.toml"
        prices = "prices.toml"
        [listen]
        connections_max = 9000
        connections_per_ip = 9000
        [storage]
        wal_max = "1GiB"
        [limits]
        requests_per_minute = 1_000_000
        tokens_per_minute = 1_000_000_000
        concurrency = 10_000
        usd_per_day = 1_000_000
        [telemetry]
        access_log = "{log}"
        [[telemetry.traces]]
        kind = "file"
        sample = {sample}
        "#
    );
    let mut routes = format!("[upstreams.origin]\nurl = \"http://{origin}/v1\"\n");
    let mut prices = "version = \"2026-11-01\"\n".to_owned();
    for name in Manner::ALL.map(Manner::model) {
        routes.push_str(&format!(
            "[models.{name}]\nupstream = \"origin\"\n[routes.{name}]\nsplit = {{ {name} = 100 }}\n"
        ));
        routes.push_str("timeouts = { first_token = \"60s\", idle = \"600s\", total = \"900s\" }\n");
        prices.push_str(&format!("[models.{name}]\ninput = 0.25\noutput = 2.0\n"));
    }
    let whole = Manner::Whole.model();
    routes.push_str(&format!("[routes.{KEPT}]\nsplit = {{ {whole} = 100 }}\ncache = {{ ttl = \"1h\" }}\n"));
    let folder = tempfile::tempdir().unwrap();
    let configs = folder.path().join("configs");
    std::fs::create_dir(&configs).unwrap();
    for (name, text) in [("gateway.toml", gateway), ("routes.toml", routes), ("prices.toml", prices)] {
        std::fs::write(configs.join(name), text).unwrap();
    }
    folder
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

/// Whose time the machine spent.
struct Machine {
    began: Instant,
    busy: Duration,
    ours: Duration,
}

impl Machine {
    fn now(subjects: &[Subject]) -> Machine {
        let ours =
            subjects.iter().map(|subject| subject.process.cpu()).sum::<Duration>() + process::cpu(std::process::id());
        Machine { began: Instant::now(), busy: busy_time(), ours }
    }

    /// The share of all cores' time since then that went to others, or was stolen.
    fn others(&self, subjects: &[Subject]) -> f64 {
        let now = Machine::now(subjects);
        let others = (now.busy - self.busy).saturating_sub(now.ours - self.ours);
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).max(CORES);
        others.as_secs_f64() / (now.began - self.began).as_secs_f64() / cores as f64
    }
}

/// Everything but idling and waiting, in the kernel's hundredths of a second.
fn busy_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/stat").unwrap();
    let fields = stat.lines().next().unwrap().split_whitespace().skip(1).map(|field| field.parse::<u64>().unwrap());
    // user, nice, system, idle, iowait, irq, softirq, steal; what follows is counted in these.
    let busy = fields.take(8).enumerate().filter(|(index, _)| !matches!(index, 3 | 4)).map(|(_, ticks)| ticks);
    Duration::from_millis(10 * busy.sum::<u64>())
}

/// This thread, and all threads and processes that it starts from now on.
fn pin(core: usize) {
    let mut cores = CpuSet::new();
    cores.set(core);
    sched_setaffinity(None, &cores).expect("the benchmark needs two cores");
}

/// Two files a stream, here as there.
fn raise_files() {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

fn nginx_version() -> String {
    // It says so on stderr.
    let output = Command::new("nginx").env("PATH", process::path()).arg("-v").output().unwrap();
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}
