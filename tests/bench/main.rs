//! `make bench`: what the gateway costs and what batching gains, as ratios of figures taken in turn in one run.
//!
//! Absolute figures depend on the machine and its mood; each ratio is formed within a round, and median, minimum and
//! maximum over the rounds are printed and written to `tests/bench/results/`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a benchmark that cannot go on should stop")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use glassgate_runtime as runtime;
use serde_json::{Value, json};

const ROUNDS: usize = 7;
/// Tokens of every answer: long enough that prefill does not decide.
const TOKENS: u32 = 256;
const PROMPT: &str = "Count up from 1 to 20.";
const SMALL_REQUESTS: usize = 2000;

fn main() {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let gateway = Gateway::start(root);
    let engine = Engine::start(root);
    println!("ready in {:.2} s, {:.1} MiB resident when idle", gateway.ready.as_secs_f64(), gateway.resident_mib());
    let idle_mib = gateway.resident_mib();

    let mut rounds = Vec::new();
    for round in 0..=ROUNDS {
        let measured = json!({
            "tokens_per_s_1": gateway.tokens_per_s(1),
            "tokens_per_s_8": gateway.tokens_per_s(8),
            "engine_tokens_per_s_8": engine.tokens_per_s(8),
            "engine_prefill_tokens_per_s": engine.prefill_tokens_per_s(),
            "tokens_per_s_32": gateway.tokens_per_s(32),
            "cpu_us_models": gateway.cpu_us(&gateway.get("/v1/models", &gateway.key)),
            "cpu_us_refused": gateway.cpu_us(&gateway.get("/v1/models", "gg-nobody")),
            "cpu_us_chat_1_token": gateway.cpu_us(&gateway.post(1, false)),
        });
        // The first round warms caches and clocks.
        if round > 0 {
            rounds.push(measured);
        }
    }

    let over = |a: &str, b: &str| {
        rounds.iter().map(|round| round[a].as_f64().unwrap() / round[b].as_f64().unwrap()).collect::<Vec<_>>()
    };
    let of = |a: &str| rounds.iter().map(|round| round[a].as_f64().unwrap()).collect::<Vec<_>>();
    let table = [
        ("8 clients / 1 client, tokens/s", spread(over("tokens_per_s_8", "tokens_per_s_1"))),
        ("32 clients / 1 client, tokens/s", spread(over("tokens_per_s_32", "tokens_per_s_1"))),
        ("gateway / engine alone at 8, tokens/s", spread(over("tokens_per_s_8", "engine_tokens_per_s_8"))),
        ("refused (401) / GET models, CPU", spread(over("cpu_us_refused", "cpu_us_models"))),
        ("chat of 1 token / GET models, CPU", spread(over("cpu_us_chat_1_token", "cpu_us_models"))),
        ("tokens/s at 1 client", spread(of("tokens_per_s_1"))),
        ("tokens/s at 8 clients", spread(of("tokens_per_s_8"))),
        ("tokens/s at 32 clients", spread(of("tokens_per_s_32"))),
        ("engine prefill, tokens/s", spread(of("engine_prefill_tokens_per_s"))),
        ("CPU µs, GET models", spread(of("cpu_us_models"))),
        ("CPU µs, chat of 1 token, engine included", spread(of("cpu_us_chat_1_token"))),
    ];
    println!("{:45} {:>9} {:>9} {:>9}", "", "median", "min", "max");
    for (name, [median, low, high]) in &table {
        println!("{name:45} {median:>9.2} {low:>9.2} {high:>9.2}");
    }
    let result = json!({
        "commit": said("git", &["rev-parse", "--short", "HEAD"]),
        "date": said("date", &["-u", "+%Y-%m-%d"]),
        "cores": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "cpu": std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default().lines().find(|line| line.starts_with("model name")).map(|line| line.split(':').nth(1).unwrap_or("").trim().to_owned()),
        "ready_s": gateway.ready.as_secs_f64(),
        "idle_resident_mib": idle_mib,
        "rounds": ROUNDS,
        "median_min_max": table.iter().map(|(name, spread)| ((*name).to_owned(), json!(spread))).collect::<serde_json::Map<_, _>>(),
    });
    let path = root.join("tests/bench/results/gateway.json");
    std::fs::write(&path, format!("{result:#}\n")).unwrap();
    println!("written to tests/bench/results/gateway.json");
}

