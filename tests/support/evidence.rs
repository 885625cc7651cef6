//! The oracle: what independent witnesses say of the same requests, and every way in which they disagree.
//!
//! Witnesses: the client's bytes on the wire, the ledger read by another SQLite client, the access log, decoded OTLP
//! spans, `/metrics`, the engine's own counters, and a recount of every prompt with the tokenizer and of every price.

use std::collections::{BTreeMap, HashMap};

use rusqlite::Connection;
use serde_json::Value;

use super::gateway::{TestGateway, metric};
use super::http::Response;
use super::{eventually, root};

/// What a client saw of one request.
#[derive(Clone, Debug)]
pub struct Seen {
    pub request_id: String,
    pub status: u16,
    pub error_code: Option<String>,
    /// `Some` if the client read the answer to its end.
    pub usage: Option<(u64, u64)>,
    pub cost_usd: Option<String>,
    /// Pieces of text that arrived; each is one token or more.
    pub pieces: u64,
    pub prompt: Option<String>,
    pub authenticated: bool,
}

/// One row of the ledger, as another client reads it.
#[derive(Clone, Debug)]
pub struct LedgerRow {
    pub request_id: String,
    pub outcome: String,
    pub variant: String,
    pub key_id: String,
    pub input: u64,
    pub output: u64,
    pub other_tokens: u64,
    pub billed: u64,
    pub provider_cost: u64,
}

/// Everything that was said.
#[derive(Clone, Debug)]
pub struct Evidence {
    pub seen: Vec<Seen>,
    pub rows: Vec<LedgerRow>,
    pub log: Vec<Value>,
    pub spans: Vec<Value>,
    pub metrics: String,
}

impl Seen {
    /// A response that was read to its end (or refused).
    pub fn whole(response: &Response, prompt: Option<&str>, authenticated: bool) -> Seen {
        let mut seen = Seen {
            request_id: response.header("x-request-id").expect("an id").to_owned(),
            status: response.status,
            error_code: None,
            usage: None,
            cost_usd: None,
            pieces: 0,
            prompt: prompt.map(str::to_owned),
            authenticated,
        };
        let usage = |usage: &Value| Some((usage["prompt_tokens"].as_u64()?, usage["completion_tokens"].as_u64()?));
        if response.status >= 400 {
            seen.error_code = response.json()["error"]["code"].as_str().map(str::to_owned);
        } else if response.header("content-type") == Some("text/event-stream") {
            for chunk in response.chunks() {
                seen.pieces +=
                    u64::from(chunk["choices"][0]["delta"]["content"].as_str().is_some_and(|text| !text.is_empty()));
                if let Some(extra) = chunk.get("glassgate") {
                    seen.cost_usd = extra["cost_usd"].as_str().map(str::to_owned);
                    seen.usage =
                        Some((extra["usage"]["input"].as_u64().unwrap(), extra["usage"]["output"].as_u64().unwrap()));
                }
                if chunk["usage"].is_object() {
                    assert_eq!(usage(&chunk["usage"]), seen.usage, "the usage chunk and its glassgate object agree");
                }
            }
        } else {
            let body = response.json();
            seen.usage = usage(&body["usage"]);
            seen.cost_usd = response.header("x-glassgate-cost").map(str::to_owned);
            assert_eq!(body["glassgate"]["cost_usd"].as_str().map(str::to_owned), seen.cost_usd);
        }
        seen
    }
}

