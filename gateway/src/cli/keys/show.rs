//! Keys as tables and as JSON. Never the secret: it is not there to be shown.

use serde_json::Value;

use crate::auth::store::KeyRow;
use crate::control::view;
use crate::observe::access_log::timestamp;

pub fn list(keys: &[KeyRow], now_ns: i64, json: bool) {
    if json {
        println!("{}", Value::from_iter(keys.iter().map(view::key)));
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
    let value = view::key(key);
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
