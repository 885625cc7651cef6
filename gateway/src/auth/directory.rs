//! Every key, tenant and limit rule in memory, as the store had it a quarter of a second ago: a request asks no database.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::{ArcSwap, Guard};
use parking_lot::Mutex;

use super::follow::Follower;
use super::store::{KeyRow, Location, News, OpenError, StoredRule, Tenant};
use crate::admission::before::Callers;
use crate::admission::core::rule::Rule;
use crate::config::{Common, stored_rule};
use crate::observe::metrics::Metrics;

pub type Keys = HashMap<Arc<str>, Arc<KeyRow>>;
pub type Tenants = HashMap<String, Arc<Tenant>>;

/// What is followed. Those who read it never wait.
#[derive(Default)]
pub(super) struct Shown {
    /// Whether there is anything to be shown.
    is_known: AtomicBool,
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

#[derive(Clone)]
pub struct Directory(Arc<Shown>);

impl Directory {
    /// Reads the store and follows changes to it. `mark`: our pepper's.
    ///
    /// # Errors
    /// When the key store cannot be read, or is of another pepper. One that gateways share may be away: its last `copy` is
    /// read then, and followed is what it says when it is back.
    pub fn open(location: &Location, copy: &Path, mark: String, metrics: Arc<Metrics>) -> Result<Directory, OpenError> {
        let shown = Arc::new(Shown::default());
        let follower = Follower::start(location.clone(), copy, mark, &shown, metrics)?;
        if let Err(error) = std::thread::Builder::new().name("keys".into()).spawn(|| follower.follow()) {
            tracing::error!(%error, "changes to keys will only be seen after a restart");
        }
        Ok(Directory(shown))
    }

    /// Whether anything was ever read.
    pub fn is_known(&self) -> bool {
        self.0.is_known.load(Ordering::Acquire)
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
    pub(super) fn show(&self, news: &News) {
        if news.is_all || !news.keys.is_empty() {
            let mut keys = if news.is_all { Keys::default() } else { Keys::clone(&self.keys.load()) };
            let fresh = news.keys.iter().map(|(key, _)| (Arc::from(key.who.key_id.as_str()), Arc::new(key.clone())));
            keys.extend(fresh);
            self.keys.store(Arc::new(keys));
        }
        let tenants = news.tenants.iter().map(|tenant| (tenant.id.clone(), Arc::new(tenant.clone())));
        self.tenants.store(Arc::new(tenants.collect()));
        self.bind(|sources| sources.store.clone_from(&news.rules));
        self.is_known.store(true, Ordering::Release);
    }

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
