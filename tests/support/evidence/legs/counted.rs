//! Every counter of `/metrics` that requests move, summed anew from the other witnesses.

use super::*;

impl Evidence {
    pub(super) fn counted(&self, index: &Index<'_>, found: &mut Vec<String>) {
        let mut tokens = Sums::default();
        let (mut cost, mut provider_cost, mut saved) = (Sums::default(), Sums::default(), Sums::default());
        let (mut saved_tokens, mut settled) = (Sums::default(), Sums::default());
        let mut admitted = Sums::default();
        for row in self.rows.iter().filter(|row| row.outcome != "failed_over") {
            let labels = [
                ("route", &row.route),
                ("model", &row.model),
                ("variant", &row.variant),
                ("tenant", &row.tenant),
                ("role", &row.role),
            ]
            .map(|(name, value)| (name, value.as_str()));
            for (kind, count) in KINDS.iter().zip(row.tokens) {
                tokens.add(labels.iter().copied().chain([("kind", *kind)]), count);
            }
            cost.add(labels, row.billed);
            provider_cost.add(labels, row.provider_cost);
            let end = [("outcome", row.outcome.as_str()), ("usage_source", row.usage_source.as_str())];
            settled.add(labels.into_iter().chain(end), 1);
            if row.is_shared() {
                for (kind, count) in KINDS.iter().zip(row.tokens) {
                    saved_tokens.add(labels[..4].iter().copied().chain([("kind", *kind)]), count);
                }
                saved.add(labels[..4].iter().copied(), row.due());
            }
            if !row.is_shadow() {
                admitted.add(labels[..3].iter().copied(), 1);
            }
        }
        let mut attempted = Sums::default();
        // Whoever was given another's answer, or left while waiting for it, has asked nobody.
        let has_asked = |row: &&LedgerRow| !row.is_shadow() && !row.is_shared() && !index.has_waited_in_vain(row);
        for row in self.rows.iter().filter(has_asked) {
            let labels = [("route", &row.route), ("model", &row.model), ("variant", &row.variant)];
            let labels = labels.into_iter().chain([("role", &row.role), ("outcome", &row.outcome)]);
            attempted.add(labels.map(|(name, value)| (name, value.as_str())), 1);
        }
        let mut left = Sums::default();
        let mut requests = Sums::default();
        let mut refused = Sums::default();
        for line in &self.log {
            let (outcome, error) = (text(line, "outcome"), text(line, "error_type"));
            let class = match outcome {
                "aborted" => "4xx",
                "panicked" | "timed_out" | "cut" => "5xx",
                "failed" if line["status"].as_u64() < Some(400) => "5xx",
                _ => ["2xx", "3xx", "4xx", "5xx"][(line["status"].as_u64().unwrap_or(599) / 100 - 2) as usize],
            };
            let or_none = |name| Some(text(line, name)).filter(|text| !text.is_empty()).unwrap_or("none");
            requests.add(
                [
                    ("route", or_none("route")),
                    ("model", or_none("model")),
                    ("variant", or_none("variant")),
                    ("op", text(line, "op")),
                    ("code_class", class),
                    ("error_type", error),
                    ("stream", if line["stream"] == true { "true" } else { "false" }),
                    ("cache", text(line, "cache")),
                ],
                1,
            );
            if outcome == "aborted" || (outcome == "released" && line["status"] == 499) {
                let phase = if line["ttft_ms"].is_number() { "stream" } else { "before" };
                let served = ["route", "model", "variant"].map(|name| (name, or_none(name)));
                left.add(served.into_iter().chain([("phase", phase)]), 1);
            }
            // Whoever left was not refused.
            if matches!(outcome, "refused" | "released") && line["status"] != 499 {
                refused.add([("reason", error)], 1);
            }
        }
        // Strangers are counted, whether or not they have a line.
        for seen in self.seen.iter().filter(|seen| !index.log.contains_key(seen.request_id.as_str())) {
            let error = seen.error_code.as_deref().unwrap_or("");
            let none = ["route", "model", "variant", "cache"].map(|name| (name, "none"));
            let others = [("op", seen.op), ("code_class", "4xx"), ("error_type", error), ("stream", "false")];
            requests.add(none.into_iter().chain(others), 1);
            refused.add([("reason", error)], 1);
        }
        let mut attempts = Sums::default();
        for span in self.spans.iter().filter(|span| span.attributes.contains_key("glassgate.attempt.number")) {
            if span.get("glassgate.attempt.provider") != "glassgate" {
                let (upstream, outcome) =
                    (span.get("glassgate.attempt.provider"), span.get("glassgate.attempt.outcome"));
                attempts.add([("upstream", upstream), ("outcome", outcome)], 1);
            }
        }
        for (name, expected) in [
            ("gateway_upstream_attempts_total", attempts),
            ("gateway_tokens_total", tokens),
            ("gateway_requests_total", requests),
            ("gateway_rejections_total", refused),
            ("gateway_request_duration_seconds_count", admitted),
            ("gateway_attempts_total", attempted),
            ("gateway_settled_requests_total", settled),
            ("gateway_cache_saved_tokens_total", saved_tokens),
        ] {
            expected.compare(name, &Sums::of(&self.metrics, name, |value| value.parse().unwrap()), found);
        }
        for (name, expected) in [
            ("gateway_cost_usd_total", cost),
            ("gateway_provider_cost_usd_total", provider_cost),
            ("gateway_cache_saved_usd_total", saved),
            ("gateway_budget_spent_usd", self.spent(index)),
        ] {
            expected.compare(name, &Sums::of(&self.metrics, name, nano_usd), found);
        }
        // Who left before the first token is told apart by the engine alone.
        let metrics = self.metrics.replace("phase=\"queue\"", "phase=\"before\"");
        let metrics = metrics.replace("phase=\"prefill\"", "phase=\"before\"");
        let name = "gateway_client_aborts_total";
        left.compare(name, &Sums::of(&metrics, name, |value| value.parse().unwrap()), found);
        let known = self.log.iter().filter(|line| line["key_id"].is_string()).count();
        for (phase, expected) in [("auth", known), ("admit", index.terminal.len()), ("total", known)] {
            let label = format!("phase=\"{phase}\"");
            let counted = metric(&self.metrics, "gateway_overhead_seconds_count", &[label.as_str()]);
            if counted != expected as f64 {
                found.push(format!("metric: {counted} overheads of {phase}, {expected} requests came so far"));
            }
        }
        let none = [
            "gateway_panics_total",
            "gateway_ledger_failures_total",
            "gateway_ledger_queue_rows",
            "gateway_reserved_tokens",
            "gateway_reserved_usd",
            "runtime_failures_total",
        ];
        for family in none {
            if metric(&self.metrics, family, &[]) != 0.0 {
                found.push(format!("metric: {family} is not 0"));
            }
        }
    }

