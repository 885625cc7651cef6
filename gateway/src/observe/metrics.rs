//! All metrics: one typed method for everything that is counted. `table` has their names, labels and buckets.
//!
//! Labels come from closed sets (configuration, enums), or are bounded: so many values have a series, the rest share one.
//! Money is counted in integer nano-dollars and scaled when it is written out, so that sums stay exact. One registry a
//! gateway: parallel tests share nothing.

mod engine;
mod table;
mod text;

use parking_lot::Mutex;
use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use prometheus::{
    CounterVec, GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry,
};

pub use engine::EngineStep;

use super::labels::{Bounded, Vocabulary};
use crate::accounting::core::NanoUsd;
use crate::accounting::feedback::Score;
use crate::accounting::settlement::Receipt;

/// One row of the table that dashboards and the golden file read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Family {
    pub name: &'static str,
    pub kind: &'static str,
    pub labels: &'static [&'static str],
    pub help: &'static str,
}

/// The name that everybody uses, and the demo.
const CORRECT: &str = "correct";

/// Which request a number belongs to.
#[derive(Clone, Copy, Debug)]
pub struct Served<'a> {
    pub route: &'a str,
    pub model: &'a str,
    pub variant: &'a str,
}

/// Whose judgement of what.
#[derive(Clone, Copy, Debug)]
pub struct Judged<'a> {
    pub tenant: &'a str,
    pub route: &'a str,
    pub variant: &'a str,
}

/// What a key may spend on a day, and has.
#[derive(Clone, Copy, Debug)]
pub struct Budget<'a> {
    pub tenant: &'a str,
    pub key: &'a str,
    pub limit: NanoUsd,
    pub spent: NanoUsd,
}

pub struct Metrics {
    registry: Registry,
    families: Vec<Family>,
    tenants: Bounded,
    keys: Bounded,
    requests: IntCounterVec,
    duration: HistogramVec,
    first_token: HistogramVec,
    per_output_token: HistogramVec,
    inter_token: HistogramVec,
    overhead: HistogramVec,
    aborts: IntCounterVec,
    attempts: IntCounterVec,
    tokens: IntCounterVec,
    cost: IntCounterVec,
    provider_cost: IntCounterVec,
    settled: IntCounterVec,
    unpriced: IntGaugeVec,
    in_flight: IntGauge,
    limit_decisions: IntCounterVec,
    reserved_tokens: IntGauge,
    reserved_usd: IntGauge,
    budget_exceeded: IntCounterVec,
    unbilled: IntCounter,
    unpriced_services: IntCounterVec,
    budget_limit: IntGaugeVec,
    budget_spent: IntGaugeVec,
    cache_requests: IntCounterVec,
    cache_saved_tokens: IntCounterVec,
    cache_saved_usd: IntCounterVec,
    cache_bytes: IntGauge,
    cache_waiting: IntGauge,
    shadows: IntCounterVec,
    upstream_attempts: IntCounterVec,
    feedback_words: Mutex<Vocabulary>,
    feedback: IntCounterVec,
    feedback_revised: IntCounterVec,
    feedback_score: HistogramVec,
    rejections: IntCounterVec,
    authentications: IntCounterVec,
    jwks_age: GaugeVec,
    tls_handshakes: IntCounterVec,
    panics: IntCounter,
    reloads: IntCounterVec,
    config_info: IntGaugeVec,
    store_up: IntGaugeVec,
    store_calls: IntCounterVec,
    ledger_lag: GaugeVec,
    ledger_queue: IntGauge,
    ledger_wal: IntGauge,
    ledger_failures: IntCounter,
    ledger_recovered: IntCounterVec,
    spans: IntCounterVec,
    span_queue: IntGaugeVec,
    span_export: HistogramVec,
    log_lines: IntCounterVec,
    runtime_requests: IntGaugeVec,
    runtime_queued: IntGaugeVec,
    runtime_kv_blocks: IntGaugeVec,
    runtime_queue: HistogramVec,
    runtime_step: HistogramVec,
    runtime_batch: HistogramVec,
    runtime_prompt_tokens: IntCounterVec,
    runtime_generated_tokens: IntCounterVec,
    runtime_prefix_tokens: IntCounterVec,
    runtime_preemptions: IntCounterVec,
    runtime_recomputed_tokens: IntCounterVec,
    runtime_step_parts: CounterVec,
    runtime_decode_steps: IntCounterVec,
    runtime_stuck: IntGaugeVec,
    runtime_in_step: GaugeVec,
    runtime_failures: IntCounterVec,
    runtime_models: IntGaugeVec,
    runtime_memory: IntGaugeVec,
    runtime_load: GaugeVec,
}

