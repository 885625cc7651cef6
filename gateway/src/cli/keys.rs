//! `glassgate keys`: who may call.

use clap::Subcommand;

use super::{Outcome, Place, text};
use crate::accounting::core::NanoUsd;
use crate::auth::api_key::{ApiKey, Pepper, generate};
use crate::auth::store::{KeyRow, KeyStore, OwnLimits};
use crate::config::{CONCURRENCY_MAX, REQUESTS_PER_MINUTE_MAX, TOKENS_PER_MINUTE_MAX};
use crate::data_dir::DataDir;
use crate::observe::access_log::timestamp;
use crate::ports::{Clock, SystemClock};

#[derive(Subcommand)]
pub enum KeysCommand {
    /// Make a key and print it, once: only its hash is stored
    Create {
        /// What the key is called in lists, logs and `spend`; must be new
        name: String,
        /// Whose key it is: spending is summed by tenant
        #[arg(long, default_value = "default")]
        tenant: String,
        /// Requests a minute, instead of the configuration's `limits.requests_per_minute`
        #[arg(long, value_name = "N", value_parser = upto(REQUESTS_PER_MINUTE_MAX))]
        rpm: Option<u32>,
        /// Tokens a minute, prompt and answer together, instead of `limits.tokens_per_minute`
        #[arg(long, value_name = "N", value_parser = upto(TOKENS_PER_MINUTE_MAX))]
        tpm: Option<u32>,
        /// Requests at a time, instead of `limits.concurrency`
        #[arg(long, value_name = "N", value_parser = upto(CONCURRENCY_MAX))]
        concurrency: Option<u32>,
        /// US dollars on a UTC day, instead of `limits.usd_per_day`
        #[arg(long, value_name = "X", value_parser = usd)]
        usd_per_day: Option<NanoUsd>,
    },
    /// List keys, without their secrets
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Revoke a key by its id or name; running gateways refuse it within a second
    Revoke { key: String },
}

fn upto(max: u32) -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=i64::from(max))
}

fn usd(text: &str) -> Result<NanoUsd, String> {
    let usd = text.parse().map_err(|_| "must be a number of US dollars such as 2.50".to_owned())?;
    NanoUsd::from_usd(usd).map_err(str::to_owned)
}

pub fn run(place: &Place, command: KeysCommand) -> Outcome {
    let data_dir = place.data_dir()?;
    match command {
        KeysCommand::Create { name, tenant, rpm, tpm, concurrency, usd_per_day } => {
            let limits =
                OwnLimits { requests_per_minute: rpm, tokens_per_minute: tpm, concurrency, per_day: usd_per_day };
            let token = generate().map_err(text)?;
            add(&data_dir, &token, &name, &tenant, limits)?;
            println!("{token}");
            Ok(())
        }
        KeysCommand::List { json } => list(&store(&data_dir)?, json),
        KeysCommand::Revoke { key } => match store(&data_dir)?.revoke(&key, SystemClock.now_ns()).map_err(text)? {
            Some(id) => {
                println!("revoked {id}");
                Ok(())
            }
            None => Err(format!("there is no key with the id or name `{key}`; `glassgate keys list` shows them")),
        },
    }
}

pub fn store(data_dir: &DataDir) -> Result<KeyStore, String> {
    KeyStore::open(&data_dir.keys()).map_err(|error| format!("{}: {error}", data_dir.keys().display()))
}

/// Stores a key, or rather its hash.
///
/// # Errors
/// A name that is taken or that could not be shown in a list.
pub fn add(data_dir: &DataDir, token: &str, name: &str, tenant: &str, limits: OwnLimits) -> Result<(), String> {
    for (what, word) in [("key name", name), ("tenant", tenant)] {
        if word.is_empty() || word.len() > 64 || word.chars().any(char::is_control) {
            return Err(format!("the {what} must have 1 to 64 bytes and no control characters"));
        }
    }
    let pepper =
        Pepper::load(&data_dir.pepper()).map_err(|error| format!("{}: {error}", data_dir.pepper().display()))?;
    let key = ApiKey::parse(token).ok_or("a key was made that does not parse")?;
    let row = KeyRow {
        id: key.id().to_owned(),
        name: name.to_owned(),
        tenant: tenant.to_owned(),
        hash: key.hash(&pepper),
        created_ns: SystemClock.now_ns(),
        revoked_ns: None,
        limits,
    };
    if !store(data_dir)?.add(&row).map_err(text)? {
        return Err(format!(
            "there is a key named `{name}` already; revoked keys keep their names, so that the ledger stays readable"
        ));
    }
    Ok(())
}

fn list(store: &KeyStore, json: bool) -> Outcome {
    let keys = store.list().map_err(text)?;
    if json {
        let rows: Vec<_> = keys
            .iter()
            .map(|key| {
                serde_json::json!({"id": key.id, "name": key.name, "tenant": key.tenant, "created": timestamp(key.created_ns),
                                   "revoked": key.revoked_ns.map(timestamp),
                                   "requests_per_minute": key.limits.requests_per_minute, "tokens_per_minute": key.limits.tokens_per_minute,
                                   "concurrency": key.limits.concurrency, "usd_per_day": key.limits.per_day.map(|usd| usd.to_string())})
            })
            .collect();
        println!("{}", serde_json::Value::from(rows));
        return Ok(());
    }
    // A limit of the configuration is a dash: it may change with the file.
    println!(
        "{:14} {:20} {:16} {:>8} {:>10} {:>11} {:>16} {:28} state",
        "id", "name", "tenant", "rpm", "tpm", "concurrency", "USD/day", "created"
    );
    for key in keys {
        let state = key.revoked_ns.map_or("active".to_owned(), |at| format!("revoked {}", timestamp(at)));
        let or_dash = |limit: Option<u32>| limit.map_or("-".to_owned(), |limit| limit.to_string());
        println!(
            "{:14} {:20} {:16} {:>8} {:>10} {:>11} {:>16} {:28} {state}",
            key.id,
            key.name,
            key.tenant,
            or_dash(key.limits.requests_per_minute),
            or_dash(key.limits.tokens_per_minute),
            or_dash(key.limits.concurrency),
            key.limits.per_day.map_or("-".to_owned(), |usd| usd.to_string()),
            timestamp(key.created_ns)
        );
    }
    Ok(())
}
