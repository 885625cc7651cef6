//! A closed record → spans, with the names of OpenTelemetry's GenAI conventions 1.41.
//!
//! The HTTP server span; below it the inference; below that the attempts and the engine's phases. Our own stages take
//! microseconds: they are events of the server span, because backends bill and list every span. All is built at the end,
//! from the record, on a sink's thread: nothing is paid on the hot path, and the numbers cannot differ from the ledger's.

use std::time::{Duration, SystemTime};

use opentelemetry::trace::{Event, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceState};
use opentelemetry::{Array, InstrumentationScope, KeyValue, StringValue, Value};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

use super::langfuse;
use super::stages::{self, Phase, Stage};
use crate::api::openai::request::Op;
use crate::exchange::{Attempt, Child, EMBEDDED, Record};

/// Whose spans they are.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// `production`, `staging`, …, if the configuration says so.
    pub environment: Option<String>,
}

impl Origin {
    /// What is said once for all spans.
    pub fn resource(&self) -> Resource {
        let mut attributes = vec![
            KeyValue::new("service.name", "glassgate"),
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        ];
        if let Some(environment) = &self.environment {
            attributes.push(KeyValue::new("deployment.environment.name", environment.clone()));
        }
        Resource::builder_empty().with_attributes(attributes).build()
    }

    /// The spans of one request.
    pub fn spans(&self, record: &Record) -> Vec<SpanData> {
        // A shadow is no request: its spans hang below those of the one that it copies.
        let mut spans = if record.is_shadow { Vec::new() } else { vec![server_span(record)] };
        if is_inference(record) {
            let inference = inference_span(record);
            let parent = inference.span_context.span_id();
            spans.push(inference);
            spans.extend(told(record).iter().map(|attempt| attempt_span(record, attempt, parent)));
            // The engine worked for the last attempt that was ours.
            let embedded = told(record).iter().rev().find(|attempt| attempt.provider == EMBEDDED);
            let parent = embedded.map_or(parent, |attempt| record.child_id(Child::Attempt(attempt.number)));
            spans.extend(stages::phases(record).map(|phase| phase_span(record, phase, parent)));
        }
        let everywhere = langfuse::trace(record, self.environment.as_deref());
        for span in &mut spans {
            span.attributes.extend(everywhere.iter().cloned());
        }
        spans
    }
}

/// How many spans `spans` builds: who only counts them need not build them.
pub fn count(record: &Record) -> u64 {
    let below = if is_inference(record) { 1 + told(record).len() + stages::phases(record).count() } else { 0 };
    u64::from(!record.is_shadow) + below as u64
}

/// The attempts that have spans of their own. Where a model of ours was asked and nobody else, the inference says it all.
fn told(record: &Record) -> &[Attempt] {
    match record.attempts.as_slice() {
        [only] if only.server.is_none() => &[],
        attempts => attempts,
    }
}

/// The ledger's row decides, not the mark: a panic may come between the two.
fn is_inference(record: &Record) -> bool {
    record.receipt.is_some()
}

fn server_span(record: &Record) -> SpanData {
    let path = if record.op == "other" { "unknown" } else { record.path.as_str() };
    let mut attributes = vec![
        KeyValue::new("http.request.method", record.method.clone()),
        KeyValue::new("url.path", record.path.clone()),
        KeyValue::new("http.response.status_code", i64::from(record.status)),
        KeyValue::new("glassgate.request_id", record.request_id.clone()),
        KeyValue::new("glassgate.outcome", record.outcome),
        langfuse::span(),
    ];
    if record.authenticated {
        attributes.push(KeyValue::new("glassgate.tenant", record.tenant.clone()));
        attributes.push(KeyValue::new("glassgate.key_id", record.key_id.clone()));
    }
    let mut span = span(
        record,
        record.span_id,
        record.parent_span_id.unwrap_or(SpanId::INVALID),
        format!("{} {path}", record.method),
        SpanKind::Server,
        attributes,
    );
    span.parent_span_is_remote = record.parent_span_id.is_some();
    if record.status_counted() >= 500 {
        span.status = Status::error(record.error_type);
    }
    if !record.error_type.is_empty() {
        span.attributes.push(KeyValue::new("error.type", record.error_type));
    }
    span.events.events =
        stages::before(record).iter().chain(&stages::after(record)).map(|stage| event(record, stage)).collect();
    span
}

