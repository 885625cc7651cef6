//! What serves, for people.

use serde_json::{Value, json};

use crate::accounting::core::NanoUsd;
use crate::admission::core::rule::{Rule, Sharing};
use crate::api::limit::{Of, Per, scope};
use crate::config::{Config, Limits, SinkKind, TraceSink};

/// Secrets print as `***`.
pub fn config(config: &Config, rejected: Option<&str>) -> Value {
    json!({
        "config_hash": config.hash,
        "rejected": rejected,
        "files": config.files,
        "price_version": config.prices.version,
        "listen": {"data": config.gateway.data, "admin": config.gateway.admin},
        "data_dir": config.gateway.data_dir,
        "telemetry": {
            "environment": config.gateway.environment,
            "traces": config.gateway.traces.iter().map(trace_sink).collect::<Vec<_>>(),
        },
        "limits": limits(&config.gateway.limits, config.gateway.limits_shared),
        "rules": config.gateway.rules.iter().map(|rule| self::rule(rule)).collect::<Vec<_>>(),
        "models": config.models.iter().map(|(name, model)| (name.clone(), json!({"source": model.source.to_string(), "public": model.public, "output_max": model.output_max}))).collect::<serde_json::Map<_, _>>(),
        "upstreams": config.upstreams.values().map(|upstream| (upstream.name.clone(), json!({
            "host": upstream.host, "port": upstream.port, "tls": upstream.tls, "http2": upstream.http2,
            "api_key": upstream.api_key,
        }))).collect::<serde_json::Map<_, _>>(),
        "routes": config.routes.iter().map(|route| json!({
            "name": route.name,
            "split": route.split.iter().map(|(name, weight)| (name.clone(), json!(weight))).collect::<serde_json::Map<_, _>>(),
            "fallback": route.fallback,
            "priority": route.priority.as_str(),
            "shadow": route.shadow.as_ref().map(|rule| json!({"variant": rule.variant, "sample": rule.sample})),
            "cache": route.cache.map(|rule| json!({"ttl_seconds": rule.ttl.as_secs_f64(), "sampled": rule.sampled})),
        })).collect::<Vec<_>>(),
    })
}

fn rule(rule: &Rule) -> Value {
    let limit = match rule.of {
        Of::Usd => json!(NanoUsd(rule.limit).to_string()),
        _ => json!(rule.limit),
    };
    json!({
        "name": rule.name, "limit": limit, "of": rule.of.as_str(), "per": rule.per.map(Per::as_str),
        "scope": scope(&rule.by), "mode": rule.mode.as_str(),
    })
}

/// What a key may do that has no limits of its own; `glassgate keys list` shows those.
fn limits(limits: &Limits, shared: Option<Sharing>) -> Value {
    json!({
        "requests_per_minute": limits.requests_per_minute,
        "tokens_per_minute": limits.tokens_per_minute,
        "concurrency": limits.concurrency,
        "usd_per_day": limits.per_day.to_string(),
        "shared": shared.map(Sharing::taken_ahead), "down": shared.map(|shared| shared.down.as_str()),
    })
}

fn trace_sink(sink: &TraceSink) -> Value {
    match &sink.kind {
        SinkKind::File => json!({"name": sink.name, "sample": sink.sample}),
        SinkKind::Otlp(to) => json!({
            "name": sink.name,
            "sample": sink.sample,
            // A query may hold a key.
            "endpoint": to.endpoint.split_once('?').map_or(to.endpoint.clone(), |(url, _)| format!("{url}?***")),
            "headers": to.headers.iter().map(|(name, value)| (name.clone(), json!(value))).collect::<serde_json::Map<_, _>>(),
        }),
    }
}
