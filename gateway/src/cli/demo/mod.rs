//! `glassgate demo`: a real client's traffic against a running gateway, for minutes, with every answer checked.
//!
//! Arrivals are an open loop: a gateway that is slow does not slow them down. Each answer is compared with the only right
//! one and judged as `correct` or not, which is what dashboards and `glassgate feedback` compare versions by.

mod callers;
mod client;
mod plan;
mod tally;

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use clap::Args;
use parking_lot::Mutex;
use serde_json::value::RawValue;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Semaphore;

use self::callers::Callers;
use self::client::{Client, Stay, Told};
use self::plan::{Act, Case, Misstep, Plan, Question, Step};
use self::tally::Tally;
use super::{Outcome, Place, text};
use crate::control::Control;

/// Every answer of the evaluation fits.
const ANSWER_TOKENS: u32 = 96;
/// Whoever means to leave asks for more than can be made before they are gone.
const LEAVER_TOKENS: u32 = 800;
/// Acts under way; an arrival beyond them is counted and not made, as nobody has endless sockets.
const ACTS_MAX: usize = 256;
/// A running gateway sees new keys within a second.
const KEYS_KNOWN_WITHIN: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// After Ctrl-C, what is under way has so long to end.
const LAST_WORDS: Duration = Duration::from_secs(10);
/// How often progress is told: on a terminal, and in a file.
const TELL_TERMINAL: Duration = Duration::from_millis(500);
const TELL_FILE: Duration = Duration::from_secs(10);

#[derive(Args)]
pub struct Options {
    /// Where the gateway is, such as http://127.0.0.1:8080; by default the one that serves from the data folder
    #[arg(long)]
    url: Option<String>,
    /// The only key to use; by default keys of several tenants are made in the data folder and used again, for the gateway
    /// that serves from there
    #[arg(long, env = "GLASSGATE_API_KEY", hide_env_values = true)]
    key: Option<String>,
    /// The route to ask
    #[arg(long, default_value = "assistant")]
    route: String,
    /// How long requests are sent
    #[arg(long, default_value_t = 5.0, value_parser = positive)]
    minutes: f64,
    /// Arrivals a second, on average
    #[arg(long, default_value_t = 5.0, value_parser = positive)]
    rps: f64,
    /// The same seed asks the same questions in the same order at the same times, in sessions that are new each time
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && (0.001..=100_000.0).contains(number));
    number.ok_or_else(|| "must be a number from 0.001 to 100000".to_owned())
}

pub fn run(place: &Place, options: &Options) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(text)?;
    runtime.block_on(play(place, options))
}

/// What every act needs.
struct Stage {
    client: Client,
    callers: Callers,
    cases: Vec<Case>,
    route: String,
    /// Tells this run's sessions from another's.
    run: u64,
    tally: Mutex<Tally>,
}

async fn play(place: &Place, options: &Options) -> Outcome {
    let base = address(place, options)?;
    let client = Client::new(base.clone());
    if let Err(error) = client.get("/health", "").await {
        return Err(format!("there is no gateway at {base} ({error}); start one with `make run`"));
    }
    let callers = match &options.key {
        Some(key) => Callers::one(key.trim()),
        None => {
            let control = served_at(place, &base)?;
            // A store may block, and the executor is not to.
            tokio::task::spawn_blocking(move || Callers::in_store(&control)).await.map_err(text)??
        }
    };
    known(&client, &callers, &base).await?;
    let cases = plan::cases()?;
    let plan = Plan::new(options.seed, options.rps, callers.regular.len(), cases.len(), callers.missteps());
    let run = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_millis() as u64);
    let tally = Mutex::default();
    let stage = Arc::new(Stage { client, callers, cases, route: options.route.clone(), run, tally });
    let length = Duration::from_secs_f64(options.minutes * 60.0);
    eprintln!("playing against {base} for {} s, {} requests a second; Ctrl-C ends it", length.as_secs(), options.rps);
    perform(&stage, plan, length).await.map_err(text)?;
    let tally = stage.tally.lock();
    println!("\n{}", tally.summary());
    match tally.complaints() {
        None => Ok(()),
        Some(complaints) => Err(format!("not everything was as it should be:\n{complaints}")),
    }
}

