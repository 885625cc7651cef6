//! All metrics: names, labels, buckets, and one typed method for everything that is counted.
//!
//! Labels come from closed sets (configuration, enums), or are bounded: so many values have a series, the rest share one.
//! Money is counted in integer nano-dollars and scaled when it is written out, so that sums stay exact. One registry a
//! gateway: parallel tests share nothing.

mod engine;
mod text;

use parking_lot::Mutex;
use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    CounterVec, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry,
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

/// Families whose integer value is written divided by 10⁹.
const IN_BILLIONTHS: [&str; 6] = [
    "gateway_cost_usd_total",
    "gateway_provider_cost_usd_total",
    "gateway_cache_saved_usd_total",
    "gateway_reserved_usd",
    "gateway_budget_limit_usd",
    "gateway_budget_spent_usd",
];

/// Tenants that get a label of their own; the rest share `other`.
const TENANTS_MAX: usize = 200;
/// Keys likewise.
const KEYS_MAX: usize = 200;
/// The name that everybody uses, and the demo.
const CORRECT: &str = "correct";

/// Request durations: OpenTelemetry's list for GenAI clients, and two more for long streams.
const DURATION: &[f64] =
    &[0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84, 327.68];
/// Time to first token: OpenTelemetry's list, the 2 s edge of the usual objective, and room for saturation.
const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0,
];
/// Time per token: OpenTelemetry's list, with the steps of a small local model below it.
const PER_TOKEN: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];
/// What we add ourselves: microseconds, where it is well.
const OVERHEAD: &[f64] =
    &[0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0];
const STEP: &[f64] = &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0];
/// Scores, on whatever scale clients have: -1 to 1, 1 to 5, 0 to 10, per cent.
const SCORE: &[f64] = &[
    -1.0, -0.5, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0,
    25.0, 50.0, 75.0, 100.0,
];
const BATCH: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0];

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
    panics: IntCounter,
    reloads: IntCounterVec,
    config_info: IntGaugeVec,
    store_up: IntGaugeVec,
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

/// Makes families, registers them, and remembers them for the table.
struct Maker {
    registry: Registry,
    families: Vec<Family>,
}

impl Maker {
    fn register<C: Collector + Clone + 'static>(
        &mut self,
        made: prometheus::Result<C>,
        family: Family,
    ) -> prometheus::Result<C> {
        let collector = made?;
        self.registry.register(Box::new(collector.clone()))?;
        self.families.push(family);
        Ok(collector)
    }

    fn counters(
        &mut self,
        name: &'static str,
        labels: &'static [&'static str],
        help: &'static str,
    ) -> prometheus::Result<IntCounterVec> {
        self.register(IntCounterVec::new(Opts::new(name, help), labels), Family { name, kind: "counter", labels, help })
    }

    fn counter(&mut self, name: &'static str, help: &'static str) -> prometheus::Result<IntCounter> {
        self.register(IntCounter::new(name, help), Family { name, kind: "counter", labels: &[], help })
    }

    fn gauges(
        &mut self,
        name: &'static str,
        labels: &'static [&'static str],
        help: &'static str,
    ) -> prometheus::Result<IntGaugeVec> {
        self.register(IntGaugeVec::new(Opts::new(name, help), labels), Family { name, kind: "gauge", labels, help })
    }

    fn gauge(&mut self, name: &'static str, help: &'static str) -> prometheus::Result<IntGauge> {
        self.register(IntGauge::new(name, help), Family { name, kind: "gauge", labels: &[], help })
    }

    fn seconds(
        &mut self,
        name: &'static str,
        labels: &'static [&'static str],
        help: &'static str,
    ) -> prometheus::Result<GaugeVec> {
        self.register(GaugeVec::new(Opts::new(name, help), labels), Family { name, kind: "gauge", labels, help })
    }

    fn counted_seconds(
        &mut self,
        name: &'static str,
        labels: &'static [&'static str],
        help: &'static str,
    ) -> prometheus::Result<CounterVec> {
        self.register(CounterVec::new(Opts::new(name, help), labels), Family { name, kind: "counter", labels, help })
    }

    fn histograms(
        &mut self,
        name: &'static str,
        labels: &'static [&'static str],
        buckets: &[f64],
        help: &'static str,
    ) -> prometheus::Result<HistogramVec> {
        self.register(
            HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels),
            Family { name, kind: "histogram", labels, help },
        )
    }
}

