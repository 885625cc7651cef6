//! A closed record → spans, with the names of OpenTelemetry's GenAI conventions 1.41, as one line of OTLP JSON in a file.
//!
//! Two spans a request: the HTTP server span, and below it the inference with where the time went. They are built once,
//! at the end, from the record: nothing is paid on the hot path, and the numbers cannot differ from the ledger's.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceState};
use opentelemetry::{Array, InstrumentationScope, KeyValue, StringValue, Value};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::transform::trace::tonic::group_spans_by_resource_and_scope;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

use super::metrics::Metrics;
use super::writer::Writer;
use crate::exchange::Record;

const QUEUE_RECORDS: usize = 4096;
/// When the file has grown to this it becomes `….1`, and the one before it goes.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// The spans of one request.
pub fn spans(record: &Record) -> Vec<SpanData> {
    let mut spans = vec![server_span(record)];
    // The ledger's row decides, not the mark: a panic may come between the two.
    if record.receipt.is_some() {
        let admitted = record.marks.admitted.unwrap_or_default();
        let inference = inference_span(record, admitted);
        let parent = inference.span_context.span_id();
        spans.push(inference);
        spans.extend(engine_spans(record, admitted, parent));
    }
    spans
}

fn server_span(record: &Record) -> SpanData {
    let path = if record.op == "other" { "unknown" } else { record.path.as_str() };
    let mut attributes = vec![
        KeyValue::new("http.request.method", record.method.clone()),
        KeyValue::new("url.path", record.path.clone()),
        KeyValue::new("http.response.status_code", i64::from(record.status)),
        KeyValue::new("glassgate.request_id", record.request_id.clone()),
        KeyValue::new("glassgate.outcome", record.outcome),
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
    span
}

/// The logical call, INTERNAL because the model runs in this process.
fn inference_span(record: &Record, admitted: Duration) -> SpanData {
    let usage = record.usage();
    let params = &record.sampling;
    let mut attributes = vec![
        KeyValue::new("gen_ai.operation.name", record.op),
        KeyValue::new("gen_ai.provider.name", "glassgate"),
        KeyValue::new("gen_ai.request.model", record.route.clone()),
        KeyValue::new("gen_ai.response.model", record.model.clone()),
        KeyValue::new("gen_ai.usage.input_tokens", integer(usage.prompt())),
        KeyValue::new("gen_ai.usage.output_tokens", integer(usage.completion())),
        KeyValue::new("glassgate.route", record.route.clone()),
        KeyValue::new("glassgate.variant", record.variant.clone()),
        KeyValue::new("glassgate.cache", record.cache),
        KeyValue::new("glassgate.config_hash", record.config_hash.clone()),
        KeyValue::new("glassgate.price_version", record.price_version.clone()),
        KeyValue::new("glassgate.outcome", record.outcome),
    ];
    if let Some(receipt) = record.receipt {
        attributes.push(KeyValue::new("glassgate.cost_usd", receipt.billed.to_string()));
        attributes.push(KeyValue::new("glassgate.usage_source", receipt.usage_source.as_str()));
    }
    let mut add =
        |name: &'static str, value: Option<Value>| attributes.extend(value.map(|value| KeyValue::new(name, value)));
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
    add("gen_ai.response.finish_reasons", Some(strings(finishes)));
    add("error.type", (!record.error_type.is_empty()).then(|| record.error_type.into()));
    let mut span = span(
        record,
        child_id(record, 1),
        record.span_id,
        format!("{} {}", record.op, record.route),
        SpanKind::Internal,
        attributes,
    );
    span.start_time = at(record, admitted);
    if record.outcome != "answered" {
        span.status = Status::error(record.error_type);
    }
    span
}

/// Queue, prefill and decode, as the engine timed them.
fn engine_spans(record: &Record, admitted: Duration, parent: SpanId) -> Vec<SpanData> {
    let Some(engine) = record.engine else { return Vec::new() };
    let phases = [("queue", Some(engine.queue)), ("prefill", engine.prefill), ("decode", engine.decode)];
    let mut began = admitted;
    let mut spans = Vec::new();
    for (number, (name, took)) in phases.into_iter().enumerate() {
        let Some(took) = took else { continue };
        let attributes = match name {
            "decode" => vec![
                KeyValue::new("glassgate.engine.steps", i64::from(engine.steps)),
                KeyValue::new("glassgate.engine.batch_max", i64::from(engine.batch_max)),
            ],
            "prefill" => vec![KeyValue::new("glassgate.engine.chunks", i64::from(engine.prefill_chunks))],
            _ => Vec::new(),
        };
        let mut span =
            span(record, child_id(record, 2 + number as u8), parent, name.to_owned(), SpanKind::Internal, attributes);
        span.start_time = at(record, began);
        began += took;
        span.end_time = at(record, began);
        spans.push(span);
    }
    spans
}

/// Children's ids follow from the parent's, which is random: no more randomness is needed, and none is spent.
fn child_id(record: &Record, number: u8) -> SpanId {
    let mut bytes = record.span_id.to_bytes();
    bytes[7] ^= number;
    bytes[0] ^= 0x80;
    SpanId::from_bytes(bytes)
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

/// Writes spans to `traces.jsonl`: a line is one `ExportTraceServiceRequest`, as OpenTelemetry's file exporter writes it.
pub struct FileSink {
    writer: Writer<Arc<Record>>,
    metrics: Arc<Metrics>,
}

impl FileSink {
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(path: &Path, metrics: Arc<Metrics>) -> std::io::Result<FileSink> {
        let mut file = Rotating::open(path)?;
        let counted = metrics.clone();
        let resource = Resource::builder_empty()
            .with_attributes([
                KeyValue::new("service.name", "glassgate"),
                KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            ])
            .build();
        let resource = (&resource).into();
        let writer = Writer::start("traces", QUEUE_RECORDS, move |record: Arc<Record>| {
            let spans = spans(&record);
            let count = spans.len() as u64;
            let request =
                ExportTraceServiceRequest { resource_spans: group_spans_by_resource_and_scope(spans, &resource) };
            let mut json = serde_json::to_vec(&request).unwrap_or_default();
            json.push(b'\n');
            match file.write(&json) {
                Ok(()) => counted.span("file", "exported", count),
                Err(error) => {
                    tracing::warn!(%error, "spans could not be written");
                    counted.span("file", "failed", count);
                }
            }
        })?;
        Ok(FileSink { writer, metrics })
    }

    pub fn write(&self, record: &Arc<Record>) {
        if let Err(record) = self.writer.write(record.clone()) {
            self.metrics.span("file", "dropped", spans(&record).len() as u64);
        }
    }

    pub fn shut_down(&self) {
        self.writer.shut_down();
    }
}

struct Rotating {
    path: PathBuf,
    file: File,
    written: u64,
}

impl Rotating {
    fn open(path: &Path) -> std::io::Result<Rotating> {
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        let written = file.metadata()?.len();
        Ok(Rotating { path: path.to_owned(), file, written })
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        if self.written > 0 && self.written + bytes.len() as u64 > FILE_BYTES_MAX {
            std::fs::rename(&self.path, self.path.with_extension("jsonl.1"))?;
            *self = Rotating::open(&self.path)?;
        }
        self.file.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }
}
