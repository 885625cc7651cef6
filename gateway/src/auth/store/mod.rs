//! The key store: one SQLite table that the CLI writes and a running gateway follows.

mod migrate;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::types::Type;
use rusqlite::{Connection, Row, Transaction, TransactionBehavior, named_params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::identity::Identity;
use crate::accounting::core::NanoUsd;
use crate::ports::Scope;
pub use migrate::MigrateError;

/// A key as stored. Never the secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRow {
    pub who: Arc<Identity>,
    pub hash: [u8; 32],
    /// The hash before the last rotation, and until when it counts, in Unix nanoseconds.
    pub previous: Option<([u8; 32], i64)>,
    pub created_ns: i64,
    pub expires_ns: Option<i64>,
    pub disabled_ns: Option<i64>,
    pub revoked_ns: Option<i64>,
    /// What its owner wants to remember; nobody here reads it.
    pub metadata: BTreeMap<String, String>,
}

/// The limits that a key has of its own; the configuration's stand where it has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnLimits {
    pub requests_per_minute: Option<u32>,
    pub tokens_per_minute: Option<u32>,
    pub concurrency: Option<u32>,
    pub per_day: Option<NanoUsd>,
}

const COLUMNS: &str = "id, tenant, name, hash, previous_hash, previous_until_ns, created_ns, expires_ns, disabled_ns, \
                       revoked_ns, user_id, tags, metadata, scopes, models, networks, requests_per_minute, \
                       tokens_per_minute, concurrency, nano_usd_per_day, changed_seq";

/// A key by its id, and how far the store had come when it changed last.
type Found = (KeyRow, i64);

pub struct KeyStore(Connection);

impl KeyStore {
    /// # Errors
    /// When the file cannot be read or written, or a newer version has made it.
    pub fn open(path: &Path) -> Result<KeyStore, MigrateError> {
        let db = Connection::open(path)?;
        db.busy_timeout(Duration::from_secs(5))?;
        db.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;")?;
        migrate::migrate(&db)?;
        Ok(KeyStore(db))
    }

    /// Changes whenever another connection commits.
    pub fn version(&self) -> rusqlite::Result<i64> {
        self.0.query_row("PRAGMA data_version", [], |row| row.get(0))
    }

    pub fn list(&self) -> rusqlite::Result<Vec<KeyRow>> {
        Ok(self.rows("1 ORDER BY created_ns, id", [])?.into_iter().map(|(row, _)| row).collect())
    }

    /// Keys that changed after `seen`, in no order, and how far the store has come.
    pub fn changed_since(&self, seen: i64) -> rusqlite::Result<(Vec<KeyRow>, i64)> {
        let found = self.rows("changed_seq > ?1", [seen])?;
        let last = found.iter().map(|(_, seq)| *seq).max().unwrap_or(seen);
        Ok((found.into_iter().map(|(row, _)| row).collect(), last))
    }

    /// The keys that somebody may mean: by id, by name, or by `tenant/name`.
    pub fn find(&self, called: &str) -> rusqlite::Result<Vec<KeyRow>> {
        let found = self.rows("?1 IN (id, name, tenant || '/' || name) ORDER BY created_ns, id", [called])?;
        Ok(found.into_iter().map(|(row, _)| row).collect())
    }

    /// Adds a key; `false` if its tenant has one of this name.
    pub fn add(&self, key: &KeyRow) -> rusqlite::Result<bool> {
        self.write(key, "ON CONFLICT DO NOTHING").map(|written| written == 1)
    }

    /// Changes a key as it is now, and returns what became of it; `None` if there is none.
    pub fn change(&self, id: &str, change: impl FnOnce(&mut KeyRow)) -> rusqlite::Result<Option<KeyRow>> {
        let lock = Transaction::new_unchecked(&self.0, TransactionBehavior::Immediate)?;
        let Some((mut row, _)) = self.rows("id = ?1", [id])?.pop() else { return Ok(None) };
        change(&mut row);
        self.write(&row, "ON CONFLICT (id) DO UPDATE SET hash = excluded.hash, previous_hash = excluded.previous_hash, \
                          previous_until_ns = excluded.previous_until_ns, expires_ns = excluded.expires_ns, \
                          disabled_ns = excluded.disabled_ns, revoked_ns = excluded.revoked_ns, user_id = excluded.user_id, \
                          tags = excluded.tags, metadata = excluded.metadata, scopes = excluded.scopes, \
                          models = excluded.models, networks = excluded.networks, \
                          requests_per_minute = excluded.requests_per_minute, \
                          tokens_per_minute = excluded.tokens_per_minute, concurrency = excluded.concurrency, \
                          nano_usd_per_day = excluded.nano_usd_per_day, changed_seq = excluded.changed_seq")?;
        lock.commit()?;
        Ok(Some(row))
    }

