//! Every key in memory, as the store had it a quarter of a second ago: a request asks no database.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};

use super::store::{KeyRow, KeyStore, MigrateError};
use crate::observe::metrics::Metrics;

/// How soon a key that was made or changed by another process counts here.
const WATCH_EVERY: Duration = Duration::from_millis(250);

pub type Keys = HashMap<Arc<str>, Arc<KeyRow>>;

pub struct Directory(Arc<ArcSwap<Keys>>);

impl Directory {
    /// Reads the keys and follows changes that other processes make to them.
    ///
    /// # Errors
    /// When the key store cannot be read.
    pub fn open(path: &Path, metrics: Arc<Metrics>) -> Result<Directory, MigrateError> {
        let store = KeyStore::open(path)?;
        // The version first: a key that is made between the two reads is then seen again, not missed.
        let version = store.version()?;
        let (rows, seen) = store.changed_since(0)?;
        let keys = Arc::new(ArcSwap::from_pointee(with(Keys::new(), rows)));
        let follower = Follower { store, version, seen, keys: Arc::downgrade(&keys), metrics };
        let follow = move || follower.follow();
        if let Err(error) = std::thread::Builder::new().name("keys".into()).spawn(follow) {
            tracing::error!(%error, "changes to keys will only be seen after a restart");
        }
        Ok(Directory(keys))
    }

    pub fn keys(&self) -> Guard<Arc<Keys>> {
        self.0.load()
    }
}

fn with(mut keys: Keys, rows: Vec<KeyRow>) -> Keys {
    keys.extend(rows.into_iter().map(|row| (Arc::from(row.who.key_id.as_str()), Arc::new(row))));
    keys
}

/// Polls SQLite's change counter: one page read, no lock, works across processes.
struct Follower {
    store: KeyStore,
    version: i64,
    /// How far the store had come when it was read last.
    seen: i64,
    keys: Weak<ArcSwap<Keys>>,
    metrics: Arc<Metrics>,
}

impl Follower {
    fn follow(mut self) {
        loop {
            std::thread::sleep(WATCH_EVERY);
            let Some(keys) = self.keys.upgrade() else { return };
            let looked = self.look(&keys);
            self.metrics.store_up("keys", looked.is_ok());
            if let Err(error) = looked {
                tracing::error!(%error, "the key store cannot be read; the keys known so far stay");
            }
        }
    }

    fn look(&mut self, keys: &ArcSwap<Keys>) -> rusqlite::Result<()> {
        let version = self.store.version()?;
        if version != self.version {
            let (rows, seen) = self.store.changed_since(self.seen)?;
            if !rows.is_empty() {
                keys.store(Arc::new(with(Keys::clone(&keys.load()), rows)));
            }
            (self.version, self.seen) = (version, seen);
        }
        Ok(())
    }
}
