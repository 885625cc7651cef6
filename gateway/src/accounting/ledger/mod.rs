//! The ledger: intent → write-ahead log → store.
//!
//! A row is in the log before anything depends on it: a `write` survives `kill -9`, as the page cache is the kernel's;
//! where a route asks for more, a sync survives a power cut (`commit`). One thread ships rows to the store in batches
//! (`shipper`); a segment of the log is removed when all it holds is in the store for good.

mod commit;
pub mod disk;
mod journal;
mod log;
pub mod recovery;
mod shipper;
pub mod store;
pub mod totals;
pub mod verify;
pub mod wal;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::{oneshot, watch};

use super::feedback::{Judgement, Verdict};
use super::row::Row;
use crate::observe::metrics::Metrics;
use crate::ports::{Clock as _, SystemClock};
use commit::Progress;
use disk::{Disk, RealDisk};
use log::Log;
use recovery::Left;
pub use recovery::Recovery;
use store::{Database, Opener};

/// The store's count while the log is no witness.
const NO_COUNT: i64 = 0;
/// Judgements that may be in the queue for the store; more are refused.
const JUDGEMENTS_MAX: usize = 1024;

/// The log and what is still to be shipped, on disk and in memory.
pub struct Ledger {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// How a ledger is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Of the log: what the store has not taken.
    pub bytes_max: u64,
    /// How long a row that must survive a power cut waits for others, to be synced with them.
    pub commit_every: Duration,
    /// So many months of rows are kept in the store, this one among them; `None`: all.
    pub retain: Option<u32>,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings { bytes_max: 64 << 20, commit_every: Duration::from_millis(2), retain: None }
    }
}

struct Shared {
    disk: Arc<dyn Disk>,
    state: Mutex<State>,
    /// Wakes the shipper.
    work: Condvar,
    /// Wakes the thread that syncs.
    waiting: Condvar,
    /// Wakes whoever waits for the end of the recovery.
    recovered: Condvar,
    /// Held during a sync, until it is known what became of it.
    syncing: Mutex<()>,
    progress: watch::Sender<Progress>,
    /// What a count that begins in this life is called.
    epoch: i64,
    metrics: Arc<Metrics>,
}

struct State {
    log: Log,
    queue: VecDeque<Unshipped>,
    /// How many in the queue are judgements.
    judgements: usize,
    /// Rows that are on their way to the store, and since when the oldest of them waits.
    shipping: Option<(usize, Instant)>,
    /// How many at the front of the queue are of the life before.
    recovering: usize,
    recovery: Recovery,
    /// What the log had counted when this life began.
    counted_before: totals::Sums,
    /// The ends that this recovery gave to requests that were cut off, until the log counts them.
    cut_off: totals::Sums,
    /// … whose intents are all below this.
    began_at: u64,
    /// Log and store agree on what they count from.
    is_concluded: bool,
    /// Why the store cannot be reached, until it was once.
    down: Option<String>,
    closing: bool,
}

/// What waits for the store. One queue: a judgement finds every row that was there before it.
#[allow(clippy::large_enum_variant, reason = "nearly all are rows; a box for each would cost the request path")]
enum Unshipped {
    /// `is_cut_off`: of the last life, whose log has no end for it.
    Row {
        segment: u64,
        row: Row,
        since: Instant,
        is_cut_off: bool,
    },
    Judgement {
        judgement: Arc<Judgement>,
        reply: oneshot::Sender<Verdict>,
    },
}

impl Unshipped {
    fn row(&self) -> Option<(u64, &Row, Instant)> {
        match self {
            Unshipped::Row { segment, row, since, .. } => Some((*segment, row, *since)),
            Unshipped::Judgement { .. } => None,
        }
    }

    fn judgement(&self) -> Option<&Judgement> {
        match self {
            Unshipped::Row { .. } => None,
            Unshipped::Judgement { judgement, .. } => Some(judgement),
        }
    }

