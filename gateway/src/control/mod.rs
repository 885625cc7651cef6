//! What operators decide: every change of keys, tenants and limit rules, and of what rows of the ledger count as, whoever asks for it, is a `Change` that `Control`
//! applies, and nothing else writes the key store.
//!
//! A change is checked, and then its rows and its entry in the record are written in one transaction. Gateways that serve from
//! the folder, or share the database, see it within a second, this one too.

pub mod edit;
pub mod export;
mod make;
pub mod view;

use serde_json::{Map, Value};

use self::edit::{KeyEdit, When};
use self::export::Import;
use crate::auth::api_key::Pepper;
use crate::auth::store::{ChainKey, KeyRow, KeyStore, Location, OpenError, StoreError, StoredRule, Tenant};
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
    /// Into an empty store.
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

impl From<StoreError> for Denied {
    fn from(error: StoreError) -> Denied {
        Denied::Store(error.to_string())
    }
}

/// The one who writes.
#[derive(Clone)]
pub struct Control {
    data_dir: DataDir,
    location: Location,
    pepper: Option<Pepper>,
}

impl Control {
    /// `pepper`: the configuration's, if it has one; else it is in the data folder.
    pub fn new(data_dir: DataDir, location: Location, pepper: Option<Pepper>) -> Control {
        Control { data_dir, location, pepper }
    }

    pub fn data_dir(&self) -> &DataDir {
        &self.data_dir
    }

    pub fn location(&self) -> &Location {
        &self.location
    }

    /// # Errors
    /// When it cannot be read, or a newer version has made it.
    pub fn store(&self) -> Result<KeyStore, Denied> {
        KeyStore::open(&self.location).map_err(|error| match &self.location {
            Location::File(path) => Denied::Store(format!("{}: {error}", path.display())),
            Location::Postgres(_) => Denied::Store(format!("the database: {error}")),
        })
    }

    /// # Errors
    /// When it cannot be read, or made where there is none.
    pub fn pepper(&self) -> Result<Pepper, Denied> {
        let path = self.data_dir.pepper();
        let load = || Pepper::load(&path).map_err(|error| Denied::Store(format!("{}: {error}", path.display())));
        self.pepper.clone().map_or_else(load, Ok)
    }

    /// What seals the record of a store.
    ///
    /// # Errors
    /// When there is no pepper to be had, or not the one that it is of.
    pub fn chain_key(&self, store: &KeyStore) -> Result<ChainKey, Denied> {
        let pepper = self.pepper()?;
        match store.pepper()? {
            Some(mark) if mark != pepper.mark() => Err(wrong_pepper()),
            _ => Ok(chain_key(&pepper)),
        }
    }

    /// Makes a change, if what it is about is `expected` (its version, where that matters).
    ///
    /// # Errors
    /// Why not. Nothing has changed then.
    pub fn apply(&self, actor: &str, change: Change, expected: Option<i64>) -> Result<Applied, Denied> {
        let (store, pepper) = (self.store()?, self.pepper()?);
        let now = SystemClock.now_ns();
        let mut writing = store.write()?;
        if !writing.claim(&pepper.mark())? {
            return Err(wrong_pepper());
        }
        let version = writing.seq();
        let (done, told) = make::make(&writing, &pepper, change, expected, now)?;
        writing.record(&chain_key(&pepper), now, actor, told.to_string())?;
        writing.commit()?;
        Ok(Applied { done, version })
    }
}

fn wrong_pepper() -> Denied {
    Denied::Conflict(OpenError::Pepper.to_string())
}

fn chain_key(pepper: &Pepper) -> ChainKey {
    ChainKey(pepper.derive("glassgate 2026-11 audit chain"))
}
