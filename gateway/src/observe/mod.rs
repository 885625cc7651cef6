//! Who watches: every closed record becomes numbers, a log line, spans, and one of the last thousand to look up.

pub mod access_log;
mod labels;
mod langfuse;
pub mod metrics;
pub mod spans;
pub mod stages;
pub mod traces;
mod writer;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use access_log::AccessLog;
use metrics::{Metrics, Served};
use parking_lot::Mutex;
use traces::Sink;

use crate::accounting::row::Outcome;
use crate::exchange::{Observer, Record};

/// Requests that `glassgate trace` can still find.
const RECENT_MAX: usize = 1000;
/// Unauthenticated refusals are logged at most this often; the rest is counted.
const STRANGERS_EVERY: Duration = Duration::from_secs(1);

pub struct Observe {
    metrics: Arc<Metrics>,
    log: Option<AccessLog>,
    traces: Vec<Sink>,
    recent: Mutex<VecDeque<Arc<Record>>>,
    strangers: Mutex<Option<Instant>>,
}

impl Observe {
    pub fn new(metrics: Arc<Metrics>, log: Option<AccessLog>, traces: Vec<Sink>) -> Self {
        Observe { metrics, log, traces, recent: Mutex::default(), strangers: Mutex::default() }
    }

    /// One of the last thousand requests, by request, response or trace id. Of a trace, the last that was admitted: what
    /// was said of an answer is not what is looked for.
    pub fn find(&self, id: &str) -> Option<Arc<Record>> {
        let id = id.trim_start_matches("chat").trim_start_matches("cmpl-");
        let recent = self.recent.lock();
        let is_meant = |record: &&Arc<Record>| record.request_id == id || record.trace_id.to_string() == id;
        let found = || recent.iter().rev().filter(is_meant);
        found().find(|record| record.receipt.is_some()).or_else(|| found().next()).cloned()
    }

    /// Writes what is queued. Called once nobody is in flight.
    pub fn shut_down(&self) {
        if let Some(log) = &self.log {
            log.shut_down();
        }
        for sink in &self.traces {
            sink.end();
        }
        for sink in &self.traces {
            sink.ended();
        }
    }

    fn count(&self, record: &Record) {
        let served = Served { route: &record.route, model: &record.model, variant: &record.variant };
        let metrics = &self.metrics;
        metrics.request(served, record.op, record.status_counted(), record.error_type, record.stream, record.cache);
        if let Some(receipt) = &record.receipt {
            metrics.settled(served, &record.tenant, receipt);
            // What the cache answers says nothing of how fast a model is.
            let is_made = !matches!(record.cache, "hit" | "coalesced");
            let first_token = record.first_token().filter(|_| is_made);
            let per_output_token = record.time_per_output_token().filter(|_| is_made);
            metrics.admitted(served, record.marks.closed, first_token, per_output_token);
        }
        for (phase, took) in stages::overhead(record) {
            metrics.overhead(phase, took);
        }
        if record.is_abandoned() {
            metrics.client_abort(served, stages::abandoned_in(record));
        }
        for (number, attempt) in record.attempts.iter().enumerate() {
            let by = Served { route: &record.route, model: &attempt.model, variant: &attempt.variant };
            let is_last = number + 1 == record.attempts.len();
            let outcome = if is_last { attempt.outcome } else { Outcome::FailedOver.as_str() };
            metrics.attempt(by, attempt.role, outcome);
        }
        // Whoever left was not refused.
        let was_refused = matches!(record.outcome, "refused" | "released") && record.status != 499;
        if was_refused && !record.error_type.is_empty() {
            metrics.rejection(record.error_type);
        }
        for attempt in record.attempts.iter().filter(|attempt| attempt.server.is_some()) {
            metrics.upstream_attempt(&attempt.provider, attempt.outcome);
        }
        if record.error_type == "panic" {
            metrics.panicked();
        }
    }

    /// Whether somebody who did not say who they are gets a line: one a second, so that nobody can flood the log.
    fn is_logged(&self, record: &Record) -> bool {
        if record.authenticated || record.outcome != "refused" {
            return true;
        }
        let mut last = self.strangers.lock();
        let now = Instant::now();
        if last.is_some_and(|last| now.duration_since(last) < STRANGERS_EVERY) {
            self.metrics.log_lines("suppressed", 1);
            return false;
        }
        *last = Some(now);
        true
    }
}

/// Watches copies of requests: they cost tokens and have spans, and are no requests.
pub struct ObserveShadows(pub Arc<Observe>);

impl Observer for ObserveShadows {
    fn opened(&self) {}

    fn closed(&self, record: Record) {
        let Some(receipt) = &record.receipt else { return };
        let served = Served { route: &record.route, model: &record.model, variant: &record.variant };
        self.0.metrics.settled(served, &record.tenant, receipt);
        if record.error_type == "panic" {
            self.0.metrics.panicked();
        }
        let record = Arc::new(record);
        for sink in &self.0.traces {
            sink.write(&record);
        }
    }
}

impl Observer for Observe {
    fn opened(&self) {
        self.metrics.in_flight(1);
    }

    fn closed(&self, record: Record) {
        self.count(&record);
        let record = Arc::new(record);
        if self.is_logged(&record) {
            if let Some(log) = &self.log {
                log.write(&record);
            }
            // Probes would drown everything else.
            if !matches!(record.op, "health" | "root") {
                for sink in &self.traces {
                    sink.write(&record);
                }
                let mut recent = self.recent.lock();
                if recent.len() == RECENT_MAX {
                    recent.pop_front();
                }
                recent.push_back(record);
            }
        }
        // Last, so that whoever sees nobody in flight knows that everything was said.
        self.metrics.in_flight(-1);
    }
}
