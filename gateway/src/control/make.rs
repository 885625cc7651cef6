//! What each change does to the store, and what the record says of it.

use std::sync::Arc;

use serde_json::{Value, json};

use super::edit::{KeyEdit, word, words};
use super::{Change, CheckedRule, Denied, Done, view};
use crate::auth::Identity;
use crate::auth::api_key::{ApiKey, Pepper};
use crate::auth::store::{KeyRow, StoredRule, Tenant, Writing};
use crate::config::RULES_MAX;
use crate::observe::access_log::timestamp;

/// What one tenant may have.
const TAGS_MAX: usize = 16;

/// Writes the rows of a change; returns what it was about, and what the record says of it.
pub(super) fn make(
    writing: &Writing<'_>,
    pepper: &Pepper,
    change: Change,
    expected: Option<i64>,
    now: i64,
) -> Result<(Done, Value), Denied> {
    let on_key = |name, id: &str, edit: &mut dyn FnMut(&mut KeyRow)| edit_key(writing, name, id, expected, edit);
    match change {
        Change::CreateKey { token, tenant, name, edit } => {
            create_key(writing, pepper, &token, &tenant, &name, *edit, now)
        }
        Change::EditKey { id, edit } => {
            edit.check()?;
            let mut edit = Some(*edit);
            on_key("edit_key", &id, &mut |row| edit.take().into_iter().for_each(|edit| edit.apply(row)))
        }
        Change::RotateKey { id, token, grace } => {
            let hash = ApiKey::parse(&token).ok_or_else(malformed)?.hash(pepper);
            on_key("rotate_key", &id, &mut |row| {
                row.previous = Some((row.hash, grace.from(now)));
                row.hash = hash;
            })
        }
        Change::EnableKey { id } => on_key("enable_key", &id, &mut |row| row.disabled_ns = None),
        Change::DisableKey { id } => {
            on_key("disable_key", &id, &mut |row| row.disabled_ns = row.disabled_ns.or(Some(now)))
        }
        Change::RevokeKey { id } => on_key("revoke_key", &id, &mut |row| row.revoked_ns = row.revoked_ns.or(Some(now))),
        Change::PutTenant { id, name, tags } => {
            name.iter().try_for_each(|name| word("name", name, 256))?;
            words("tags", &tags, TAGS_MAX, 64)?;
            on_tenant(writing, "put_tenant", &id, expected, |tenant| Tenant { name, tags, ..tenant })
        }
        Change::EnableTenant { id } => {
            if writing.tenant(&id)?.is_none() {
                return Err(Denied::NotFound(format!("nobody has put or disabled a tenant `{id}`")));
            }
            on_tenant(writing, "enable_tenant", &id, expected, |tenant| Tenant { disabled_ns: None, ..tenant })
        }
        Change::DisableTenant { id } => on_tenant(writing, "disable_tenant", &id, expected, |tenant| Tenant {
            disabled_ns: tenant.disabled_ns.or(Some(now)),
            ..tenant
        }),
        Change::PutRule(rule) => put_rule(writing, rule, expected),
        Change::Import(import) => Ok((Done::Gone, import.write(writing, pepper)?)),
        Change::Reprice(words) => Ok((Done::Gone, json!({"change": "reprice", "after": words}))),
        Change::DeleteRule { name } => {
            let rules = writing.rules()?;
            let Some(rule) = rules.into_iter().find(|rule| rule.name == name) else {
                return Err(Denied::NotFound(format!(
                    "the key store has no rule `{name}`; those of the configuration are changed there"
                )));
            };
            check_version(expected, rule.seq)?;
            writing.delete_rule(&name)?;
            Ok((Done::Gone, json!({"change": "delete_rule", "rule": name, "before": rule.words})))
        }
    }
}

fn malformed() -> Denied {
    Denied::Store("a key was made that does not parse".to_owned())
}

fn check_version(expected: Option<i64>, found: i64) -> Result<(), Denied> {
    match expected {
        Some(expected) if expected != found => Err(Denied::Stale { expected, found }),
        _ => Ok(()),
    }
}

