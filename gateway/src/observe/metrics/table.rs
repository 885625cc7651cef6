//! Every family: its name, labels, buckets and help. What dashboards and the golden file read.

use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    CounterVec, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

use parking_lot::Mutex;

use super::{Family, Metrics};
use crate::observe::labels::Bounded;

/// Tenants that get a label of their own; the rest share `other`.
pub(super) const TENANTS_MAX: usize = 200;
/// Keys likewise.
pub(super) const KEYS_MAX: usize = 200;
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
            budget_exceeded: make.counters(
                "gateway_budget_exceeded_total",
                &["rule", "mode"],
                "Requests let in beyond the limit of a rule that only warns or throttles",
            )?,
            unbilled: make.counter(
                "gateway_unbilled_usd_total",
                "US dollars beyond what a strict budget had reserved, which nobody was billed",
            )?,
            unpriced_services: make.counters(
                "gateway_unpriced_service_tiers_total",
                &["model", "service"],
                "Answers in a service tier that has no price of its own; they cost what others do",
            )?,
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
            authentications: make.counters(
                "gateway_auth_total",
                &["method", "result"],
                "Credentials by their form (admin: the token of operators) and what became of them: accepted, \
                 accepted_previous (a secret in its grace after a rotation) or the error code",
            )?,
            jwks_age: make.seconds(
                "gateway_jwks_age_seconds",
                &["issuer"],
                "Age of the last good set of keys that an issuer published; after an hour its tokens are refused",
            )?,
            tls_handshakes: make.counters(
                "gateway_tls_handshakes_total",
                &["result"],
                "Handshakes of clients: accepted, failed (also for want of a certificate that we ask for) or too_slow",
            )?,
            panics: make.counter("gateway_panics_total", "Requests that ended in a panic of our own code")?,
            reloads: make.counters("gateway_config_reloads_total", &["result"], "Configuration reloads")?,
            config_info: make.gauges("gateway_config_info", &["hash"], "1 for the configuration that serves")?,
            store_up: make.gauges("gateway_store_up", &["store"], "1 while the store takes writes")?,
            store_calls: make.counters(
                "gateway_redis_calls_total",
                &["result"],
                "Calls to the counters that gateways share: answered, late (after storage.redis_deadline), failed, or \
                 not_made while they are out of reach, when nobody waits",
            )?,
            ledger_lag: make.seconds(
                "gateway_ledger_lag_seconds",
                &[],
                "Age of the oldest row that is not yet in the store",
            )?,
            ledger_queue: make
                .gauge("gateway_ledger_queue_rows", "Rows that are in the log and not yet in the store")?,
            ledger_wal: make.gauge("gateway_ledger_wal_bytes", "Size of the ledger's write-ahead log")?,
            ledger_failures: make.counter("gateway_ledger_failures_total", "Failed writes to the log or the store, and losses that a start found")?,
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
        for kind in ["requests", "tokens", "concurrency", "budget", "feedback", "lookups"] {
            for decision in ["allowed", "denied"] {
                self.limit_decisions.with_label_values(&["key", kind, decision]);
            }
        }
        for result in ["accepted", "failed", "too_slow"] {
            self.tls_handshakes.with_label_values(&[result]);
        }
        for result in ["written", "dropped", "suppressed"] {
            self.log_lines.with_label_values(&[result]);
        }
        for (method, result) in [
            ("key", "accepted"),
            ("key", "accepted_previous"),
            ("key", "invalid_api_key"),
            ("key", "too_many_failures"),
            ("jwt", "accepted"),
            ("none", "missing_api_key"),
            ("admin", "accepted"),
            ("admin", "invalid_admin_token"),
            ("admin", "too_many_failures"),
        ] {
            self.authentications.with_label_values(&[method, result]);
        }
        self.store_up("ledger", true);
        self.store_up("keys", true);
        for result in ["answered", "late", "failed", "not_made"] {
            self.store_calls.with_label_values(&[result]);
        }
        self.ledger(0, 0, Duration::ZERO);
    }
}
