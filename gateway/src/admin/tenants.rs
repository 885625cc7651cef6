//! `/admin/tenants`: what is known of tenants beyond the names that keys and tokens give them.

use http::StatusCode;
use serde_json::{Value, json};

use super::asked::Asked;
use super::reply::{Answer, Problem, Reply};
use crate::app::App;
use crate::auth::store::Tenant;
use crate::control::edit::{items, text};
use crate::control::{Change, Done, view};

/// What can be put.
pub const FIELDS: [&str; 2] = ["name", "tags"];

pub fn list(app: &App, asked: &Asked) -> Answer {
    let (limit, after) = asked.page()?;
    let tenants = app.control.store()?.tenants()?;
    let mut found = tenants.iter().filter(|tenant| tenant.id.as_str() > after);
    let page: Vec<&Tenant> = found.by_ref().take(limit as usize).collect();
    let next = page.last().filter(|_| found.next().is_some()).map(|tenant| tenant.id.as_str().into());
    Ok(Reply::list(page.into_iter().map(shown).collect(), next))
}

pub fn show(app: &App, asked: &Asked) -> Answer {
    let found = app.control.store()?.tenant(asked.name())?;
    let tenant =
        found.ok_or_else(|| Problem::not_found(format!("nobody has put or disabled a tenant `{}`", asked.name())))?;
    Ok(Reply::ok(&shown(&tenant)).version(tenant.seq))
}

pub fn put(app: &App, asked: &Asked) -> Answer {
    let fields = asked.fields(&FIELDS)?;
    let said = |name: &str| fields.get(name).filter(|value| !value.is_null());
    let name = said("name").map(|value| text("name", value).map(str::to_owned)).transpose()?;
    let tag = |path: &str, value: &Value| text(path, value).map(str::to_owned);
    let tags = items("tags", said("tags").unwrap_or(&json!([])), tag)?;
    change(app, asked, Change::PutTenant { id: asked.name().to_owned(), name, tags })
}

pub fn change(app: &App, asked: &Asked, change: Change) -> Answer {
    match app.control.apply(asked.actor, change, asked.if_match)?.done {
        Done::Tenant(tenant) => Ok(Reply::ok(&shown(&tenant)).version(tenant.seq)),
        Done::Key(_) | Done::Rule(_) | Done::Gone => {
            Err(Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", "the change was about no tenant"))
        }
    }
}

fn shown(tenant: &Tenant) -> Value {
    let mut value = view::tenant(tenant);
    value["version"] = tenant.seq.into();
    value
}
