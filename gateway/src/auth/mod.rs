//! Who is calling → `Caller`.

pub mod api_key;
pub mod store;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use http::HeaderMap;

use crate::config::Limits;
use crate::observe::metrics::Metrics;
use crate::refusal::Refusal;
use api_key::{ApiKey, Pepper};
use store::{KeyRow, KeyStore};

/// How soon a key that was made or revoked by another process counts here.
const WATCH_EVERY: Duration = Duration::from_millis(250);

/// Proof that somebody known is calling. Only `Auth::identify` makes one.
#[derive(Clone, Debug)]
pub struct Caller {
    key: Arc<KeyRow>,
}

impl Caller {
    pub fn key_id(&self) -> &str {
        &self.key.id
    }
    pub fn key_name(&self) -> &str {
        &self.key.name
    }
    pub fn tenant(&self) -> &str {
        &self.key.tenant
    }
    /// The key's own limits, and the default where it has none.
    pub fn limits(&self, default: &Limits) -> Limits {
        let own = &self.key.limits;
        Limits {
            requests_per_minute: own.requests_per_minute.unwrap_or(default.requests_per_minute),
            tokens_per_minute: own.tokens_per_minute.unwrap_or(default.tokens_per_minute),
            concurrency: own.concurrency.unwrap_or(default.concurrency),
            per_day: own.per_day.unwrap_or(default.per_day),
        }
    }
}

type Keys = HashMap<String, Arc<KeyRow>>;

#[cfg(test)]
impl Caller {
    /// A caller whose key is none of a store's.
    pub fn for_tests(id: &str, limits: store::OwnLimits) -> Caller {
        let key = KeyRow {
            id: id.to_owned(),
            name: id.to_owned(),
            tenant: "default".into(),
            hash: [0; 32],
            created_ns: 0,
            revoked_ns: None,
            limits,
        };
        Caller { key: Arc::new(key) }
    }
}

/// Knows every key; a lookup is one hash and one constant-time comparison.
pub struct Auth {
    keys: Arc<ArcSwap<Keys>>,
    pepper: Pepper,
}

impl Auth {
    /// Reads the keys and follows changes that other processes make to them.
    ///
    /// # Errors
    /// When the key store cannot be read.
    pub fn open(path: PathBuf, pepper: Pepper, metrics: Arc<Metrics>) -> rusqlite::Result<Auth> {
        let store = KeyStore::open(&path)?;
        // The version first: a key that is made between the two reads is then seen again, not missed.
        let version = store.version()?;
        let keys = Arc::new(ArcSwap::from_pointee(index(store.list()?)));
        watch(store, version, Arc::downgrade(&keys), metrics);
        Ok(Auth { keys, pepper })
    }

    /// # Errors
    /// `MissingKey`, `MalformedKey`, `UnknownKey`, `RevokedKey`: each says what to do.
    pub fn identify(&self, headers: &HeaderMap) -> Result<Caller, Refusal> {
        let token = bearer(headers)?;
        let presented = ApiKey::parse(token).ok_or(Refusal::MalformedKey)?;
        let keys = self.keys.load();
        let key = keys.get(presented.id());
        // An unknown id is compared with nothing real, so that its answer takes as long as a wrong secret's.
        let stored = key.map_or([0; 32], |key| key.hash);
        let matches = presented.matches(&self.pepper, &stored);
        match key {
            Some(key) if matches && key.revoked_ns.is_some() => Err(Refusal::RevokedKey),
            Some(key) if matches => Ok(Caller { key: key.clone() }),
            _ => Err(Refusal::UnknownKey),
        }
    }
}

fn index(rows: Vec<KeyRow>) -> Keys {
    rows.into_iter().map(|row| (row.id.clone(), Arc::new(row))).collect()
}

/// Polls SQLite's change counter: one page read, no lock, works across processes.
fn watch(store: KeyStore, mut seen: i64, keys: std::sync::Weak<ArcSwap<Keys>>, metrics: Arc<Metrics>) {
    let watcher = move || {
        loop {
            std::thread::sleep(WATCH_EVERY);
            let Some(keys) = keys.upgrade() else { return };
            match store.version() {
                Ok(version) if version == seen => metrics.store_up("keys", true),
                Ok(version) => match store.list() {
                    Ok(rows) => {
                        keys.store(Arc::new(index(rows)));
                        seen = version;
                        metrics.store_up("keys", true);
                    }
                    Err(error) => {
                        tracing::error!(%error, "the key store cannot be read; the keys known so far stay");
                        metrics.store_up("keys", false);
                    }
                },
                Err(error) => {
                    tracing::error!(%error, "the key store cannot be watched");
                    metrics.store_up("keys", false);
                }
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("keys".into()).spawn(watcher) {
        tracing::error!(%error, "changes to keys will only be seen after a restart");
    }
}

/// The token of `authorization: Bearer …`, or of Anthropic's `x-api-key`.
fn bearer(headers: &HeaderMap) -> Result<&str, Refusal> {
    let text = |name: &str| {
        let value = headers.get(name)?;
        Some(value.to_str().map_err(|_| Refusal::MalformedKey))
    };
    if let Some(value) = text("authorization") {
        let value = value?;
        let (scheme, token) = value.split_once(' ').unwrap_or((value, ""));
        if !scheme.eq_ignore_ascii_case("bearer") || token.trim().is_empty() {
            return Err(Refusal::MissingKey);
        }
        return Ok(token.trim());
    }
    match text("x-api-key") {
        Some(value) => Ok(value?.trim()),
        None => Err(Refusal::MissingKey),
    }
}