fn event(record: &Record, stage: &Stage) -> Event {
    let took = stage.ended.saturating_sub(stage.began).as_secs_f64();
    let attributes = vec![KeyValue::new("glassgate.stage.duration_seconds", took)];
    Event::new(stage.name, at(record, stage.began), attributes, 0)
}

/// The logical call with all its attempts; INTERNAL where the model runs in this process.
fn inference_span(record: &Record) -> SpanData {
    let usage = record.usage();
    let params = &record.sampling;
    let mut attributes = vec![
        KeyValue::new("gen_ai.operation.name", record.op),
        KeyValue::new("gen_ai.provider.name", record.provider.clone()),
        KeyValue::new("gen_ai.request.model", record.route.clone()),
        KeyValue::new("gen_ai.response.model", record.model.clone()),
        KeyValue::new("gen_ai.usage.input_tokens", integer(usage.prompt())),
        KeyValue::new("gen_ai.usage.output_tokens", integer(usage.completion())),
        KeyValue::new("glassgate.route", record.route.clone()),
        KeyValue::new("glassgate.variant", record.variant.clone()),
        KeyValue::new("glassgate.cache", record.cache),
        KeyValue::new("glassgate.priority", if record.is_shadow { "shadow" } else { record.priority.as_str() }),
        KeyValue::new("glassgate.config_hash", record.config_hash.clone()),
        KeyValue::new("glassgate.price_version", record.price_version.clone()),
        KeyValue::new("glassgate.outcome", record.outcome),
    ];
    if let Some(receipt) = record.receipt {
        attributes.push(KeyValue::new("glassgate.cost_usd", receipt.billed.to_string()));
        attributes.push(KeyValue::new("glassgate.usage_source", receipt.usage_source.as_str()));
        attributes.push(KeyValue::new("glassgate.role", receipt.role.as_str()));
    }
    let mut add =
        |name: &'static str, value: Option<Value>| attributes.extend(value.map(|value| KeyValue::new(name, value)));
    // Parts of the two sums above, told where there are any.
    let part = |tokens: u64| (tokens > 0).then(|| integer(tokens).into());
    add("gen_ai.usage.cache_read.input_tokens", part(usage.cache_read));
    add("gen_ai.usage.cache_creation.input_tokens", part(usage.cache_write));
    add("gen_ai.usage.reasoning.output_tokens", part(usage.reasoning));
    add("gen_ai.response.id", record.response_id.clone().map(Value::from));
    add("gen_ai.conversation.id", record.session.clone().map(Value::from));
    add("gen_ai.request.max_tokens", record.max_tokens.map(|n| integer(n).into()));
    add("gen_ai.request.temperature", params.temperature.map(Value::from));
    add("gen_ai.request.top_p", params.top_p.map(Value::from));
    add("gen_ai.request.top_k", params.top_k.map(|k| (k as f64).into()));
    add("gen_ai.request.frequency_penalty", params.frequency_penalty.map(Value::from));
    add("gen_ai.request.presence_penalty", params.presence_penalty.map(Value::from));
    add("gen_ai.request.seed", params.seed.map(Value::from));
    add("gen_ai.request.stop_sequences", (!record.stop.is_empty()).then(|| strings(record.stop.clone())));
    // The convention wants it only where it is true.
    add("gen_ai.request.stream", record.stream.then_some(Value::from(true)));
    add(
        "gen_ai.response.time_to_first_chunk",
        record.marks.first_token.filter(|_| record.stream).map(|time| time.as_secs_f64().into()),
    );
    let mut finishes: Vec<String> = record.finishes.iter().map(|finish| finish.as_str().to_owned()).collect();
    if finishes.is_empty() {
        finishes.push("error".to_owned());
    }
    // Vectors have none.
    let has_reasons = record.op != Op::Embeddings.as_str();
    add("gen_ai.response.finish_reasons", has_reasons.then(|| strings(finishes)));
    add("error.type", (!record.error_type.is_empty()).then(|| record.error_type.into()));
    if let Some((address, port)) = record.attempts.last().and_then(|attempt| attempt.server.as_ref()) {
        add("server.address", Some(address.clone().into()));
        add("server.port", Some(i64::from(*port).into()));
    }
    attributes.extend(langfuse::generation(record));
    let kind = if record.provider == EMBEDDED { SpanKind::Internal } else { SpanKind::Client };
    let name = format!("{} {}", record.op, record.route);
    // A shadow has no server span of its own to hang below.
    let parent = record.parent_span_id.filter(|_| record.is_shadow).unwrap_or(record.span_id);
    let mut span = span(record, record.child_id(Child::Inference), parent, name, kind, attributes);
    span.start_time = at(record, record.marks.admitted.unwrap_or_default());
    if record.outcome != "answered" {
        span.status = Status::error(record.error_type);
    }
    span
}

