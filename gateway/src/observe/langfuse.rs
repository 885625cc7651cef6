//! What Langfuse wants to be told in its own words, on every span.
//!
//! Its mapping from the GenAI conventions guesses: a model named on the wrong span becomes a second generation and doubles
//! the cost, and a user named only on the root is missing wherever it groups by rows. Explicit attributes win over every
//! guess. They go to all sinks alike: a collector between us and Langfuse then needs no rule of its own, others show them
//! as what they are, attributes, and one trace is the same wherever it is read.

use opentelemetry::{Array, KeyValue, StringValue, Value};
use serde_json::{Map, json};

use super::access_log::timestamp;
use crate::accounting::core::Usage;
use crate::api::openai::request::Op;
use crate::exchange::Record;

/// What holds for the whole trace, and therefore has to be on each of its spans.
pub fn trace(record: &Record, environment: Option<&str>) -> Vec<KeyValue> {
    let known = |text: &'_ str| (!text.is_empty() && text != "none").then(|| text.to_owned());
    let (route, variant) = (known(&record.route), known(&record.variant));
    let path = if record.op == "other" { "unknown" } else { record.path.as_str() };
    let name = route.clone().unwrap_or_else(|| format!("{} {path}", record.method));
    let mut attributes =
        vec![KeyValue::new("langfuse.trace.name", name), KeyValue::new("langfuse.release", env!("CARGO_PKG_VERSION"))];
    let mut add = |name: &'static str, value: Option<Value>| {
        attributes.extend(value.map(|value| KeyValue::new(name, value)));
    };
    let user = record.user.clone().or_else(|| record.authenticated.then(|| record.key_id.clone()));
    add("langfuse.user.id", user.map(Value::from));
    add("langfuse.session.id", record.session.clone().map(Value::from));
    add("langfuse.environment", environment.map(|name| name.to_owned().into()));
    if record.is_shadow {
        // The trace is the request's: what it was answered by is not for its copy to say.
        add("langfuse.trace.tags", Some(Value::Array(Array::String(vec!["shadow".into()]))));
        return attributes;
    }
    // Neither can be grouped by as metadata, and a variant is there to be compared: it is the version.
    add("langfuse.version", route.as_ref().zip(variant.as_ref()).map(|(r, v)| format!("{r}:{v}").into()));
    let tags: Vec<StringValue> = [("route", route), ("variant", variant)]
        .into_iter()
        .filter_map(|(kind, name)| Some(format!("{kind}:{}", name?).into()))
        .collect();
    add("langfuse.trace.tags", (!tags.is_empty()).then_some(Value::Array(Array::String(tags))));
    attributes
}

/// The type of a span that is no model call.
pub fn span() -> KeyValue {
    KeyValue::new("langfuse.observation.type", "span")
}

/// The one span of a request that is a model call: whatever Langfuse sums and charts, it reads here.
pub fn generation(record: &Record) -> Vec<KeyValue> {
    let level = match record.outcome {
        "answered" => "DEFAULT",
        "aborted" => "WARNING",
        _ => "ERROR",
    };
    let kind = if record.op == Op::Embeddings.as_str() { "embedding" } else { "generation" };
    let mut attributes = vec![
        KeyValue::new("langfuse.observation.type", kind),
        KeyValue::new("langfuse.observation.model.name", record.model.clone()),
        KeyValue::new("langfuse.observation.model.parameters", parameters(record)),
        KeyValue::new("langfuse.observation.usage_details", usage(&record.usage())),
        // As text, so that no float comes near it: nine places are a JSON number too.
        KeyValue::new("langfuse.observation.cost_details", format!("{{\"total\":{}}}", record.billed())),
        KeyValue::new("langfuse.observation.level", level),
    ];
    if !record.error_type.is_empty() {
        attributes.push(KeyValue::new("langfuse.observation.status_message", record.error_type));
    }
    if let Some(first) = record.first_token() {
        let first = timestamp(record.at_ns(first));
        attributes.push(KeyValue::new("langfuse.observation.completion_start_time", first));
    }
    attributes
}

fn parameters(record: &Record) -> String {
    let said = &record.sampling;
    let all = [
        ("max_tokens", record.max_tokens.map(|n| json!(n))),
        ("temperature", said.temperature.map(|n| json!(n))),
        ("top_p", said.top_p.map(|n| json!(n))),
        ("top_k", said.top_k.map(|n| json!(n))),
        ("min_p", said.min_p.map(|n| json!(n))),
        ("repetition_penalty", said.repetition_penalty.map(|n| json!(n))),
        ("frequency_penalty", said.frequency_penalty.map(|n| json!(n))),
        ("presence_penalty", said.presence_penalty.map(|n| json!(n))),
        ("seed", said.seed.map(|n| json!(n))),
        ("stop", (!record.stop.is_empty()).then(|| json!(record.stop))),
        ("stream", record.stream.then_some(json!(true))),
    ];
    let said: Map<_, _> = all.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect();
    json!(said).to_string()
}

/// Disjoint buckets under Langfuse's names, and their sum: what is not disjoint it counts twice.
fn usage(usage: &Usage) -> String {
    json!({
        "input": usage.input,
        "input_cached_tokens": usage.cache_read,
        "input_cache_creation": usage.cache_write,
        "output": usage.output,
        "output_reasoning_tokens": usage.reasoning,
        "total": usage.prompt().saturating_add(usage.completion()),
    })
    .to_string()
}