    /// Whether it is a judgement whose client waits no longer. Who does not know what became of it sends it again.
    fn is_forsaken(&self) -> bool {
        matches!(self, Unshipped::Judgement { reply, .. } if reply.is_closed())
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub struct OpenError {
    path: PathBuf,
    source: std::io::Error,
}

impl Ledger {
    /// Reads what the last life left in `data_dir`, opens a new segment and starts shipping to `store`. That may be down:
    /// then rows wait.
    ///
    /// # Errors
    /// When the log cannot be read or written: the gateway must not serve unmetered.
    pub fn open(
        data_dir: &Path,
        store: &Database,
        settings: Settings,
        metrics: Arc<Metrics>,
    ) -> Result<Ledger, OpenError> {
        let folder = data_dir.join("wal");
        let failed = |source| OpenError { path: folder.clone(), source };
        std::fs::create_dir_all(&folder).map_err(failed)?;
        let disk = Arc::new(RealDisk::new(folder.clone()));
        let shared =
            Arc::new(Shared::recover(disk, settings.bytes_max, SystemClock.now_ns(), metrics).map_err(failed)?);
        let opener = store.opener(shared.lock().log.id);
        Ledger::start(shared, opener, settings).map_err(failed)
    }

    fn start(shared: Arc<Shared>, opener: Opener, settings: Settings) -> std::io::Result<Ledger> {
        let thread = |name: &str| std::thread::Builder::new().name(name.to_owned());
        let (ships, commits) = (shared.clone(), shared.clone());
        let threads = vec![
            thread("ledger").spawn(move || shipper::run(&ships, &opener, settings.retain))?,
            thread("ledger-sync").spawn(move || commit::run(&commits, settings.commit_every))?,
        ];
        Ok(Ledger { shared, threads: Mutex::new(threads) })
    }

    /// Waits until everything that the last life left is in the store, and tells what that was. A store that is at work,
    /// as on tables of an older version, may take as long as that takes.
    ///
    /// # Errors
    /// Why the store cannot take it, if that goes on so long.
    pub fn recovered(&self, patience: Duration) -> Result<Recovery, String> {
        const LOOK_EVERY: Duration = Duration::from_millis(100);
        let deadline = Instant::now() + patience;
        let mut state = self.shared.lock();
        while !state.is_concluded {
            self.shared.recovered.wait_for(&mut state, LOOK_EVERY);
            if let Some(why) = state.down.clone().filter(|_| Instant::now() >= deadline) {
                return Err(why);
            }
        }
        Ok(std::mem::take(&mut state.recovery))
    }

    /// As `recovered`, however long it takes; `None` if the ledger closes before.
    pub fn recovered_some_time(&self) -> Option<Recovery> {
        let mut state = self.shared.lock();
        while !state.is_concluded {
            if state.closing {
                return None;
            }
            self.shared.recovered.wait(&mut state);
        }
        Some(std::mem::take(&mut state.recovery))
    }

    /// Whether the store was reached; it waits until that is known.
    pub fn is_reached(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut state = self.shared.lock();
        while !state.is_concluded && state.down.is_none() {
            if self.shared.recovered.wait_until(&mut state, deadline).timed_out() {
                return false;
            }
        }
        state.is_concluded
    }

    /// The log's name among those that ship to one database.
    pub fn log(&self) -> i64 {
        self.shared.lock().log.id
    }

    /// False once a write to the log has failed: new requests are refused.
    pub fn is_healthy(&self) -> bool {
        !self.shared.lock().log.is_broken()
    }

    /// Writes down what somebody says of an answer. The verdict comes when it is durable; `None` if too many wait already.
    pub fn judge(&self, judgement: Arc<Judgement>) -> Option<oneshot::Receiver<Verdict>> {
        let mut state = self.shared.lock();
        if state.judgements >= JUDGEMENTS_MAX || state.closing {
            return None;
        }
        let (reply, verdict) = oneshot::channel();
        state.judgements += 1;
        state.enqueue(Unshipped::Judgement { judgement, reply }, &self.shared.work);
        Some(verdict)
    }

    /// Shows how much waits for the store, and since when. For whoever looks at the metrics: no request pays for it.
    pub fn observe(&self) {
        let state = self.shared.lock();
        let waiting = || state.queue.iter().find_map(Unshipped::row).map(|(_, _, since)| since);
        let oldest = state.shipping.map(|(_, since)| since).or_else(waiting);
        let rows = state.queue.len() - state.judgements + state.shipping.map_or(0, |(rows, _)| rows);
        self.shared.metrics.ledger(rows, state.log.bytes(), oldest.map_or(Duration::ZERO, |since| since.elapsed()));
    }

    /// Ships what is queued and stops. Idempotent.
    pub fn shut_down(&self) {
        self.shared.lock().closing = true;
        self.shared.work.notify_all();
        self.shared.waiting.notify_all();
        self.shared.recovered.notify_all();
        for thread in std::mem::take(&mut *self.threads.lock()) {
            // The threads hold no lock when they panic, and the rows are in the log either way.
            let _ = thread.join();
        }
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.shut_down();
    }
}

impl Shared {
    /// The log goes on where it ended, and its rows wait for the store. `now_ns` names a count that has to begin anew.
    fn recover(disk: Arc<dyn Disk>, bytes_max: u64, now_ns: i64, metrics: Arc<Metrics>) -> std::io::Result<Shared> {
        let recovered = recovery::recover(disk.clone(), bytes_max, now_ns)?;
        let since = Instant::now();
        let rows = recovered.rows.into_iter();
        let rows = rows.map(|Left { segment, row, is_cut_off }| Unshipped::Row { segment, row, since, is_cut_off });
        let queue: VecDeque<_> = rows.collect();
        let state = State {
            judgements: 0,
            shipping: None,
            recovering: queue.len(),
            recovery: recovered.found,
            counted_before: recovered.log.sums,
            cut_off: totals::Sums::default(),
            began_at: recovered.log.sequence(),
            is_concluded: false,
            down: None,
            closing: false,
            log: recovered.log,
            queue,
        };
        Ok(Shared {
            disk,
            state: Mutex::new(state),
            work: Condvar::new(),
            waiting: Condvar::new(),
            recovered: Condvar::new(),
            syncing: Mutex::new(()),
            progress: watch::Sender::new(Progress::default()),
            epoch: now_ns,
            metrics,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// The log is broken: whoever waits for it need not any longer.
    fn failed(&self, error: &std::io::Error) {
        self.metrics.ledger_failure();
        tracing::error!(%error, "the disk of the ledger's log failed; new requests are refused until a restart");
        self.progress.send_modify(|progress| progress.broken = true);
    }
}

impl State {
    fn is_recovering(&self) -> bool {
        self.recovering > 0
    }

    /// Whether there is anything for the shipper to do.
    fn has_work(&self) -> bool {
        !self.queue.is_empty() || !self.is_concluded || self.log.has_retirable()
    }

    /// Wakes the shipper when a batch begins and when one is full: in between it only waits for more.
    fn enqueue(&mut self, unshipped: Unshipped, work: &Condvar) {
        self.queue.push_back(unshipped);
        if matches!(self.queue.len(), 1 | shipper::BATCH_ROWS) {
            work.notify_one();
        }
    }

    fn enqueue_row(&mut self, segment: u64, row: Row, work: &Condvar) {
        self.enqueue(Unshipped::Row { segment, row, since: Instant::now(), is_cut_off: false }, work);
    }
}

#[cfg(test)]
mod power_model;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod verify_tests;
#[cfg(test)]
mod versions_tests;
