//! Keys, tenants and rules as people and programs see them. Never a secret: it is not there to be shown.

use serde_json::{Map, Value, json};

use crate::accounting::core::NanoUsd;
use crate::admission::core::rule::{Mode, Rule, Sharing};
use crate::api::limit::{Dimension, Of, Per};
use crate::auth::store::{KeyRow, Tenant};
use crate::observe::access_log::timestamp;
use crate::ports::Scope;

pub fn key(key: &KeyRow) -> Value {
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

pub fn tenant(tenant: &Tenant) -> Value {
    json!({
        "id": tenant.id, "name": tenant.name, "tags": tenant.tags, "disabled": tenant.disabled_ns.map(timestamp),
    })
}

/// A rule that binds, in the words that it is written in.
pub fn rule(rule: &Rule) -> Value {
    let throttle = match rule.mode {
        Mode::Throttle { requests, per } => Some(format!("{requests}/{}", per.as_str())),
        Mode::Hard | Mode::Soft => None,
    };
    let only: Map<String, Value> =
        rule.only.iter().map(|(only, wanted)| (only.as_str().to_owned(), wanted.as_str().into())).collect();
    json!({
        "name": rule.name, "limit": amount(rule.of, rule.limit), "of": rule.of.as_str(), "per": rule.per.map(Per::as_str),
        "by": rule.by.iter().map(|one| Dimension::as_str(*one)).collect::<Vec<_>>(), "only": only,
        "zone": rule.zone.iana_name(), "mode": rule.mode.as_str(), "throttle": throttle,
        "shared": rule.shared.map(Sharing::taken_ahead), "down": rule.shared.map(|shared| shared.down.as_str()),
        "exact": rule.exact, "strict": rule.strict, "wait_ms": rule.wait.as_millis() as u64,
    })
}

/// In the unit that a limit is written in.
pub fn amount(of: Of, amount: u64) -> Value {
    match of {
        Of::Usd => json!(NanoUsd(amount).to_string()),
        _ => json!(amount),
    }
}

/// What is not the same of both, as it was and as it is.
pub fn difference(before: Value, after: Value) -> (Value, Value) {
    let (Value::Object(before), Value::Object(after)) = (&before, &after) else { return (before, after) };
    let differs = |name: &str| before.get(name) != after.get(name);
    let of = |one: &Map<String, Value>| -> Value {
        one.iter().filter(|(name, _)| differs(name)).map(|(name, value)| (name.clone(), value.clone())).collect()
    };
    (of(before), of(after))
}