    fn rows(&self, which: &str, parameters: impl rusqlite::Params) -> rusqlite::Result<Vec<Found>> {
        let mut query = self.0.prepare_cached(&format!("SELECT {COLUMNS} FROM keys WHERE {which}"))?;
        query.query_map(parameters, read)?.collect()
    }

    /// Every write counts the store on by one, in the same transaction.
    fn write(&self, key: &KeyRow, on_conflict: &str) -> rusqlite::Result<usize> {
        let who = &key.who;
        let scopes =
            who.scopes.as_ref().map(|scopes| json(&scopes.iter().map(|scope| scope.as_str()).collect::<Vec<_>>()));
        let networks = who.networks.as_ref();
        let networks = networks.map(|networks| json(&networks.iter().map(ToString::to_string).collect::<Vec<_>>()));
        let mut insert = self.0.prepare_cached(&format!(
            "INSERT INTO keys ({COLUMNS}) VALUES (:id, :tenant, :name, :hash, :previous_hash, :previous_until_ns, \
             :created_ns, :expires_ns, :disabled_ns, :revoked_ns, :user_id, :tags, :metadata, :scopes, :models, :networks, \
             :rpm, :tpm, :concurrency, :nano_usd_per_day, \
             (SELECT COALESCE(MAX(changed_seq), 0) + 1 FROM keys)) {on_conflict}"
        ))?;
        insert.execute(named_params! {
            ":id": who.key_id,
            ":tenant": who.tenant,
            ":name": who.key_name,
            ":hash": key.hash,
            ":previous_hash": key.previous.map(|(hash, _)| hash),
            ":previous_until_ns": key.previous.map(|(_, until)| until),
            ":created_ns": key.created_ns,
            ":expires_ns": key.expires_ns,
            ":disabled_ns": key.disabled_ns,
            ":revoked_ns": key.revoked_ns,
            ":user_id": who.user,
            ":tags": json(&who.tags),
            ":metadata": json(&key.metadata),
            ":scopes": scopes,
            ":models": who.models.as_ref().map(json),
            ":networks": networks,
            ":rpm": who.limits.requests_per_minute,
            ":tpm": who.limits.tokens_per_minute,
            ":concurrency": who.limits.concurrency,
            ":nano_usd_per_day": who.limits.per_day.map(|usd| i64::try_from(usd.0).unwrap_or(i64::MAX)),
        })
    }
}

fn read(row: &Row<'_>) -> rusqlite::Result<Found> {
    let words = |column| texts::<Option<Vec<String>>>(row, column);
    let scopes = words("scopes")?.map(|words| words.iter().map(|word| parsed("scopes", Scope::parse(word))).collect());
    let networks =
        words("networks")?.map(|words| words.iter().map(|word| parsed("networks", word.parse().ok())).collect());
    let who = Identity {
        tenant: row.get("tenant")?,
        key_id: row.get("id")?,
        key_name: row.get("name")?,
        user: row.get("user_id")?,
        tags: texts(row, "tags")?,
        tier: None,
        scopes: scopes.transpose()?,
        models: texts(row, "models")?,
        networks: networks.transpose()?,
        limits: OwnLimits {
            requests_per_minute: row.get("requests_per_minute")?,
            tokens_per_minute: row.get("tokens_per_minute")?,
            concurrency: row.get("concurrency")?,
            per_day: row.get::<_, Option<i64>>("nano_usd_per_day")?.map(|nano| NanoUsd(nano.max(0).unsigned_abs())),
        },
    };
    let previous: Option<[u8; 32]> = row.get("previous_hash")?;
    let key = KeyRow {
        who: Arc::new(who),
        hash: row.get("hash")?,
        previous: previous.zip(row.get("previous_until_ns")?),
        created_ns: row.get("created_ns")?,
        expires_ns: row.get("expires_ns")?,
        disabled_ns: row.get("disabled_ns")?,
        revoked_ns: row.get("revoked_ns")?,
        metadata: texts(row, "metadata")?,
    };
    Ok((key, row.get("changed_seq")?))
}

fn json(texts: &impl Serialize) -> String {
    // Texts, lists and maps of them: this has no way to fail.
    serde_json::to_string(texts).unwrap_or_default()
}

/// A column of JSON; SQL's NULL reads as JSON's.
fn texts<T: DeserializeOwned>(row: &Row<'_>, column: &str) -> rusqlite::Result<T> {
    let text: Option<String> = row.get(column)?;
    serde_json::from_str(text.as_deref().unwrap_or("null")).map_err(|error| unreadable(column, error))
}

/// What a column holds that nobody here wrote is an error: a list that reads shorter than it is would allow too much.
fn parsed<T>(column: &str, parsed: Option<T>) -> rusqlite::Result<T> {
    parsed.ok_or_else(|| unreadable(column, "it holds a word that this version does not know"))
}

fn unreadable(column: &str, why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> rusqlite::Error {
    let why = why.into();
    rusqlite::Error::FromSqlConversionFailure(0, Type::Text, format!("column `{column}`: {why}").into())
}

#[cfg(test)]
mod tests;
