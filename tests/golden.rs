//! The contract that later work must not change unseen: a small golden file each. `make golden` writes them anew.

use std::collections::BTreeSet;
use std::fmt::Write;

use glassgate::accounting::ledger::store::adjust::COLUMNS_OF_ONE;
use glassgate::accounting::ledger::store::sqlite::feedback;
use glassgate::accounting::reprice::STANDING_COLUMNS;
use glassgate::accounting::row::{COLUMNS, Outcome, Role, Service, UsageSource};
use glassgate::observe::metrics::Metrics;
use glassgate::refusal::Refusal;
use glassgate::routing::core::{pick, uniform};
use serde_json::{Value, json};

use crate::support::gateway::{TestGateway, chat_with};
use crate::support::http;
use crate::support::root;

/// Compares with the file, or writes it when asked to.
fn golden(name: &str, found: &str) {
    let path = root().join("tests/golden").join(name);
    if std::env::var_os("GLASSGATE_GOLDEN").is_some_and(|mode| mode == "write") {
        std::fs::write(&path, found).unwrap();
        return;
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        expected == found,
        "{} differs; if that is meant, run `make golden` and read the diff.\n--- found\n{found}",
        path.display()
    );
}

#[test]
fn golden_refusals() {
    let mut text = String::from("# status  type  code  headers\n#   message\n");
    for refusal in Refusal::every() {
        let described = refusal.describe();
        let headers: Vec<String> = refusal.headers().iter().map(|(name, value)| format!("{name}: {value}")).collect();
        let body: Value = serde_json::from_slice(&refusal.body()).unwrap();
        writeln!(text, "\n{}  {}  {}  [{}]", described.status, described.kind, described.code, headers.join(", "))
            .unwrap();
        writeln!(text, "  {} (param: {})", body["error"]["message"].as_str().unwrap(), body["error"]["param"]).unwrap();
        if let Some(limit) = body["error"].get("limit") {
            writeln!(text, "  limit: {limit}").unwrap();
        }
    }
    golden("refusals.txt", &text);
}

#[test]
fn golden_metrics() {
    let mut text = String::from("# name  type  labels\n");
    for family in Metrics::new().families() {
        writeln!(text, "{}  {}  {{{}}}", family.name, family.kind, family.labels.join(", ")).unwrap();
    }
    golden("metrics.txt", &text);
}

#[test]
fn golden_ledger_columns() {
    let mut text = String::from("# primary key: request_id, attempt, role\n");
    for (name, kind) in COLUMNS {
        writeln!(text, "{name}  {kind}").unwrap();
    }
    let words = |words: &[&str]| words.join(" ");
    writeln!(text, "\nrole: {}", words(&Role::ALL.map(Role::as_str))).unwrap();
    writeln!(text, "outcome: {}", words(&Outcome::ALL.map(Outcome::as_str))).unwrap();
    writeln!(text, "usage_source: {}", words(&UsageSource::ALL.map(UsageSource::as_str))).unwrap();
    writeln!(text, "service_tier: {}", words(&Service::ALL.map(Service::as_str))).unwrap();
    text.push_str("\n# exported beside them\n");
    for (name, kind) in STANDING_COLUMNS {
        writeln!(text, "{name}  {kind}").unwrap();
    }
    text.push_str("\n# adjustment; primary key: request_id, attempt, role, number\n");
    for name in COLUMNS_OF_ONE {
        writeln!(text, "{name}").unwrap();
    }
    text.push_str("\n# feedback; primary key: request_id, name, key_id\n");
    for (name, kind) in feedback::COLUMNS {
        writeln!(text, "{name}  {kind}").unwrap();
    }
    golden("ledger_columns.txt", &text);
}

#[test]
fn golden_split() {
    let variants = [("glimmer-1", 90), ("glimmer-2", 10)];
    let mut text = String::from("# salt  unit  →  u(glimmer-1)  u(glimmer-2)  chosen at 90/10\n");
    for salt in ["assistant", "other"] {
        for unit in [
            "key=abc",
            "user=alice",
            "header:x-session-id=1",
            "header:x-session-id=2",
            "header:x-session-id=3",
            "header:x-session-id=세션",
            "",
        ] {
            let chosen = pick(salt, unit, &variants).map(|index| variants[index].0).unwrap();
            writeln!(
                text,
                "{salt}  {unit:?}  →  {:.12}  {:.12}  {chosen}",
                uniform(salt, unit, "glimmer-1"),
                uniform(salt, unit, "glimmer-2")
            )
            .unwrap();
        }
    }
    golden("split.txt", &text);
}

