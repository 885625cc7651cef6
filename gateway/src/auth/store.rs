//! The key store: one SQLite table that the CLI writes and a running gateway follows.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};

use crate::accounting::core::NanoUsd;

/// A key as stored. Never the secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRow {
    pub id: String,
    pub name: String,
    pub tenant: String,
    pub hash: [u8; 32],
    pub created_ns: i64,
    pub revoked_ns: Option<i64>,
    pub limits: OwnLimits,
}

/// The limits that a key has of its own; the configuration's stand where it has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnLimits {
    pub requests_per_minute: Option<u32>,
    pub tokens_per_minute: Option<u32>,
    pub concurrency: Option<u32>,
    pub per_day: Option<NanoUsd>,
}

/// Columns that a data folder of an earlier version lacks.
const ADDED: [(&str, &str); 3] =
    [("tokens_per_minute", "INTEGER"), ("concurrency", "INTEGER"), ("nano_usd_per_day", "INTEGER")];

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
        add_columns(&db)?;
        Ok(KeyStore(db))
    }

    /// Changes whenever another connection commits.
    pub fn version(&self) -> rusqlite::Result<i64> {
        self.0.query_row("PRAGMA data_version", [], |row| row.get(0))
    }

    pub fn list(&self) -> rusqlite::Result<Vec<KeyRow>> {
        let mut query = self.0.prepare_cached(
            "SELECT id, name, tenant, hash, created_ns, revoked_ns,
                    requests_per_minute, tokens_per_minute, concurrency, nano_usd_per_day
             FROM keys ORDER BY created_ns, id",
        )?;
        let rows = query.query_map([], |row| {
            Ok(KeyRow {
                id: row.get(0)?,
                name: row.get(1)?,
                tenant: row.get(2)?,
                hash: row.get(3)?,
                created_ns: row.get(4)?,
                revoked_ns: row.get(5)?,
                limits: OwnLimits {
                    requests_per_minute: row.get(6)?,
                    tokens_per_minute: row.get(7)?,
                    concurrency: row.get(8)?,
                    per_day: row.get::<_, Option<i64>>(9)?.map(|nano| NanoUsd(nano.max(0).unsigned_abs())),
                },
            })
        })?;
        rows.collect()
    }

    /// Adds a key; `false` if its name is taken.
    pub fn add(&self, key: &KeyRow) -> rusqlite::Result<bool> {
        let added = self.0.execute(
            "INSERT INTO keys (id, name, tenant, hash, created_ns, revoked_ns,
                               requests_per_minute, tokens_per_minute, concurrency, nano_usd_per_day)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            params![
                key.id,
                key.name,
                key.tenant,
                key.hash,
                key.created_ns,
                key.revoked_ns,
                key.limits.requests_per_minute,
                key.limits.tokens_per_minute,
                key.limits.concurrency,
                key.limits.per_day.map(|usd| i64::try_from(usd.0).unwrap_or(i64::MAX)),
            ],
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

/// Brings the table of an earlier version up to date. Looks before it writes: a write would wake every gateway that
/// follows this store.
fn add_columns(db: &Connection) -> rusqlite::Result<()> {
    if missing(db)?.is_empty() {
        return Ok(());
    }
    // Two processes may both have looked; the lock lets one of them be first.
    db.execute_batch("BEGIN IMMEDIATE")?;
    let added = missing(db).and_then(|columns| {
        columns
            .iter()
            .try_for_each(|(name, kind)| db.execute_batch(&format!("ALTER TABLE keys ADD COLUMN {name} {kind}")))
    });
    db.execute_batch(if added.is_ok() { "COMMIT" } else { "ROLLBACK" })?;
    added
}

fn missing(db: &Connection) -> rusqlite::Result<Vec<(&'static str, &'static str)>> {
    let mut query = db.prepare("SELECT name FROM pragma_table_info('keys')")?;
    let there: Vec<String> = query.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
    Ok(ADDED.into_iter().filter(|(name, _)| !there.iter().any(|there| there == name)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_of_an_earlier_version_keeps_its_keys_and_learns_new_limits() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.sqlite");
        Connection::open(&path)
            .unwrap()
            .execute_batch(
                "CREATE TABLE keys (id TEXT PRIMARY KEY NOT NULL, name TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL,
                                    hash BLOB NOT NULL, created_ns INTEGER NOT NULL, revoked_ns INTEGER,
                                    requests_per_minute INTEGER) WITHOUT ROWID;
                 INSERT INTO keys VALUES ('a', 'alice', 'acme', zeroblob(32), 1, NULL, 7);",
            )
            .unwrap();
        let store = KeyStore::open(&path).unwrap();
        let alice = store.list().unwrap().remove(0);
        assert_eq!((alice.name.as_str(), alice.limits.requests_per_minute), ("alice", Some(7)));
        assert_eq!(alice.limits, OwnLimits { requests_per_minute: Some(7), ..OwnLimits::default() });
        let limits = OwnLimits {
            requests_per_minute: None,
            tokens_per_minute: Some(1_000),
            concurrency: Some(2),
            per_day: Some(NanoUsd(1_500_000_000)),
        };
        let bob = KeyRow { id: "b".into(), name: "bob".into(), created_ns: 2, limits, ..alice.clone() };
        assert!(store.add(&bob).unwrap());
        let version = store.version().unwrap();
        assert_eq!(KeyStore::open(&path).unwrap().list().unwrap(), [alice, bob], "a second open changes nothing");
        assert_eq!(store.version().unwrap(), version, "and wakes nobody");
    }
}
