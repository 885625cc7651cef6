//! The log on a disk whose plug is pulled: what was not synced may be lost, whole or in part, in any combination. What
//! was confirmed as durable must be in the store in the end, whatever was lost; and the test must notice each mistake
//! that would break that.

use std::collections::{BTreeMap, HashMap};
use std::io::{Error, ErrorKind, Result};
use std::sync::atomic::{AtomicBool, Ordering};

use super::super::core::{NanoUsd, Usage};
use super::super::row::Outcome;
use super::super::settlement::{Durability, Held, Journal as _, Slot};
use super::disk::Segment;
use super::store::months::Month;
use super::store::{Fate, Shipped, Store, StoreError};
use super::totals::Sums;
use super::wal::{Id, id, tests::row};
use super::*;

const SEEDS: u64 = 10_000;
/// A quarter of it is a segment: three requests or so.
const LOG_BYTES: u64 = 16_000;

/// What could be wrong with the order of things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mistake {
    None,
    /// A new segment's name is never synced.
    FolderNotSynced,
    /// Segments are removed before the store has its rows for good.
    StoreNotSynced,
    /// Clients are told before the disk confirms.
    ToldBeforeSync,
    /// Clients are told that it failed, and the store is; the log is not.
    LogNotAmended,
}

/// Marsaglia's xorshift64 (2003, Journal of Statistical Software 8/14), never zero.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % n
    }
}

/// A file: everything written, and how much of it is safe.
#[derive(Default)]
struct File {
    bytes: Mutex<(Vec<u8>, usize)>,
    /// Its next sync fails, and nobody may ask it again.
    fails: Arc<AtomicBool>,
    failed: AtomicBool,
}

impl Segment for File {
    fn append(&self, bytes: &[u8]) -> Result<()> {
        assert!(!self.failed.load(Ordering::Relaxed), "what is at its end is not known");
        self.bytes.lock().0.extend_from_slice(bytes);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        assert!(!self.failed.load(Ordering::Relaxed), "a sync that failed is not tried again");
        if self.fails.load(Ordering::Relaxed) {
            self.failed.store(true, Ordering::Relaxed);
            return Err(ErrorKind::StorageFull.into());
        }
        let mut file = self.bytes.lock();
        file.1 = file.0.len();
        Ok(())
    }
}

type Folder = BTreeMap<u64, Arc<File>>;

#[derive(Default)]
struct Plug {
    now: Folder,
    safe: Folder,
    /// Names made (with their files) and removed since the folder was synced.
    changes: Vec<(u64, Option<Arc<File>>)>,
}

struct ModelDisk {
    plug: Mutex<Plug>,
    mistake: Mistake,
    /// Syncs fail for now.
    fails: Arc<AtomicBool>,
}

impl Disk for ModelDisk {
    fn list(&self) -> Result<Vec<u64>> {
        Ok(self.plug.lock().now.keys().copied().collect())
    }

    fn read(&self, number: u64) -> Result<Vec<u8>> {
        let plug = self.plug.lock();
        let file = plug.now.get(&number).ok_or(Error::from(ErrorKind::NotFound))?;
        Ok(file.bytes.lock().0.clone())
    }

    fn create(&self, number: u64, _bytes: u64) -> Result<Arc<dyn Segment>> {
        let mut plug = self.plug.lock();
        let file = Arc::new(File { fails: self.fails.clone(), ..File::default() });
        plug.now.insert(number, file.clone());
        plug.changes.push((number, Some(file.clone())));
        Ok(file)
    }

    fn unlink(&self, number: u64) -> Result<()> {
        let mut plug = self.plug.lock();
        plug.now.remove(&number);
        plug.changes.push((number, None));
        Ok(())
    }

    fn set_aside(&self, number: u64) -> Result<()> {
        self.unlink(number)
    }

    fn sync_folder(&self) -> Result<()> {
        if self.mistake != Mistake::FolderNotSynced {
            let mut plug = self.plug.lock();
            plug.safe = plug.now.clone();
            plug.changes.clear();
        }
        Ok(())
    }
}

impl ModelDisk {
    /// Of the names that changed any may have; of what was written and not synced any beginning may be there, and pages
    /// of it may not.
    fn cut(&self, dice: &mut Dice) {
        let mut plug = self.plug.lock();
        let mut left = plug.safe.clone();
        for (number, file) in std::mem::take(&mut plug.changes) {
            match file {
                _ if dice.below(2) == 0 => {}
                Some(file) => drop(left.insert(number, file)),
                None => drop(left.remove(&number)),
            }
        }
        for file in left.values() {
            let mut file = file.bytes.lock();
            let (length, safe) = (file.0.len(), file.1);
            let kept = safe + dice.below(length - safe + 1);
            file.0.truncate(kept);
            if kept > safe && dice.below(4) == 0 {
                let hole = safe + dice.below(kept - safe);
                file.0[hole..].iter_mut().take(64).for_each(|byte| *byte = 0);
            }
            file.1 = kept;
        }
        plug.now = left.clone();
        plug.safe = left;
    }
}

