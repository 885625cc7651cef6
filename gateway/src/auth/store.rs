//! The key store: one SQLite table that the CLI writes and a running gateway follows.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};

/// A key as stored. Never the secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRow {
    pub id: String,
    pub name: String,
    pub tenant: String,
    pub hash: [u8; 32],
    pub created_ns: i64,
    pub revoked_ns: Option<i64>,
    pub requests_per_minute: Option<u32>,
}

pub struct KeyStore(Connection);

impl KeyStore {
    pub fn open(path: &Path) -> rusqlite::Result<KeyStore> {
        let db = Connection::open(path)?;
        db.busy_timeout(Duration::from_secs(5))?;
        db.execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
             CREATE TABLE IF NOT EXISTS keys (
                id TEXT PRIMARY KEY NOT NULL,
                name TEXT NOT NULL UNIQUE,
                tenant TEXT NOT NULL,
                hash BLOB NOT NULL,
                created_ns INTEGER NOT NULL,
                revoked_ns INTEGER,
                requests_per_minute INTEGER
             ) WITHOUT ROWID;",
        )?;
        Ok(KeyStore(db))
    }

    /// Changes whenever another connection commits.
    pub fn version(&self) -> rusqlite::Result<i64> {
        self.0.query_row("PRAGMA data_version", [], |row| row.get(0))
    }

    pub fn list(&self) -> rusqlite::Result<Vec<KeyRow>> {
        let mut query = self.0.prepare_cached(
            "SELECT id, name, tenant, hash, created_ns, revoked_ns, requests_per_minute FROM keys ORDER BY created_ns, id",
        )?;
        let rows = query.query_map([], |row| {
            Ok(KeyRow {
                id: row.get(0)?,
                name: row.get(1)?,
                tenant: row.get(2)?,
                hash: row.get(3)?,
                created_ns: row.get(4)?,
                revoked_ns: row.get(5)?,
                requests_per_minute: row.get(6)?,
            })
        })?;
        rows.collect()
    }

    /// Adds a key; `false` if its name is taken.
    pub fn add(&self, key: &KeyRow) -> rusqlite::Result<bool> {
        let added = self.0.execute(
            "INSERT INTO keys (id, name, tenant, hash, created_ns, revoked_ns, requests_per_minute)
             VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            params![key.id, key.name, key.tenant, key.hash, key.created_ns, key.revoked_ns, key.requests_per_minute],
        )?;
        Ok(added == 1)
    }

    /// Revokes by id or name and returns the id; `None` if there is no such key. Revoking twice keeps the first time.
    pub fn revoke(&self, id_or_name: &str, now_ns: i64) -> rusqlite::Result<Option<String>> {
        self.0
            .query_row(
                "UPDATE keys SET revoked_ns = COALESCE(revoked_ns, ?1) WHERE id = ?2 OR name = ?2 RETURNING id",
                params![now_ns, id_or_name],
                |row| row.get(0),
            )
            .optional()
    }
}