/// Median, minimum, maximum.
fn spread(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [values[values.len() / 2], values[0], values[values.len() - 1]]
}

fn said(program: &str, args: &[&str]) -> String {
    Command::new(program)
        .args(args)
        .output()
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .unwrap_or_default()
}

/// The real binary beside this one, on a free port.
struct Gateway {
    child: Child,
    _folder: tempfile::TempDir,
    data: SocketAddr,
    key: String,
    ready: Duration,
}

impl Gateway {
    fn start(root: &Path) -> Gateway {
        let folder = tempfile::tempdir().unwrap();
        let configs = folder.path().join("configs");
        std::fs::create_dir(&configs).unwrap();
        for name in ["gateway.toml", "routes.toml", "prices.toml"] {
            let text = std::fs::read_to_string(root.join("configs").join(name)).unwrap();
            let text = text
                .replace("../models", root.join("models").canonicalize().unwrap().to_str().unwrap())
                .replace("requests_per_minute = 600", "requests_per_minute = 1000000")
                .replace("tokens_per_minute = 200_000", "tokens_per_minute = 1_000_000_000")
                .replace("concurrency = 64", "concurrency = 10_000")
                .replace("usd_per_day = 5.0", "usd_per_day = 1_000_000")
                .replace("glimmer-1 = 90, glimmer-2 = 10", "glimmer-2 = 100");
            std::fs::write(configs.join(name), text).unwrap();
        }
        let data_dir = folder.path().join("data");
        let binary: PathBuf = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("glassgate");
        let began = Instant::now();
        let child = Command::new(&binary)
            .args(["serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--config"])
            .arg(configs.join("gateway.toml"))
            .arg("--data-dir")
            .arg(&data_dir)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", binary.display()));
        let run = loop {
            let run = std::fs::read(data_dir.join("run.json"))
                .ok()
                .and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
            if let Some(run) = run {
                break run;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "the gateway does not start");
            std::thread::sleep(Duration::from_millis(1));
        };
        let data = run["data"].as_str().unwrap().parse().unwrap();
        let key = std::fs::read_to_string(data_dir.join("quickstart.key")).unwrap();
        Gateway { child, _folder: folder, data, key, ready: began.elapsed() }
    }

    fn get(&self, path: &str, key: &str) -> Vec<u8> {
        format!("GET {path} HTTP/1.1\r\nhost: g\r\nauthorization: Bearer {key}\r\n\r\n").into_bytes()
    }

