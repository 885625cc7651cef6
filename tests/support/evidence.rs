//! The oracle: what independent witnesses say of the same requests, and every way in which they disagree.
//!
//! Witnesses: the client's bytes on the wire, what the mock upstreams were asked and said, the ledger read by another
//! SQLite client, the access log, decoded OTLP spans, `/metrics`, the engine's own counters, and a recount of every prompt
//! with the tokenizer and of every price.

mod legs;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use rusqlite::Connection;
use serde_json::Value;

use super::gateway::{TestGateway, metric};
use super::http::Response;
use super::upstream::{Asked, PROMPT_TOKENS};
use super::{eventually, root};

/// Disjoint counts of tokens: input, cache_read, cache_write, output, reasoning.
pub type Tokens = [u64; 5];
/// Of the engine's prefix cache.
const BLOCK_TOKENS: u64 = 32;
const KINDS: [&str; 5] = ["input", "cache_read", "cache_write", "output", "reasoning"];
/// Who makes an answer in the gateway's own process.
const EMBEDDED: &str = "glassgate";
/// The span that every client of the oracle names as its own.
pub const CLIENT_SPAN: &str = "b7ad6b7169203331";

/// What a client asked to be read.
#[derive(Clone, Debug)]
pub enum Prompt {
    Chat(String),
    Text(String),
}

/// What a client sent and saw of one request.
#[derive(Clone, Debug)]
pub struct Seen {
    /// What it was sent to show.
    pub kind: &'static str,
    /// Empty if the client left before it was told; then the trace says which it was.
    pub request_id: String,
    pub trace_id: String,
    pub tenant: String,
    pub key_id: String,
    pub authenticated: bool,
    pub op: &'static str,
    pub route: String,
    pub stream: bool,
    /// Answers that were asked for.
    pub n: u64,
    pub prompt: Option<Prompt>,
    /// Requests of one tenant that may have each other's answers say the same.
    pub same: Option<String>,
    pub bytes_in: u64,
    /// 0 if it was not read.
    pub status: u16,
    pub error_code: Option<String>,
    /// `Some` if the client read the answer to its end.
    pub usage: Option<Tokens>,
    pub cost_usd: Option<String>,
    pub cache: Option<String>,
    /// Whether it was read until nothing more came.
    pub is_read: bool,
    pub bytes_out: Option<u64>,
    /// Pieces of text that arrived; each is one token or more.
    pub pieces: u64,
}

/// One row of the ledger, as another client reads it.
#[derive(Clone, Debug)]
pub struct LedgerRow {
    pub request_id: String,
    pub attempt: u64,
    pub role: String,
    pub outcome: String,
    pub trace_id: String,
    pub tenant: String,
    pub route: String,
    pub model: String,
    pub variant: String,
    pub provider: String,
    pub op: String,
    pub stream: bool,
    pub cache: String,
    pub usage_source: String,
    pub key_id: String,
    pub input: u64,
    pub output: u64,
    pub other_tokens: u64,
    pub tokens: Tokens,
    pub billed: u64,
    pub provider_cost: u64,
}

impl LedgerRow {
    pub fn is_shadow(&self) -> bool {
        self.role == "shadow"
    }

    /// The one that says how its request ended.
    pub fn is_terminal(&self) -> bool {
        !self.is_shadow() && self.outcome != "failed_over"
    }

    /// Somebody else's answer.
    pub fn is_shared(&self) -> bool {
        !self.is_shadow() && matches!(self.cache.as_str(), "hit" | "coalesced")
    }

    /// Nano-dollars for its tokens, by the price file and other arithmetic.
    fn due(&self) -> u64 {
        let (input, read, output) = match self.variant.as_str() {
            "glimmer-1" => (20_000, 20_000, 80_000),
            "glimmer-2" => (30_000, 30_000, 120_000),
            // Every upstream of the tests has one list.
            _ => (30_000, 10_000, 120_000),
        };
        let pico = [input, read, 0, output, output].into_iter().zip(self.tokens).map(|(price, tokens)| price * tokens);
        // Every price of the shipped file is a whole number of nano-dollars a token: nothing is rounded.
        pico.sum::<u64>() / 1000
    }

