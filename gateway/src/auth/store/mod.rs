//! The key store: keys, tenants and limit rules, and the record of who changed them. `control` writes it, running gateways
//! follow. It is a SQLite file of one gateway, or tables in the Postgres that several share.

mod audit;
mod copy;
mod keys;
mod migrate;
mod postgres;
mod rules;
mod sql;
mod sqlite;
mod tenants;
mod writing;

use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use self::audit::{Broken, ChainKey, Entry, Head, Verifier};
pub use self::copy::News;
pub use self::keys::{Found, KeyRow, OwnLimits, Place};
pub use self::rules::StoredRule;
use self::sql::{Row, Sql, unreadable};
pub use self::tenants::Tenant;
pub use self::writing::Writing;
pub use crate::database::StoreError;
use crate::database::postgres::Target;

/// Where a key store is.
#[derive(Clone, Debug)]
pub enum Location {
    File(PathBuf),
    Postgres(Arc<Target>),
}

/// Why a store is not opened, or not followed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the key store was written by a newer glassgate; use that one")]
    Newer,
    #[error(
        "the key store is of another pepper than this gateway's, with which none of its keys would be known; give this data \
         folder the file `pepper` of the one that has made them, or all gateways the same `auth.pepper`"
    )]
    Pepper,
}

impl From<rusqlite::Error> for OpenError {
    fn from(error: rusqlite::Error) -> OpenError {
        OpenError::Store(error.into())
    }
}

pub struct KeyStore(Box<dyn Sql>);

impl KeyStore {
    /// # Errors
    /// When it cannot be read or written, or a newer version has made it.
    pub fn open(location: &Location) -> Result<KeyStore, OpenError> {
        Ok(KeyStore(match location {
            Location::File(path) => Box::new(sqlite::Sqlite::open(path)?),
            Location::Postgres(target) => Box::new(postgres::Postgres::open(target)?),
        }))
    }

    fn db(&self) -> &dyn Sql {
        &*self.0
    }

    pub fn list(&self) -> Result<Vec<KeyRow>, StoreError> {
        let found = keys::rows(self.db(), "ORDER BY created_ns, id", &[])?;
        Ok(found.into_iter().map(|(row, _)| row).collect())
    }

    /// So many keys by id, after this one.
    pub fn page(&self, after: &str, most: u32) -> Result<Vec<Found>, StoreError> {
        keys::rows(self.db(), "WHERE id > ?1 ORDER BY id LIMIT ?2", &[after.into(), most.into()])
    }

    pub fn key(&self, id: &str) -> Result<Option<Found>, StoreError> {
        Ok(keys::rows(self.db(), "WHERE id = ?1", &[id.into()])?.pop())
    }

    /// The keys that somebody may mean: by id, by name, or by `tenant/name`.
    pub fn find(&self, called: &str) -> Result<Vec<Found>, StoreError> {
        let which = "WHERE ?1 IN (id, name, tenant || '/' || name) ORDER BY created_ns, id";
        keys::rows(self.db(), which, &[called.into()])
    }

    /// By id.
    pub fn tenants(&self) -> Result<Vec<Tenant>, StoreError> {
        tenants::rows(self.db(), "ORDER BY id", &[])
    }

    pub fn tenant(&self, id: &str) -> Result<Option<Tenant>, StoreError> {
        Ok(tenants::rows(self.db(), "WHERE id = ?1", &[id.into()])?.pop())
    }

    /// By name.
    pub fn rules(&self) -> Result<Vec<StoredRule>, StoreError> {
        rules::rows(self.db())
    }

    /// So many entries of the record, after this one.
    pub fn audit(&self, after: i64, most: u32) -> Result<Vec<Entry>, StoreError> {
        audit::rows(self.db(), after, most)
    }

    /// One row: whoever follows asks for it all the time.
    pub fn head(&self) -> Result<Option<Head>, StoreError> {
        audit::head(self.db())
    }

    /// The mark of the pepper that its hashes were made with, once a change has been made.
    pub fn pepper(&self) -> Result<Option<String>, StoreError> {
        pepper(self.db())
    }
}

fn pepper(db: &dyn Sql) -> Result<Option<String>, StoreError> {
    let rows = db.rows("SELECT pepper FROM #head", &[])?;
    rows.first().map_or(Ok(None), |row| row.get("pepper"))
}

fn json(texts: &impl Serialize) -> String {
    // Texts, lists and maps of them: this has no way to fail.
    serde_json::to_string(texts).unwrap_or_default()
}

/// A column of JSON; SQL's NULL reads as JSON's.
fn texts<T: DeserializeOwned>(row: &Row, column: &str) -> Result<T, StoreError> {
    let text: Option<String> = row.get(column)?;
    serde_json::from_str(text.as_deref().unwrap_or("null")).map_err(|error| unreadable(column, error))
}

fn parsed<T>(column: &str, parsed: Option<T>) -> Result<T, StoreError> {
    parsed.ok_or_else(|| unreadable(column, "it holds a word that this version does not know"))
}

#[cfg(test)]
mod tests;