    fn post(&self, tokens: u32, stream: bool) -> Vec<u8> {
        let body =
            json!({"model": "assistant", "temperature": 0, "stream": stream, "max_tokens": tokens, "ignore_eos": true,
                          "messages": [{"role": "user", "content": PROMPT}]})
            .to_string();
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            self.key,
            body.len()
        );
        [head.into_bytes(), body.into_bytes()].concat()
    }

    /// Streams answers to so many clients at once and counts tokens over the whole time.
    fn tokens_per_s(&self, clients: usize) -> f64 {
        let request = self.post(TOKENS, true);
        let each = (32 / clients).max(2);
        let began = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..clients {
                scope.spawn(|| {
                    let mut connection = Connection::open(self.data);
                    for _ in 0..each {
                        assert_eq!(connection.ask(&request), 200);
                    }
                });
            }
        });
        (clients * each) as f64 * f64::from(TOKENS) / began.elapsed().as_secs_f64()
    }

    /// CPU time of the gateway's process for one request, over many on one connection.
    fn cpu_us(&self, request: &[u8]) -> f64 {
        let mut connection = Connection::open(self.data);
        let before = self.cpu();
        for _ in 0..SMALL_REQUESTS {
            connection.ask(request);
        }
        (self.cpu() - before).as_secs_f64() * 1e6 / SMALL_REQUESTS as f64
    }

    /// User and system time, from the kernel's scheduler accounting (nanoseconds) of every thread.
    fn cpu(&self) -> Duration {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let nanos = tasks.flatten().filter_map(|task| {
            std::fs::read_to_string(task.path().join("schedstat")).ok()?.split(' ').next()?.parse::<u64>().ok()
        });
        Duration::from_nanos(nanos.sum())
    }

    fn resident_mib(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A kept-alive connection that reads answers and throws them away.
struct Connection(BufReader<TcpStream>);

impl Connection {
    fn open(address: SocketAddr) -> Connection {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        Connection(BufReader::with_capacity(64 << 10, stream))
    }

    fn ask(&mut self, request: &[u8]) -> u16 {
        self.0.get_mut().write_all(request).unwrap();
        let (mut status, mut length, mut chunked) = (0, 0, false);
        let mut line = String::new();
        loop {
            line.clear();
            self.0.read_line(&mut line).unwrap();
            let lower = line.trim_end().to_ascii_lowercase();
            if status == 0 {
                status = lower.split(' ').nth(1).unwrap().parse().unwrap();
            } else if let Some(value) = lower.strip_prefix("content-length: ") {
                length = value.parse().unwrap();
            } else if lower == "transfer-encoding: chunked" {
                chunked = true;
            } else if lower.is_empty() {
                break;
            }
        }
        let mut body = Vec::new();
        if !chunked {
            body.resize(length, 0);
            self.0.read_exact(&mut body).unwrap();
            return status;
        }
        loop {
            line.clear();
            self.0.read_line(&mut line).unwrap();
            let size = usize::from_str_radix(line.trim(), 16).unwrap();
            body.resize(size + 2, 0);
            self.0.read_exact(&mut body).unwrap();
            if size == 0 {
                return status;
            }
        }
    }
}

/// The runtime alone, in this process: what the gateway's throughput is held against.
struct Engine {
    /// The last handle ends the engine.
    _runtime: runtime::Runtime,
    model: runtime::Model,
    prompt: Vec<u32>,
    executor: tokio::runtime::Runtime,
}

impl Engine {
    fn start(root: &Path) -> Engine {
        let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get().saturating_sub(1).max(1));
        runtime::set_threads(threads);
        let settings = runtime::Settings { threads, ..runtime::Settings::default() };
        let runtime = runtime::Runtime::start(settings).unwrap();
        let model = runtime.load("glimmer-2", &root.join("models/glimmer-2")).unwrap();
        let message = runtime::Message { role: "user".into(), content: PROMPT.into() };
        let prompt = model.tokenize(&model.prompt(&[message]).unwrap()).unwrap();
        Engine {
            _runtime: runtime,
            model,
            prompt,
            executor: tokio::runtime::Builder::new_current_thread().build().unwrap(),
        }
    }

    fn tokens_per_s(&self, clients: usize) -> f64 {
        let each = (32 / clients).max(2);
        let began = Instant::now();
        self.executor.block_on(async {
            for _ in 0..each {
                let mut generations: Vec<_> = (0..clients)
                    .map(|_| self.model.generate(self.request(self.prompt.clone(), TOKENS)).unwrap())
                    .collect();
                for generation in &mut generations {
                    while generation.next().await.is_some() {}
                }
            }
        });
        (clients * each) as f64 * f64::from(TOKENS) / began.elapsed().as_secs_f64()
    }

    /// Prompts of a thousand tokens, and one token of answer each.
    fn prefill_tokens_per_s(&self) -> f64 {
        let prompt: Vec<u32> = self.prompt.iter().copied().cycle().take(1000).collect();
        let began = Instant::now();
        self.executor.block_on(async {
            for _ in 0..4 {
                let mut generation = self.model.generate(self.request(prompt.clone(), 1)).unwrap();
                while generation.next().await.is_some() {}
            }
        });
        4000.0 / began.elapsed().as_secs_f64()
    }

    fn request(&self, prompt: Vec<u32>, max_tokens: u32) -> runtime::Request {
        runtime::Request {
            prompt,
            max_tokens,
            params: runtime::SamplingParams { temperature: 0.0, ..self.model.defaults().clone() },
            stop: Vec::new(),
            ignore_eos: true,
            tenant: 0,
            class: runtime::Class::Interactive,
            deadline: None,
        }
    }
}
