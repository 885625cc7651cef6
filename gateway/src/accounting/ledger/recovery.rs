//! What the last life left in its log. Its rows wait for the store like any other: a start needs no store.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;

use super::super::row::Row;
use super::disk::Disk;
use super::log::{Log, Segment};
use super::totals::{Sums, Totals};
use super::wal::{self, Kind};

/// What a start found of the life before.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Rows that were in the log and not yet in the store.
    pub shipped: usize,
    /// Requests that were in flight when the process died, now written as `killed`.
    pub killed: Vec<String>,
    pub damaged_bytes: u64,
    /// Segments that the log speaks of and that are not there, or not to their end.
    pub missing: Vec<u64>,
    /// The store holds rows that the log knows nothing of: the log has lost its end, as in a power cut.
    pub lost_end: bool,
    /// Requests that the store knows otherwise than the log.
    pub different: Vec<String>,
}

impl Recovery {
    /// Whether anything is lost, or not as it was written.
    pub fn is_alarming(&self) -> bool {
        self.damaged_bytes > 0 || !self.missing.is_empty() || self.lost_end || !self.different.is_empty()
    }
}

/// A log that is ready to go on, and the rows that the store may not have.
pub(super) struct Recovered {
    pub(super) log: Log,
    /// In the order in which they began.
    pub(super) rows: Vec<Left>,
    pub(super) found: Recovery,
}

/// A row of the last life.
pub(super) struct Left {
    pub(super) segment: u64,
    pub(super) row: Row,
    /// The log has no end for it. The store may, if the segment that held it is gone; else this is the end.
    pub(super) is_cut_off: bool,
}

/// Everything that a log's segments hold, read once.
#[derive(Default)]
pub struct Reading {
    /// Records of rows with their segment and sequence, in order.
    pub records: Vec<((u64, u64), Kind, Row)>,
    /// The last totals and their sequence.
    pub totals: Option<(u64, Totals)>,
    pub segments: BTreeMap<u64, Scanned>,
    /// Segments that must be there and are not.
    pub missing: Vec<u64>,
    /// Segments whose last records are not there, though the next one goes on after them.
    pub cut: Vec<u64>,
}

/// A segment as it was found.
#[derive(Debug, Default)]
pub struct Scanned {
    pub bytes: u64,
    pub damaged_bytes: u64,
    pub sequences: Vec<u64>,
}

impl Reading {
    /// # Errors
    /// When a segment cannot be read.
    pub fn of(disk: &dyn Disk) -> io::Result<Reading> {
        let mut reading = Reading::default();
        for number in disk.list()? {
            let bytes = match disk.read(number) {
                // Beside a gateway that runs: it was shipped meanwhile, and whether it may be missing the totals say.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                bytes => bytes?,
            };
            let scan = wal::scan(&bytes);
            let (sequences, damaged_bytes) = (scan.sequences(), scan.damaged_bytes);
            reading.segments.insert(number, Scanned { bytes: bytes.len() as u64, damaged_bytes, sequences });
            let records = scan.records.into_iter();
            reading.records.extend(records.map(|(sequence, kind, row)| ((number, sequence), kind, row)));
            let last = scan.totals.into_iter().next_back();
            reading.totals = reading.totals.into_iter().chain(last).max_by_key(|(sequence, _)| *sequence);
        }
        let listed = reading.totals.iter().flat_map(|(_, totals)| &totals.segments);
        reading.missing = listed.copied().filter(|number| !reading.segments.contains_key(number)).collect();
        let next = |number: &u64| reading.segments.get(&(number + 1))?.sequences.first().copied();
        let last = reading.segments.keys().next_back().copied();
        let follows = |(number, segment): (&u64, &Scanned)| match segment.sequences.last() {
            Some(at) => next(number).filter(|next| at + 1 != *next).map(|_| *number),
            // Every segment begins with totals.
            None => (Some(*number) != last).then_some(*number),
        };
        reading.cut = reading.segments.iter().filter_map(follows).collect();
        Ok(reading)
    }