impl Metrics {
    /// A route's variant that may be asked, in this role, reads zero until it is.
    pub fn serves(&self, served: Served<'_>, role: &str, is_cached: bool) {
        let labels = [served.route, served.model, served.variant];
        for histogram in [&self.duration, &self.first_token, &self.per_output_token, &self.inter_token] {
            histogram.with_label_values(&labels);
        }
        let with = |more: &'static str| [served.route, served.model, served.variant, more];
        for phase in ["queue", "prefill", "stream"] {
            self.aborts.with_label_values(&with(phase));
        }
        for outcome in ["answered", "failed", "failed_over"] {
            self.attempts.with_label_values(&[served.route, served.model, served.variant, role, outcome]);
        }
        let caches: &[&str] = if is_cached { &["none", "miss", "hit"] } else { &["none"] };
        let refusals = crate::refusal::Refusal::every();
        let described = refusals.iter().map(crate::refusal::Refusal::describe);
        let ours: BTreeSet<&str> = described.filter(|it| it.status >= 500).map(|it| it.code).collect();
        for cache in caches {
            for stream in ["true", "false"] {
                let [route, model, variant] = labels;
                self.requests.with_label_values(&[route, model, variant, "chat", "2xx", "", stream, cache]);
                // An outage that begins between two looks at the counters would else show no increase.
                for error in ours.iter().filter(|_| *cache != "hit") {
                    self.requests.with_label_values(&[route, model, variant, "chat", "5xx", error, stream, cache]);
                }
            }
        }
        for value in ["true", "false"] {
            self.may_be_judged(served.route, served.variant, CORRECT, value);
        }
        if is_cached {
            for result in ["hit", "miss", "coalesced", "alone"] {
                self.cache_requests.with_label_values(&[served.route, "exact", result]);
            }
        }
    }