    fn name(&self) -> String {
        format!("{} {} {}", self.request_id, self.attempt, self.role)
    }
}

/// A span with those of its attributes that tell what happened.
#[derive(Clone, Debug)]
pub struct Span {
    pub id: String,
    pub parent: String,
    pub trace: String,
    pub attributes: BTreeMap<String, String>,
}

impl Span {
    fn get(&self, name: &str) -> &str {
        self.attributes.get(name).map_or("", String::as_str)
    }

    /// The request whose inference it is.
    fn inference(&self) -> Option<&str> {
        let id = self.attributes.get("gen_ai.response.id")?;
        Some(id.trim_start_matches("chat").trim_start_matches("cmpl-"))
    }
}

/// One call as an upstream saw it.
#[derive(Clone, Debug)]
pub struct Call {
    pub server: &'static str,
    pub request_id: String,
    pub trace: String,
    /// The span that called.
    pub span: String,
    pub told: Option<u64>,
}

impl Call {
    pub fn new(server: &'static str, asked: &Asked) -> Call {
        let parent = asked.header("traceparent").unwrap_or_default();
        let part = |at| parent.split('-').nth(at).unwrap_or_default().to_owned();
        let request_id = asked.header("x-request-id").unwrap_or_default().to_owned();
        Call { server, request_id, trace: part(1), span: part(2), told: asked.told }
    }
}

/// Everything that was said.
#[derive(Clone, Debug)]
pub struct Evidence {
    pub seen: Vec<Seen>,
    pub rows: Vec<LedgerRow>,
    /// The requests whose answers the ledger's other table has judgements of.
    pub judged: Vec<String>,
    pub log: Vec<Value>,
    pub spans: Vec<Span>,
    pub calls: Vec<Call>,
    pub metrics: String,
    /// Routes that mirror every request, and to whom.
    pub shadows: Vec<(&'static str, &'static str)>,
}

impl Seen {
    /// Takes in a response that was read until nothing more came.
    pub fn read(mut self, response: &Response) -> Seen {
        self.told(response.status, response.header("x-request-id"), response.header("x-glassgate-cache"));
        self.is_read = true;
        self.bytes_out = response.complete.then_some(response.body.len() as u64);
        if response.status >= 400 {
            self.error_code = response.json()["error"]["code"].as_str().map(str::to_owned);
        } else if response.header("content-type") == Some("text/event-stream") {
            let events: Vec<String> = if response.complete {
                response.chunks().iter().map(Value::to_string).collect()
            } else {
                response.events()
            };
            events.iter().for_each(|event| self.event(event));
        } else if self.prompt.is_some() {
            let body = response.json();
            self.told_usage(&body["glassgate"]);
            assert_eq!(response.header("x-glassgate-cost"), self.cost_usd.as_deref());
            self.check(&body["usage"]);
        }
        self
    }

    /// Takes in the head.
    pub fn told(&mut self, status: u16, request_id: Option<&str>, cache: Option<&str>) {
        self.status = status;
        self.request_id = request_id.expect("an id").to_owned();
        self.cache = cache.map(str::to_owned);
    }

    /// Takes in one event of a stream.
    pub fn event(&mut self, event: &str) {
        // What was cut in the middle of an event says nothing.
        let Ok(chunk) = serde_json::from_str::<Value>(event) else { return };
        let choice = &chunk["choices"][0];
        let text = choice["delta"]["content"].as_str().or(choice["text"].as_str());
        self.pieces += u64::from(text.is_some_and(|text| !text.is_empty()));
        if chunk["glassgate"].is_object() {
            self.told_usage(&chunk["glassgate"]);
        }
        if chunk["usage"].is_object() {
            self.check(&chunk["usage"]);
        }
        if let Some(code) = chunk["error"]["code"].as_str() {
            self.error_code = Some(code.to_owned());
        }
    }