/// One try. It names no model in the words of a convention: a second model call would be seen, and paid for, in it.
fn attempt_span(record: &Record, attempt: &Attempt, parent: SpanId) -> SpanData {
    let mut attributes = vec![
        KeyValue::new("glassgate.attempt.number", i64::from(attempt.number)),
        KeyValue::new("glassgate.attempt.role", attempt.role),
        KeyValue::new("glassgate.attempt.model", attempt.model.clone()),
        KeyValue::new("glassgate.attempt.variant", attempt.variant.clone()),
        KeyValue::new("glassgate.attempt.provider", attempt.provider.clone()),
        KeyValue::new("glassgate.attempt.outcome", attempt.outcome),
        langfuse::span(),
    ];
    let mut kind = SpanKind::Internal;
    if let Some((address, port)) = &attempt.server {
        kind = SpanKind::Client;
        attributes.push(KeyValue::new("http.request.method", "POST"));
        attributes.push(KeyValue::new("server.address", address.clone()));
        attributes.push(KeyValue::new("server.port", i64::from(*port)));
    }
    if let Some(status) = attempt.status {
        attributes.push(KeyValue::new("http.response.status_code", i64::from(status)));
    }
    if let Some(first) = attempt.first_byte {
        let took = first.saturating_sub(attempt.began).as_secs_f64();
        attributes.push(KeyValue::new("glassgate.attempt.time_to_first_byte", took));
    }
    let name = format!("attempt {}", attempt.model);
    let mut span = span(record, record.child_id(Child::Attempt(attempt.number)), parent, name, kind, attributes);
    (span.start_time, span.end_time) = (at(record, attempt.began), at(record, attempt.ended));
    if !attempt.error_type.is_empty() {
        span.attributes.push(KeyValue::new("error.type", attempt.error_type));
        span.status = Status::error(attempt.error_type);
    }
    span
}

fn phase_span(record: &Record, phase: Phase, parent: SpanId) -> SpanData {
    let mut attributes = vec![langfuse::span()];
    let engine = record.engine.unwrap_or_default();
    match phase.name {
        "prefill" => {
            attributes.push(KeyValue::new("glassgate.engine.chunks", i64::from(engine.prefill_chunks)));
            attributes.push(KeyValue::new("glassgate.engine.cached_tokens", integer(engine.cached_tokens)));
        }
        "decode" => {
            attributes.push(KeyValue::new("glassgate.engine.steps", i64::from(engine.steps)));
            attributes.push(KeyValue::new("glassgate.engine.batch_max", i64::from(engine.batch_max)));
            attributes.push(KeyValue::new("glassgate.engine.preemptions", i64::from(engine.preemptions)));
        }
        _ => {}
    }
    let id = record.child_id(Child::Phase(phase.number));
    let mut span = span(record, id, parent, phase.name.to_owned(), SpanKind::Internal, attributes);
    (span.start_time, span.end_time) = (at(record, phase.began), at(record, phase.ended));
    span
}

