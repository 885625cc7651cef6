//! `GET /admin/audit` and `GET /admin/export`: who changed what, and what that came to.

use serde_json::{Value, json};

use super::asked::Asked;
use super::reply::{Answer, Problem, Reply};
use crate::app::App;
use crate::auth::store::Entry;
use crate::control::export::{export, hex};
use crate::observe::access_log::timestamp;

pub fn audit(app: &App, asked: &Asked) -> Answer {
    let (limit, after) = asked.page()?;
    let number = || Problem::invalid("after", "`after` must be the number of an entry");
    let whole = || after.parse().ok().filter(|after| *after >= 0).ok_or_else(number);
    let after = if after.is_empty() { 0 } else { whole()? };
    let entries = app.control.store()?.audit(after, limit)?;
    let next = entries.last().filter(|_| entries.len() == limit as usize).map(|entry| entry.n.into());
    Ok(Reply::list(entries.iter().map(entry).collect(), next))
}

/// An entry as programs read it.
pub fn entry(entry: &Entry) -> Value {
    json!({
        "n": entry.n, "at": timestamp(entry.at_ns), "actor": entry.actor,
        "change": serde_json::from_str::<Value>(&entry.change).unwrap_or_else(|_| entry.change.as_str().into()),
        "previous_hash": hex(&entry.previous_hash), "hash": hex(&entry.hash),
    })
}

pub fn all(app: &App) -> Answer {
    Ok(Reply::ok(&export(&app.control)?))
}
