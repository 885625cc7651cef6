//! One JSON line a request, written by a thread of its own. A full queue drops lines and counts them; it never waits.

use std::io::Write;
use std::sync::Arc;

use serde::Serialize;

use super::metrics::Metrics;
use super::writer::Writer;
use crate::exchange::Record;

/// Lines waiting for the writer.
const QUEUE_LINES: usize = 8192;
/// Bytes that Linux writes to a pipe at once: nothing that others write there (stderr, in a container) comes in between.
const PIPE_BUF: usize = 4096;

/// The schema, version 1. Never holds content.
#[derive(Serialize)]
struct Line<'a> {
    v: u32,
    ts: String,
    request_id: &'a str,
    response_id: Option<&'a str>,
    trace_id: String,
    span_id: String,
    client_ip: Option<std::net::IpAddr>,
    method: &'a str,
    path: &'a str,
    op: &'a str,
    status: u16,
    outcome: &'a str,
    error_type: Option<&'a str>,
    tenant: Option<&'a str>,
    key_id: Option<&'a str>,
    key_name: Option<&'a str>,
    session_id: Option<&'a str>,
    route: Option<&'a str>,
    model: Option<&'a str>,
    variant: Option<&'a str>,
    stream: bool,
    cache: &'a str,
    finish_reason: Option<&'a str>,
    tokens: Option<crate::accounting::core::Usage>,
    usage_source: Option<&'a str>,
    cost_usd: Option<String>,
    provider_cost_usd: Option<String>,
    price_version: Option<&'a str>,
    config_hash: Option<&'a str>,
    queue_ms: Option<f64>,
    ttft_ms: Option<f64>,
    duration_ms: f64,
    bytes_in: u64,
    bytes_out: u64,
}

/// A record as one line of JSON, with its newline.
pub fn line(record: &Record) -> Vec<u8> {
    let known = |text: &'_ str| (!text.is_empty() && text != "none").then(|| text.to_owned());
    let (route, model, variant) = (known(&record.route), known(&record.model), known(&record.variant));
    let millis = |time: std::time::Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
    let some = |text: &'static str| (!text.is_empty()).then_some(text);
    let receipt = record.receipt;
    let line = Line {
        v: 1,
        ts: timestamp(record.started_ns),
        request_id: &record.request_id,
        response_id: record.response_id.as_deref(),
        trace_id: record.trace_id.to_string(),
        span_id: record.span_id.to_string(),
        client_ip: record.client,
        method: &record.method,
        path: &record.path,
        op: record.op,
        status: record.status,
        outcome: record.outcome,
        error_type: some(record.error_type),
        tenant: record.authenticated.then_some(record.tenant.as_str()),
        key_id: record.authenticated.then_some(record.key_id.as_str()),
        key_name: record.authenticated.then_some(record.key_name.as_str()),
        session_id: record.session.as_deref(),
        route: route.as_deref(),
        model: model.as_deref(),
        variant: variant.as_deref(),
        stream: record.stream,
        cache: record.cache,
        finish_reason: record.finishes.first().map(|finish| finish.as_str()),
        tokens: receipt.map(|receipt| receipt.usage),
        usage_source: receipt.map(|receipt| receipt.usage_source.as_str()),
        cost_usd: receipt.map(|receipt| receipt.billed.to_string()),
        provider_cost_usd: receipt.map(|receipt| receipt.provider_cost.to_string()),
        price_version: receipt.map(|_| record.price_version.as_str()),
        config_hash: route.as_ref().map(|_| record.config_hash.as_str()),
        queue_ms: record.engine.map(|engine| millis(engine.queue)),
        ttft_ms: record.first_token().map(millis),
        duration_ms: millis(record.marks.closed),
        bytes_in: record.bytes_in,
        bytes_out: record.bytes_out,
    };
    let mut json = serde_json::to_vec(&line).unwrap_or_default();
    json.push(b'\n');
    json
}

