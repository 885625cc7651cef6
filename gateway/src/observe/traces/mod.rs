//! Closed records → spans somewhere else. Each sink has a bounded queue and a thread of its own, where spans are built and
//! sent: a backend that is down, slow or hostile costs a request nothing, and another sink neither.
//!
//! Every span is accounted for once: exported, rejected (the backend took the rest of its batch), failed (sent in vain),
//! dropped (never sent: the queue was full, or the end came) or sampled out.

mod file;
mod http;
mod otlp;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::metrics::Metrics;
use super::spans::{self, Origin};
use super::writer::Writer;
use crate::config::{SinkKind, TraceSink};
use crate::exchange::Record;

/// Where a sink's spans are counted.
#[derive(Clone)]
struct Tally {
    sink: String,
    metrics: Arc<Metrics>,
}

impl Tally {
    fn add(&self, result: &str, spans: u64) {
        self.metrics.span(&self.sink, result, spans);
    }

    fn queued(&self, change: i64) {
        self.metrics.span_queue(&self.sink, change);
    }

    fn took(&self, time: Duration) {
        self.metrics.span_export(&self.sink, time);
    }
}

/// Which traces a sink keeps.
///
/// Decided from the trace id alone, by the rule of OpenTelemetry's `TraceIdRatioBased`: every process with the same ratio
/// keeps the same traces whole, and it could be known before the request began. One thing cannot: a request that was not
/// answered is always kept, whatever its id says.
#[derive(Clone, Copy, Debug)]
struct Sample {
    below: u64,
}

impl Sample {
    fn ratio(ratio: f64) -> Sample {
        Sample { below: (ratio.clamp(0.0, 1.0) * (1_u64 << 63) as f64) as u64 }
    }

    fn keeps(self, record: &Record) -> bool {
        let [.., a, b, c, d, e, f, g, h] = record.trace_id.to_bytes();
        let drawn = u64::from_be_bytes([a, b, c, d, e, f, g, h]) >> 1;
        drawn < self.below || record.outcome != "answered"
    }
}

enum Output {
    File(Writer<Arc<Record>>),
    Otlp(otlp::Exporter),
}

/// One `[[telemetry.traces]]`.
pub struct Sink {
    sample: Sample,
    output: Output,
    tally: Tally,
}

impl Sink {
    /// Starts the sink's thread.
    ///
    /// # Errors
    /// What is missing on this machine, in words for the operator.
    pub fn start(sink: &TraceSink, origin: Origin, file: &Path, metrics: Arc<Metrics>) -> Result<Sink, String> {
        metrics.span_sink(&sink.name);
        let tally = Tally { sink: sink.name.clone(), metrics };
        let why = |error: &dyn std::fmt::Display| format!("the trace sink `{}` cannot start: {error}", sink.name);
        let output = match &sink.kind {
            SinkKind::File => Output::File(file::open(file, origin, tally.clone()).map_err(|error| why(&error))?),
            SinkKind::Otlp(to) => {
                Output::Otlp(otlp::Exporter::start(to, origin, tally.clone()).map_err(|error| why(&error))?)
            }
        };
        Ok(Sink { sample: Sample::ratio(sink.sample), output, tally })
    }

    /// Takes a record, or counts its spans as lost. Never waits.
    pub fn write(&self, record: &Arc<Record>) {
        if !self.sample.keeps(record) {
            return self.tally.add("sampled_out", spans::count(record));
        }
        // Before it is taken, so that it never reads less than nothing.
        self.tally.queued(1);
        let taken = match &self.output {
            Output::File(writer) => writer.write(record.clone()),
            Output::Otlp(exporter) => exporter.write(record.clone()),
        };
        if let Err(record) = taken {
            self.tally.queued(-1);
            self.tally.add("dropped", spans::count(&record));
        }
    }

    /// Asks the sink to send what it has, and to end; `ended` waits for it. Two steps, so that sinks end side by side.
    pub fn end(&self) {
        if let Output::Otlp(exporter) = &self.output {
            exporter.end();
        }
    }

    pub fn ended(&self) {
        match &self.output {
            Output::File(writer) => writer.shut_down(),
            Output::Otlp(exporter) => exporter.ended(),
        }
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::TraceId;
    use opentelemetry::trace::SpanKind;
    use opentelemetry_sdk::trace::{Sampler, SamplingDecision, ShouldSample};

    use super::*;
    use crate::exchange::Exchange;

    #[test]
    fn a_trace_is_kept_exactly_where_opentelemetrys_own_sampler_keeps_it() {
        let exchange = Exchange::for_tests();
        let mut record = exchange.record().unwrap().clone();
        record.outcome = "answered";
        for ratio in [0.0, 0.001, 0.25, 0.5, 0.999, 1.0] {
            for number in 0..2000_u128 {
                // Spread over all ids.
                record.trace_id = TraceId::from(number.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835));
                let theirs = Sampler::TraceIdRatioBased(ratio)
                    .should_sample(None, record.trace_id, "", &SpanKind::Server, &[], &[])
                    .decision;
                let kept = theirs == SamplingDecision::RecordAndSample;
                assert_eq!(Sample::ratio(ratio).keeps(&record), kept, "{ratio} {}", record.trace_id);
            }
        }
        record.outcome = "failed";
        assert!(Sample::ratio(0.0).keeps(&record), "what was not answered is always kept");
    }
}
