//! Follows the key store: one row is asked for four times a second, in a thread of its own, and what has changed is read. Of a
//! store that gateways share, the data folder keeps a copy of what was seen last: a start that cannot reach it serves from that.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, utimensat};

use super::directory::Shown;
use super::store::{KeyStore, Location, News, OpenError, StoreError};
use crate::observe::metrics::Metrics;

/// How soon what was changed by another process, or here, counts.
const WATCH_EVERY: Duration = Duration::from_millis(250);
/// How soon a store that could not be read is asked again: then all of it is read.
const AGAIN_EVERY: Duration = Duration::from_secs(1);
/// How exactly a copy's age is known.
const TOUCH_EVERY: Duration = Duration::from_secs(10);

pub(super) struct Follower {
    location: Location,
    /// Of a store that others share.
    copy: Option<Copy>,
    /// Of our pepper.
    mark: String,
    store: Option<KeyStore>,
    /// The last change that was seen on this connection.
    seen: Option<i64>,
    shown: Weak<Shown>,
    metrics: Arc<Metrics>,
    is_up: bool,
}

impl Follower {
    /// With what is to be shown at first.
    pub(super) fn start(
        location: Location,
        copy: &Path,
        mark: String,
        shown: &Arc<Shown>,
        metrics: Arc<Metrics>,
    ) -> Result<Follower, OpenError> {
        let copy = match &location {
            Location::File(_) => None,
            Location::Postgres(_) => Some(Copy { path: copy.to_owned(), is_behind: false, touched: None }),
        };
        let (store, seen, is_up) = (None, None, true);
        let mut follower = Follower { location, copy, mark, store, seen, shown: Arc::downgrade(shown), metrics, is_up };
        match (follower.look(shown), &follower.copy) {
            (Err(OpenError::Store(why)), Some(copy)) => {
                copy.stand_in(&why, &follower.mark, shown)?;
                follower.is_up = false;
                follower.metrics.store_up("keys", false);
            }
            (looked, _) => looked?,
        }
        Ok(follower)
    }

    pub(super) fn follow(mut self) {
        loop {
            std::thread::sleep(if self.is_up { WATCH_EVERY } else { AGAIN_EVERY });
            let Some(shown) = self.shown.upgrade() else { return };
            let looked = self.look(&shown);
            self.metrics.store_up("keys", looked.is_ok());
            match (&looked, self.is_up) {
                (Err(error), true) => {
                    tracing::error!(%error, "the key store cannot be read; what is known so far stays, and nothing can be changed");
                }
                (Ok(()), false) => tracing::info!("the key store can be read again, and what it says counts"),
                _ => {}
            }
            self.is_up = looked.is_ok();
        }
    }

    fn look(&mut self, shown: &Shown) -> Result<(), OpenError> {
        let store = match self.store.take() {
            Some(store) => store,
            None => {
                // It may be another one by now, or the same as it was yesterday.
                self.seen = None;
                KeyStore::open(&self.location)?
            }
        };
        let now = store.head()?.map_or(0, |head| head.n);
        if self.seen != Some(now) {
            let is_behind = self.copy.as_ref().is_some_and(|copy| copy.is_behind);
            let news = store.news(self.seen.filter(|_| !is_behind))?;
            if news.pepper.as_ref().is_some_and(|mark| *mark != self.mark) {
                return Err(OpenError::Pepper);
            }
            shown.show(&news);
            self.seen = Some(news.head.n);
            self.copy.iter_mut().for_each(|copy| copy.take(&news));
        }
        self.copy.iter_mut().for_each(Copy::touch);
        self.store = Some(store);
        Ok(())
    }
}

/// A file like that of one gateway's key store, without the record. When it was written tells when it was last known to be true.
struct Copy {
    path: PathBuf,
    /// It could not be written, and lacks something.
    is_behind: bool,
    touched: Option<Instant>,
}

impl Copy {
    fn open(&self) -> Result<KeyStore, OpenError> {
        // What SQLite makes beside it is as its owner's alone as this.
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&self.path)
            .map_err(StoreError::from)?;
        KeyStore::open(&Location::File(self.path.clone()))
    }

    fn take(&mut self, news: &News) {
        let take = |store: KeyStore| -> Result<(), OpenError> {
            let is_there = (store.head()?, store.pepper()?) == (Some(news.head), news.pepper.clone());
            if news.is_all && is_there { Ok(()) } else { Ok(store.take(news)?) }
        };
        let taken = self.open().and_then(take);
        if let Err(error) = &taken {
            tracing::error!(%error, file = %self.path.display(), "a start without the database would serve from an old copy of the key store");
        }
        self.is_behind = taken.is_err();
    }

    /// It is still true. (By name: closing a file of SQLite's gives up its locks.)
    fn touch(&mut self) {
        if self.is_behind || self.touched.is_some_and(|touched| touched.elapsed() < TOUCH_EVERY) {
            return;
        }
        let special = |what| Timespec { tv_sec: 0, tv_nsec: what };
        let times = Timestamps { last_access: special(UTIME_OMIT), last_modification: special(UTIME_NOW) };
        if let Err(error) = utimensat(CWD, &self.path, &times, AtFlags::empty()) {
            tracing::debug!(%error, "the copy of the key store looks older than it is");
        }
        self.touched = Some(Instant::now());
    }

    /// Shows what is in it, as the store cannot be reached.
    fn stand_in(&self, why: &StoreError, mark: &str, shown: &Shown) -> Result<(), OpenError> {
        let Ok(written) = std::fs::metadata(&self.path).and_then(|file| file.modified()) else {
            tracing::error!(%why, "the key store cannot be read, and there is no copy of it yet: until it can, callers get 503");
            return Ok(());
        };
        match self.open().and_then(|store| Ok(store.news(None)?)) {
            Ok(news) if news.pepper.as_deref().is_some_and(|of| of != mark) => return Err(OpenError::Pepper),
            Ok(news) => {
                shown.show(&news);
                let age = SystemTime::now().duration_since(written).unwrap_or_default();
                tracing::warn!(
                    %why,
                    keys = news.keys.len(),
                    age_seconds = age.as_secs(),
                    "the key store cannot be read; until it can, keys, tenants and rules are those of the copy in the data folder, and what was changed since does not count"
                );
            }
            Err(error) => {
                tracing::error!(%why, %error, "the key store cannot be read, nor its copy: until it can, callers get 503");
            }
        }
        Ok(())
    }
}