    fn told_usage(&mut self, told: &Value) {
        self.cost_usd = told["cost_usd"].as_str().map(str::to_owned);
        self.usage = Some(KINDS.map(|kind| told["usage"][kind].as_u64().expect("a count")));
        assert_eq!(told["cache"].as_str(), self.cache.as_deref(), "the header and the object agree");
    }

    /// OpenAI's own object says the same.
    fn check(&self, usage: &Value) {
        let [input, read, write, output, reasoning] = self.usage.expect("told before");
        let said = [&usage["prompt_tokens"], &usage["completion_tokens"]].map(Value::as_u64);
        assert_eq!(said, [Some(input + read + write), Some(output + reasoning)]);
    }
}

impl Evidence {
    /// Waits until nobody is in flight, takes the metrics, ends the gateway, and reads what it left.
    pub fn gather(
        gateway: &mut TestGateway,
        mut seen: Vec<Seen>,
        calls: impl FnOnce() -> Vec<Call>,
        shadows: &[(&'static str, &'static str)],
    ) -> Evidence {
        let zero = [
            "gateway_in_flight_requests",
            "gateway_ledger_queue_rows",
            "gateway_telemetry_queue_length",
            "runtime_requests",
        ];
        let metrics = eventually("everything to be counted and shipped", || {
            let text = gateway.metrics();
            let of =
                |outcome| metric(&text, "gateway_shadow_requests_total", &[format!("outcome=\"{outcome}\"").as_str()]);
            let ended: f64 = ["shed", "paired", "primary_failed", "shadow_failed", "both_failed"].map(of).iter().sum();
            let quiet = zero.iter().all(|gauge| metric(&text, gauge, &[]) == 0.0) && ended == of("sampled");
            // Who leaves at once may not even have been let in yet.
            let all = metric(&text, "gateway_requests_total", &[]) >= seen.len() as f64;
            (quiet && all).then_some(text)
        });
        gateway.stop();
        let lines = |text: String| -> Vec<Value> {
            text.lines().map(|line| serde_json::from_str(line).expect("one JSON object a line")).collect()
        };
        let log = lines(gateway.stdout());
        let traces = lines(std::fs::read_to_string(gateway.data_dir().join("traces.jsonl")).unwrap());
        let each = |value: &Value, name: &str| value[name].as_array().cloned().unwrap_or_default();
        let spans = traces
            .iter()
            .flat_map(|line| each(line, "resourceSpans"))
            .flat_map(|resource| each(&resource, "scopeSpans"))
            .flat_map(|scope| each(&scope, "spans"))
            .map(|value| span(&value))
            .collect();
        let by_trace: HashMap<&str, &str> =
            log.iter().filter_map(|line| Some((line["trace_id"].as_str()?, line["request_id"].as_str()?))).collect();
        for seen in seen.iter_mut().filter(|seen| seen.request_id.is_empty()) {
            seen.request_id = by_trace.get(seen.trace_id.as_str()).copied().unwrap_or_default().to_owned();
        }
        let (rows, calls, shadows) = (ledger(gateway), calls(), shadows.to_vec());
        let judged = judged(gateway);
        Evidence { seen, rows, judged, log, spans, calls, metrics, shadows }
    }
}

fn text<'v>(value: &'v Value, name: &str) -> &'v str {
    value[name].as_str().unwrap_or("")
}

fn span(value: &Value) -> Span {
    let attributes = value["attributes"].as_array().into_iter().flatten().filter_map(|attribute| {
        let name = attribute["key"].as_str()?;
        let told = ["glassgate.", "gen_ai.", "error."].iter().any(|prefix| name.starts_with(prefix));
        Some((name.to_owned(), scalar(&attribute["value"])?)).filter(|_| told)
    });
    let own = |name: &str| text(value, name).to_owned();
    Span { id: own("spanId"), parent: own("parentSpanId"), trace: own("traceId"), attributes: attributes.collect() }
}