type Rows = HashMap<Id, Row>;

/// A store whose last commits a power cut may take, the latest first.
#[derive(Default)]
struct Kept {
    commits: Vec<(Rows, Option<(i64, Sums)>)>,
    safe: usize,
}

struct ModelStore {
    kept: Arc<Mutex<Kept>>,
    mistake: Mistake,
}

impl ModelStore {
    fn commit<T>(&self, change: impl FnOnce(&mut Rows, &mut Option<(i64, Sums)>) -> T) -> T {
        let mut kept = self.kept.lock();
        let (mut rows, mut epoch) = kept.commits.last().cloned().unwrap_or_default();
        let done = change(&mut rows, &mut epoch);
        kept.commits.push((rows, epoch));
        done
    }
}

impl Store for ModelStore {
    fn ship(&mut self, rows: &[&Row], _: &[&Judgement]) -> std::result::Result<Shipped, StoreError> {
        let add = |known: &mut Rows, row: &Row| match known.get(&id(row)) {
            Some(there) if there == row => Fate::There,
            Some(_) => Fate::Different,
            None => {
                known.insert(id(row), row.clone());
                Fate::New
            }
        };
        let fates = self.commit(|known, _| rows.iter().map(|row| add(known, row)).collect());
        Ok(Shipped { fates, verdicts: Vec::new() })
    }

    fn sync(&mut self) -> std::result::Result<(), StoreError> {
        if self.mistake != Mistake::StoreNotSynced {
            let mut kept = self.kept.lock();
            kept.safe = kept.commits.len();
        }
        Ok(())
    }

    fn counts(&mut self) -> std::result::Result<Option<(i64, Sums)>, StoreError> {
        let kept = self.kept.lock();
        let Some((rows, Some((epoch, before)))) = kept.commits.last() else { return Ok(None) };
        Ok(Some((*epoch, Sums::of(rows.values()).since(before))))
    }

    fn count_from(&mut self, epoch: i64) -> std::result::Result<(), StoreError> {
        self.commit(|rows, counted| *counted = Some((epoch, Sums::of(rows.values()))));
        Ok(())
    }

    fn keep_from(&mut self, _: Month) -> std::result::Result<bool, StoreError> {
        Ok(false)
    }

    fn latest(&mut self) -> std::result::Result<Option<Month>, StoreError> {
        Ok(None)
    }
}

impl Kept {
    fn cut(&mut self, dice: &mut Dice) {
        let left = self.safe + dice.below(self.commits.len() - self.safe + 1);
        self.commits.truncate(left);
        self.safe = left;
    }
}

/// How a life ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    PowerCut,
    Kill,
}

/// What must be in the store in the end.
#[derive(Default)]
struct Promises {
    intents: Rows,
    written: Rows,
    confirmed: Rows,
    /// What clients were told has failed, as it was amended.
    denied: Rows,
}

fn start(disk: &Arc<ModelDisk>, epoch: i64) -> Shared {
    thread_local! { static METRICS: Arc<Metrics> = Arc::new(Metrics::new()); }
    Shared::recover(disk.clone(), LOG_BYTES, epoch, METRICS.with(Arc::clone)).expect("this disk never fails")
}

/// One life of so many steps. Gives what its start found.
fn live(disk: &Arc<ModelDisk>, store: &mut ModelStore, steps: usize, dice: &mut Dice, told: &mut Promises) -> Recovery {
    let shared = start(disk, dice.below(1 << 40) as i64);
    let (mut open, mut pending): (Vec<(Slot, Row)>, Vec<Held>) = (Vec::new(), Vec::new());
    for _ in 0..steps {
        match dice.below(10) {
            0..3 => {
                let intent = row(&format!("r{}", told.intents.len()));
                // A full log is no mistake.
                if let Ok(slot) = shared.open(&intent) {
                    told.intents.insert(id(&intent), intent.clone());
                    open.push((slot, intent));
                }
            }
            3..6 if !open.is_empty() => {
                let (slot, intent) = open.swap_remove(dice.below(open.len()));
                let row = Row { outcome: Outcome::Answered, usage: Usage::tokens(7, 3), ..intent };
                let durability = [Durability::Process, Durability::Power, Durability::Power][dice.below(3)];
                match shared.close(slot, row.clone(), durability) {
                    Ok(held) => {
                        told.written.insert(id(&row), row);
                        pending.extend(held.map(|held| *held));
                    }
                    // The log is broken.
                    Err(_) => deny(&shared, None, row, disk.mistake, told),
                }
            }
            6 => {
                let fails = dice.below(8) == 0;
                disk.fails.store(fails, Ordering::Relaxed);
                assert!(!shared.sync() || !fails, "this disk says when it fails");
                disk.fails.store(false, Ordering::Relaxed);
            }
            // One who waits waits no longer.
            8 if !pending.is_empty() => {
                let held = pending.swap_remove(dice.below(pending.len()));
                let row = held.row.clone();
                deny(&shared, Some(held), row, disk.mistake, told);
            }
            7 => drop(shipper::step(&shared, store).expect("this store is up")),
            _ => {}
        }
        let Progress { durable, broken } = *shared.progress.borrow();
        for held in pending.extract_if(.., |held| broken && held.sequence >= durable) {
            let row = held.row.clone();
            deny(&shared, Some(held), row, disk.mistake, told);
        }
        for held in pending.extract_if(.., |held| held.sequence < durable || disk.mistake == Mistake::ToldBeforeSync) {
            told.confirmed.insert(id(&held.row), held.row.clone());
            shared.ship(held);
        }
    }
    let mut state = shared.lock();
    std::mem::take(&mut state.recovery)
}

