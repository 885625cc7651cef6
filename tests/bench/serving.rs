//! The embedded runtime behind the gateway, and alone: throughput, and the CPU of small requests.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Instant;

use glassgate_runtime as runtime;
use serde_json::{Value, json};

use super::latency;
use super::process::{self, Process};
use super::python::Script;
use super::report::{Rounds, publish};

const ROUNDS: usize = 7;
/// Tokens of every answer: long enough that prefill does not decide.
const TOKENS: u32 = 256;
const PROMPT: &str = "Count up from 1 to 20.";
const SMALL_REQUESTS: usize = 2000;

pub fn run(root: &Path) {
    let gateway = Gateway::start(root);
    let engine = Engine::start(root);
    let mut transformers = Transformers::start(root);
    let idle_mib = gateway.process.resident_mib();
    println!("ready in {:.2} s, {:.1} MiB resident when idle", gateway.process.ready.as_secs_f64(), idle_mib);

    let mut rounds = Rounds::default();
    for round in 0..=ROUNDS {
        let measured = json!({
            "tokens_per_s_1": gateway.tokens_per_s(1),
            "tokens_per_s_8": gateway.tokens_per_s(8),
            "engine_tokens_per_s_8": engine.tokens_per_s(8),
            "engine_prefill_tokens_per_s": engine.prefill_tokens_per_s(),
            "tokens_per_s_32": gateway.tokens_per_s(32),
            "transformers_tokens_per_s_1": transformers.tokens_per_s(1),
            "transformers_tokens_per_s_8": transformers.tokens_per_s(8),
            "transformers_tokens_per_s_32": transformers.tokens_per_s(32),
            "cpu_us_models": gateway.cpu_us(&gateway.get("/v1/models", &gateway.key)),
            "cpu_us_refused": gateway.cpu_us(&gateway.get("/v1/models", "gg-nobody")),
            "cpu_us_chat_1_token": gateway.cpu_us(&gateway.post(1, false)),
        });
        // The first round warms caches and clocks.
        if round > 0 {
            rounds.0.push(measured);
        }
    }

    let table = [
        ("8 clients / 1 client, tokens/s", rounds.over("tokens_per_s_8", "tokens_per_s_1")),
        ("32 clients / 1 client, tokens/s", rounds.over("tokens_per_s_32", "tokens_per_s_1")),
        ("gateway / engine alone at 8, tokens/s", rounds.over("tokens_per_s_8", "engine_tokens_per_s_8")),
        ("gateway / transformers at 1, tokens/s", rounds.over("tokens_per_s_1", "transformers_tokens_per_s_1")),
        ("gateway / transformers at 8, tokens/s", rounds.over("tokens_per_s_8", "transformers_tokens_per_s_8")),
        ("gateway / transformers at 32, tokens/s", rounds.over("tokens_per_s_32", "transformers_tokens_per_s_32")),
        ("refused (401) / GET models, CPU", rounds.over("cpu_us_refused", "cpu_us_models")),
        ("chat of 1 token / GET models, CPU", rounds.over("cpu_us_chat_1_token", "cpu_us_models")),
        ("tokens/s at 1 client", rounds.of("tokens_per_s_1")),
        ("tokens/s at 8 clients", rounds.of("tokens_per_s_8")),
        ("tokens/s at 32 clients", rounds.of("tokens_per_s_32")),
        ("transformers, tokens/s in a batch of 1", rounds.of("transformers_tokens_per_s_1")),
        ("transformers, tokens/s in a batch of 8", rounds.of("transformers_tokens_per_s_8")),
        ("transformers, tokens/s in a batch of 32", rounds.of("transformers_tokens_per_s_32")),
        ("engine prefill, tokens/s", rounds.of("engine_prefill_tokens_per_s")),
        ("CPU µs, GET models", rounds.of("cpu_us_models")),
        ("CPU µs, chat of 1 token, engine included", rounds.of("cpu_us_chat_1_token")),
    ];
    let mut table: Vec<_> = table.into_iter().map(|(name, spread)| (name.to_owned(), spread)).collect();
    // Only one of them may work.
    let ways = transformers.ways.clone();
    drop((engine, transformers));
    latency::measure(&gateway, &mut table);
    let facts = json!({
        "ready_s": gateway.process.ready.as_secs_f64(),
        "idle_resident_mib": idle_mib,
        "rounds": ROUNDS,
        "transformers": ways,
    });
    publish(root, "gateway.json", &table, facts);
}

/// The gateway with the shipped configuration, its limits, cache and shadow out of the way.
pub struct Gateway {
    pub process: Process,
    pub key: String,
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
                .replace("[limits]", "[auth]\nfailures_per_minute = 0\n\n[limits]")
                .replace("requests_per_minute = 600", "requests_per_minute = 1000000")
                .replace("tokens_per_minute = 200_000", "tokens_per_minute = 1_000_000_000")
                .replace("concurrency = 64", "concurrency = 10_000")
                .replace("usd_per_day = 5.0", "usd_per_day = 1_000_000")
                .replace("glimmer-1 = 90, glimmer-2 = 10", "glimmer-2 = 100");
            // Every answer is to be made, and nothing else beside it.
            let is_made = |line: &&str| !line.starts_with("cache ") && !line.starts_with("shadow ");
            let text = text.lines().filter(is_made).collect::<Vec<_>>().join("\n") + "\n";
            std::fs::write(configs.join(name), text).unwrap();
        }
        let (process, key) = Process::gateway(folder);
        Gateway { process, key }
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
                    let mut connection = Connection::open(self.process.address);
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
        let mut connection = Connection::open(self.process.address);
        let before = self.process.cpu_at_rest();
        for _ in 0..SMALL_REQUESTS {
            connection.ask(request);
        }
        (self.process.cpu_at_rest() - before).as_secs_f64() * 1e6 / SMALL_REQUESTS as f64
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

/// The same model in transformers, on the same cores: one batch, in a process of its own and without HTTP.
struct Transformers {
    script: Script,
    /// How it was fastest, by batch size.
    ways: Value,
}

impl Transformers {
    fn start(root: &Path) -> Transformers {
        let folder = root.join("models/glimmer-2");
        let script = Script::start(&process::peer("python"), root, "generate.py", &[folder.as_ref()]);
        Transformers { script, ways: json!({}) }
    }

    fn tokens_per_s(&mut self, clients: usize) -> f64 {
        let told = self.script.ask(&json!({"prompt": PROMPT, "clients": clients, "tokens": TOKENS}));
        self.ways[clients.to_string()] = told["way"].clone();
        clients as f64 * f64::from(TOKENS) / told["seconds"].as_f64().unwrap()
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
        let model =
            runtime.load("glimmer-2", &root.join("models/glimmer-2"), &runtime::LoadOptions::default()).unwrap();
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
            // What is measured is computed: no prompt finds another in the prefix cache.
            salt: uuid::Uuid::new_v4().into_bytes(),
            class: runtime::Class::Interactive,
            deadline: None,
        }
    }
}
