//! `glassgate keys`: who may call.

mod settings;
mod show;

use std::sync::Arc;

use clap::Subcommand;

use self::settings::{Clear, Settings, When, when};
use super::{Outcome, Place, text};
use crate::auth::Identity;
use crate::auth::api_key::{ApiKey, Pepper, generate, renew};
use crate::auth::store::{KeyRow, KeyStore};
use crate::data_dir::DataDir;
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
    let data_dir = place.data_dir()?;
    let now = SystemClock.now_ns();
    match command {
        KeysCommand::Create { name, tenant, settings } => {
            settings.check()?;
            hint(place, &settings);
            let token = generate().map_err(text)?;
            add(&data_dir, &token, &name, &tenant, |row| settings.apply(row, now))?;
            println!("{token}");
        }
        KeysCommand::List { json } => show::list(&store(&data_dir)?.list().map_err(text)?, now, json),
        KeysCommand::Show { key, json } => show::one(&one(&store(&data_dir)?, &key)?, now, json),
        KeysCommand::Edit { key, settings, clear } => {
            settings.check()?;
            hint(place, &settings);
            let row = change(&data_dir, &key, |row| {
                clear.iter().for_each(|setting| setting.apply(row));
                settings.apply(row, now);
            })?;
            show::one(&row, now, false);
        }
        KeysCommand::Rotate { key, grace } => {
            let pepper = pepper(&data_dir)?;
            let id = one(&store(&data_dir)?, &key)?.who.key_id.clone();
            let token = renew(&id).map_err(text)?;
            let hash = ApiKey::parse(&token).ok_or("a key was made that does not parse")?.hash(&pepper);
            let until = grace.from(now);
            change(&data_dir, &id, |row| {
                row.previous = Some((row.hash, until));
                row.hash = hash;
            })?;
            eprintln!("the secret before it works until {}", timestamp(until));
            println!("{token}");
        }
        KeysCommand::Enable { key } => {
            let row = change(&data_dir, &key, |row| row.disabled_ns = None)?;
            println!("enabled {}", row.who.key_id);
        }
        KeysCommand::Disable { key } => {
            let row = change(&data_dir, &key, |row| row.disabled_ns = row.disabled_ns.or(Some(now)))?;
            println!("disabled {}", row.who.key_id);
        }
        KeysCommand::Revoke { key } => {
            let store = store(&data_dir)?;
            let id = one(&store, &key)?.who.key_id.clone();
            revoke(&store, &id)?;
            println!("revoked {id}");
        }
    }
    Ok(())
}

pub fn store(data_dir: &DataDir) -> Result<KeyStore, String> {
    KeyStore::open(&data_dir.keys()).map_err(|error| format!("{}: {error}", data_dir.keys().display()))
}

/// The key that is meant.
///
/// # Errors
/// If there is none, or more than one.
pub fn one(store: &KeyStore, called: &str) -> Result<KeyRow, String> {
    let mut found = store.find(called).map_err(text)?;
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

/// Revoking twice keeps the first time.
///
/// # Errors
/// When the store cannot be written.
pub fn revoke(store: &KeyStore, id: &str) -> Outcome {
    let now = SystemClock.now_ns();
    store.change(id, |row| row.revoked_ns = row.revoked_ns.or(Some(now))).map_err(text)?;
    Ok(())
}

fn change(data_dir: &DataDir, called: &str, change: impl FnOnce(&mut KeyRow)) -> Result<KeyRow, String> {
    let store = store(data_dir)?;
    let row = one(&store, called)?;
    if let Some(at) = row.revoked_ns {
        return Err(format!(
            "the key was revoked at {}, for ever; make another with `glassgate keys create`",
            timestamp(at)
        ));
    }
    let changed = store.change(&row.who.key_id, change).map_err(text)?;
    changed.ok_or_else(|| format!("the key `{called}` is gone"))
}

/// Stores a key, or rather its hash.
///
/// # Errors
/// A name that is taken or that could not be shown in a list.
pub fn add(
    data_dir: &DataDir,
    token: &str,
    name: &str,
    tenant: &str,
    set: impl FnOnce(&mut KeyRow),
) -> Result<(), String> {
    settings::word("key name", name, 64)?;
    settings::word("tenant", tenant, 64)?;
    let key = ApiKey::parse(token).ok_or("a key was made that does not parse")?;
    let who = Identity {
        tenant: tenant.to_owned(),
        key_id: key.id().to_owned(),
        key_name: name.to_owned(),
        ..Identity::default()
    };
    let mut row = KeyRow {
        who: Arc::new(who),
        hash: key.hash(&pepper(data_dir)?),
        previous: None,
        created_ns: SystemClock.now_ns(),
        expires_ns: None,
        disabled_ns: None,
        revoked_ns: None,
        metadata: Default::default(),
    };
    set(&mut row);
    if !store(data_dir)?.add(&row).map_err(text)? {
        return Err(format!(
            "the tenant `{tenant}` has a key named `{name}` already; revoked keys keep their names, so that the ledger stays readable"
        ));
    }
    Ok(())
}

fn pepper(data_dir: &DataDir) -> Result<Pepper, String> {
    Pepper::load(&data_dir.pepper()).map_err(|error| format!("{}: {error}", data_dir.pepper().display()))
}

/// A name that is misspelt allows nothing. It may also be one that the configuration is going to have, so it is no error.
fn hint(place: &Place, settings: &Settings) {
    let Ok(config) = place.config() else { return };
    let public = config.models.iter().filter(|(_, model)| model.public).map(|(name, _)| name);
    let known: Vec<&String> = config.routes.iter().map(|route| &route.name).chain(public).collect();
    for model in settings.models().iter().filter(|model| !known.contains(model)) {
        eprintln!("note: clients can ask for nothing called `{model}` at the moment");
    }
}