impl Evidence {
    /// Waits until nobody is in flight, takes the metrics, ends the gateway, and reads what it left.
    pub fn gather(gateway: &mut TestGateway, seen: Vec<Seen>) -> Evidence {
        let metrics = eventually("everything to be counted and shipped", || {
            let text = gateway.metrics();
            let quiet = metric(&text, "gateway_in_flight_requests", &[]) == 0.0
                && metric(&text, "gateway_ledger_queue_rows", &[]) == 0.0
                && metric(&text, "runtime_requests", &[]) == 0.0;
            quiet.then_some(text)
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
            .collect();
        Evidence { seen, rows: ledger(gateway), log, spans, metrics }
    }

    /// Every disagreement, each beginning with the name of its leg.
    pub fn disagreements(&self) -> Vec<String> {
        let mut found = Vec::new();
        self.records(&mut found);
        self.client(&mut found);
        self.ledger_and_log(&mut found);
        self.spans(&mut found);
        self.counted(&mut found);
        self.engine(&mut found);
        self.prices(&mut found);
        found
    }

    fn rows_by_id(&self) -> HashMap<&str, &LedgerRow> {
        self.rows.iter().map(|row| (row.request_id.as_str(), row)).collect()
    }

    fn log_by_id(&self) -> HashMap<&str, &Value> {
        self.log.iter().map(|line| (line["request_id"].as_str().unwrap_or(""), line)).collect()
    }

    /// Every request of a known caller left exactly one line.
    fn records(&self, found: &mut Vec<String>) {
        let mut count: HashMap<&str, usize> = HashMap::new();
        for line in &self.log {
            *count.entry(line["request_id"].as_str().unwrap_or("")).or_default() += 1;
        }
        for seen in self.seen.iter().filter(|seen| seen.authenticated) {
            let lines = count.get(seen.request_id.as_str()).copied().unwrap_or(0);
            if lines != 1 {
                found.push(format!("record: {} has {lines} log lines", seen.request_id));
            }
        }
        let known = |id: &str| self.seen.iter().any(|seen| seen.request_id == id);
        for id in count.keys().filter(|id| !known(id)) {
            found.push(format!("record: the log knows {id}, no client does"));
        }
    }

    fn client(&self, found: &mut Vec<String>) {
        let rows = self.rows_by_id();
        for seen in &self.seen {
            match (seen.usage, rows.get(seen.request_id.as_str())) {
                (Some(usage), Some(row)) => {
                    if usage != (row.input, row.output) {
                        found.push(format!(
                            "client: {} read {usage:?}, the ledger has {:?}",
                            seen.request_id,
                            (row.input, row.output)
                        ));
                    }
                    if seen.cost_usd.as_deref() != Some(usd(row.billed).as_str()) {
                        found.push(format!(
                            "client: {} was told {:?}, the ledger has {}",
                            seen.request_id,
                            seen.cost_usd,
                            usd(row.billed)
                        ));
                    }
                }
                (Some(_), None) => {
                    found.push(format!("client: {} was answered and is not in the ledger", seen.request_id))
                }
                (None, Some(row)) if seen.pieces > row.output => {
                    found.push(format!(
                        "client: {} got {} pieces and pays for {} tokens",
                        seen.request_id, seen.pieces, row.output
                    ));
                }
                _ => {}
            }
            if seen.prompt.is_some() && seen.status == 200 && !rows.contains_key(seen.request_id.as_str()) {
                found.push(format!("client: {} began an answer and is not in the ledger", seen.request_id));
            }
            if let (Some(prompt), Some(row)) = (&seen.prompt, rows.get(seen.request_id.as_str()))
                && row.input != 0
                && row.input != recount(prompt)
            {
                found.push(format!(
                    "recount: {} has {} prompt tokens, the ledger {}",
                    seen.request_id,
                    recount(prompt),
                    row.input
                ));
            }
        }
    }

    fn ledger_and_log(&self, found: &mut Vec<String>) {
        let (rows, lines) = (self.rows_by_id(), self.log_by_id());
        if rows.len() != self.rows.len() {
            found.push(format!("ledger: {} rows for {} requests", self.rows.len(), rows.len()));
        }
        for (id, row) in &rows {
            let Some(line) = lines.get(id) else {
                found.push(format!("ledger: {id} has no log line"));
                continue;
            };
            let said = (
                line["outcome"].as_str().unwrap_or(""),
                line["variant"].as_str().unwrap_or(""),
                line["key_id"].as_str().unwrap_or(""),
                line["tokens"]["input"].as_u64(),
                line["tokens"]["output"].as_u64(),
                line["cost_usd"].as_str().unwrap_or("").to_owned(),
                line["provider_cost_usd"].as_str().unwrap_or("").to_owned(),
            );
            let is = (
                row.outcome.as_str(),
                row.variant.as_str(),
                row.key_id.as_str(),
                Some(row.input),
                Some(row.output),
                usd(row.billed),
                usd(row.provider_cost),
            );
            if said != is {
                found.push(format!("log: {id} says {said:?}, the ledger {is:?}"));
            }
        }
        for (id, line) in &lines {
            if line["tokens"].is_object() && !rows.contains_key(id) {
                found.push(format!("log: {id} was admitted and is not in the ledger"));
            }
        }
    }

    fn spans(&self, found: &mut Vec<String>) {
        let mut server: HashMap<String, usize> = HashMap::new();
        let mut inference: HashMap<String, Vec<&Value>> = HashMap::new();
        for span in &self.spans {
            if let Some(id) = attribute(span, "glassgate.request_id") {
                *server.entry(id).or_default() += 1;
            }
            if let Some(id) = attribute(span, "gen_ai.response.id") {
                inference.entry(id.trim_start_matches("chatcmpl-").to_owned()).or_default().push(span);
            }
        }
        let rows = self.rows_by_id();
        for line in &self.log {
            let id = line["request_id"].as_str().unwrap_or("");
            if matches!(line["op"].as_str(), Some("health" | "root")) {
                continue;
            }
            if server.get(id) != Some(&1) {
                found.push(format!("span: {id} has {:?} server spans", server.get(id)));
            }
            let spans = inference.remove(id).unwrap_or_default();
            match (rows.get(id), spans.as_slice()) {
                (Some(row), [span]) => {
                    let said = (
                        attribute(span, "gen_ai.usage.input_tokens"),
                        attribute(span, "gen_ai.usage.output_tokens"),
                        attribute(span, "glassgate.cost_usd"),
                        attribute(span, "glassgate.outcome"),
                        attribute(span, "gen_ai.response.model"),
                    );
                    let is = (
                        Some(row.input.to_string()),
                        Some(row.output.to_string()),
                        Some(usd(row.billed)),
                        Some(row.outcome.clone()),
                        Some(row.variant.clone()),
                    );
                    if said != is {
                        found.push(format!("span: {id} says {said:?}, the ledger {is:?}"));
                    }
                }
                (None, []) => {}
                (row, spans) => found.push(format!(
                    "span: {id} has {} inference spans and {} rows",
                    spans.len(),
                    usize::from(row.is_some())
                )),
            }
        }
        for id in inference.keys() {
            found.push(format!("span: {id} is known to the traces alone"));
        }
        let exported = metric(&self.metrics, "gateway_telemetry_spans_total", &["exported"]);
        // The metrics were read a moment before the last spans were written.
        if exported > self.spans.len() as f64 {
            found.push(format!("span: {exported} exported, {} in the file", self.spans.len()));
        }
        for result in ["dropped", "failed", "rejected", "sampled_out"] {
            if metric(&self.metrics, "gateway_telemetry_spans_total", &[result]) != 0.0 {
                found.push(format!("span: some were {result}"));
            }
        }
    }

    fn counted(&self, found: &mut Vec<String>) {
        let mut sums: BTreeMap<(String, &str), u64> = BTreeMap::new();
        let mut billed: BTreeMap<String, u64> = BTreeMap::new();
        for row in &self.rows {
            *sums.entry((row.variant.clone(), "input")).or_default() += row.input;
            *sums.entry((row.variant.clone(), "output")).or_default() += row.output;
            *billed.entry(row.variant.clone()).or_default() += row.billed;
        }
        for ((variant, kind), tokens) in &sums {
            let (variant, kind) = (format!("variant=\"{variant}\""), format!("kind=\"{kind}\""));
            let counted = metric(&self.metrics, "gateway_tokens_total", &[&variant, &kind]);
            if counted != *tokens as f64 {
                found.push(format!("metric: {counted} tokens counted for {variant} {kind}, {tokens} in the ledger"));
            }
        }
        let other: u64 = self.rows.iter().map(|row| row.other_tokens).sum();
        let all: u64 = sums.values().sum::<u64>() + other;
        if metric(&self.metrics, "gateway_tokens_total", &[]) != all as f64 {
            found.push(format!("metric: tokens counted that are not in the ledger ({all})"));
        }
        for (variant, nano) in &billed {
            let label = format!("variant=\"{variant}\"");
            let counted: u64 = self
                .metrics
                .lines()
                .filter(|line| line.starts_with("gateway_cost_usd_total{") && line.contains(&label))
                .map(|line| nano_usd(line.rsplit(' ').next().unwrap()))
                .sum();
            if counted != *nano {
                found.push(format!("metric: {} counted for {variant}, {} in the ledger", usd(counted), usd(*nano)));
            }
        }
        let requests = metric(&self.metrics, "gateway_requests_total", &[]);
        if requests != self.seen.len() as f64 {
            found.push(format!("metric: {requests} requests counted, {} sent", self.seen.len()));
        }
        let mut refused: BTreeMap<&str, usize> = BTreeMap::new();
        for code in self.seen.iter().filter_map(|seen| seen.error_code.as_deref()) {
            *refused.entry(code).or_default() += 1;
        }
        for (code, count) in refused {
            let counted = metric(&self.metrics, "gateway_rejections_total", &[&format!("reason=\"{code}\"")]);
            if counted != count as f64 {
                found.push(format!("metric: {counted} rejections for {code}, clients saw {count}"));
            }
        }
        for family in ["gateway_panics_total", "gateway_ledger_failures_total", "gateway_ledger_queue_rows"] {
            if metric(&self.metrics, family, &[]) != 0.0 {
                found.push(format!("metric: {family} is not 0"));
            }
        }
    }

    /// The engine counts what it samples, and knows nothing of the ledger.
    fn engine(&self, found: &mut Vec<String>) {
        let sampled = metric(&self.metrics, "runtime_generated_tokens_total", &[]);
        let owed: u64 = self.rows.iter().map(|row| row.output).sum();
        if sampled != owed as f64 {
            found.push(format!("engine: {sampled} tokens sampled, {owed} in the ledger"));
        }
        if metric(&self.metrics, "runtime_kv_blocks", &["state=\"used\""]) != 0.0 {
            found.push("engine: KV blocks are still in use".into());
        }
    }

    /// Recomputed from the price file with other arithmetic: exact fractions of pico-dollars.
    fn prices(&self, found: &mut Vec<String>) {
        for row in &self.rows {
            let (input, output): (u128, u128) = match row.variant.as_str() {
                "glimmer-1" => (20_000, 80_000),
                "glimmer-2" => (30_000, 120_000),
                other => panic!("no price is known for {other}"),
            };
            let pico = u128::from(row.input) * input + u128::from(row.output) * output;
            // Every price of the shipped file is a whole number of nano-dollars a token: nothing is rounded.
            if u128::from(row.billed) * 1000 != pico {
                found.push(format!(
                    "price: {} billed {}, {pico} pico-dollars are due",
                    row.request_id,
                    usd(row.billed)
                ));
            }
        }
    }
}

/// The ledger, by a client of its own.
pub fn ledger(gateway: &TestGateway) -> Vec<LedgerRow> {
    let db = Connection::open(gateway.data_dir().join("ledger.sqlite")).unwrap();
    let mut query = db
        .prepare(
            "SELECT request_id, outcome, variant, key_id, input_tokens, output_tokens,
                    cache_read_tokens + cache_write_tokens + reasoning_tokens, billed_nano_usd, provider_cost_nano_usd
             FROM ledger ORDER BY started_ns",
        )
        .unwrap();
    let rows = query.query_map([], |row| {
        let number = |at| row.get::<_, i64>(at).map(|value| value as u64);
        Ok(LedgerRow {
            request_id: row.get(0)?,
            outcome: row.get(1)?,
            variant: row.get(2)?,
            key_id: row.get(3)?,
            input: number(4)?,
            output: number(5)?,
            other_tokens: number(6)?,
            billed: number(7)?,
            provider_cost: number(8)?,
        })
    });
    rows.unwrap().collect::<rusqlite::Result<_>>().unwrap()
}

/// A span's attribute as text, whatever its type.
pub fn attribute(span: &Value, key: &str) -> Option<String> {
    let value = span["attributes"].as_array()?.iter().find(|attribute| attribute["key"] == key)?["value"].clone();
    let value = value.as_object()?.values().next()?.clone();
    Some(value.as_str().map_or_else(|| value.to_string(), str::to_owned))
}

/// Prompt tokens of one user message, by the tokenizer library itself and a ChatML written by hand.
fn recount(question: &str) -> u64 {
    thread_local! {
        static TOKENIZER: tokenizers::Tokenizer =
            tokenizers::Tokenizer::from_file(root().join("models/glimmer-1/tokenizer.json")).expect("the bundled tokenizer");
    }
    let text = format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n");
    TOKENIZER.with(|tokenizer| tokenizer.encode(text, false).unwrap().len() as u64)
}

fn usd(nano: u64) -> String {
    format!("{}.{:09}", nano / 1_000_000_000, nano % 1_000_000_000)
}

fn nano_usd(text: &str) -> u64 {
    let (whole, rest) = text.split_once('.').unwrap_or((text, "0"));
    whole.parse::<u64>().unwrap() * 1_000_000_000 + format!("{rest:0<9}").parse::<u64>().unwrap()
}