/// RFC 3339 with microseconds, in UTC.
pub fn timestamp(unix_ns: i64) -> String {
    let format =
        time::macros::format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z");
    time::OffsetDateTime::from_unix_timestamp_nanos(i128::from(unix_ns))
        .ok()
        .and_then(|at| at.format(&format).ok())
        .unwrap_or_default()
}

/// Lines in groups that are written at once: as many as reach a pipe whole, or one that is longer.
fn slices(lines: &[Vec<u8>]) -> impl Iterator<Item = &[Vec<u8>]> {
    let mut bytes = lines.first().map_or(0, Vec::len);
    lines.chunk_by(move |_, next| {
        let fits = bytes + next.len() <= PIPE_BUF;
        bytes = next.len() + if fits { bytes } else { 0 };
        fits
    })
}

pub struct AccessLog {
    writer: Writer<Arc<Record>>,
    metrics: Arc<Metrics>,
}

impl AccessLog {
    /// Starts the writer.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn to(mut out: impl Write + Send + 'static, metrics: Arc<Metrics>) -> std::io::Result<AccessLog> {
        let (counted, lost) = (metrics.clone(), metrics.clone());
        let write = move |records: &[Arc<Record>]| {
            let lines: Vec<Vec<u8>> = records.iter().map(|record| line(record)).collect();
            for slice in slices(&lines) {
                // A closed stdout is no reason to stop serving; the loss is counted.
                let is_written = out.write_all(&slice.concat()).and_then(|()| out.flush()).is_ok();
                counted.log_lines(if is_written { "written" } else { "dropped" }, slice.len() as u64);
            }
        };
        let lost = move |records: &[Arc<Record>]| lost.log_lines("dropped", records.len() as u64);
        Ok(AccessLog { writer: Writer::start("access-log", QUEUE_LINES, write, lost)?, metrics })
    }

    pub fn write(&self, record: &Arc<Record>) {
        if self.writer.write(record.clone()).is_err() {
            self.metrics.log_lines("dropped", 1);
        }
    }

    pub fn shut_down(&self) {
        self.writer.shut_down();
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use parking_lot::Mutex;

    use super::*;
    use crate::exchange::Exchange;

    /// Keeps every write; the first one fails.
    #[derive(Clone, Default)]
    struct Pipe(Arc<Mutex<Vec<Vec<u8>>>>);

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut writes = self.0.lock();
            writes.push(bytes.to_vec());
            if writes.len() == 1 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(bytes.len()) }
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_write_is_whole_lines_that_reach_a_pipe_at_once_and_each_is_counted_for_itself() {
        let (pipe, metrics) = (Pipe::default(), Arc::new(Metrics::new()));
        let log = AccessLog::to(pipe.clone(), metrics.clone()).unwrap();
        let mut record = Exchange::for_tests().record().unwrap().clone();
        for index in 0..200 {
            // Every fiftieth line is longer than what a pipe takes at once.
            record.path = "/".repeat(if index % 50 == 7 { PIPE_BUF } else { index });
            log.write(&Arc::new(record.clone()));
        }
        log.shut_down();
        let writes = pipe.0.lock();
        let lines = |bytes: &[u8]| bytes.iter().filter(|byte| **byte == b'\n').count();
        for bytes in writes.iter() {
            assert!(bytes.ends_with(b"\n") && (bytes.len() <= PIPE_BUF || lines(bytes) == 1));
        }
        assert!(writes.iter().any(|bytes| lines(bytes) > 1), "lines that come together are written together");
        let (all, lost) = (writes.iter().map(|bytes| lines(bytes)).sum::<usize>(), lines(&writes[0]));
        assert_eq!(all, 200);
        let count = |result: &str, lines: usize| format!("{{result=\"{result}\"}} {lines}");
        let text = metrics.encode();
        assert!(text.contains(&count("dropped", lost)) && text.contains(&count("written", all - lost)), "{text}");
    }
}