/// Where the gateway is: as it was said, or where the one is that serves from the data folder.
fn address(place: &Place, options: &Options) -> Result<String, String> {
    if let Some(url) = &options.url {
        let base = url.trim_end_matches('/').trim_end_matches("/v1");
        if !base.starts_with("http://") {
            return Err(format!("{url} cannot be asked: the demo speaks http:// only"));
        }
        return Ok(base.to_owned());
    }
    let data_dir = place.data_dir()?;
    let run = data_dir.read_run();
    let run =
        run.ok_or_else(|| format!("no gateway runs from {}; start one with `make run`", data_dir.path().display()))?;
    Ok(format!("http://{}", run.data))
}

/// Where the gateway at `base` has its keys, if it serves from this data folder. Keys that are made there are told to nobody else.
fn served_at(place: &Place, base: &str) -> Result<Control, String> {
    let data_dir = place.data_dir()?;
    if data_dir.read_run().is_some_and(|run| format!("http://{}", run.data) == base) {
        return place.control();
    }
    Err(format!(
        "the gateway that serves from {} is not at {base}; say with --key which key to use there, or leave out --url",
        data_dir.path().display()
    ))
}

/// Waits until the gateway knows every key.
async fn known(client: &Client, callers: &Callers, base: &str) -> Outcome {
    let deadline = Instant::now() + KEYS_KNOWN_WITHIN;
    for key in callers.all() {
        while client.get("/v1/models", key).await? != 200 {
            if Instant::now() > deadline {
                return Err(format!(
                    "the gateway at {base} does not know the key; say with --key which to use, or with --data-dir from where it serves"
                ));
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
    Ok(())
}

/// Ctrl-C, and what other programs send in its place.
struct Interrupt {
    int: Signal,
    term: Signal,
}

impl Interrupt {
    fn new() -> std::io::Result<Interrupt> {
        Ok(Interrupt { int: signal(SignalKind::interrupt())?, term: signal(SignalKind::terminate())? })
    }

    async fn comes(&mut self) {
        tokio::select! {
            _ = self.int.recv() => {}
            _ = self.term.recv() => {}
        }
    }
}

/// Sends what is planned, and waits until all of it has ended. The first Ctrl-C ends the sending, the second the waiting.
async fn perform(stage: &Arc<Stage>, plan: Plan, length: Duration) -> std::io::Result<()> {
    let mut interrupt = Interrupt::new()?;
    let places = Arc::new(Semaphore::new(ACTS_MAX));
    let last_words = tokio::select! {
        // Each request has an end of its own.
        () = send(stage, plan, length, &places) => Duration::MAX,
        () = interrupt.comes() => LAST_WORDS,
    };
    tokio::select! {
        () = ended(&places) => {}
        () = tokio::time::sleep(last_words) => {}
        () = interrupt.comes() => {}
    }
    Ok(())
}

/// Sends what is planned, each in its time, unless nobody is there any more.
async fn send(stage: &Arc<Stage>, plan: Plan, length: Duration, places: &Arc<Semaphore>) {
    let began = tokio::time::Instant::now();
    let is_terminal = std::io::stderr().is_terminal();
    let mut tell = tokio::time::interval(if is_terminal { TELL_TERMINAL } else { TELL_FILE });
    tell.tick().await;
    let mut due = began;
    for (number, Step { after, act }) in plan.enumerate() {
        due += after;
        if due > began + length {
            break;
        }
        loop {
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(due) => break,
                _ = tell.tick() => progress(stage, began.elapsed(), length, is_terminal),
            }
        }
        if stage.client.is_alone() {
            stage.tally.lock().unexpected("stopped: the gateway is gone".to_owned());
            break;
        }
        match places.clone().try_acquire_owned() {
            Ok(place) => {
                let stage = stage.clone();
                tokio::spawn(async move {
                    stage.act(number, act).await;
                    drop(place);
                });
            }
            Err(_) => stage.tally.lock().unexpected(format!("not sent: {ACTS_MAX} others had no answer yet")),
        }
    }
    progress(stage, began.elapsed(), length, is_terminal);
}

/// Ends when nobody is on stage any more.
async fn ended(places: &Semaphore) {
    // It cannot fail: nobody closes it.
    let _ = places.acquire_many(ACTS_MAX as u32).await;
}

fn progress(stage: &Stage, elapsed: Duration, length: Duration, is_terminal: bool) {
    let line = stage.tally.lock().progress(elapsed, length);
    let mut out = std::io::stderr().lock();
    // Nobody who watches is no reason to stop.
    let _ = if is_terminal { write!(out, "\r\x1b[K{line}") } else { writeln!(out, "{line}") };
    let _ = out.flush();
}

impl Stage {
    async fn act(&self, number: usize, act: Act) {
        let session = |part: usize| format!("demo-{:x}-{number}-{part}", self.run);
        match act {
            Act::Ask { question, stream } => self.ask(question, stream, session(0)).await,
            Act::Crowd(question) => {
                tokio::join!(
                    self.ask(question, true, session(0)),
                    self.ask(question, false, session(1)),
                    self.ask(question, true, session(2)),
                );
            }
            Act::Leave(question) => self.leave(question, &session(0)).await,
            Act::Misstep(misstep, question) => self.misstep(misstep, question, &session(0)).await,
        }
    }

    fn key(&self, question: Question) -> &str {
        &self.callers.regular[question.caller]
    }

    async fn ask(&self, question: Question, stream: bool, session: String) {
        let case = &self.cases[question.case];
        let body = body(&self.route, &case.messages, stream, ANSWER_TOKENS, false);
        self.tally.lock().sent();
        let told = self.client.chat(self.key(question), &session, body, Stay::ToTheEnd).await;
        self.told(told, case, self.key(question), &session, None).await;
    }

    async fn leave(&self, question: Question, session: &str) {
        let messages = &self.cases[question.case].messages;
        let body = body(&self.route, messages, true, LEAVER_TOKENS, true);
        self.tally.lock().sent();
        match self.client.chat(self.key(question), session, body, Stay::ForOneChunk).await {
            Told::Left => self.tally.lock().left(),
            other => self.tally.lock().failed(format!("who meant to leave: {other}")),
        }
    }

    async fn misstep(&self, misstep: Misstep, question: Question, session: &str) {
        let case = &self.cases[question.case];
        let key = self.callers.key_for(misstep, self.key(question));
        let good = body(&self.route, &case.messages, false, ANSWER_TOKENS, false);
        let (body, expected) = match misstep {
            Misstep::NoKey => (good, (401, "missing_api_key")),
            Misstep::UnknownRoute => {
                (body("no-such-route", &case.messages, false, ANSWER_TOKENS, false), (404, "model_not_found"))
            }
            Misstep::BrokenBody => (good[..good.len() - 1].to_owned(), (400, "invalid_json")),
            Misstep::TooOften => (good, (429, "rate_limit_exceeded")),
            Misstep::Unaffordable => (good, (429, "insufficient_quota")),
        };
        // One of two at a time is more than one a minute.
        let times = if misstep == Misstep::TooOften { 2 } else { 1 };
        for _ in 0..times {
            self.tally.lock().sent();
            let told = self.client.chat(&key, session, body.clone(), Stay::ToTheEnd).await;
            self.told(told, case, &key, session, Some(expected)).await;
        }
    }

    /// Checks what a request was told, and judges an answer.
    async fn told(&self, told: Told, case: &Case, key: &str, session: &str, expected: Option<(u16, &str)>) {
        match told {
            // Whoever asks too often is answered the first time.
            Told::Answer(answer) if expected.is_none_or(|(_, code)| code == "rate_limit_exceeded") => {
                let correct = answer.text == case.answer;
                self.tally.lock().answered(&answer, correct);
                match self.client.judge(key, session, &answer.response_id, correct).await {
                    Ok(()) => self.tally.lock().judged(),
                    Err(why) => self.tally.lock().unexpected(why),
                }
            }
            Told::Refused { status, code } if expected == Some((status, code.as_str())) => {
                self.tally.lock().refused(&code);
            }
            other => self.tally.lock().failed(match expected {
                Some((status, code)) => format!("{other}, expected {status} {code}"),
                None => other.to_string(),
            }),
        }
    }
}

/// Greedy, so that there is one right answer.
fn body(route: &str, messages: &RawValue, stream: bool, tokens: u32, endless: bool) -> String {
    let messages = messages.get();
    let route = serde_json::Value::from(route);
    format!(
        r#"{{"model":{route},"temperature":0,"stream":{stream},"max_tokens":{tokens},"ignore_eos":{endless},"messages":{messages}}}"#
    )
}