const SERVED: &[&str] = &["route", "model", "variant"];
const FEEDBACK: &[&str] = &["route", "variant", "name", "value"];

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// A registry of its own with every family in it.
    #[allow(
        clippy::expect_used,
        reason = "fails only on a clash of names in the table below, which every test would see"
    )]
    pub fn new() -> Self {
        Self::try_new().expect("the metric table is consistent")
    }

    fn try_new() -> prometheus::Result<Self> {
        let mut make = Maker { registry: Registry::new(), families: Vec::new() };
        let metrics = Metrics {
            requests: make.counters(
                "gateway_requests_total",
                &["route", "model", "variant", "op", "code_class", "error_type", "stream", "cache"],
                "Requests whose head was accepted, by how they ended",
            )?,
            duration: make.histograms(
                "gateway_request_duration_seconds",
                SERVED,
                DURATION,
                "From the accepted head to the last byte, of admitted requests",
            )?,
            first_token: make.histograms(
                "gateway_time_to_first_token_seconds",
                SERVED,
                FIRST_TOKEN,
                "From the accepted head to the first produced token",
            )?,
            per_output_token: make.histograms(
                "gateway_time_per_output_token_seconds",
                SERVED,
                PER_TOKEN,
                "(last token - first token) / (output tokens - 1), of answers with two tokens or more",
            )?,
            inter_token: make.histograms(
                "gateway_inter_token_latency_seconds",
                SERVED,
                PER_TOKEN,
                "Between one chunk of text and the next",
            )?,
            overhead: make.histograms(
                "gateway_overhead_seconds",
                &["phase"],
                OVERHEAD,
                "Time that the gateway itself took of a known caller's request: not waiting for a model, an upstream, \
                 another request or the client",
            )?,
            aborts: make.counters(
                "gateway_client_aborts_total",
                &["route", "model", "variant", "phase"],
                "Requests whose client left: before anybody worked on them (queue), before the first token (prefill), \
                 or during the answer (stream)",
            )?,
            attempts: make.counters(
                "gateway_attempts_total",
                &["route", "model", "variant", "role", "outcome"],
                "Attempts at any model, by what they were for and how they ended, as in the ledger",
            )?,
            tokens: make.counters(
                "gateway_tokens_total",
                &["route", "model", "variant", "tenant", "role", "kind"],
                "Tokens by disjoint kind, as in the ledger",
            )?,
            cost: make.counters(
                "gateway_cost_usd_total",
                &["route", "model", "variant", "tenant", "role"],
                "US dollars billed, as in the ledger",
            )?,
            provider_cost: make.counters(
                "gateway_provider_cost_usd_total",
                &["route", "model", "variant", "tenant", "role"],
                "US dollars that it cost us: a provider's prices, or the time of our own device; as in the ledger",
            )?,
            settled: make.counters(
                "gateway_settled_requests_total",
                &["route", "model", "variant", "tenant", "role", "outcome", "usage_source"],
                "Admitted requests and shadows by how they ended and where their token counts come from, as in the ledger",
            )?,
            unpriced: make.gauges(
                "gateway_model_unpriced",
                &["model"],
                "1 for a model that has no price and is therefore free, 0 for the others",
            )?,
            in_flight: make.gauge("gateway_in_flight_requests", "Requests that have begun and not yet ended")?,
            limit_decisions: make.counters(
                "gateway_limit_decisions_total",
                &["scope", "kind", "decision"],
                "What limits decided; allowed is what they counted",
            )?,
            reserved_tokens: make
                .gauge("gateway_reserved_tokens", "Tokens that token limits hold for requests under way")?,
            reserved_usd: make.gauge("gateway_reserved_usd", "US dollars that budgets hold for requests under way")?,
            budget_limit: make.gauges(
                "gateway_budget_limit_usd",
                &["tenant", "key"],
                "US dollars that a key may spend on a UTC day; of keys that asked since the start",
            )?,
            budget_spent: make.gauges(
                "gateway_budget_spent_usd",
                &["tenant", "key"],
                "US dollars that a key has spent on the present UTC day; of keys that asked since the start",
            )?,
            cache_requests: make.counters(
                "gateway_cache_requests_total",
                &["route", "kind", "result"],
                "Requests that could be answered from a cache, by what was found",
            )?,
            cache_saved_tokens: make.counters(
                "gateway_cache_saved_tokens_total",
                &["route", "model", "variant", "tenant", "kind"],
                "Tokens that were told again instead of being processed; a part of gateway_tokens_total",
            )?,
            cache_saved_usd: make.counters(
                "gateway_cache_saved_usd_total",
                &["route", "model", "variant", "tenant"],
                "US dollars that callers would have been billed without the cache",
            )?,
            cache_bytes: make.gauge("gateway_cache_bytes", "Answers in the cache")?,
            cache_waiting: make.gauge("gateway_cache_waiting_requests", "Requests that wait for another's answer")?,
            shadows: make.counters(
                "gateway_shadow_requests_total",
                &["route", "variant", "outcome"],
                "Copies of requests: eligible, of these sampled, and how each of those ended",
            )?,
            upstream_attempts: make.counters(
                "gateway_upstream_attempts_total",
                &["upstream", "outcome"],
                "Attempts of requests at remote servers, by how they ended",
            )?,
            feedback: make.counters(
                "gateway_feedback_total",
                FEEDBACK,
                "Judgements of answers, first ones and revisions; its increase less that of \
                 gateway_feedback_revised_total is what was added to those that stand",
            )?,
            feedback_revised: make.counters(
                "gateway_feedback_revised_total",
                FEEDBACK,
                "Judgements that another of the same key replaced, by the value that no longer stands",
            )?,
            feedback_score: make.histograms(
                "gateway_feedback_score",
                &FEEDBACK[..3],
                SCORE,
                "Judgements that are numbers, also those that were revised later; they may be negative, so _sum may fall",
            )?,
            rejections: make.counters("gateway_rejections_total", &["reason"], "Requests refused, by error code")?,
            panics: make.counter("gateway_panics_total", "Requests that ended in a panic of our own code")?,
            reloads: make.counters("gateway_config_reloads_total", &["result"], "Configuration reloads")?,
            config_info: make.gauges("gateway_config_info", &["hash"], "1 for the configuration that serves")?,
            store_up: make.gauges("gateway_store_up", &["store"], "1 while the store takes writes")?,
            ledger_lag: make.seconds(
                "gateway_ledger_lag_seconds",
                &[],
                "Age of the oldest row that is not yet in the store",
            )?,
            ledger_queue: make
                .gauge("gateway_ledger_queue_rows", "Rows that are in the log and not yet in the store")?,
            ledger_wal: make.gauge("gateway_ledger_wal_bytes", "Size of the ledger's write-ahead log")?,
            ledger_failures: make.counter("gateway_ledger_failures_total", "Failed writes to the log or the store")?,
            ledger_recovered: make.counters(
                "gateway_ledger_recovered_rows_total",
                &["outcome"],
                "Rows that this start found in the log of the life before",
            )?,
            spans: make.counters(
                "gateway_telemetry_spans_total",
                &["sink", "result"],
                "Spans by what became of them; the results of a sink add up to all that were built",
            )?,
            span_queue: make.gauges(
                "gateway_telemetry_queue_length",
                &["sink"],
                "Requests whose spans wait for a sink",
            )?,
            span_export: make.histograms(
                "gateway_telemetry_export_seconds",
                &["sink"],
                DURATION,
                "What a sink needs for one batch, with everything that it tries again",
            )?,
            log_lines: make.counters("gateway_access_log_lines_total", &["result"], "Access log lines")?,
            runtime_requests: make.gauges("runtime_requests", &["model", "state"], "Sequences in the engine")?,
            runtime_queued: make.gauges(
                "runtime_queued_requests",
                &["model", "class"],
                "Sequences in the engine's queue as of its last step, by who is served first",
            )?,
            runtime_kv_blocks: make.gauges("runtime_kv_blocks", &["model", "state"], "KV blocks of 32 tokens")?,
            runtime_queue: make.histograms(
                "runtime_queue_seconds",
                &["model", "class"],
                STEP,
                "From submission to admission in the engine",
            )?,
            runtime_step: make.histograms(
                "runtime_step_seconds",
                &["model", "phase"],
                STEP,
                "One engine step; a step with any prefill counts as prefill",
            )?,
            runtime_batch: make.histograms("runtime_batch_size", &["model"], BATCH, "Sequences in one step")?,
            runtime_prompt_tokens: make.counters(
                "runtime_prompt_tokens_total",
                &["model"],
                "Prompt tokens computed",
            )?,
            runtime_generated_tokens: make.counters("runtime_generated_tokens_total", &["model"], "Tokens sampled")?,
            runtime_prefix_tokens: make.counters(
                "runtime_prefix_tokens_total",
                &["model", "result"],
                "Prompt tokens of admitted sequences by what the prefix cache knew of them: hit, regretted (a pool of \
                 twice the size would have known them) or miss",
            )?,
            runtime_preemptions: make.counters(
                "runtime_preemptions_total",
                &["model"],
                "Sequences that gave up their KV blocks for others",
            )?,
            runtime_recomputed_tokens: make.counters(
                "runtime_recomputed_tokens_total",
                &["model"],
                "Tokens computed again, because their blocks had been given up",
            )?,
            runtime_step_parts: make.counted_seconds(
                "runtime_step_part_seconds_total",
                &["model", "part"],
                "Where the engine's time goes: between steps with work to do (gap), and the parts of a step",
            )?,
            runtime_decode_steps: make.counters(
                "runtime_decode_steps_total",
                &["model", "pace"],
                "Steps in which somebody's next token was made, by whether they kept to models.itl_target",
            )?,
            runtime_stuck: make.gauges(
                "runtime_stuck",
                &["model", "why"],
                "1 while sequences wait and none runs: shadows for another model's users, or because nobody fits, which \
                 should never be",
            )?,
            runtime_in_step: make.seconds(
                "runtime_step_under_way_seconds",
                &["model"],
                "How long the step under way has been going on; 0 between steps",
            )?,
            runtime_failures: make.counters(
                "runtime_failures_total",
                &["model"],
                "Sequences that failed in the engine",
            )?,
            runtime_models: make.gauges("runtime_model_state", &["model", "state"], "Versions of a model in each state")?,
            runtime_memory: make.gauges(
                "runtime_model_memory_bytes",
                &["model", "part"],
                "What a model's versions are held to take, by the ledger that admits them",
            )?,
            runtime_load: make.seconds("runtime_model_load_seconds", &["model"], "How long loading took")?,
            tenants: Bounded::to(TENANTS_MAX),
            keys: Bounded::to(KEYS_MAX),
            feedback_words: Mutex::default(),
            families: Vec::new(),
            registry: make.registry.clone(),
        };
        let build = make.gauges("gateway_build_info", &["version"], "1 for the running version")?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        #[cfg(target_os = "linux")]
        make.registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        metrics.show_zeroes();
        Ok(Metrics { families: make.families, ..metrics })
    }

    /// Series that should read zero before anything happened, so that rates have a start.
    fn show_zeroes(&self) {
        for refusal in crate::refusal::Refusal::every() {
            self.rejections.with_label_values(&[refusal.describe().code]);
        }
        for result in ["applied", "rejected"] {
            self.reloads.with_label_values(&[result]);
        }
        for kind in ["requests", "tokens", "concurrency", "budget", "feedback"] {
            for decision in ["allowed", "denied"] {
                self.limit_decisions.with_label_values(&["key", kind, decision]);
            }
        }
        for result in ["written", "dropped", "suppressed"] {
            self.log_lines.with_label_values(&[result]);
        }
        self.store_up("ledger", true);
        self.store_up("keys", true);
        self.ledger(0, 0, Duration::ZERO);
    }

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
mod tests {
    use super::super::labels::{FEEDBACK_LABELS_MAX, FEEDBACK_NAMES_MAX, FEEDBACK_WORDS_OF_TENANT_MAX};
    use super::*;
    use crate::accounting::core::Usage;
    use crate::accounting::row::{Outcome, Role, UsageSource};

