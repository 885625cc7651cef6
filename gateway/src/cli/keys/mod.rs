//! `glassgate keys`: who may call.

mod settings;
mod show;

use clap::Subcommand;

pub use self::settings::pair;
use self::settings::{Clear, Settings};
use super::{Outcome, Place, actor, text};
use crate::auth::api_key::{generate, renew};
use crate::auth::store::{KeyRow, KeyStore};
use crate::control::edit::{KeyEdit, When, when};
use crate::control::{Change, Control, Done};
use crate::observe::access_log::timestamp;
use crate::ports::{Clock, SystemClock};

/// A key is said by its id, its name, or `tenant/name` where several tenants have a key of that name.
#[derive(Subcommand)]
pub enum KeysCommand {
    /// Make a key and print it, once: only its hash is stored
    Create {
        /// What the key is called in lists, logs and `spend`; must be new to its tenant
        name: String,
        /// Whose key it is: tenants share nothing, and spending is summed by them
        #[arg(long, default_value = "default")]
        tenant: String,
        #[command(flatten)]
        settings: Settings,
    },
    /// List keys, without their secrets
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show everything about a key but its secret
    Show {
        /// Its id, its name, or tenant/name
        key: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Change what a key may; what is not given stays, and a list that is given replaces the old one
    Edit {
        /// Its id, its name, or tenant/name
        key: String,
        #[command(flatten)]
        settings: Settings,
        /// Take a setting back: all are allowed then, or the configuration's limit stands (may be given several times)
        #[arg(long, value_enum, value_name = "SETTING")]
        clear: Vec<Clear>,
    },
    /// Make a new secret for a key and print it, once; id, name, limits and what was spent stay
    Rotate {
        /// Its id, its name, or tenant/name
        key: String,
        /// How long the secret before it still works, from "0s" on; one before that ends at once
        #[arg(long, default_value = "24h", value_parser = when)]
        grace: When,
    },
    /// Let a disabled key in again
    Enable { key: String },
    /// Refuse a key until it is enabled again
    Disable { key: String },
    /// Refuse a key for ever; running gateways know it within a second
    Revoke { key: String },
}

pub fn run(place: &Place, command: KeysCommand) -> Outcome {
    let control = place.control()?;
    let store = || control.store().map_err(text);
    let now = SystemClock.now_ns();
    let id = |called: &str| one(&store()?, called).map(|row| row.who.key_id.clone());
    match command {
        KeysCommand::Create { name, tenant, settings } => {
            let edit = settings.edit(&[], now);
            hint(place, &edit);
            let token = generate().map_err(text)?;
            create(&control, &actor(), &token, &name, &tenant, edit)?;
            println!("{token}");
        }
        KeysCommand::List { json } => show::list(&store()?.list().map_err(text)?, now, json),
        KeysCommand::Show { key, json } => show::one(&one(&store()?, &key)?, now, json),
        KeysCommand::Edit { key, settings, clear } => {
            let edit = settings.edit(&clear, now);
            hint(place, &edit);
            let row = change(&control, Change::EditKey { id: id(&key)?, edit: Box::new(edit) })?;
            show::one(&row, now, false);
        }
        KeysCommand::Rotate { key, grace } => {
            let id = id(&key)?;
            let token = renew(&id).map_err(text)?;
            change(&control, Change::RotateKey { id, token: token.clone(), grace })?;
            eprintln!("the secret before it works until {}", timestamp(grace.from(now)));
            println!("{token}");
        }
        KeysCommand::Enable { key } => {
            let row = change(&control, Change::EnableKey { id: id(&key)? })?;
            println!("enabled {}", row.who.key_id);
        }
        KeysCommand::Disable { key } => {
            let row = change(&control, Change::DisableKey { id: id(&key)? })?;
            println!("disabled {}", row.who.key_id);
        }
        KeysCommand::Revoke { key } => {
            let row = change(&control, Change::RevokeKey { id: id(&key)? })?;
            println!("revoked {}", row.who.key_id);
        }
    }
    Ok(())
}

/// The key that is meant.
///
/// # Errors
/// If there is none, or more than one.
pub fn one(store: &KeyStore, called: &str) -> Result<KeyRow, String> {
    let mut found: Vec<KeyRow> = store.find(called).map_err(text)?.into_iter().map(|(row, _)| row).collect();
    // An id is one key's alone, whatever others are called.
    if let Some(index) = found.iter().position(|row| row.who.key_id == called) {
        return Ok(found.swap_remove(index));
    }
    match found.len() {
        0 => Err(format!("there is no key with the id or name `{called}`; `glassgate keys list` shows them")),
        1 => Ok(found.remove(0)),
        _ => {
            let names: Vec<String> = found
                .iter()
                .map(|row| format!("{}/{} ({})", row.who.tenant, row.who.key_name, row.who.key_id))
                .collect();
            Err(format!(
                "several keys are called `{called}`: {}; say which with tenant/name or the id",
                names.join(", ")
            ))
        }
    }
}

fn change(control: &Control, change: Change) -> Result<KeyRow, String> {
    match control.apply(&actor(), change, None).map_err(text)?.done {
        Done::Key(row) => Ok(*row),
        Done::Tenant(_) | Done::Rule(_) | Done::Gone => Err("the change was about no key".to_owned()),
    }
}

/// Stores a key, or rather its hash.
///
/// # Errors
/// A name that is taken or that could not be shown in a list.
pub fn create(control: &Control, actor: &str, token: &str, name: &str, tenant: &str, edit: KeyEdit) -> Outcome {
    let (token, name, tenant) = (token.to_owned(), name.to_owned(), tenant.to_owned());
    control.apply(actor, Change::CreateKey { token, tenant, name, edit: Box::new(edit) }, None).map_err(text)?;
    Ok(())
}

fn hint(place: &Place, edit: &KeyEdit) {
    let Ok(config) = place.config() else { return };
    edit.notes(&config).iter().for_each(|note| eprintln!("note: {note}"));
}
