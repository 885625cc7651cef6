//! `/admin/rules`: limits beside those of every key, in the configuration and in the key store.

use serde_json::{Value, json};

use super::asked::Asked;
use super::reply::{Answer, Problem, Reply};
use crate::app::App;
use crate::auth::store::StoredRule;
use crate::config::{Common, GatewayConfig, stored_rule};
use crate::control::{Change, CheckedRule, Done, view};

pub fn list(app: &App, asked: &Asked) -> Answer {
    let (limit, after) = asked.page()?;
    let all = of_app(app)?;
    let name = |rule: &Value| rule["name"].as_str().unwrap_or_default().to_owned();
    let mut found = all.into_iter().filter(|rule| name(rule).as_str() > after);
    let page: Vec<Value> = found.by_ref().take(limit as usize).collect();
    let next = page.last().filter(|_| found.next().is_some()).map(|rule| name(rule).into());
    Ok(Reply::list(page, next))
}

pub fn show(app: &App, asked: &Asked) -> Answer {
    let found = of_app(app)?.into_iter().find(|rule| rule["name"] == asked.name());
    let rule = found.ok_or_else(|| Problem::not_found(format!("no rule is called `{}`", asked.name())))?;
    let version = rule["version"].as_i64();
    let reply = Reply::ok(&rule);
    Ok(match version {
        Some(version) => reply.version(version),
        None => reply,
    })
}

pub fn put(app: &App, asked: &Asked) -> Answer {
    let config = &app.snapshot.load().config;
    let rule = CheckedRule::new(asked.name(), asked.object()?, config)?;
    match app.control.apply(asked.actor, Change::PutRule(rule), asked.if_match)?.done {
        Done::Rule(rule) => {
            let replaces = config.gateway.rules.iter().any(|other| other.name == rule.name);
            Ok(Reply::ok(&stored(&rule, replaces, config.gateway.common)).version(rule.seq))
        }
        Done::Key(_) | Done::Tenant(_) | Done::Gone => Err(Problem::not_found("the change was about no rule")),
    }
}

pub fn delete(app: &App, asked: &Asked) -> Answer {
    let name = asked.name().to_owned();
    app.control.apply(asked.actor, Change::DeleteRule { name: name.clone() }, asked.if_match)?;
    Ok(Reply::ok(&json!({"name": name, "deleted": true})))
}

fn of_app(app: &App) -> Result<Vec<Value>, Problem> {
    Ok(all(&app.snapshot.load().config.gateway, &app.control.store()?.rules()?))
}

/// Every rule that binds, by name, and where it is from. The store's stand before the file's.
pub fn all(config: &GatewayConfig, store: &[StoredRule]) -> Vec<Value> {
    let file = &config.rules;
    let is_stored = |name: &str| store.iter().any(|rule| rule.name == name);
    let from_file = file.iter().filter(|rule| !is_stored(&rule.name)).map(|rule| {
        let mut value = view::rule(rule);
        (value["origin"], value["replaces"], value["version"]) = ("config".into(), false.into(), Value::Null);
        value
    });
    let from_store =
        store.iter().map(|rule| stored(rule, file.iter().any(|other| other.name == rule.name), config.common));
    let mut all: Vec<Value> = from_file.chain(from_store).collect();
    all.sort_by(|a, b| a["name"].as_str().cmp(&b["name"].as_str()));
    all
}

/// `replaces`: one of the configuration.
fn stored(rule: &StoredRule, replaces: bool, common: Common) -> Value {
    let mut value = match stored_rule(&rule.name, &rule.words, common) {
        Ok(rule) => view::rule(&rule),
        Err(why) => json!({"name": rule.name, "unreadable": why}),
    };
    (value["origin"], value["replaces"], value["version"]) = ("store".into(), replaces.into(), rule.seq.into());
    value
}
