//! The key store: keys, tenants and limit rules in one SQLite file, and the record of who changed them. `control` writes it, a
//! running gateway follows.

mod audit;
mod keys;
mod migrate;
mod rules;
mod tenants;
mod writing;

use std::path::Path;
use std::time::Duration;

use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension as _, Row};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use audit::{Broken, ChainKey, Entry, Head, Verifier};
pub use keys::{Found, KeyRow, OwnLimits, Place};
pub use migrate::MigrateError;
pub use rules::StoredRule;
pub use tenants::Tenant;
pub use writing::Writing;

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
        Ok(keys::rows(&self.0, "1 ORDER BY created_ns, id", [])?.into_iter().map(|(row, _)| row).collect())
    }

    /// So many keys by id, after this one.
    pub fn page(&self, after: &str, most: u32) -> rusqlite::Result<Vec<Found>> {
        keys::rows(&self.0, "id > ?1 ORDER BY id LIMIT ?2", (after, most))
    }

    pub fn key(&self, id: &str) -> rusqlite::Result<Option<Found>> {
        Ok(keys::rows(&self.0, "id = ?1", [id])?.pop())
    }

    /// Keys that changed after `seen`, in no order, and how far the store has come.
    pub fn changed_since(&self, seen: i64) -> rusqlite::Result<(Vec<KeyRow>, i64)> {
        let found = keys::rows(&self.0, "changed_seq > ?1", [seen])?;
        let last = found.iter().map(|(_, seq)| *seq).max().unwrap_or(seen);
        Ok((found.into_iter().map(|(row, _)| row).collect(), last))
    }

    /// The keys that somebody may mean: by id, by name, or by `tenant/name`.
    pub fn find(&self, called: &str) -> rusqlite::Result<Vec<Found>> {
        keys::rows(&self.0, "?1 IN (id, name, tenant || '/' || name) ORDER BY created_ns, id", [called])
    }

    /// By id.
    pub fn tenants(&self) -> rusqlite::Result<Vec<Tenant>> {
        tenants::rows(&self.0, "1 ORDER BY id", [])
    }

    pub fn tenant(&self, id: &str) -> rusqlite::Result<Option<Tenant>> {
        Ok(tenants::rows(&self.0, "id = ?1", [id])?.pop())
    }

    /// By name.
    pub fn rules(&self) -> rusqlite::Result<Vec<StoredRule>> {
        rules::rows(&self.0)
    }

    /// So many entries of the record, after this one.
    pub fn audit(&self, after: i64, most: u32) -> rusqlite::Result<Vec<Entry>> {
        audit::rows(&self.0, after, most)
    }

    pub fn head(&self) -> rusqlite::Result<Option<Head>> {
        self.0.query_row("SELECT n, hash FROM head", [], Head::read).optional()
    }
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