    const SERVED: Served<'_> = Served { route: "assistant", model: "glimmer-1", variant: "glimmer-1" };

    fn receipt(billed: u64) -> Receipt {
        Receipt {
            role: Role::Primary,
            outcome: Outcome::Answered,
            usage: Usage::tokens(3, 4),
            usage_source: UsageSource::Counted,
            billed: NanoUsd(billed),
            provider_cost: NanoUsd(0),
            saved: None,
        }
    }

    #[test]
    fn money_is_written_exactly_to_the_nano_dollar() {
        let metrics = Metrics::new();
        for _ in 0..3 {
            metrics.settled(SERVED, "default", &receipt(1_000_000_001));
        }
        let line = metrics.encode().lines().find(|line| line.starts_with("gateway_cost_usd_total{")).map(str::to_owned);
        assert_eq!(line.as_deref().and_then(|line| line.rsplit(' ').next()), Some("3.000000003"));
    }

    #[test]
    fn tenants_beyond_the_bound_share_one_series() {
        let metrics = Metrics::new();
        for i in 0..TENANTS_MAX + 50 {
            metrics.settled(SERVED, &format!("t{i}"), &receipt(1));
        }
        let text = metrics.encode();
        let series = text.lines().filter(|line| line.starts_with("gateway_cost_usd_total{")).count();
        assert_eq!(series, TENANTS_MAX + 1);
        assert!(text.contains("tenant=\"other\""));
    }