fn scalar(value: &Value) -> Option<String> {
    let value = value.as_object()?.values().next()?;
    Some(value.as_str().map_or_else(|| value.to_string(), str::to_owned))
}

fn judged(gateway: &TestGateway) -> Vec<String> {
    let db = Connection::open(gateway.data_dir().join("ledger.sqlite")).unwrap();
    let mut query = db.prepare("SELECT request_id FROM feedback").unwrap();
    let rows = query.query_map([], |row| row.get(0)).unwrap();
    rows.collect::<rusqlite::Result<_>>().unwrap()
}

/// The ledger, by a client of its own.
pub fn ledger(gateway: &TestGateway) -> Vec<LedgerRow> {
    let db = Connection::open(gateway.data_dir().join("ledger.sqlite")).unwrap();
    let mut query = db.prepare("SELECT * FROM ledger ORDER BY started_ns").unwrap();
    let rows = query.query_map([], |row| {
        let number = |name| row.get::<_, i64>(name).map(|value| value as u64);
        let tokens = [
            number("input_tokens")?,
            number("cache_read_tokens")?,
            number("cache_write_tokens")?,
            number("output_tokens")?,
            number("reasoning_tokens")?,
        ];
        Ok(LedgerRow {
            request_id: row.get("request_id")?,
            attempt: number("attempt")?,
            role: row.get("role")?,
            outcome: row.get("outcome")?,
            trace_id: row.get("trace_id")?,
            tenant: row.get("tenant")?,
            route: row.get("route")?,
            model: row.get("model")?,
            variant: row.get("variant")?,
            provider: row.get("provider")?,
            op: row.get("op")?,
            stream: row.get("stream")?,
            cache: row.get("cache")?,
            usage_source: row.get("usage_source")?,
            key_id: row.get("key_id")?,
            input: tokens[0],
            output: tokens[3],
            other_tokens: tokens[1] + tokens[2] + tokens[4],
            tokens,
            billed: number("billed_nano_usd")?,
            provider_cost: number("provider_cost_nano_usd")?,
        })
    });
    rows.unwrap().collect::<rusqlite::Result<_>>().unwrap()
}

/// A span's attribute as text, whatever its type.
pub fn attribute(span: &Value, key: &str) -> Option<String> {
    let value = &span["attributes"].as_array()?.iter().find(|attribute| attribute["key"] == key)?["value"];
    scalar(value)
}

/// Prompt tokens of one user message, by the tokenizer library itself and a ChatML written by hand; or of a plain text.
fn recount(prompt: &Prompt) -> u64 {
    thread_local! {
        static TOKENIZER: tokenizers::Tokenizer =
            tokenizers::Tokenizer::from_file(root().join("models/glimmer-1/tokenizer.json")).expect("the bundled tokenizer");
        static COUNTED: RefCell<HashMap<String, u64>> = RefCell::default();
    }
    let text = match prompt {
        Prompt::Chat(question) => format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"),
        Prompt::Text(text) => text.clone(),
    };
    COUNTED.with_borrow_mut(|counted| {
        let count = |text: &str| TOKENIZER.with(|tokenizer| tokenizer.encode(text, false).unwrap().len() as u64);
        *counted.entry(text).or_insert_with_key(|text| count(text))
    })
}

pub fn usd(nano: u64) -> String {
    format!("{}.{:09}", nano / 1_000_000_000, nano % 1_000_000_000)
}

fn nano_usd(text: &str) -> u64 {
    let (whole, rest) = text.split_once('.').unwrap_or((text, "0"));
    whole.parse::<u64>().unwrap() * 1_000_000_000 + format!("{rest:0<9}").parse::<u64>().unwrap()
}
