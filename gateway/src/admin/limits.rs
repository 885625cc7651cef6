//! `GET /admin/limits`: which limits bind a key, how each stands, and which says no first.

use serde_json::{Value, json};

use super::asked::Asked;
use super::keys::one;
use super::reply::{Answer, Problem, Reply};
use crate::admission::core::rule::Subjects;
use crate::admission::explain::Standing;
use crate::admission::rules::DEFAULTS;
use crate::api::limit::{Dimension, scope};
use crate::app::App;
use crate::auth::store::KeyRow;
use crate::control::view::{self, amount};
use crate::network::host;
use crate::observe::access_log::timestamp;

pub fn answer(app: &App, asked: &Asked) -> Answer {
    let called =
        asked.said("key").ok_or_else(|| Problem::invalid("key", "`key` is missing; whose limits are they?"))?;
    let store = app.control.store()?;
    let (key, _) = one(&store, called)?;
    let of_tenant = store.tenant(&key.who.tenant)?.map(|tenant| tenant.tags).unwrap_or_default();
    let ip = asked.said("ip").map(|ip| ip.parse().map_err(|_| Problem::invalid("ip", "`ip` must be an address")));
    let owned = |name: &str| asked.said(name).map(str::to_owned);
    let who = &key.who;
    let subjects = Subjects {
        key: who.key_id.clone(),
        key_name: who.key_name.clone(),
        user: who.user.clone().or(owned("user")),
        tenant: who.tenant.clone(),
        route: owned("route"),
        model: owned("model"),
        ip: ip.transpose()?.map(|ip| host(ip).to_string()),
        tags: who.tags.iter().cloned().chain(of_tenant).collect(),
        tier: None,
    };
    let stored: Vec<String> = store.rules()?.into_iter().map(|rule| rule.name).collect();
    let limits = who.limits(&app.snapshot.load().config.gateway.limits);
    let explained = app.admission.explain(&subjects, &limits, &app.auth.rules());
    let standing = |standing: &Standing| {
        let origin = origin(&standing.bound.rule.name, &key, &stored);
        shown(standing, origin)
    };
    let refuses = explained.refuses.map(|(rule, wait)| {
        json!({"rule": rule, "retry_after_ms": wait.map(|wait| wait.as_nanos().div_ceil(1_000_000) as u64)})
    });
    Ok(Reply::ok(&json!({
        "key": {"id": who.key_id, "name": who.key_name, "tenant": who.tenant},
        "route": subjects.route, "model": subjects.model,
        "rules": explained.standings.iter().map(standing).collect::<Vec<_>>(),
        "refuses": refuses, "nearest": explained.nearest,
    })))
}

/// Where the limit that counts was said.
fn origin(rule: &str, key: &KeyRow, stored: &[String]) -> &'static str {
    let own = &key.who.limits;
    let set = [
        own.concurrency.is_some(),
        own.requests_per_minute.is_some(),
        own.tokens_per_minute.is_some(),
        own.per_day.is_some(),
    ];
    match DEFAULTS.iter().position(|name| *name == rule) {
        Some(at) if set[at] => "key",
        None if stored.iter().any(|name| name == rule) => "store",
        _ => "config",
    }
}

fn shown(standing: &Standing, origin: &str) -> Value {
    let (rule, state) = (&standing.bound.rule, standing.state);
    let mut value = view::rule(rule);
    value["limit"] = amount(rule.of, standing.bound.limit);
    value["origin"] = origin.into();
    value["scope"] = scope(&rule.by).into();
    value["used"] = state.map(|state| amount(rule.of, state.used)).unwrap_or_default();
    value["reserved"] = state.map(|state| amount(rule.of, state.held)).unwrap_or_default();
    value["remaining"] = state.map(|state| amount(rule.of, state.remaining)).unwrap_or_default();
    value["resets_at"] = standing.resets_ns.map(timestamp).into();
    value["needs"] = standing.needs.iter().map(|one| Dimension::as_str(*one)).collect();
    value
}
