//! `/admin/keys`: who may call.

use http::StatusCode;
use serde_json::{Map, Value, json};

use super::asked::Asked;
use super::reply::{Answer, Problem, Reply};
use crate::app::App;
use crate::auth::api_key::{generate, renew};
use crate::auth::store::{Found, KeyStore};
use crate::control::edit::{FIELDS, KeyEdit, invalid, text, when};
use crate::control::{Applied, Change, Done, view};
use crate::ports::{Clock as _, SystemClock};

pub fn list(app: &App, asked: &Asked) -> Answer {
    let (limit, after) = asked.page()?;
    let keys = app.control.store()?.page(after, limit)?;
    let next = keys.last().filter(|_| keys.len() == limit as usize).map(|(key, _)| key.who.key_id.as_str().into());
    Ok(Reply::list(keys.iter().map(shown).collect(), next))
}

pub fn show(app: &App, asked: &Asked) -> Answer {
    let found = one(&app.control.store()?, asked.name())?;
    Ok(Reply::ok(&shown(&found)).version(found.1))
}

pub fn create(app: &App, asked: &Asked) -> Answer {
    let names: Vec<&str> = ["name", "tenant"].into_iter().chain(FIELDS).collect();
    let mut fields = asked.fields(&names)?;
    let named = |fields: &mut Map<String, Value>, name: &str| -> Result<Option<String>, Problem> {
        let value = fields.remove(name).filter(|value| !value.is_null());
        Ok(value.map(|value| text(name, &value).map(str::to_owned)).transpose()?)
    };
    let name =
        named(&mut fields, "name")?.ok_or_else(|| invalid("name", "is missing; it says what the key is called"))?;
    let tenant = named(&mut fields, "tenant")?.unwrap_or_else(|| "default".to_owned());
    let edit = KeyEdit::read(&fields, SystemClock.now_ns())?;
    let notes = edit.notes(&app.snapshot.load().config);
    let token = generate().map_err(no_randomness)?;
    let change = Change::CreateKey { token: token.clone(), tenant, name, edit: Box::new(edit) };
    let reply = changed(app, asked, change, &[("key", token.into()), ("notes", notes.into())])?;
    Ok(Reply { status: StatusCode::CREATED, ..reply })
}

pub fn edit(app: &App, asked: &Asked) -> Answer {
    let edit = KeyEdit::read(&asked.fields(&FIELDS)?, SystemClock.now_ns())?;
    let notes = edit.notes(&app.snapshot.load().config);
    let change = Change::EditKey { id: id(app, asked)?, edit: Box::new(edit) };
    changed(app, asked, change, &[("notes", notes.into())])
}

pub fn rotate(app: &App, asked: &Asked) -> Answer {
    // A body is optional: a day is what most need.
    let fields = if asked.body.is_empty() { Map::new() } else { asked.fields(&["grace"])? };
    let grace = text("grace", fields.get("grace").unwrap_or(&json!("24h"))).map(when)?;
    let grace = grace.map_err(|why| invalid("grace", why))?;
    let id = id(app, asked)?;
    let token = renew(&id).map_err(no_randomness)?;
    let change = Change::RotateKey { id, token: token.clone(), grace };
    changed(app, asked, change, &[("key", token.into())])
}

/// Of a key, by its id.
pub fn switch(app: &App, asked: &Asked, change: impl FnOnce(String) -> Change) -> Answer {
    changed(app, asked, change(id(app, asked)?), &[])
}

/// The key that is meant: by its id, its name, or `tenant/name`.
pub fn one(store: &KeyStore, called: &str) -> Result<Found, Problem> {
    let mut found = store.find(called)?;
    // An id is one key's alone, whatever others are called.
    if let Some(at) = found.iter().position(|(row, _)| row.who.key_id == called) {
        return Ok(found.swap_remove(at));
    }
    match found.pop() {
        Some(one) if found.is_empty() => Ok(one),
        Some(_) => {
            let message = format!("several keys are called `{called}`; say which with tenant/name or the id");
            Err(Problem::new(StatusCode::CONFLICT, "ambiguous_name", message))
        }
        None => Err(Problem::not_found(format!("there is no key with the id or name `{called}`"))),
    }
}

fn id(app: &App, asked: &Asked) -> Result<String, Problem> {
    Ok(one(&app.control.store()?, asked.name())?.0.who.key_id.clone())
}

fn shown((key, version): &Found) -> Value {
    let mut value = view::key(key);
    value["version"] = (*version).into();
    value
}

/// Makes the change; the key as it is then, and what else there is to be told.
fn changed(app: &App, asked: &Asked, change: Change, more: &[(&str, Value)]) -> Answer {
    let Applied { done, version } = app.control.apply(asked.actor, change, asked.if_match)?;
    let Done::Key(key) = done else {
        return Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", "the change was about no key"));
    };
    let mut value = shown(&(*key, version));
    more.iter().for_each(|(name, what)| value[*name] = what.clone());
    Ok(Reply::ok(&value).version(version))
}

fn no_randomness(error: getrandom::Error) -> Problem {
    Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", format!("no randomness: {error}"))
}
