//! The ledger: intent → write-ahead log → SQLite.
//!
//! A row is in the log before anything depends on it (a `write` survives `kill -9`; the page cache is the kernel's). One
//! thread ships rows to SQLite in batches; a segment of the log is deleted when all it holds is in the store. Room on
//! disk is claimed when a segment is opened, so that an admitted request can always write its end.

pub mod feedback;
mod shipper;
pub mod sqlite;
pub mod wal;

use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::oneshot;

use super::feedback::{Judgement, Verdict};
use super::row::Row;
use super::settlement::{Journal, JournalClosed, Slot};
use crate::observe::metrics::Metrics;

/// A new segment is begun when one has grown to this, or to a quarter of a smaller bound: what is shipped is only given
/// back a whole segment at a time.
const SEGMENT_BYTES: u64 = 4 << 20;
/// Judgements that may be in the queue for the store; more are refused.
const JUDGEMENTS_MAX: usize = 1024;

/// The log and what is still to be shipped, on disk and in memory.
pub struct Ledger {
    shared: Arc<Shared>,
    shipper: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    folder: PathBuf,
    bytes_max: u64,
    state: Mutex<State>,
    work: Condvar,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct State {
    segments: BTreeMap<u64, Segment>,
    /// Room promised to the ends of running requests.
    reserved: u64,
    sequence: u64,
    queue: VecDeque<Unshipped>,
    /// How many in the queue are judgements.
    judgements: usize,
    /// Rows that are on their way to the store, and since when the oldest of them waits.
    shipping: Option<(usize, Instant)>,
    /// Set for good when a write failed: a file whose tail is unknown takes no more rows.
    broken: bool,
    closing: bool,
    buffer: Vec<u8>,
}

struct Segment {
    path: PathBuf,
    file: Option<File>,
    written: u64,
    claimed: u64,
    /// Intents without an end.
    open: u64,
    unshipped: u64,
}

impl Segment {
    fn is_shipped(&self) -> bool {
        self.open == 0 && self.unshipped == 0
    }
}

/// What waits for the store. One queue: a judgement finds every row that was there before it.
#[allow(clippy::large_enum_variant, reason = "nearly all are rows; a box for each would cost the request path")]
enum Unshipped {
    Row { segment: u64, row: Row, since: Instant },
    Judgement { judgement: Arc<Judgement>, reply: oneshot::Sender<Verdict> },
}

impl Unshipped {
    fn row(&self) -> Option<(u64, &Row, Instant)> {
        match self {
            Unshipped::Row { segment, row, since } => Some((*segment, row, *since)),
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

/// What a start found of the life before.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Rows that were in the log and not yet in the store.
    pub shipped: usize,
    /// Requests that were in flight when the process died, now written as `killed`.
    pub killed: Vec<String>,
    pub damaged_bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error("{}: {source}", path.display())]
    Store { path: PathBuf, source: rusqlite::Error },
}

impl Ledger {
    /// Recovers what the last life left, then opens a new segment and starts shipping.
    ///
    /// # Errors
    /// When the log or the store cannot be read or written: the gateway must not serve unmetered.
    pub fn open(data_dir: &Path, bytes_max: u64, metrics: Arc<Metrics>) -> Result<(Ledger, Recovery), OpenError> {
        let store_path = data_dir.join("ledger.sqlite");
        let folder = data_dir.join("wal");
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| OpenError::File { path, source }
        };
        std::fs::create_dir_all(&folder).map_err(at(&folder))?;
        let mut store =
            sqlite::open(&store_path).map_err(|source| OpenError::Store { path: store_path.clone(), source })?;

        let old = segment_files(&folder).map_err(at(&folder))?;
        let mut records = Vec::new();
        let mut recovery = Recovery::default();
        for (_, path) in &old {
            let found = wal::scan(&std::fs::read(path).map_err(at(path))?);
            recovery.damaged_bytes += found.damaged_bytes;
            records.extend(found.records);
        }
        let sequence = records.iter().map(|(sequence, _, _)| sequence + 1).max().unwrap_or(0);
        let rows = wal::standing(records);
        let new = sqlite::insert(&mut store, &rows)
            .map_err(|source| OpenError::Store { path: store_path.clone(), source })?;
        for (row, _) in rows.iter().zip(new).filter(|(_, new)| *new) {
            match row.outcome {
                super::row::Outcome::Killed => recovery.killed.push(row.request_id.clone()),
                _ => recovery.shipped += 1,
            }
        }
        for (_, path) in &old {
            // A damaged segment is evidence: it stays, under a name that no start reads again.
            if recovery.damaged_bytes > 0 {
                std::fs::rename(path, path.with_extension("damaged")).map_err(at(path))?;
            } else {
                std::fs::remove_file(path).map_err(at(path))?;
            }
        }