/// A JSON value's shape: names and types, no values.
fn shape(value: &Value) -> Value {
    match value {
        Value::Null => json!("null"),
        Value::Bool(_) => json!("bool"),
        Value::Number(number) if number.is_f64() => json!("float"),
        Value::Number(_) => json!("integer"),
        Value::String(text) if text.starts_with("chatcmpl-") => json!("string chatcmpl-<request id>"),
        Value::String(text) if text.starts_with("chat.completion") => json!(text),
        Value::String(_) => json!("string"),
        Value::Array(items) => Value::Array(items.iter().map(shape).collect()),
        Value::Object(map) => Value::Object(map.iter().map(|(name, value)| (name.clone(), shape(value))).collect()),
    }
}

fn headers(headers: &[(String, String)]) -> String {
    let names: BTreeSet<&str> = headers.iter().map(|(name, _)| name.as_str()).collect();
    names.into_iter().collect::<Vec<_>>().join(" ")
}

#[test]
fn golden_answer() {
    let gateway = TestGateway::start();
    let question = json!({"max_tokens": 4});
    let mut text = String::new();
    let whole = gateway.post(&chat_with("What is Glassgate?", question));
    writeln!(text, "# JSON\nheaders: {}\n{:#}", headers(&whole.headers), shape(&whole.json())).unwrap();
    for usage in [false, true] {
        let mut more = json!({"max_tokens": 4, "stream": true});
        if usage {
            more["stream_options"] = json!({"include_usage": true});
        }
        let response = gateway.post(&chat_with("What is Glassgate?", more));
        let chunks = response.chunks();
        writeln!(text, "\n# SSE, include_usage: {usage}\nheaders: {}", headers(&response.headers)).unwrap();
        let mut last = Value::Null;
        for chunk in &chunks {
            let shape = shape(chunk);
            if shape != last {
                writeln!(text, "data: {shape}").unwrap();
            }
            last = shape;
        }
        writeln!(text, "data: [DONE]").unwrap();
    }
    let models = gateway.send(&http::get("/v1/models", Some(&gateway.key)));
    writeln!(text, "\n# GET /v1/models\nheaders: {}\n{:#}", headers(&models.headers), shape(&models.json())).unwrap();
    let refused = gateway.post(&json!({}));
    writeln!(text, "\n# a refusal\nheaders: {}\n{:#}", headers(&refused.headers), shape(&refused.json())).unwrap();
    golden("answer.txt", &text);
}

#[test]
fn golden_spans() {
    let mut gateway = TestGateway::start();
    let body =
        chat_with("What is Glassgate?", json!({"max_tokens": 4, "stream": true, "user": "alice", "stop": ["@"]}));
    gateway.send(&gateway.chat_bytes(&body, &[("x-session-id", "1")]));
    gateway.stop();
    let line: Value =
        serde_json::from_slice(&std::fs::read(gateway.data_dir().join("traces.jsonl")).unwrap()).expect("one line");
    let resource = &line["resourceSpans"][0];
    let spans = resource["scopeSpans"][0]["spans"].as_array().unwrap();
    let names = |attributes: &Value| -> BTreeSet<String> {
        let kind = |value: &Value| value.as_object().and_then(|value| value.keys().next()).cloned().unwrap_or_default();
        let attributes = attributes.as_array().cloned().unwrap_or_default();
        attributes.iter().map(|a| format!("  {} {}", a["key"].as_str().unwrap(), kind(&a["value"]))).collect()
    };
    let list = |names: BTreeSet<String>| names.into_iter().collect::<Vec<_>>().join("\n");
    let mut text = format!("resource\n{}\n", list(names(&resource["resource"]["attributes"])));
    for span in spans {
        let parent = spans.iter().find(|parent| parent["spanId"] == span["parentSpanId"]);
        let parent = parent.map_or("-", |parent| parent["name"].as_str().unwrap());
        writeln!(text, "\n{} (kind {}, below {parent})", span["name"].as_str().unwrap(), span["kind"]).unwrap();
        writeln!(text, "{}", list(names(&span["attributes"]))).unwrap();
        for event in span["events"].as_array().into_iter().flatten() {
            let attributes = names(&event["attributes"]).into_iter().collect::<String>();
            writeln!(text, "  event {}:{attributes}", event["name"].as_str().unwrap()).unwrap();
        }
    }
    golden("spans.txt", &text);
}
