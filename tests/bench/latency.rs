//! TTFT and inter-token latency at half load: requests arrive when they arrive, at half of the rate that saturates the
//! engine, whether or not the ones before them are done.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::load::{self, Client, Request};
use super::report::{Rounds, Spread};
use super::serving::Gateway;

const ROUNDS: usize = 7;
/// Of each answer.
const TOKENS: u32 = 64;
/// Length of prompts in words, and how many of ten have it.
const PROMPTS: [(usize, usize); 3] = [(8, 7), (150, 2), (600, 1)];
/// Clients that ask again at once keep the engine full.
const SATURATING: usize = 32;
const SATURATED: usize = 320;
const ALONE: usize = 60;
const HALF_LOAD: Duration = Duration::from_secs(6);
const QUANTILES: [(&str, f64); 3] = [("p50", 0.50), ("p95", 0.95), ("p99", 0.99)];

/// Appends its figures to the table of serving.
pub fn measure(gateway: &Gateway, table: &mut Vec<(String, Spread)>) {
    let executor = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mix = Arc::new(Mix::new(&gateway.key));
    let mut rounds = Rounds::default();
    for round in 0..=ROUNDS {
        let mut figures = Map::new();
        let capacity = executor.block_on(saturate(gateway, &mix));
        figures.insert("capacity".into(), json!(capacity));
        executor.block_on(alone(gateway, &mix)).note("alone", &mut figures);
        executor.block_on(arrive(gateway, &mix, capacity / 2.0, round as u64)).note("half", &mut figures);
        // The first round warms caches and clocks.
        if round > 0 {
            rounds.0.push(Value::Object(figures));
        }
    }
    for kind in ["TTFT", "ITL"] {
        for (quantile, _) in QUANTILES {
            let figure = |load: &str| format!("{load} {kind} {quantile}");
            table.push((
                format!("{kind} {quantile}, half load / alone"),
                rounds.over(&figure("half"), &figure("alone")),
            ));
            table.push((format!("{kind} {quantile} at half load, ms"), rounds.of(&figure("half"))));
        }
    }
    table.push((format!("answers of {TOKENS} tokens a second when saturated"), rounds.of("capacity")));
}

/// The requests that are asked in turn.
struct Mix(Vec<Request>);

impl Mix {
    fn new(key: &str) -> Mix {
        let request = |words: usize| {
            let content = "one two three four five six ".repeat(words / 6 + 1);
            let body = json!({"model": "assistant", "temperature": 0, "stream": true, "max_tokens": TOKENS, "ignore_eos": true,
                              "messages": [{"role": "user", "content": content}]});
            load::post(&body.to_string(), key)
        };
        Mix(PROMPTS.iter().flat_map(|(words, count)| (0..*count).map(|_| request(*words))).collect())
    }

    /// Scattered, so that long prompts do not come in a row.
    fn nth(&self, number: usize) -> &Request {
        &self.0[number * 7 % self.0.len()]
    }
}

/// What clients saw, in seconds.
#[derive(Default)]
struct Seen {
    first: Vec<f64>,
    gaps: Vec<f64>,
}

impl Seen {
    fn add(&mut self, began: Instant, events: &[Instant]) {
        assert!(events.len() > 1, "an answer without text");
        self.first.push((events[0] - began).as_secs_f64());
        self.gaps.extend(events.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()));
    }

    fn note(mut self, load: &str, figures: &mut Map<String, Value>) {
        for (kind, values) in [("TTFT", &mut self.first), ("ITL", &mut self.gaps)] {
            values.sort_by(f64::total_cmp);
            for (name, quantile) in QUANTILES {
                let at = ((values.len() - 1) as f64 * quantile).round() as usize;
                figures.insert(format!("{load} {kind} {name}"), json!(values[at] * 1e3));
            }
        }
    }
}

/// Answers a second while so many clients ask without a pause.
async fn saturate(gateway: &Gateway, mix: &Arc<Mix>) -> f64 {
    let next = Arc::new(Mutex::new(0));
    let began = Instant::now();
    let mut clients = JoinSet::new();
    for _ in 0..SATURATING {
        let (mix, next, address) = (mix.clone(), next.clone(), gateway.process.address);
        clients.spawn(async move {
            let mut client = Client::connect(address).await;
            loop {
                let number = {
                    let mut next = next.lock();
                    *next += 1;
                    *next
                };
                if number > SATURATED {
                    return;
                }
                client.stream(mix.nth(number)).await;
            }
        });
    }
    clients.join_all().await;
    SATURATED as f64 / began.elapsed().as_secs_f64()
}

async fn alone(gateway: &Gateway, mix: &Mix) -> Seen {
    let mut client = Client::connect(gateway.process.address).await;
    let mut seen = Seen::default();
    for number in 0..ALONE {
        let began = Instant::now();
        let events = client.stream(mix.nth(number)).await;
        seen.add(began, &events);
    }
    seen
}

/// A Poisson process: the time between two arrivals is exponential. A request's time counts from when it was due.
async fn arrive(gateway: &Gateway, mix: &Arc<Mix>, per_second: f64, seed: u64) -> Seen {
    let idle: Arc<Mutex<VecDeque<Client>>> = Arc::default();
    let (sender, mut arrivals) = mpsc::unbounded_channel();
    // A thread of its own: tokio's timers are a millisecond wide.
    let clock = std::thread::spawn(move || {
        let mut random = uniform(seed);
        let mut due = Instant::now();
        let end = due + HALF_LOAD;
        for number in 0.. {
            due += Duration::from_secs_f64(-(1.0 - random()).ln() / per_second);
            if due > end {
                return;
            }
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            sender.send((number, due)).unwrap();
        }
    });
    let mut answers = JoinSet::new();
    while let Some((number, due)) = arrivals.recv().await {
        let (idle, mix, address) = (idle.clone(), mix.clone(), gateway.process.address);
        answers.spawn(async move {
            let kept = idle.lock().pop_front();
            let mut client = match kept {
                Some(client) => client,
                None => Client::connect(address).await,
            };
            let events = client.stream(mix.nth(number)).await;
            idle.lock().push_back(client);
            (due, events)
        });
    }
    clock.join().unwrap();
    let mut seen = Seen::default();
    for (due, events) in answers.join_all().await {
        seen.add(due, &events);
    }
    seen
}

/// Uniform in [0, 1): xorshift64* (Vigna, 2016).
fn uniform(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 / (1_u64 << 53) as f64
    }
}
