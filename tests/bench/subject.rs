//! Servers in front of one origin, measured in turn. What is measured has core 0 to itself; clients and origin share
//! core 1. CPU is user and system time of all threads, until the process is at rest again.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_setaffinity};
use serde_json::{Map, Value, json};

use super::load;
use super::origin::{EVENTS, Manner};
use super::process::{self, Process};
use super::report::{Rounds, said};

/// One for what is measured, one for who measures.
const CORES: usize = 2;
/// A round in which others took more of the machine than this share is measured again …
const DISTURBED: f64 = 0.10;
/// … but not for ever: then it counts, and the results say so.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long the machine is looked at before a round.
const LOOK: Duration = Duration::from_millis(500);

/// What one figure is taken of: its name, how the origin answers, clients, answers, and events of the origin in each.
pub type Load = (&'static str, Manner, usize, usize, usize);
pub const WHOLE: Load = ("request, 32 clients", Manner::Whole, 32, 16_000, 1);
pub const PACED: Load = ("event one by one, 32 clients", Manner::Paced, 32, 96, EVENTS);

/// A route of the gateway that has a cache.
pub const KEPT: &str = "kept";
/// As many wrong keys as one likes.
const GUESSES: &str = "[auth]\nfailures_per_minute = 0\n";
/// A budget beside the four limits of every key.
const BUDGET: &str = r#"
        [[limits.rules]]
        name = "tenant-month"
        limit = 1_000_000
        of = "usd"
        per = "month"
        by = ["tenant"]
"#;

/// Puts each load on each of them, in turn.
pub fn measure(
    subjects: &[Subject],
    loads: &[Load],
    executor: &tokio::runtime::Runtime,
    round: &mut Map<String, Value>,
) {
    for (name, manner, clients, answers, events) in loads {
        for subject in subjects {
            let request = load::request(*manner, &subject.key);
            subject.measure(executor, (name, request, *clients, *answers, *events), round);
        }
    }
}

/// So many rounds, after one that warms caches and clocks, in which others left the machine alone; and what to say of it.
pub fn undisturbed(
    subjects: &[Subject],
    count: usize,
    mut round_of: impl FnMut(&mut Map<String, Value>),
) -> (Rounds, Value) {
    let (mut rounds, mut others, mut discarded) = (Rounds::default(), Vec::new(), 0);
    round_of(&mut Map::new());
    let began = Instant::now();
    while rounds.0.len() < count {
        quiet(subjects, began);
        let machine = Machine::now(subjects);
        let mut round = Map::new();
        round_of(&mut round);
        let share = machine.others(subjects);
        if share > DISTURBED && began.elapsed() < PATIENCE {
            discarded += 1;
            println!("a round in which others took {:.0} % of the machine is discarded", share * 100.0);
            continue;
        }
        rounds.0.push(Value::Object(round));
        others.push(share);
    }
    let facts = json!({
        "rounds": count,
        "rounds_discarded": discarded,
        "share_of_others": others,
        "kernel": said("uname", &["-r"]),
        "load_average": std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
    });
    (rounds, facts)
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

pub fn cpu(kind: &str, load: &str) -> String {
    format!("{kind} cpu {load}")
}

pub fn busy(kind: &str, load: &str) -> String {
    format!("{kind} busy {load}")
}

pub fn rate(kind: &str, load: &str) -> String {
    format!("{kind} rate {load}")
}

pub fn reads(kind: &str, load: &str) -> String {
    format!("{kind} reads {load}")
}

/// One of those that are compared.
pub struct Subject {
    pub kind: &'static str,
    pub process: Process,
    pub key: String,
}

impl Subject {
    pub fn start(kind: &'static str, origin: SocketAddr) -> Subject {
        // Children inherit it.
        pin(0);
        let (process, key) = match kind {
            "nginx" => (Process::nginx(origin), String::new()),
            "bare" => (Process::bare(origin), String::new()),
            "smg" => (Process::smg(origin, "smg-key"), "smg-key".to_owned()),
            "ungoverned" => Process::ungoverned(configured(origin, kind)),
            _ => Process::gateway(configured(origin, kind)),
        };
        pin(1);
        Subject { kind, process, key }
    }

    pub fn measure(
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
fn configured(origin: SocketAddr, kind: &str) -> tempfile::TempDir {
    let (log, sample) = if kind == "full" { ("stdout", "1.0") } else { ("off", "0.01") };
    let durability = if kind == "power" { "power" } else { "process" };
    let more = match kind {
        "governed" | "power" => BUDGET,
        "guessed" => GUESSES,
        _ => "",
    };
    let gateway = format!(
        r#"
        routes = "routes.toml"
        prices = "prices.toml"
        [listen]
        connections_max = 9000
        connections_per_ip = 9000
        [storage]
        wal_max = "1GiB"
        durability = "{durability}"
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
        {more}
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
pub fn pin(core: usize) {
    let mut cores = CpuSet::new();
    cores.set(core);
    sched_setaffinity(None, &cores).expect("the benchmark needs two cores");
}

/// Two files a stream, here as there.
pub fn raise_files() {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}