    /// The rows that stand, with their segments, and whether the log has no end for them. What ended in a segment that is
    /// gone is not among them.
    pub fn standing(self) -> Vec<((u64, bool), Row)> {
        let ended_below = self.totals.map_or(0, |(_, totals)| totals.ended_below);
        let rows = wal::standing(self.records).into_iter();
        rows.filter(|((_, sequence), kind, _)| *kind != Kind::Intent || *sequence >= ended_below)
            .map(|((segment, _), kind, row)| ((segment, kind == Kind::Intent), row))
            .collect()
    }

    /// Which log this is.
    pub fn log(&self) -> i64 {
        self.totals.as_ref().map_or(0, |(_, totals)| totals.log)
    }

    /// Segments that say otherwise what an earlier one says, each with that one.
    fn amends(&self) -> Vec<(u64, u64)> {
        let mut ended: HashMap<wal::Id, u64> = HashMap::new();
        let mut found = Vec::new();
        for ((segment, _), _, row) in self.records.iter().filter(|(_, kind, _)| *kind != Kind::Intent) {
            let before = ended.insert(wal::id(row), *segment);
            found.extend(before.filter(|before| before != segment).map(|before| (*segment, before)));
        }
        found
    }

    pub fn damaged_bytes(&self) -> u64 {
        self.segments.values().map(|segment| segment.damaged_bytes).sum()
    }

    /// What the log says that the store must hold in all, of the count that it names: terminal rows up to here.
    pub fn sums(&self) -> Option<(i64, Sums)> {
        let (at, totals) = self.totals.as_ref()?;
        let mut ended: HashMap<wal::Id, &Row> = HashMap::new();
        let mut sums = totals.sums;
        for ((_, sequence), _, row) in self.records.iter().filter(|(_, kind, _)| *kind != Kind::Intent) {
            let before = ended.insert(wal::id(row), row);
            if sequence > at {
                // What an amended row was before is there as long as totals do not know better.
                sums = before.map_or(sums, |before| sums.since(&Sums::of([before])));
                sums.add(row);
            }
        }
        Some((totals.epoch, sums))
    }
}

/// Reads what is there and begins a new segment. `epoch`: what to call a count that has to begin anew, because part of
/// the log is lost.
pub(super) fn recover(disk: Arc<dyn Disk>, bytes_max: u64, epoch: i64) -> io::Result<Recovered> {
    let reading = Reading::of(&*disk)?;
    let mut old: BTreeMap<u64, Segment> = BTreeMap::new();
    for (number, scanned) in &reading.segments {
        let damaged = scanned.damaged_bytes > 0;
        old.insert(*number, Segment { written: scanned.bytes, damaged, ..Segment::default() });
    }
    let sequences = reading.segments.values().filter_map(|segment| segment.sequences.last());
    let next = sequences.max().map_or(0, |last| last + 1);
    let damaged_bytes = reading.damaged_bytes();
    let missing: Vec<u64> = reading.missing.iter().chain(&reading.cut).copied().collect();
    let counted = reading.sums().filter(|_| damaged_bytes == 0 && missing.is_empty());

    let mut log = Log::new(disk, bytes_max, old, next);
    log.id = match reading.log() {
        // Never negative: a store's integers are signed.
        0 => (uuid::Uuid::new_v4().as_u64_pair().1 >> 1).cast_signed(),
        id => id,
    };
    (log.epoch, log.sums) = counted.unwrap_or((epoch, Sums::default()));
    log.ended_below = reading.totals.as_ref().map_or(0, |(_, totals)| totals.ended_below);
    for (segment, before) in reading.amends() {
        if let Some(segment) = log.segment(segment) {
            segment.amends.insert(before);
        }
    }
    let mut rows = Vec::new();
    for ((segment, is_cut_off), row) in reading.standing() {
        if let Some(segment) = log.segment(segment) {
            segment.unshipped += 1;
        }
        rows.push(Left { segment, row, is_cut_off });
    }
    log.begin(log.head_bytes())?;
    log.count()?;
    Ok(Recovered { log, rows, found: Recovery { damaged_bytes, missing, ..Recovery::default() } })
}