    /// Every model that can be asked, and whether it has no price.
    pub fn unpriced<'a>(&self, models: impl Iterator<Item = (&'a str, bool)>) {
        self.unpriced.reset();
        for (model, is_unpriced) in models {
            self.unpriced.with_label_values(&[model]).set(i64::from(is_unpriced));
        }
    }

    /// The table of families, in the order in which they were made.
    pub fn families(&self) -> &[Family] {
        &self.families
    }

    #[allow(clippy::too_many_arguments, reason = "the labels of one family")]
    pub fn request(&self, served: Served<'_>, op: &str, status: u16, error_type: &str, stream: bool, cache: &str) {
        let stream = if stream { "true" } else { "false" };
        self.requests
            .with_label_values(&[
                served.route,
                served.model,
                served.variant,
                op,
                code_class(status),
                error_type,
                stream,
                cache,
            ])
            .inc();
    }

    pub fn admitted(
        &self,
        served: Served<'_>,
        duration: Duration,
        first_token: Option<Duration>,
        per_output_token: Option<Duration>,
    ) {
        let labels = [served.route, served.model, served.variant];
        self.duration.with_label_values(&labels).observe(duration.as_secs_f64());
        if let Some(first) = first_token {
            self.first_token.with_label_values(&labels).observe(first.as_secs_f64());
        }
        if let Some(each) = per_output_token {
            self.per_output_token.with_label_values(&labels).observe(each.as_secs_f64());
        }
    }

    /// The child to observe with while a stream runs: looked up once, not for every chunk.
    pub fn inter_token(&self, served: Served<'_>) -> Histogram {
        self.inter_token.with_label_values(&[served.route, served.model, served.variant])
    }

    pub fn settled(&self, served: Served<'_>, tenant: &str, receipt: &Receipt) {
        let Served { route, model, variant } = served;
        let (tenant, role) = (self.tenants.label(tenant), receipt.role.as_str());
        for (kind, count) in receipt.usage.kinds() {
            if count > 0 {
                self.tokens.with_label_values(&[route, model, variant, &tenant, role, kind]).inc_by(count);
            }
            if count > 0 && receipt.saved.is_some() {
                self.cache_saved_tokens.with_label_values(&[route, model, variant, &tenant, kind]).inc_by(count);
            }
        }
        if let Some(saved) = receipt.saved {
            self.cache_saved_usd.with_label_values(&[route, model, variant, &tenant]).inc_by(saved.0);
        }
        if let Some(service) = receipt.unpriced_service {
            self.unpriced_services.with_label_values(&[model, service.as_str()]).inc();
        }
        let labels = [route, model, variant, &tenant, role];
        self.cost.with_label_values(&labels).inc_by(receipt.billed.0);
        self.provider_cost.with_label_values(&labels).inc_by(receipt.provider_cost.0);
        let (outcome, source) = (receipt.outcome.as_str(), receipt.usage_source.as_str());
        self.settled.with_label_values(&[route, model, variant, &tenant, role, outcome, source]).inc();
    }

    pub fn overhead(&self, phase: &str, took: Duration) {
        self.overhead.with_label_values(&[phase]).observe(took.as_secs_f64());
    }

    pub fn client_abort(&self, served: Served<'_>, phase: &str) {
        self.aborts.with_label_values(&[served.route, served.model, served.variant, phase]).inc();
    }

    /// `by` is who was asked: not always the one that `Served` of the request says, which is the last.
    pub fn attempt(&self, by: Served<'_>, role: &str, outcome: &str) {
        self.attempts.with_label_values(&[by.route, by.model, by.variant, role, outcome]).inc();
    }

    /// All budgets as they are now. Keys beyond the bound are shown as their sum.
    pub fn budgets<'a>(&self, budgets: impl Iterator<Item = Budget<'a>>) {
        let mut sums: HashMap<[String; 2], [u64; 2]> = HashMap::new();
        for Budget { tenant, key, limit, spent } in budgets {
            let sum = sums.entry([self.tenants.label(tenant), self.keys.label(key)]).or_default();
            *sum = [sum[0].saturating_add(limit.0), sum[1].saturating_add(spent.0)];
        }
        for ([tenant, key], [limit, spent]) in &sums {
            let labels = [tenant.as_str(), key.as_str()];
            self.budget_limit.with_label_values(&labels).set(i64::try_from(*limit).unwrap_or(i64::MAX));
            self.budget_spent.with_label_values(&labels).set(i64::try_from(*spent).unwrap_or(i64::MAX));
        }
    }

    pub fn in_flight(&self, change: i64) {
        self.in_flight.add(change);
    }

    pub fn requests_in_flight(&self) -> i64 {
        self.in_flight.get()
    }

    pub fn limit_decision(&self, scope: &str, kind: &str, allowed: bool) {
        let decision = if allowed { "allowed" } else { "denied" };
        self.limit_decisions.with_label_values(&[scope, kind, decision]).inc();
    }

    /// A rule that warns or throttles was passed by one more request.
    pub fn budget_exceeded(&self, rule: &str, mode: &str) {
        self.budget_exceeded.with_label_values(&[rule, mode]).inc();
    }

    /// What strict budgets kept from being billed, because it was beyond what they had reserved.
    pub fn unbilled(&self, nano_usd: NanoUsd) {
        self.unbilled.inc_by(nano_usd.0);
    }

    /// What limits hold has grown by so much (a negative change: shrunk).
    pub fn reserved(&self, tokens: i64, nano_usd: i64) {
        self.reserved_tokens.add(tokens);
        self.reserved_usd.add(nano_usd);
    }

    pub fn cache_request(&self, route: &str, result: &str) {
        self.cache_requests.with_label_values(&[route, "exact", result]).inc();
    }

    pub fn shadow(&self, route: &str, variant: &str, outcome: &str) {
        self.shadows.with_label_values(&[route, variant, outcome]).inc();
    }

    pub fn upstream_attempt(&self, upstream: &str, outcome: &str) {
        self.upstream_attempts.with_label_values(&[upstream, outcome]).inc();
    }

    /// A judgement that counts from now on.
    pub fn feedback(&self, by: Judged<'_>, name: &str, score: &Score) {
        let (name, value) = self.feedback_words.lock().words(by.tenant, name, score);
        self.may_be_judged(by.route, by.variant, &name, &value);
        self.feedback.with_label_values(&[by.route, by.variant, &name, &value]).inc();
        if let Score::Number(number) = score {
            self.feedback_score.with_label_values(&[by.route, by.variant, &name]).observe(*number);
        }
    }

    /// A judgement that counts no longer.
    pub fn feedback_revised(&self, by: Judged<'_>, name: &str, old: &Score) {
        let (name, value) = self.feedback_words.lock().words(by.tenant, name, old);
        self.feedback_revised.with_label_values(&[by.route, by.variant, &name, &value]).inc();
    }

    /// A value that reads zero, and so do its revisions: from no series to 1 is no increase. Who may say `true` may say
    /// `false`.
    fn may_be_judged(&self, route: &str, variant: &str, name: &str, value: &str) {
        let values = if matches!(value, "true" | "false") { &["true", "false"][..] } else { &[value] };
        for value in values {
            self.feedback.with_label_values(&[route, variant, name, value]);
            self.feedback_revised.with_label_values(&[route, variant, name, value]);
        }
    }

    pub fn cache_waiting(&self, change: i64) {
        self.cache_waiting.add(change);
    }

    pub fn cache_bytes(&self, bytes: u64) {
        self.cache_bytes.set(bytes as i64);
    }

    pub fn rejection(&self, reason: &str) {
        self.rejections.with_label_values(&[reason]).inc();
    }

    /// A credential was looked at, or was missing.
    pub fn authenticated(&self, method: &str, result: &str) {
        self.authentications.with_label_values(&[method, result]).inc();
    }

    /// Issuers, and how old their keys are; without any, there is nothing to show.
    pub fn jwks_ages<'a>(&self, ages: impl Iterator<Item = (&'a str, Option<Duration>)>) {
        self.jwks_age.reset();
        for (issuer, age) in ages {
            if let Some(age) = age {
                self.jwks_age.with_label_values(&[issuer]).set(age.as_secs_f64());
            }
        }
    }

    pub fn tls_handshake(&self, result: &str) {
        self.tls_handshakes.with_label_values(&[result]).inc();
    }

    pub fn panicked(&self) {
        self.panics.inc();
    }

    pub fn reload(&self, applied: bool) {
        let result = if applied { "applied" } else { "rejected" };
        self.reloads.with_label_values(&[result]).inc();
    }

    pub fn config(&self, hash: &str) {
        self.config_info.reset();
        self.config_info.with_label_values(&[hash]).set(1);
    }

    pub fn store_up(&self, store: &str, up: bool) {
        self.store_up.with_label_values(&[store]).set(i64::from(up));
    }

    /// What became of a call to the counters that gateways share.
    pub fn store_call(&self, result: &str) {
        self.store_calls.with_label_values(&[result]).inc();
    }

    pub fn ledger(&self, queue_rows: usize, wal_bytes: u64, lag: Duration) {
        self.ledger_queue.set(queue_rows as i64);
        self.ledger_wal.set(wal_bytes as i64);
        self.ledger_lag.with_label_values::<&str>(&[]).set(lag.as_secs_f64());
    }

    pub fn ledger_failure(&self) {
        self.ledger_failures.inc();
    }

    pub fn ledger_recovered(&self, outcome: &str, rows: usize) {
        self.ledger_recovered.with_label_values(&[outcome]).inc_by(rows as u64);
    }

    pub fn span(&self, sink: &str, result: &str, count: u64) {
        self.spans.with_label_values(&[sink, result]).inc_by(count);
    }

    /// A sink that is there and has had nothing to do reads zero.
    pub fn span_sink(&self, sink: &str) {
        for result in ["exported", "dropped", "failed", "rejected", "sampled_out"] {
            self.spans.with_label_values(&[sink, result]);
        }
        self.span_queue.with_label_values(&[sink]);
        self.span_export.with_label_values(&[sink]);
    }

    pub fn span_queue(&self, sink: &str, change: i64) {
        self.span_queue.with_label_values(&[sink]).add(change);
    }

    pub fn span_export(&self, sink: &str, took: Duration) {
        self.span_export.with_label_values(&[sink]).observe(took.as_secs_f64());
    }

    pub fn log_lines(&self, result: &str, lines: u64) {
        self.log_lines.with_label_values(&[result]).inc_by(lines);
    }
}

fn code_class(status: u16) -> &'static str {
    match status {
        200..=299 => "2xx",
        300..=399 => "3xx",
        400..=499 => "4xx",
        _ => "5xx",
    }
}

#[cfg(test)]
mod tests;
