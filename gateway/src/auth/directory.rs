//! Every key, tenant and limit rule in memory, as the store had it a quarter of a second ago: a request asks no database.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use parking_lot::Mutex;

use super::store::{KeyRow, KeyStore, MigrateError, StoredRule, Tenant};
use crate::admission::before::Callers;
use crate::admission::core::rule::Rule;
use crate::config::{Common, stored_rule};
use crate::observe::metrics::Metrics;

/// How soon what was changed by another process, or here, counts.
const WATCH_EVERY: Duration = Duration::from_millis(250);

pub type Keys = HashMap<Arc<str>, Arc<KeyRow>>;
pub type Tenants = HashMap<String, Arc<Tenant>>;

/// What is followed. Those who read it never wait.
#[derive(Default)]
struct Shown {
    keys: ArcSwap<Keys>,
    tenants: ArcSwap<Tenants>,
    /// The file's and the store's, as they bind.
    rules: ArcSwap<Vec<Arc<Rule>>>,
    /// What `rules` is made of; held while it is made.
    sources: Mutex<Sources>,
}

#[derive(Default)]
struct Sources {
    file: Vec<Arc<Rule>>,
    common: Common,
    store: Vec<StoredRule>,
}

pub struct Directory(Arc<Shown>);

impl Directory {
    /// Reads the store and follows changes to it.
    ///
    /// # Errors
    /// When the key store cannot be read.
    pub fn open(path: &Path, metrics: Arc<Metrics>) -> Result<Directory, MigrateError> {
        let store = KeyStore::open(path)?;
        // The version first: what is changed between the two reads is then seen again, not missed.
        let version = store.version()?;
        let shown = Arc::new(Shown::default());
        let mut follower = Follower { store, version, seen: 0, shown: Arc::downgrade(&shown), metrics };
        follower.read(&shown)?;
        let follow = move || follower.follow();
        if let Err(error) = std::thread::Builder::new().name("keys".into()).spawn(follow) {
            tracing::error!(%error, "changes to keys will only be seen after a restart");
        }
        Ok(Directory(shown))
    }

    pub fn keys(&self) -> Guard<Arc<Keys>> {
        self.0.keys.load()
    }

    pub fn tenant(&self, id: &str) -> Option<Arc<Tenant>> {
        self.0.tenants.load().get(id).cloned()
    }

    pub fn callers(&self) -> Callers {
        let key = |key: &Arc<KeyRow>| {
            let who = &key.who;
            (who.key_id.clone(), (who.key_name.clone(), who.tags.clone()))
        };
        let tenant = |tenant: &Arc<Tenant>| (tenant.id.clone(), tenant.tags.clone());
        Callers {
            keys: self.0.keys.load().values().map(key).collect(),
            tenants: self.0.tenants.load().values().map(tenant).collect(),
        }
    }

    /// Those that bind now: the store's, and the file's where the store has none of the name.
    pub fn rules(&self) -> Arc<Vec<Arc<Rule>>> {
        self.0.rules.load_full()
    }

    /// From now on the file says this.
    pub fn set_file_rules(&self, file: &[Arc<Rule>], common: Common) {
        self.0.bind(|sources| (sources.file, sources.common) = (file.to_vec(), common));
    }
}

impl Shown {
    fn bind(&self, change: impl FnOnce(&mut Sources)) {
        let mut sources = self.sources.lock();
        change(&mut sources);
        self.rules.store(Arc::new(in_force(&sources.file, &read_rules(&sources.store, sources.common))));
    }
}

/// The store's rules stand before those of the file with the same names.
fn in_force(file: &[Arc<Rule>], store: &[Arc<Rule>]) -> Vec<Arc<Rule>> {
    let is_replaced = |rule: &Arc<Rule>| store.iter().any(|other| other.name == rule.name);
    file.iter().filter(|rule| !is_replaced(rule)).chain(store).cloned().collect()
}

/// What stored rules mean. One that this version cannot read binds nobody, loudly: the others must.
fn read_rules(stored: &[StoredRule], common: Common) -> Vec<Arc<Rule>> {
    let read = |stored: &StoredRule| match stored_rule(&stored.name, &stored.words, common) {
        Ok(rule) => Some(rule),
        Err(why) => {
            tracing::error!(rule = %stored.name, %why, "a limit rule of the key store cannot be read; it binds nobody");
            None
        }
    };
    stored.iter().filter_map(read).collect()
}

fn with(mut keys: Keys, rows: Vec<KeyRow>) -> Keys {
    keys.extend(rows.into_iter().map(|row| (Arc::from(row.who.key_id.as_str()), Arc::new(row))));
    keys
}

/// Polls SQLite's change counter: one page read, no lock, works across processes.
struct Follower {
    store: KeyStore,
    version: i64,
    /// How far the keys had come when they were read last.
    seen: i64,
    shown: Weak<Shown>,
    metrics: Arc<Metrics>,
}

impl Follower {
    fn follow(mut self) {
        loop {
            std::thread::sleep(WATCH_EVERY);
            let Some(shown) = self.shown.upgrade() else { return };
            let looked = self.look(&shown);
            self.metrics.store_up("keys", looked.is_ok());
            if let Err(error) = looked {
                tracing::error!(%error, "the key store cannot be read; what is known so far stays");
            }
        }
    }

    fn look(&mut self, shown: &Shown) -> rusqlite::Result<()> {
        let version = self.store.version()?;
        if version != self.version {
            self.read(shown)?;
            self.version = version;
        }
        Ok(())
    }

    fn read(&mut self, shown: &Shown) -> rusqlite::Result<()> {
        let (rows, seen) = self.store.changed_since(self.seen)?;
        let (tenants, rules) = (self.store.tenants()?, self.store.rules()?);
        if !rows.is_empty() {
            shown.keys.store(Arc::new(with(Keys::clone(&shown.keys.load()), rows)));
        }
        shown
            .tenants
            .store(Arc::new(tenants.into_iter().map(|tenant| (tenant.id.clone(), Arc::new(tenant))).collect()));
        shown.bind(|sources| sources.store = rules);
        self.seen = seen;
        Ok(())
    }
}
