//! TTFT and inter-token latency at half load: requests arrive when they arrive, at half of the rate that saturates the
//! engine, whether or not the ones before them are done.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::load::{self, Client, Request};
use super::report::{Rounds, Spread};
use super::serving::Gateway;

const ROUNDS: usize = 7;
/// An answer of about 50 tokens, nearly each an event of its own, after which the model stops by itself.
const QUESTION: &str = "Count up from 88 to 99.";
const EVENTS_MIN: usize = 32;
/// Earlier turns of chats, and how many of ten have so many: prompts of about 20, 250 and 1,000 tokens.
const CHATS: [(usize, usize); 3] = [(0, 7), (4, 2), (16, 1)];
/// Clients that ask again at once keep the engine full.
const SATURATING: usize = 32;
/// Until then they find each other; what is answered within the time after it counts.
const RAMP: Duration = Duration::from_secs(1);
const SATURATED: Duration = Duration::from_secs(3);
const ALONE: usize = 300;
const HALF_LOAD: Duration = Duration::from_secs(6);
const QUANTILES: [(&str, f64); 3] = [("p50", 0.50), ("p95", 0.95), ("p99", 0.99)];
/// What is shown of time to first token, (last event − first event) / (events − 1) of an answer, and every single gap
/// between two events. Of the last only the tail: events that come in one read have no gap.
const SHOWN: [(&str, &[&str]); 3] = [
    ("TTFT", &["p50", "p95", "p99"]),
    ("ITL, mean of an answer,", &["p50", "p95", "p99"]),
    ("ITL, every gap,", &["p99"]),
];

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
    for (kind, quantiles) in SHOWN {
        for quantile in quantiles {
            let figure = |load: &str| format!("{load} {kind} {quantile}");
            let both = rounds.over(&figure("half"), &figure("alone"));
            table.push((format!("{kind} {quantile}: half load / alone"), both));
            table.push((format!("{kind} {quantile} at half load, ms"), rounds.of(&figure("half"))));
        }
    }
    table.push(("answers of about 50 tokens a second when saturated".to_owned(), rounds.of("capacity")));
}

/// The requests that are asked in turn.
struct Mix(Vec<Request>);

impl Mix {
    fn new(key: &str) -> Mix {
        let request = |turns: usize| {
            let earlier = [
                json!({"role": "user", "content": "Count up from 20 to 31."}),
                json!({"role": "assistant", "content": "20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31"}),
            ];
            let mut messages: Vec<Value> = (0..turns).flat_map(|_| earlier.clone()).collect();
            messages.push(json!({"role": "user", "content": QUESTION}));
            let body =
                json!({"model": "assistant", "temperature": 0, "stream": true, "max_tokens": 64, "messages": messages});
            load::post(&body.to_string(), key)
        };
        Mix(CHATS.iter().flat_map(|(turns, count)| (0..*count).map(|_| request(*turns))).collect())
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
    means: Vec<f64>,
    gaps: Vec<f64>,
}

impl Seen {
    fn add(&mut self, began: Instant, events: &[Instant]) {
        assert!(events.len() >= EVENTS_MIN, "an answer of {} events", events.len());
        let all = (events[events.len() - 1] - events[0]).as_secs_f64();
        self.first.push((events[0] - began).as_secs_f64());
        self.means.push(all / (events.len() - 1) as f64);
        self.gaps.extend(events.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()));
    }

    /// Milliseconds.
    fn note(mut self, load: &str, figures: &mut Map<String, Value>) {
        for ((kind, _), values) in SHOWN.iter().zip([&mut self.first, &mut self.means, &mut self.gaps]) {
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
    let (next, done) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let end = Instant::now() + RAMP + SATURATED;
    let mut clients = JoinSet::new();
    for _ in 0..SATURATING {
        let (mix, next, done, address) = (mix.clone(), next.clone(), done.clone(), gateway.process.address);
        clients.spawn(async move {
            let mut client = Client::connect(address).await;
            while Instant::now() < end {
                client.stream(mix.nth(next.fetch_add(1, Ordering::Relaxed))).await;
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    tokio::time::sleep(RAMP).await;
    let (began, before) = (Instant::now(), done.load(Ordering::Relaxed));
    tokio::time::sleep_until(end.into()).await;
    let answers = done.load(Ordering::Relaxed) - before;
    let rate = answers as f64 / began.elapsed().as_secs_f64();
    clients.join_all().await;
    rate
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
    for _ in 0..SATURATING {
        let client = Client::connect(gateway.process.address).await;
        idle.lock().push_back(client);
    }
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