fn create_key(
    writing: &Writing<'_>,
    pepper: &Pepper,
    token: &str,
    tenant: &str,
    name: &str,
    edit: KeyEdit,
    now: i64,
) -> Result<(Done, Value), Denied> {
    word("name", name, 64)?;
    word("tenant", tenant, 64)?;
    edit.check()?;
    let key = ApiKey::parse(token).ok_or_else(malformed)?;
    let who = Identity {
        tenant: tenant.to_owned(),
        key_id: key.id().to_owned(),
        key_name: name.to_owned(),
        ..Identity::default()
    };
    let mut row = KeyRow {
        who: Arc::new(who),
        hash: key.hash(pepper),
        previous: None,
        created_ns: now,
        expires_ns: None,
        disabled_ns: None,
        revoked_ns: None,
        metadata: Default::default(),
    };
    edit.apply(&mut row);
    if !writing.add_key(&row)? {
        return Err(Denied::Conflict(format!(
            "the tenant `{tenant}` has a key named `{name}` already; revoked keys keep their names, so that the ledger stays readable"
        )));
    }
    let told = json!({"change": "create_key", "key": row.who.key_id, "after": view::key(&row)});
    Ok((Done::Key(Box::new(row)), told))
}

fn edit_key(
    writing: &Writing<'_>,
    change: &str,
    id: &str,
    expected: Option<i64>,
    edit: &mut dyn FnMut(&mut KeyRow),
) -> Result<(Done, Value), Denied> {
    let Some((mut row, seq)) = writing.key(id)? else {
        return Err(Denied::NotFound(format!("there is no key with the id `{id}`")));
    };
    check_version(expected, seq)?;
    if let Some(at) = row.revoked_ns.filter(|_| change != "revoke_key") {
        return Err(Denied::Conflict(format!(
            "the key was revoked at {}, for ever; make another with `glassgate keys create`",
            timestamp(at)
        )));
    }
    let before = view::key(&row);
    edit(&mut row);
    writing.put_key(&row)?;
    let (before, after) = view::difference(before, view::key(&row));
    let told = json!({
        "change": change, "key": id, "tenant": row.who.tenant, "name": row.who.key_name, "before": before, "after": after,
    });
    Ok((Done::Key(Box::new(row)), told))
}

fn on_tenant(
    writing: &Writing<'_>,
    change: &str,
    id: &str,
    expected: Option<i64>,
    edit: impl FnOnce(Tenant) -> Tenant,
) -> Result<(Done, Value), Denied> {
    word("tenant", id, 64)?;
    let found = writing.tenant(id)?;
    check_version(expected, found.as_ref().map_or(0, |tenant| tenant.seq))?;
    let tenant = found.clone().unwrap_or_else(|| Tenant { id: id.to_owned(), ..Tenant::default() });
    let tenant = Tenant { seq: writing.seq(), ..edit(tenant) };
    writing.put_tenant(&tenant)?;
    let before = found.as_ref().map_or(json!({}), view::tenant);
    let (before, after) = view::difference(before, view::tenant(&tenant));
    let told = json!({"change": change, "tenant": id, "before": before, "after": after});
    Ok((Done::Tenant(tenant), told))
}

fn put_rule(writing: &Writing<'_>, rule: CheckedRule, expected: Option<i64>) -> Result<(Done, Value), Denied> {
    let CheckedRule { name, words } = rule;
    let rules = writing.rules()?;
    let found = rules.iter().find(|rule| rule.name == name);
    check_version(expected, found.map_or(0, |rule| rule.seq))?;
    if found.is_none() && rules.len() >= RULES_MAX {
        return Err(Denied::Conflict(format!(
            "the key store has {RULES_MAX} rules, and every request asks all of them; delete one first"
        )));
    }
    let told = json!({
        "change": "put_rule", "rule": name, "before": found.map(|rule| &rule.words), "after": words,
    });
    let rule = StoredRule { name, words, seq: writing.seq() };
    writing.put_rule(&rule)?;
    Ok((Done::Rule(rule), told))
}
