//! `GET /admin/limits`: which limits bind a key or who has a token, how each stands, and which says no first.

use std::sync::Arc;

use serde_json::{Value, json};

use super::asked::Asked;
use super::keys::one;
use super::reply::{Answer, Problem, Reply};
use crate::admission::core::rule::Subjects;
use crate::admission::explain::Standing;
use crate::admission::rules::DEFAULTS;
use crate::api::limit::{Dimension, scope};
use crate::app::App;
use crate::auth::Identity;
use crate::auth::jwt::core::Tenant;
use crate::auth::store::KeyStore;
use crate::config::JwtConfig;
use crate::control::view::{self, amount};
use crate::network::host;
use crate::observe::access_log::timestamp;

pub fn answer(app: &App, asked: &Asked) -> Answer {
    let store = app.control.store()?;
    let snapshot = app.snapshot.load();
    let who = match asked.said("key") {
        Some(called) => key(&store, called, asked)?,
        None => Arc::new(bearer(&snapshot.config.gateway.auth.jwt, asked)?),
    };
    let of_tenant = store.tenant(&who.tenant)?.map(|tenant| tenant.tags).unwrap_or_default();
    let ip = asked.said("ip").map(|ip| ip.parse().map_err(|_| Problem::invalid("ip", "`ip` must be an address")));
    let owned = |name: &str| asked.said(name).map(str::to_owned);
    let subjects = Subjects {
        key: who.key_id.clone(),
        key_name: who.key_name.clone(),
        user: who.user.clone().or(owned("user")),
        tenant: who.tenant.clone(),
        route: owned("route"),
        model: owned("model"),
        ip: ip.transpose()?.map(|ip| host(ip).to_string()),
        tags: who.tags.iter().cloned().chain(of_tenant).collect(),
        tier: who.tier.clone(),
    };
    let stored: Vec<String> = store.rules()?.into_iter().map(|rule| rule.name).collect();
    let limits = who.limits(&snapshot.config.gateway.limits);
    let explained = app.admission.explain(&subjects, &limits, &app.auth.rules());
    let standing = |standing: &Standing| {
        let origin = origin(&standing.bound.rule.name, &who, &stored);
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

fn key(store: &KeyStore, called: &str, asked: &Asked) -> Result<Arc<Identity>, Problem> {
    if let Some(name) = ["issuer", "tenant", "tier"].into_iter().find(|name| asked.said(name).is_some()) {
        return Err(Problem::invalid(name, &format!("`{name}` is of who has a token; leave it out beside `key`")));
    }
    Ok(one(store, called)?.0.who.clone())
}

/// Whoever has a token that says what is said here.
fn bearer(issuers: &[JwtConfig], asked: &Asked) -> Result<Identity, Problem> {
    let user = asked.said("user").ok_or_else(|| {
        Problem::invalid("key", "whose limits are they? Say `key`, or `user` of who has a token of an issuer")
    })?;
    let rules = match (asked.said("issuer"), issuers) {
        (None, [only]) => &only.rules,
        (called, _) => {
            let found = issuers.iter().find(|issuer| called == Some(&issuer.rules.name));
            &found.ok_or_else(|| Problem::invalid("issuer", &which(issuers)))?.rules
        }
    };
    let tenant = match (&rules.claims.tenant, asked.said("tenant")) {
        (Tenant::Fixed(tenant), None) => tenant,
        (Tenant::Fixed(tenant), Some(said)) if tenant == said => tenant,
        (Tenant::Fixed(tenant), Some(_)) => {
            let what = format!("all tokens of `{}` are of tenant `{tenant}`", rules.name);
            return Err(Problem::invalid("tenant", &what));
        }
        (Tenant::At(_), Some(said)) => said,
        (Tenant::At(_), None) => {
            let what = format!("`tenant` is missing; tokens of `{}` say it", rules.name);
            return Err(Problem::invalid("tenant", &what));
        }
    };
    let tier = asked.said("tier");
    if tier.is_some() && rules.claims.tier.is_none() {
        let what = format!("tokens of `{}` say no tier; `auth.jwt.claims.tier` tells where one stands", rules.name);
        return Err(Problem::invalid("tier", &what));
    }
    Ok(rules.bearer(tenant.to_owned(), user.to_owned(), tier.map(str::to_owned)))
}

fn which(issuers: &[JwtConfig]) -> String {
    let names: Vec<&str> = issuers.iter().map(|issuer| issuer.rules.name.as_str()).collect();
    match names[..] {
        [] => "no `[[auth.jwt]]` is configured, so nobody has a token; say `key`".to_owned(),
        _ => format!("`issuer` must be one of {}", names.join(", ")),
    }
}

/// Where the limit that counts was said.
fn origin(rule: &str, who: &Identity, stored: &[String]) -> &'static str {
    let own = &who.limits;
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
