//! Keys as tables and as JSON. Never the secret: it is not there to be shown.

use serde_json::{Value, json};

use crate::auth::store::KeyRow;
use crate::observe::access_log::timestamp;
use crate::ports::Scope;

pub fn list(keys: &[KeyRow], now_ns: i64, json: bool) {
    if json {
        println!("{}", Value::from_iter(keys.iter().map(value)));
        return;
    }
    // A limit of the configuration is a dash: it may change with the file.
    println!(
        "{:14} {:20} {:16} {:>8} {:>10} {:>11} {:>16} {:28} state",
        "id", "name", "tenant", "rpm", "tpm", "concurrency", "USD/day", "created"
    );
    for key in keys {
        let limits = &key.who.limits;
        let or_dash = |limit: Option<u32>| limit.map_or("-".to_owned(), |limit| limit.to_string());
        println!(
            "{:14} {:20} {:16} {:>8} {:>10} {:>11} {:>16} {:28} {}",
            key.who.key_id,
            key.who.key_name,
            key.who.tenant,
            or_dash(limits.requests_per_minute),
            or_dash(limits.tokens_per_minute),
            or_dash(limits.concurrency),
            limits.per_day.map_or("-".to_owned(), |usd| usd.to_string()),
            timestamp(key.created_ns),
            state(key, now_ns)
        );
    }
}

pub fn one(key: &KeyRow, now_ns: i64, json: bool) {
    let value = value(key);
    if json {
        println!("{value:#}");
        return;
    }
    println!("{:20} {}", "state", state(key, now_ns));
    for (name, value) in value.as_object().into_iter().flatten() {
        let shown = match value {
            Value::Null => "-".to_owned(),
            Value::String(text) => text.clone(),
            Value::Array(items) => {
                items.iter().map(|item| item.as_str().unwrap_or_default()).collect::<Vec<_>>().join(", ")
            }
            Value::Object(notes) => notes
                .iter()
                .map(|(name, value)| format!("{name}={}", value.as_str().unwrap_or_default()))
                .collect::<Vec<_>>()
                .join(", "),
            other => other.to_string(),
        };
        println!("{:20} {}", name.replace('_', " "), shown);
    }
}

fn state(key: &KeyRow, now_ns: i64) -> String {
    if let Some(at) = key.revoked_ns {
        return format!("revoked {}", timestamp(at));
    }
    if let Some(at) = key.disabled_ns {
        return format!("disabled {}", timestamp(at));
    }
    match key.expires_ns {
        Some(at) if at <= now_ns => format!("expired {}", timestamp(at)),
        Some(at) => format!("active until {}", timestamp(at)),
        None => "active".to_owned(),
    }
}

fn value(key: &KeyRow) -> Value {
    let who = &key.who;
    json!({
        "id": who.key_id, "name": who.key_name, "tenant": who.tenant, "user": who.user, "tags": who.tags,
        "created": timestamp(key.created_ns), "expires": key.expires_ns.map(timestamp),
        "disabled": key.disabled_ns.map(timestamp), "revoked": key.revoked_ns.map(timestamp),
        "previous_secret_until": key.previous.map(|(_, until)| timestamp(until)),
        "scopes": who.scopes.as_ref().map(|scopes| scopes.iter().map(|scope| Scope::as_str(*scope)).collect::<Vec<_>>()),
        "models": who.models, "from": who.networks.as_ref().map(|networks| networks.iter().map(ToString::to_string).collect::<Vec<_>>()),
        "requests_per_minute": who.limits.requests_per_minute, "tokens_per_minute": who.limits.tokens_per_minute,
        "concurrency": who.limits.concurrency, "usd_per_day": who.limits.per_day.map(|usd| usd.to_string()),
        "metadata": key.metadata,
    })
}
