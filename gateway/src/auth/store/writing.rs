//! A change under way: rows and the entry that tells of them, all of it or nothing.

use rusqlite::{Transaction, TransactionBehavior};

use super::KeyStore;
use super::audit::{self, ChainKey, Head};
use super::keys::{self, Found, KeyRow, Place};
use super::rules::{self, StoredRule};
use super::tenants::{self, Tenant};

/// Holds the store until it is committed; dropped, nothing has changed.
#[must_use]
pub struct Writing<'s> {
    lock: Transaction<'s>,
    head: Head,
}

impl KeyStore {
    /// # Errors
    /// When somebody else writes for too long, or the file cannot be written.
    pub fn write(&self) -> rusqlite::Result<Writing<'_>> {
        let lock = Transaction::new_unchecked(&self.0, TransactionBehavior::Immediate)?;
        let head = lock.query_row("SELECT n, hash FROM head", [], Head::read)?;
        Ok(Writing { lock, head })
    }
}

impl Writing<'_> {
    /// The number of the change that is under way.
    pub fn seq(&self) -> i64 {
        self.head.n + 1
    }

    pub fn key(&self, id: &str) -> rusqlite::Result<Option<Found>> {
        Ok(keys::rows(&self.lock, "id = ?1", [id])?.pop())
    }

    /// `false` if its tenant has one of this name.
    pub fn add_key(&self, key: &KeyRow) -> rusqlite::Result<bool> {
        keys::write(&self.lock, key, self.seq(), Place::New).map(|written| written == 1)
    }

    pub fn put_key(&self, key: &KeyRow) -> rusqlite::Result<()> {
        keys::write(&self.lock, key, self.seq(), Place::Same).map(drop)
    }

    pub fn tenant(&self, id: &str) -> rusqlite::Result<Option<Tenant>> {
        Ok(tenants::rows(&self.lock, "id = ?1", [id])?.pop())
    }

    pub fn put_tenant(&self, tenant: &Tenant) -> rusqlite::Result<()> {
        tenants::write(&self.lock, tenant).map(drop)
    }

    pub fn rules(&self) -> rusqlite::Result<Vec<StoredRule>> {
        rules::rows(&self.lock)
    }

    pub fn put_rule(&self, rule: &StoredRule) -> rusqlite::Result<()> {
        rules::write(&self.lock, rule).map(drop)
    }

    pub fn delete_rule(&self, name: &str) -> rusqlite::Result<()> {
        rules::delete(&self.lock, name).map(drop)
    }

    /// Whether nothing was ever decided here.
    pub fn is_empty(&self) -> rusqlite::Result<bool> {
        let sql = "SELECT NOT EXISTS (SELECT 1 FROM keys) AND NOT EXISTS (SELECT 1 FROM tenants) \
                   AND NOT EXISTS (SELECT 1 FROM rules)";
        self.lock.query_row(sql, [], |row| row.get(0))
    }

    /// Writes the entry that tells of what was changed since the one before.
    pub fn record(&mut self, key: &ChainKey, at_ns: i64, actor: &str, change: String) -> rusqlite::Result<()> {
        let entry = self.head.next(key, at_ns, actor, change);
        audit::write(&self.lock, &entry)?;
        self.head = Head { n: entry.n, hash: entry.hash };
        Ok(())
    }

    pub fn commit(self) -> rusqlite::Result<()> {
        self.lock.commit()
    }
}