/// The client is told that it failed.
fn deny(shared: &Shared, written: Option<Held>, row: Row, mistake: Mistake, told: &mut Promises) {
    let row = Row { outcome: Outcome::Failed, usage: Usage::default(), billed: NanoUsd(0), ..row };
    told.denied.insert(id(&row), row.clone());
    match written {
        Some(held) if mistake == Mistake::LogNotAmended => shared.ship(Held { row, ..held }),
        written => shared.amend(written, row),
    }
}

/// A last life in which nothing happens. Gives what the store holds then, and of that what came since its count began.
fn settle(disk: &Arc<ModelDisk>, store: &mut ModelStore) -> (Rows, (i64, Sums)) {
    let shared = start(disk, 1);
    while shared.lock().has_work() {
        shipper::step(&shared, store).unwrap();
    }
    let (rows, counted) = store.kept.lock().commits.last().cloned().unwrap_or_default();
    let (epoch, before) = counted.expect("a start agrees on a count");
    let since = Sums::of(rows.values()).since(&before);
    (rows, (epoch, since))
}

/// Two lives, two ends, and a third that only cleans up.
fn play(seed: u64, mistake: Mistake, end: End) -> std::result::Result<(), String> {
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let disk = Arc::new(ModelDisk { plug: Mutex::default(), mistake, fails: Arc::default() });
    let mut store = ModelStore { kept: Arc::default(), mistake };
    let mut told = Promises::default();
    for life in 0..2 {
        let steps = 4 + dice.below(24);
        let found = live(&disk, &mut store, steps, &mut dice, &mut told);
        if end == End::Kill && found.is_alarming() {
            return Err(format!("life {life}: a kill damages nothing: {found:?}"));
        }
        if end == End::PowerCut {
            disk.cut(&mut dice);
            store.kept.lock().cut(&mut dice);
        }
    }
    let (rows, counted) = settle(&disk, &mut store);
    let mut promised = if end == End::Kill { told.written.clone() } else { told.confirmed.clone() };
    if end == End::Kill {
        promised.extend(told.denied.clone());
    }
    for (id, row) in &promised {
        if rows.get(id) != Some(row) {
            return Err(format!("{id:?} was promised and is {:?}", rows.get(id).map(|row| row.outcome)));
        }
    }
    for (id, row) in &rows {
        if ![&told.written, &told.intents, &told.denied].iter().any(|known| known.get(id) == Some(row)) {
            return Err(format!("{id:?} is nobody's: {row:?}"));
        }
    }
    if end == End::Kill && rows.len() != told.intents.len() {
        return Err(format!("{} rows of {} requests", rows.len(), told.intents.len()));
    }
    let log = recovery::Reading::of(&*disk).expect("readable").sums();
    if mistake == Mistake::None && log != Some(counted) {
        return Err(format!("the log counted {log:?}, the store holds {counted:?}"));
    }
    Ok(())
}

#[test]
fn no_power_cut_takes_a_row_that_was_confirmed() {
    for seed in 1..=SEEDS {
        if let Err(why) = play(seed, Mistake::None, End::PowerCut) {
            panic!("seed {seed}: {why}");
        }
    }
}

#[test]
fn no_kill_takes_a_row_that_was_written_or_leaves_a_request_without_one() {
    for seed in 1..=SEEDS / 5 {
        if let Err(why) = play(seed, Mistake::None, End::Kill) {
            panic!("seed {seed}: {why}");
        }
    }
}

#[test]
fn each_mistake_that_a_power_cut_would_punish_is_found() {
    for mistake in [Mistake::FolderNotSynced, Mistake::StoreNotSynced, Mistake::ToldBeforeSync] {
        let found = (1..=SEEDS).find(|seed| play(*seed, mistake, End::PowerCut).is_err());
        assert!(found.is_some(), "{mistake:?} was not found in {SEEDS} seeds");
        println!("{mistake:?}: seed {found:?}");
    }
}

#[test]
fn a_log_that_is_not_told_what_clients_were_is_found() {
    let found = (1..=SEEDS / 5).find(|seed| play(*seed, Mistake::LogNotAmended, End::Kill).is_err());
    println!("seed {found:?}");
    assert!(found.is_some(), "it was not found in {} seeds", SEEDS / 5);
}