fn span(
    record: &Record,
    id: SpanId,
    parent: SpanId,
    name: String,
    kind: SpanKind,
    attributes: Vec<KeyValue>,
) -> SpanData {
    SpanData {
        span_context: SpanContext::new(record.trace_id, id, TraceFlags::SAMPLED, false, TraceState::default()),
        parent_span_id: parent,
        parent_span_is_remote: false,
        span_kind: kind,
        name: name.into(),
        start_time: at(record, Duration::ZERO),
        end_time: at(record, record.marks.closed),
        attributes,
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: Status::Unset,
        instrumentation_scope: InstrumentationScope::builder("glassgate")
            .with_version(env!("CARGO_PKG_VERSION"))
            .build(),
    }
}

fn at(record: &Record, mark: Duration) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_nanos(u64::try_from(record.at_ns(mark)).unwrap_or(0))
}

fn integer(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn strings(values: Vec<String>) -> Value {
    Value::Array(Array::String(values.into_iter().map(StringValue::from).collect()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::accounting::core::{NanoUsd, Usage};
    use crate::accounting::row::{Outcome, Role, UsageSource};
    use crate::accounting::settlement::Receipt;
    use crate::answer::EngineTimes;
    use crate::exchange::Exchange;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// An answer for which a server failed first.
    fn failed_over() -> Record {
        let exchange = Exchange::for_tests();
        let mut record = exchange.record().unwrap().clone();
        record.route = "assistant".into();
        record.variant = "glimmer-1".into();
        record.outcome = "answered";
        record.receipt = Some(Receipt {
            role: Role::Primary,
            outcome: Outcome::Answered,
            usage: Usage { input: 3, cache_read: 5, cache_write: 7, output: 11, reasoning: 13 },
            usage_source: UsageSource::Counted,
            billed: NanoUsd(12_345_678_901),
            unbilled: NanoUsd(0),
            unpriced_service: None,
            provider_cost: NanoUsd(0),
            saved: None,
        });
        record.marks.admitted = Some(ms(1));
        record.marks.looked_up = Some(ms(2));
        record.marks.sent = Some(ms(60));
        record.marks.closed = ms(70);
        let attempt = |number, provider: &str, server, began, ended| Attempt {
            number,
            role: if number == 0 { "primary" } else { "fallback" },
            model: "m".into(),
            variant: "v".into(),
            provider: provider.into(),
            server,
            began: ms(began),
            first_byte: None,
            ended: ms(ended),
            outcome: "answered",
            error_type: "",
            status: None,
        };
        let server = Some(("api.example".to_owned(), 443));
        let first = Attempt {
            outcome: "failed",
            error_type: "upstream_error",
            status: Some(503),
            ..attempt(0, "openai", server, 2, 20)
        };
        record.attempts = vec![first, attempt(1, EMBEDDED, None, 20, 65)];
        record.engine = Some(EngineTimes {
            queue: ms(5),
            prefill: Some(ms(10)),
            decode: Some(ms(20)),
            steps: 3,
            ..EngineTimes::default()
        });
        record
    }

    fn get<'s>(span: &'s SpanData, key: &str) -> Option<&'s Value> {
        span.attributes.iter().find(|attribute| attribute.key.as_str() == key).map(|attribute| &attribute.value)
    }

    #[test]
    fn every_attempt_is_a_span_whose_id_an_upstream_could_be_told() {
        let record = failed_over();
        let spans = Origin::default().spans(&record);
        let names: Vec<&str> = spans.iter().map(|span| &*span.name).collect();
        assert_eq!(names, [" unknown", "other assistant", "attempt m", "attempt m", "queue", "prefill", "decode"]);
        let id = |number: usize| spans[number].span_context.span_id();
        assert!(record.traceparent(Child::Attempt(0)).contains(&id(2).to_string()), "the header names the span");
        assert_eq!(
            spans[1..].iter().map(|span| span.parent_span_id).collect::<Vec<_>>(),
            [id(0), id(1), id(1), id(3), id(3), id(3)]
        );
        assert_eq!(
            [&spans[1].span_kind, &spans[2].span_kind, &spans[3].span_kind],
            [&SpanKind::Internal, &SpanKind::Client, &SpanKind::Internal]
        );
        assert_eq!(spans[2].status, Status::error("upstream_error"));
        assert_eq!(get(&spans[2], "http.response.status_code"), Some(&Value::I64(503)));
        assert_eq!(get(&spans[2], "server.address"), Some(&Value::from("api.example")));
        assert_eq!(spans[4].start_time, at(&record, ms(20)), "the engine began with the attempt that was its own");
    }

    #[test]
    fn an_answer_from_elsewhere_is_a_client_span_with_its_provider_and_no_engine() {
        let mut record = failed_over();
        record.attempts.truncate(1);
        record.engine = Some(EngineTimes::default());
        record.provider = "openai".into();
        let spans = Origin::default().spans(&record);
        assert_eq!(spans.len(), 3);
        assert_eq!(spans[1].span_kind, SpanKind::Client);
        assert_eq!(get(&spans[1], "gen_ai.provider.name"), Some(&Value::from("openai")));
        assert_eq!(get(&spans[1], "server.port"), Some(&Value::I64(443)));
    }

    #[test]
    fn langfuse_is_told_disjoint_tokens_and_exact_money() {
        let record = failed_over();
        let generation = &Origin::default().spans(&record)[1];
        let text = |key: &str| get(generation, key).unwrap().as_str().into_owned();
        let usage: serde_json::Value = serde_json::from_str(&text("langfuse.observation.usage_details")).unwrap();
        let mut buckets = usage.as_object().unwrap().clone();
        let total = buckets.remove("total").unwrap();
        assert_eq!(buckets.len(), 5);
        assert_eq!(buckets.values().map(|n| n.as_u64().unwrap()).sum::<u64>(), total.as_u64().unwrap());
        assert_eq!(text("langfuse.observation.cost_details"), r#"{"total":12.345678901}"#);
        let said = |key: &str| get(generation, &format!("gen_ai.usage.{key}")).unwrap().clone();
        let input = ["input_tokens", "cache_read.input_tokens", "cache_creation.input_tokens"].map(said);
        assert_eq!(input, [15, 5, 7].map(Value::I64), "the convention's input includes what was cached");
        assert_eq!(["output_tokens", "reasoning.output_tokens"].map(said), [24, 13].map(Value::I64));
    }

    #[test]
    fn the_server_span_carries_our_own_stages_as_events() {
        let server = &Origin::default().spans(&failed_over())[0];
        let names: Vec<&str> = server.events.iter().map(|event| &*event.name).collect();
        assert_eq!(names, ["admit", "cache", "relay"]);
    }

    #[test]
    fn the_waterfall_has_every_stage_in_the_order_of_the_path() {
        let mut record = failed_over();
        let marks = &mut record.marks;
        [marks.identified, marks.knocked, marks.body_read, marks.routed, marks.measured] = [Some(ms(1)); 5];
        [marks.settling, marks.settled] = [Some(ms(66)), Some(ms(67))];
        let stages = stages::stages(&record);
        let names: Vec<&str> = stages.iter().map(|stage| stage.name).collect();
        assert_eq!(
            names,
            [
                "auth", "door", "body", "route", "measure", "admit", "cache", "attempts", "attempt", "attempt",
                "queue", "prefill", "decode", "relay", "settle"
            ]
        );
        assert_eq!(stages[8].detail, "0 primary m at openai: failed 503 (upstream_error)");
        assert_eq!((stages[7].began, stages[7].ended), (ms(2), ms(65)), "from the first try to the end of the last");
    }

    proptest! {
        /// What is dropped or sampled out is counted without being built; the two must agree.
        #[test]
        fn spans_are_counted_as_they_would_be_built(
            admitted: bool, attempts in 0usize..3, engine: bool, prefill: bool, decode: bool,
        ) {
            let mut record = failed_over();
            if !admitted {
                record.receipt = None;
            }
            record.attempts.truncate(attempts);
            record.engine = engine.then(|| EngineTimes {
                queue: ms(1),
                prefill: prefill.then_some(ms(1)),
                decode: decode.then_some(ms(1)),
                ..EngineTimes::default()
            });
            let spans = Origin::default().spans(&record);
            prop_assert_eq!(count(&record), spans.len() as u64);
            for span in &spans {
                let kinds = span.attributes.iter().filter(|a| a.key.as_str() == "langfuse.observation.type").count();
                prop_assert_eq!(kinds, 1, "{} needs one type", span.name);
            }
        }
    }
}