        let first = old.last().map_or(0, |(number, _)| number + 1);
        let mut state = State { sequence, ..State::default() };
        open_segment(&folder, first, SEGMENT_BYTES.min(bytes_max / 4), &mut state).map_err(at(&folder))?;
        let shared = Arc::new(Shared { folder, bytes_max, state: Mutex::new(state), work: Condvar::new(), metrics });
        let shipper = std::thread::Builder::new()
            .name("ledger".into())
            .spawn({
                let shared = shared.clone();
                move || shipper::run(&shared, store)
            })
            .map_err(at(&store_path))?;
        Ok((Ledger { shared, shipper: Mutex::new(Some(shipper)) }, recovery))
    }

    /// False once a write to the log has failed: new requests are refused.
    pub fn is_healthy(&self) -> bool {
        !self.shared.lock().broken
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
        self.shared.metrics.ledger(rows, state.total_bytes(), oldest.map_or(Duration::ZERO, |since| since.elapsed()));
    }

    /// Ships what is queued and stops. Idempotent.
    pub fn shut_down(&self) {
        self.shared.lock().closing = true;
        self.shared.work.notify_all();
        let thread = self.shipper.lock().take();
        if let Some(thread) = thread {
            // The thread holds no lock when it panics, and its rows are in the log either way.
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
    fn segment_bytes(&self) -> u64 {
        SEGMENT_BYTES.min(self.bytes_max / 4)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl State {
    fn total_bytes(&self) -> u64 {
        self.segments.values().map(|segment| segment.written).sum()
    }

    fn current(&self) -> Option<u64> {
        self.segments.last_key_value().map(|(number, _)| *number)
    }

    /// Claimed bytes that are left in the current segment.
    fn room(&self) -> u64 {
        self.segments.last_key_value().map_or(0, |(_, segment)| segment.claimed.saturating_sub(segment.written))
    }

    fn is_current_shipped(&self) -> bool {
        self.segments.last_key_value().is_some_and(|(_, segment)| segment.written > 0 && segment.is_shipped())
    }

    /// Deletes segments that hold nothing that is not in the store. The current one stays.
    fn delete_shipped(&mut self) {
        let Some(current) = self.current() else { return };
        self.segments.retain(|number, segment| {
            let done = *number != current && segment.is_shipped();
            if done && let Err(error) = std::fs::remove_file(&segment.path) {
                tracing::warn!(%error, path = %segment.path.display(), "a shipped segment could not be deleted");
            }
            !done
        });
    }

    /// Queues a row for the store; its segment stays until it is there.
    fn enqueue_row(&mut self, segment: u64, row: Row, work: &Condvar) {
        if let Some(segment) = self.segments.get_mut(&segment) {
            segment.unshipped += 1;
        }
        self.enqueue(Unshipped::Row { segment, row, since: Instant::now() }, work);
    }

    /// Wakes the shipper when a batch begins and when one is full: in between it only waits for more.
    fn enqueue(&mut self, unshipped: Unshipped, work: &Condvar) {
        self.queue.push_back(unshipped);
        if matches!(self.queue.len(), 1 | shipper::BATCH_ROWS) {
            work.notify_one();
        }
    }

    /// Encodes one record into the buffer and returns its length.
    fn encode(&mut self, kind: wal::Kind, row: &Row) -> u64 {
        self.buffer.clear();
        wal::encode(self.sequence, kind, row, &mut self.buffer) as u64
    }

    /// Writes the buffer to the current segment and returns the segment's number.
    fn append(&mut self) -> std::io::Result<u64> {
        let Some((number, segment)) = self.segments.iter_mut().next_back() else {
            return Err(std::io::ErrorKind::NotFound.into());
        };
        let Some(file) = &mut segment.file else { return Err(std::io::ErrorKind::NotConnected.into()) };
        file.write_all(&self.buffer)?;
        segment.written += self.buffer.len() as u64;
        self.sequence += 1;
        Ok(*number)
    }
}

impl Journal for Ledger {
    fn open(&self, row: &Row) -> Result<Slot, JournalClosed> {
        let shared = &*self.shared;
        let mut state = shared.lock();
        let length = state.encode(wal::Kind::Intent, row);
        let slot = wal::slot_bytes(length as usize);
        let needed = state.reserved + length + slot;
        if state.broken || state.closing {
            return Err(JournalClosed);
        }
        let is_full = |state: &State| state.total_bytes() + needed > shared.bytes_max;
        let has_room = state.room() >= needed;
        // A new segment when this one is full, or when all it holds is in the store and the bound is near.
        if !has_room || (is_full(&state) && state.is_current_shipped()) {
            let next = state.current().map_or(0, |number| number + 1);
            let claim = shared.segment_bytes().max(needed * 2);
            if let Err(error) = open_segment(&shared.folder, next, claim, &mut state) {
                shared.metrics.ledger_failure();
                tracing::error!(%error, "the ledger cannot claim disk space; new requests are refused");
                return Err(JournalClosed);
            }
            state.delete_shipped();
        }
        if is_full(&state) {
            return Err(JournalClosed);
        }
        match state.append() {
            Ok(segment) => {
                state.reserved += slot;
                if let Some(segment) = state.segments.get_mut(&segment) {
                    segment.open += 1;
                }
                Ok(Slot { segment, bytes: slot })
            }
            Err(error) => {
                fail(shared, &mut state, &error);
                Err(JournalClosed)
            }
        }
    }

    fn close(&self, slot: Slot, row: Row) -> Result<(), Box<Row>> {
        let shared = &*self.shared;
        let mut state = shared.lock();
        state.reserved = state.reserved.saturating_sub(slot.bytes);
        if let Some(segment) = state.segments.get_mut(&slot.segment) {
            segment.open = segment.open.saturating_sub(1);
        }
        if state.broken {
            return Err(Box::new(row));
        }
        state.encode(wal::Kind::Terminal, &row);
        match state.append() {
            Ok(segment) => {
                state.enqueue_row(segment, row, &shared.work);
                Ok(())
            }
            Err(error) => {
                fail(shared, &mut state, &error);
                Err(Box::new(row))
            }
        }
    }

    fn store(&self, row: Row) {
        let mut state = self.shared.lock();
        if let Some(segment) = state.current() {
            state.enqueue_row(segment, row, &self.shared.work);
        }
    }
}

fn fail(shared: &Shared, state: &mut State, error: &std::io::Error) {
    state.broken = true;
    shared.metrics.ledger_failure();
    tracing::error!(%error, folder = %shared.folder.display(), "writing the ledger's log failed; new requests are refused until a restart");
}

/// Makes segment `number` the current one and claims `claim` bytes of disk for it.
fn open_segment(folder: &Path, number: u64, claim: u64, state: &mut State) -> std::io::Result<()> {
    let path = folder.join(format!("{number:012}.wal"));
    let file = OpenOptions::new().create_new(true).append(true).open(&path)?;
    // KEEP_SIZE: the file's length stays what was written, so that recovery never sees a tail of zeros.
    match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::KEEP_SIZE, 0, claim) {
        // Not every file system can claim space ahead; there the bound in bytes is all we have.
        Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
        Err(error) => {
            let _ = std::fs::remove_file(&path);
            return Err(error.into());
        }
    }
    if let Some((_, last)) = state.segments.iter_mut().next_back() {
        last.file = None;
    }
    state
        .segments
        .insert(number, Segment { path, file: Some(file), written: 0, claimed: claim, open: 0, unshipped: 0 });
    Ok(())
}

/// The segments in a folder, in order.
fn segment_files(folder: &Path) -> std::io::Result<Vec<(u64, PathBuf)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let number = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_suffix(".wal"))
            .and_then(|number| number.parse().ok());
        if let Some(number) = number {
            files.push((number, path));
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests;