    /// What every key was billed. (All on one day, unless it was midnight meanwhile: then nothing is known of today.)
    fn spent(&self, index: &Index<'_>) -> Sums {
        let mut spent = Sums::default();
        for row in &self.rows {
            let name = index.log.get(row.request_id.as_str()).map_or("", |line| text(line, "key_name"));
            spent.add([("tenant", row.tenant.as_str()), ("key", name)], row.billed);
        }
        spent
    }
}

/// Sums by labels, without those that are zero.
#[derive(Default)]
pub(super) struct Sums(BTreeMap<BTreeMap<String, String>, u64>);

impl Sums {
    pub(super) fn add<'l>(&mut self, labels: impl IntoIterator<Item = (&'l str, &'l str)>, count: u64) {
        if count > 0 {
            let labels = labels.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
            *self.0.entry(labels).or_default() += count;
        }
    }

    /// One family of `/metrics`.
    pub(super) fn of(metrics: &str, family: &str, number: impl Fn(&str) -> u64) -> Sums {
        let mut sums = Sums::default();
        for line in metrics.lines() {
            let Some((labels, value)) = line
                .strip_prefix(family)
                .and_then(|rest| rest.strip_prefix('{'))
                .and_then(|rest| rest.rsplit_once("} "))
            else {
                continue;
            };
            let labels = labels.trim_end_matches('"').split("\",").filter_map(|label| label.split_once("=\""));
            sums.add(labels, number(value));
        }
        sums
    }

    pub(super) fn compare(&self, family: &str, counted: &Sums, found: &mut Vec<String>) {
        for labels in self.0.keys().chain(counted.0.keys()).collect::<BTreeSet<_>>() {
            let of = |sums: &Sums| sums.0.get(labels).copied().unwrap_or(0);
            let (is, said) = (of(self), of(counted));
            if is != said {
                found.push(format!("metric: {family} {labels:?} is {said}, and should be {is}"));
            }
        }
    }
}
