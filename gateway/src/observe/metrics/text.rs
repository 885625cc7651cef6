//! The families as text.

use prometheus::proto::MetricType;

use super::{Metrics, NanoUsd};

/// Families whose integer value is written divided by 10⁹.
const IN_BILLIONTHS: [&str; 7] = [
    "gateway_cost_usd_total",
    "gateway_provider_cost_usd_total",
    "gateway_cache_saved_usd_total",
    "gateway_unbilled_usd_total",
    "gateway_reserved_usd",
    "gateway_budget_limit_usd",
    "gateway_budget_spent_usd",
];

impl Metrics {
    /// Prometheus text exposition, version 0.0.4. Bucket edges are written with a decimal point (`le="1.0"`), as
    /// OpenMetrics does, so that a later change of format does not start new series.
    pub fn encode(&self) -> String {
        use std::fmt::Write;
        let mut out = String::with_capacity(16 * 1024);
        for family in self.registry.gather() {
            let name = family.name();
            let kind = match family.get_field_type() {
                MetricType::COUNTER => "counter",
                MetricType::GAUGE => "gauge",
                MetricType::HISTOGRAM => "histogram",
                MetricType::SUMMARY | MetricType::UNTYPED => "untyped",
            };
            let in_billionths = IN_BILLIONTHS.contains(&name);
            // Writing into a String has no way to fail.
            let _ = writeln!(out, "# HELP {name} {}\n# TYPE {name} {kind}", family.help());
            for metric in family.get_metric() {
                let labels: Vec<String> = metric
                    .get_label()
                    .iter()
                    .map(|label| format!("{}=\"{}\"", label.name(), escape(label.value())))
                    .collect();
                let labels = labels.join(",");
                let braces = |extra: &str| match (labels.is_empty(), extra.is_empty()) {
                    (true, true) => String::new(),
                    (false, false) => format!("{{{labels},{extra}}}"),
                    _ => format!("{{{labels}{extra}}}"),
                };
                match family.get_field_type() {
                    MetricType::COUNTER if in_billionths => {
                        let nano = metric.get_counter().get_value() as u64;
                        let _ = writeln!(out, "{name}{} {}", braces(""), NanoUsd(nano));
                    }
                    MetricType::COUNTER => {
                        let _ = writeln!(out, "{name}{} {}", braces(""), metric.get_counter().get_value());
                    }
                    MetricType::GAUGE if in_billionths => {
                        let nano = metric.get_gauge().get_value() as u64;
                        let _ = writeln!(out, "{name}{} {}", braces(""), NanoUsd(nano));
                    }
                    MetricType::GAUGE => {
                        let _ = writeln!(out, "{name}{} {}", braces(""), metric.get_gauge().get_value());
                    }
                    MetricType::HISTOGRAM => {
                        let histogram = metric.get_histogram();
                        for bucket in histogram.get_bucket() {
                            let edge = format!("le=\"{:?}\"", bucket.upper_bound());
                            let _ = writeln!(out, "{name}_bucket{} {}", braces(&edge), bucket.cumulative_count());
                        }
                        let count = histogram.get_sample_count();
                        let _ = writeln!(out, "{name}_bucket{} {count}", braces("le=\"+Inf\""));
                        let _ = writeln!(out, "{name}_sum{} {}", braces(""), histogram.get_sample_sum());
                        let _ = writeln!(out, "{name}_count{} {count}", braces(""));
                    }
                    MetricType::SUMMARY | MetricType::UNTYPED => {}
                }
            }
        }
        out
    }
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
