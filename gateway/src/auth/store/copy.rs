//! What has changed in a store, for those who follow it; and a store that is another one's copy, kept up with that.

use super::audit::{self, Head};
use super::keys::{self, Found, Place};
use super::rules::{self, StoredRule};
use super::tenants::{self, Tenant};
use super::{KeyStore, StoreError};

/// Keys that are read at once.
const PAGE: u32 = 10_000;

/// What a store holds.
pub struct News {
    /// The last change that is in it.
    pub head: Head,
    pub pepper: Option<String>,
    /// All keys, or those that have changed.
    pub keys: Vec<Found>,
    pub is_all: bool,
    pub tenants: Vec<Tenant>,
    pub rules: Vec<StoredRule>,
}

impl KeyStore {
    /// What has changed after `seen`, if that is known and the store has come so far; else everything.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn news(&self, seen: Option<i64>) -> Result<News, StoreError> {
        // The head first: what is changed while the rest is read comes again the next time.
        let head = self.head()?.unwrap_or(Head { n: 0, hash: [0; 32] });
        let seen = seen.filter(|seen| *seen <= head.n);
        let keys = self.changed_since(seen.unwrap_or(0))?;
        let (pepper, tenants, rules) = (self.pepper()?, self.tenants()?, self.rules()?);
        Ok(News { head, pepper, keys, is_all: seen.is_none(), tenants, rules })
    }

    /// Keys that changed after `seen`, in that order.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn changed_since(&self, seen: i64) -> Result<Vec<Found>, StoreError> {
        let mut found: Vec<Found> = Vec::new();
        let mut after = (seen + 1, String::new());
        loop {
            let values = [after.0.into(), after.1.as_str().into(), PAGE.into()];
            let which = "WHERE (changed_seq, id) > (?1, ?2) ORDER BY changed_seq, id LIMIT ?3";
            let page = keys::rows(self.db(), which, &values)?;
            let is_last = page.len() < PAGE as usize;
            found.extend(page);
            match found.last() {
                Some((key, seq)) if !is_last => after = (*seq, key.who.key_id.clone()),
                _ => return Ok(found),
            }
        }
    }

    /// Takes over what another store holds, all of it or nothing.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn take(&self, news: &News) -> Result<(), StoreError> {
        let writing = self.write()?;
        let db = self.db();
        let tables = if news.is_all { &["keys", "tenants", "rules"][..] } else { &["tenants", "rules"] };
        for table in tables {
            db.execute(&format!("DELETE FROM #{table}"), &[])?;
        }
        news.keys.iter().try_for_each(|(key, seq)| keys::write(db, key, *seq, Place::Same).map(drop))?;
        news.tenants.iter().try_for_each(|tenant| tenants::write(db, tenant).map(drop))?;
        news.rules.iter().try_for_each(|rule| rules::write(db, rule).map(drop))?;
        audit::write_head(db, news.head)?;
        db.execute("UPDATE #head SET pepper = ?1", &[news.pepper.clone().into()])?;
        writing.commit()
    }
}