    fn judged(tenant: &str) -> Judged<'_> {
        Judged { tenant, route: "assistant", variant: "glimmer-1" }
    }

    fn series(metrics: &Metrics, start: &str) -> usize {
        metrics.encode().lines().filter(|line| line.starts_with(start)).count()
    }

    #[test]
    fn names_and_labels_beyond_the_bound_share_one_series_and_keep_it() {
        let metrics = Metrics::new();
        let label = |i: usize| Score::Label(format!("label {i}"));
        for i in 0..200 {
            let tenant = format!("tenant-{i}");
            metrics.feedback(judged(&tenant), &format!("name-{i}"), &Score::Number(1.0));
            metrics.feedback(judged(&tenant), "name-0", &label(i));
        }
        metrics.feedback_revised(judged("tenant-199"), "name-0", &label(199));
        metrics.feedback_revised(judged("tenant-0"), "name-0", &label(0));
        assert_eq!(series(&metrics, "gateway_feedback_total{"), FEEDBACK_NAMES_MAX + 1 + FEEDBACK_LABELS_MAX + 1);
        let text = metrics.encode();
        let counted = |line: &str| text.lines().any(|found| found == line);
        let labels =
            |value: &str| format!("{{name=\"name-0\",route=\"assistant\",value=\"{value}\",variant=\"glimmer-1\"}}");
        assert!(counted(&format!("gateway_feedback_total{} 184", labels("other"))), "{text}");
        assert!(counted(&format!("gateway_feedback_revised_total{} 1", labels("other"))));
        assert!(counted(&format!("gateway_feedback_revised_total{} 1", labels("label 0"))));
    }

    #[test]
    fn no_tenant_can_use_up_the_words_of_the_others() {
        let metrics = Metrics::new();
        for i in 0..200 {
            metrics.feedback(judged("loud"), &format!("loud-{i}"), &Score::Number(1.0));
        }
        metrics.feedback(judged("quiet"), "tone", &Score::Label("warm".into()));
        assert_eq!(series(&metrics, "gateway_feedback_total{name=\"loud-"), FEEDBACK_WORDS_OF_TENANT_MAX);
        assert_eq!(series(&metrics, "gateway_feedback_total{name=\"tone\",route=\"assistant\",value=\"warm\""), 1);
        // What another tenant makes known later changes nothing for a word that was counted among the others.
        metrics.feedback(judged("quiet"), "loud-199", &Score::Number(1.0));
        metrics.feedback_revised(judged("loud"), "loud-199", &Score::Number(1.0));
        let text = metrics.encode();
        let revised = |name: &str| {
            let start = format!("gateway_feedback_revised_total{{name=\"{name}\"");
            text.lines().find(|line| line.starts_with(&start)).and_then(|line| line.rsplit(' ').next())
        };
        assert_eq!((revised("other"), revised("loud-199")), (Some("1"), Some("0")));
    }

    #[test]
    fn a_judgement_begins_at_zero_with_all_that_it_may_turn_into() {
        let metrics = Metrics::new();
        metrics.serves(SERVED, "primary", false);
        assert_eq!(series(&metrics, "gateway_feedback_total{name=\"correct\""), 2);
        metrics.feedback(judged("quiet"), "useful", &Score::Boolean(true));
        assert_eq!(series(&metrics, "gateway_feedback_total{name=\"useful\""), 2);
        assert_eq!(series(&metrics, "gateway_feedback_revised_total{name=\"useful\""), 2);
    }

    #[test]
    fn keys_beyond_the_bound_are_shown_as_their_sum() {
        let metrics = Metrics::new();
        let names: Vec<String> = (0..KEYS_MAX + 50).map(|i| format!("k{i}")).collect();
        let budgets = || {
            let budget = |key| Budget { tenant: "acme", key, limit: NanoUsd(5_000_000_000), spent: NanoUsd(1) };
            names.iter().map(move |key| budget(key.as_str()))
        };
        metrics.budgets(budgets());
        metrics.budgets(budgets());
        let text = metrics.encode();
        assert_eq!(text.lines().filter(|line| line.starts_with("gateway_budget_limit_usd{")).count(), KEYS_MAX + 1);
        assert!(text.contains("gateway_budget_limit_usd{key=\"other\",tenant=\"acme\"} 250.000000000"));
        assert!(text.contains("gateway_budget_spent_usd{key=\"other\",tenant=\"acme\"} 0.000000050"));
    }

    #[test]
    fn bucket_edges_have_one_spelling() {
        let metrics = Metrics::new();
        metrics.admitted(SERVED, Duration::from_millis(5), Some(Duration::from_millis(1)), None);
        let text = metrics.encode();
        assert!(text.contains("le=\"1.0\"") && text.contains("le=\"+Inf\"") && !text.contains("le=\"1\""));
    }
}
