//! A change under way: rows and the entry that tells of them, all of it or nothing.

use super::audit::{self, ChainKey, Head};
use super::keys::{self, Found, KeyRow, Place};
use super::rules::{self, StoredRule};
use super::sql::Sql;
use super::tenants::{self, Tenant};
use super::{KeyStore, StoreError};

/// Holds the store until it is committed; dropped, nothing has changed. Of all gateways one makes a change at a time.
#[must_use]
pub struct Writing<'s> {
    db: &'s dyn Sql,
    head: Head,
    is_open: bool,
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        if self.is_open {
            self.db.abandon();
        }
    }
}

impl KeyStore {
    /// # Errors
    /// When somebody else writes for too long, or the store cannot be written.
    pub fn write(&self) -> Result<Writing<'_>, StoreError> {
        let db = self.db();
        db.begin()?;
        let mut writing = Writing { db, head: Head { n: 0, hash: [0; 32] }, is_open: true };
        let lost =
            || StoreError("it has lost where its record of changes ends; `glassgate audit verify` says more".into());
        writing.head = audit::head(db)?.ok_or_else(lost)?;
        Ok(writing)
    }
}

impl Writing<'_> {
    /// The number of the change that is under way.
    pub fn seq(&self) -> i64 {
        self.head.n + 1
    }

    /// Whether this is the pepper of what is here; where there is nothing yet, it is from now on.
    ///
    /// # Errors
    /// As all of these: when the store cannot be read or written.
    pub fn claim(&self, mark: &str) -> Result<bool, StoreError> {
        self.db.execute("UPDATE #head SET pepper = ?1 WHERE pepper IS NULL", &[mark.into()])?;
        Ok(super::pepper(self.db)?.as_deref() == Some(mark))
    }

    pub fn key(&self, id: &str) -> Result<Option<Found>, StoreError> {
        Ok(keys::rows(self.db, "WHERE id = ?1", &[id.into()])?.pop())
    }

    /// `false` if its tenant has one of this name.
    pub fn add_key(&self, key: &KeyRow) -> Result<bool, StoreError> {
        keys::write(self.db, key, self.seq(), Place::New).map(|written| written == 1)
    }

    pub fn put_key(&self, key: &KeyRow) -> Result<(), StoreError> {
        keys::write(self.db, key, self.seq(), Place::Same).map(drop)
    }

    pub fn tenant(&self, id: &str) -> Result<Option<Tenant>, StoreError> {
        Ok(tenants::rows(self.db, "WHERE id = ?1", &[id.into()])?.pop())
    }

    pub fn put_tenant(&self, tenant: &Tenant) -> Result<(), StoreError> {
        tenants::write(self.db, tenant).map(drop)
    }

    pub fn rules(&self) -> Result<Vec<StoredRule>, StoreError> {
        rules::rows(self.db)
    }

    pub fn put_rule(&self, rule: &StoredRule) -> Result<(), StoreError> {
        rules::write(self.db, rule).map(drop)
    }

    pub fn delete_rule(&self, name: &str) -> Result<(), StoreError> {
        rules::delete(self.db, name).map(drop)
    }

    /// Whether nothing was ever decided here.
    pub fn is_empty(&self) -> Result<bool, StoreError> {
        let is = |sql: &str| Ok::<bool, StoreError>(self.db.rows(sql, &[])?.is_empty());
        Ok(is("SELECT id FROM #keys LIMIT 1")?
            && is("SELECT id FROM #tenants LIMIT 1")?
            && is("SELECT name FROM #rules LIMIT 1")?)
    }

    /// Writes the entry that tells of what was changed since the one before.
    pub fn record(&mut self, key: &ChainKey, at_ns: i64, actor: &str, change: String) -> Result<(), StoreError> {
        self.head = audit::write(self.db, self.head.next(key, at_ns, actor, change))?;
        Ok(())
    }

    pub fn commit(mut self) -> Result<(), StoreError> {
        self.db.commit()?;
        self.is_open = false;
        Ok(())
    }
}
