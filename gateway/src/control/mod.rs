//! What operators decide: every change of keys, tenants and limit rules, and of what rows of the ledger count as, whoever asks for it, is a `Change` that `Control`
//! applies, and nothing else writes the key store.
//!
//! A change is checked, and then its rows and its entry in the record are written in one transaction. Gateways that serve from
//! the folder see it within a second, this one too.

pub mod edit;
pub mod export;
mod make;
pub mod view;

use serde_json::{Map, Value};

use self::edit::{KeyEdit, When};
use self::export::Import;
use crate::auth::api_key::Pepper;
use crate::auth::store::{ChainKey, KeyRow, KeyStore, MigrateError, StoredRule, Tenant};
use crate::config::{Config, check_rule};
use crate::data_dir::DataDir;
use crate::ports::{Clock as _, SystemClock};

/// What is to be different.
pub enum Change {
    CreateKey {
        /// Shown to nobody; its hash is stored.
        token: String,
        tenant: String,
        name: String,
        edit: Box<KeyEdit>,
    },
    EditKey {
        id: String,
        edit: Box<KeyEdit>,
    },
    RotateKey {
        id: String,
        token: String,
        /// How long the secret before it counts.
        grace: When,
    },
    EnableKey {
        id: String,
    },
    DisableKey {
        id: String,
    },
    RevokeKey {
        id: String,
    },
    PutTenant {
        id: String,
        name: Option<String>,
        tags: Vec<String>,
    },
    EnableTenant {
        id: String,
    },
    /// Also of a tenant that nobody has put: its keys and tokens name it.
    DisableTenant {
        id: String,
    },
    PutRule(CheckedRule),
    DeleteRule {
        name: String,
    },
    /// Into an empty folder.
    Import(Import),
    /// Of the ledger, as these words say. It is written elsewhere; here it is said who has it done, before it is.
    Reprice(Value),
}

/// A rule that the running configuration can hold to. Only `CheckedRule::new` makes one.
pub struct CheckedRule {
    name: String,
    words: Map<String, Value>,
}

impl CheckedRule {
    /// # Errors
    /// `Invalid`, with every problem.
    pub fn new(name: &str, words: Map<String, Value>, config: &Config) -> Result<CheckedRule, Denied> {
        // What is not said is as good as left out, and an order says nothing.
        let mut words: Vec<(String, Value)> = words.into_iter().filter(|(_, value)| !value.is_null()).collect();
        words.sort_by(|(a, _), (b, _)| a.cmp(b));
        let words = Map::from_iter(words);
        check_rule(name, &words, config).map_err(|why| Denied::Invalid { param: None, why })?;
        Ok(CheckedRule { name: name.to_owned(), words })
    }
}

/// What a change was about, as it is now.
pub enum Done {
    Key(Box<KeyRow>),
    Tenant(Tenant),
    Rule(StoredRule),
    /// Of what there is nothing to show.
    Gone,
}

/// A change that was made.
pub struct Applied {
    pub done: Done,
    /// The version that what it was about has now; the number of the entry in the record.
    pub version: i64,
}

/// Why nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum Denied {
    #[error("{why}")]
    Invalid { param: Option<String>, why: String },
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    Conflict(String),
    #[error("it has changed meanwhile: this is version {found}, not {expected}; look at it again")]
    Stale { expected: i64, found: i64 },
    #[error("the key store: {0}")]
    Store(String),
}

impl From<rusqlite::Error> for Denied {
    fn from(error: rusqlite::Error) -> Denied {
        Denied::Store(error.to_string())
    }
}

impl From<MigrateError> for Denied {
    fn from(error: MigrateError) -> Denied {
        Denied::Store(error.to_string())
    }
}

impl From<std::io::Error> for Denied {
    fn from(error: std::io::Error) -> Denied {
        Denied::Store(error.to_string())
    }
}

/// The one who writes.
#[derive(Clone)]
pub struct Control {
    data_dir: DataDir,
}

impl Control {
    pub fn new(data_dir: DataDir) -> Control {
        Control { data_dir }
    }

    pub fn data_dir(&self) -> &DataDir {
        &self.data_dir
    }

    /// # Errors
    /// When it cannot be read, or a newer version has made it.
    pub fn store(&self) -> Result<KeyStore, Denied> {
        KeyStore::open(&self.data_dir.keys())
            .map_err(|error| Denied::Store(format!("{}: {error}", self.data_dir.keys().display())))
    }

    fn pepper(&self) -> Result<Pepper, Denied> {
        Pepper::load(&self.data_dir.pepper())
            .map_err(|error| Denied::Store(format!("{}: {error}", self.data_dir.pepper().display())))
    }

    /// What seals the record.
    ///
    /// # Errors
    /// When the pepper cannot be read.
    pub fn chain_key(&self) -> Result<ChainKey, Denied> {
        Ok(chain_key(&self.pepper()?))
    }

    /// Makes a change, if what it is about is `expected` (its version, where that matters).
    ///
    /// # Errors
    /// Why not. Nothing has changed then.
    pub fn apply(&self, actor: &str, change: Change, expected: Option<i64>) -> Result<Applied, Denied> {
        let (store, pepper) = (self.store()?, self.pepper()?);
        let now = SystemClock.now_ns();
        let mut writing = store.write()?;
        let version = writing.seq();
        let (done, told) = make::make(&writing, &pepper, change, expected, now)?;
        writing.record(&chain_key(&pepper), now, actor, told.to_string())?;
        writing.commit()?;
        Ok(Applied { done, version })
    }
}

fn chain_key(pepper: &Pepper) -> ChainKey {
    ChainKey(pepper.derive("glassgate 2026-11 audit chain"))
}

#[cfg(test)]
mod tests;
