//! The log on its disk: segments, the room that is promised in them, and what may be removed. No threads.
//!
//! Room is claimed when a segment begins, so that an admitted request can always write its end. A segment whose write or
//! sync has failed takes no more: what is at its end is not known. Then nobody is let in any more, and how those end who
//! are, goes to a segment of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use super::super::row::Row;
use super::super::settlement::{Held, Slot};
use super::disk::{Disk, Segment as File};
use super::totals::{Sums, Totals};
use super::wal;

/// A new segment is begun when one has grown to this, or to a quarter of a smaller bound: what is shipped is only given
/// back a whole segment at a time.
const SEGMENT_BYTES: u64 = 4 << 20;

pub(super) struct Log {
    pub(super) disk: Arc<dyn Disk>,
    bytes_max: u64,
    segments: BTreeMap<u64, Segment>,
    /// Room promised to the ends of running requests.
    reserved: u64,
    sequence: u64,
    /// Its name in a store that it shares with others.
    pub(super) id: i64,
    pub(super) epoch: i64,
    pub(super) sums: Sums,
    pub(super) ended_below: u64,
    /// For good, when a write or a sync failed.
    broken: bool,
    buffer: Vec<u8>,
    syncs: Syncs,
}

/// What has to be durable, and what is.
#[derive(Default)]
struct Syncs {
    /// How many segments were created, and how many of them are in a folder that was synced since.
    created: u64,
    in_folder: u64,
    /// Earlier segments that were written to since the last sync.
    behind: Vec<(u64, Arc<dyn File>)>,
    /// Records below this survive a power cut, if anybody waits for them.
    durable: u64,
    /// Somebody waits for the records below this.
    wanted: u64,
    /// Written since the last sync began.
    bytes: u64,
}

#[derive(Default)]
pub(super) struct Segment {
    pub(super) file: Option<Arc<dyn File>>,
    pub(super) written: u64,
    pub(super) claimed: u64,
    /// Intents without an end.
    pub(super) open: u64,
    pub(super) unshipped: u64,
    /// Segments that hold what this one says otherwise: it must not go before they do.
    pub(super) amends: BTreeSet<u64>,
    /// Evidence, to be kept.
    pub(super) damaged: bool,
    /// The log has said that it goes, so nothing that is written from now on may say that it is there.
    pub(super) leaving: bool,
}

impl Segment {
    fn is_shipped(&self) -> bool {
        self.open == 0 && self.unshipped == 0
    }
}

/// Where a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) segment: u64,
    pub(super) sequence: u64,
}

/// What one sync is about.
pub(super) struct Sync {
    pub(super) files: Vec<Arc<dyn File>>,
    pub(super) folder: bool,
    /// The last of the earlier segments among them.
    behind: Option<u64>,
    created: u64,
    below: u64,
}

/// Why a log took no row.
#[derive(Debug)]
pub(super) enum Refused {
    Full,
    Failed(io::Error),
}

impl Log {
    /// A log that goes on where `old` ended. It has no segment to write to yet.
    pub(super) fn new(disk: Arc<dyn Disk>, bytes_max: u64, old: BTreeMap<u64, Segment>, sequence: u64) -> Log {
        Log {
            disk,
            bytes_max,
            segments: old,
            reserved: 0,
            sequence,
            id: 0,
            epoch: 0,
            sums: Sums::default(),
            ended_below: 0,
            broken: false,
            buffer: Vec::new(),
            syncs: Syncs::default(),
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.segments.values().map(|segment| segment.written).sum()
    }

    fn current(&self) -> Option<u64> {
        self.segments.last_key_value().map(|(number, _)| *number)
    }

    pub(super) fn segment(&mut self, number: u64) -> Option<&mut Segment> {
        self.segments.get_mut(&number)
    }

    /// Claimed bytes that are left in the current segment.
    fn room(&self) -> u64 {
        self.segments.last_key_value().map_or(0, |(_, segment)| segment.claimed.saturating_sub(segment.written))
    }

    /// Makes a new segment the current one, with room for `needed` bytes. It does not begin with totals: `head` does that.
    pub(super) fn begin(&mut self, needed: u64) -> io::Result<()> {
        let number = self.current().map_or(0, |number| number + 1);
        let claimed = SEGMENT_BYTES.min(self.bytes_max / 4).max(needed);
        let file = self.disk.create(number, claimed)?;
        self.syncs.created += 1;
        if let Some((number, last)) = self.segments.iter_mut().next_back()
            && let Some(file) = last.file.take()
        {
            self.syncs.behind.push((*number, file));
        }
        self.segments.insert(number, Segment { file: Some(file), claimed, ..Segment::default() });
        Ok(())
    }

    /// Writes what has been counted so far, and which segments there are.
    pub(super) fn count(&mut self) -> io::Result<()> {
        self.encode_totals();
        self.append().map(drop)
    }

    /// As `count`, wherever there is room.
    pub(super) fn recount(&mut self) -> io::Result<()> {
        if self.room() < self.reserved + self.head_bytes() {
            self.begin(self.reserved + self.head_bytes())?;
        }
        self.count()
    }

    fn encode_totals(&mut self) {
        let staying = self.segments.iter().filter(|(_, segment)| !segment.leaving);
        let segments = staying.map(|(number, _)| *number).collect();
        self.buffer.clear();
        let (sums, ended_below) = (self.sums, self.ended_below);
        let totals = Totals { log: self.id, epoch: self.epoch, sums, ended_below, segments };
        wal::encode_totals(self.sequence, &totals, &mut self.buffer);
    }

    /// Writes an intent, and promises room for its end.
    pub(super) fn open(&mut self, row: &Row) -> Result<Slot, Refused> {
        if self.broken {
            return Err(Refused::Full);
        }
        self.encode(wal::Kind::Intent, row);
        let intent = self.buffer.len() as u64;
        let slot = wal::slot_bytes(intent as usize);
        let needed = self.reserved + intent + slot;
        // A new segment when this one is full, or when all it holds is in the store and the bound is near.
        let is_full = |log: &Log| log.bytes() + needed > log.bytes_max;
        let is_done = |log: &Log| {
            log.segments.last_key_value().is_some_and(|(_, last)| last.written > log.head_bytes() && last.is_shipped())
        };
        if self.room() < needed || (is_full(self) && is_done(self)) {
            self.begin(needed * 2 + self.head_bytes()).map_err(Refused::Failed)?;
            self.count().map_err(Refused::Failed)?;
            // The totals come before it.
            self.encode(wal::Kind::Intent, row);
        }
        if is_full(self) {
            return Err(Refused::Full);
        }
        let place = self.append().map_err(Refused::Failed)?;
        self.reserved += slot;
        if let Some(segment) = self.segments.get_mut(&place.segment) {
            segment.open += 1;
        }
        Ok(Slot { segment: place.segment, bytes: slot })
    }

    /// An upper bound of what the totals at the head of the next segment take.
    pub(super) fn head_bytes(&self) -> u64 {
        wal::totals_bytes_max(self.segments.len() + 1)
    }

    /// Writes a terminal row into the room that was promised. Its segment holds something that is not in the store yet.
    /// `waits`: somebody waits until it is durable.
    pub(super) fn close(&mut self, slot: &Slot, row: &Row, waits: bool) -> io::Result<Place> {
        self.reserved = self.reserved.saturating_sub(slot.bytes);
        if let Some(segment) = self.segments.get_mut(&slot.segment) {
            segment.open = segment.open.saturating_sub(1);
        }
        if self.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.encode(wal::Kind::Terminal, row);
        let place = self.append()?;
        self.sums.add(row);
        if let Some(segment) = self.segments.get_mut(&place.segment) {
            segment.unshipped += 1;
        }
        if waits {
            self.syncs.wanted = self.sequence;
        }
        Ok(place)
    }

    /// Writes how a row ended that was `written` otherwise, or not at all, wherever there is room. It is all that a broken
    /// log takes.
    pub(super) fn amend(&mut self, written: Option<&Held>, row: &Row) -> io::Result<u64> {
        self.encode(wal::Kind::Amended, row);
        let needed = self.buffer.len() as u64 + self.reserved;
        let is_open = self.segments.last_key_value().is_some_and(|(_, segment)| segment.file.is_some());
        if !is_open || self.room() < needed {
            self.begin(needed + self.head_bytes())?;
            self.count()?;
            self.encode(wal::Kind::Amended, row);
        }
        let place = self.append()?;
        if let Some(held) = written {
            self.sums = self.sums.since(&Sums::of([&held.row]));
            if let Some(segment) = self.segments.get_mut(&held.segment) {
                segment.unshipped = segment.unshipped.saturating_sub(1);
            }
        }
        self.sums.add(row);
        if let Some(segment) = self.segments.get_mut(&place.segment) {
            segment.unshipped += 1;
            segment.amends.extend(written.map(|held| held.segment).filter(|number| *number != place.segment));
        }
        Ok(place.segment)
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    /// A write or a sync failed: what was written to is left alone from now on.
    pub(super) fn break_off(&mut self) {
        self.broken = true;
        self.syncs.behind.clear();
        self.segments.values_mut().for_each(|segment| segment.file = None);
    }

    fn encode(&mut self, kind: wal::Kind, row: &Row) {
        self.buffer.clear();
        wal::encode(self.sequence, kind, row, &mut self.buffer);
    }

    /// Writes the buffer to the current segment.
    fn append(&mut self) -> io::Result<Place> {
        let Some((number, segment)) = self.segments.iter_mut().next_back() else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let Some(file) = &segment.file else { return Err(io::ErrorKind::NotConnected.into()) };
        if let Err(error) = file.append(&self.buffer) {
            self.break_off();
            return Err(error);
        }
        let bytes = self.buffer.len() as u64;
        segment.written += bytes;
        self.syncs.bytes += bytes;
        let place = Place { segment: *number, sequence: self.sequence };
        self.sequence += 1;
        Ok(place)
    }

    /// Segments that hold nothing that is not in the store, but for the current one; none while there is no room to say
    /// that they go.
    pub(super) fn retirable(&self) -> Vec<u64> {
        let current = self.current();
        let has_room = self.room() >= self.reserved + self.head_bytes();
        if !has_room || self.broken {
            return Vec::new();
        }
        let shipped =
            self.segments.iter().filter(|(number, segment)| Some(**number) != current && segment.is_shipped());
        let shipped = shipped.filter(|(_, segment)| !segment.amends.iter().any(|old| self.segments.contains_key(old)));
        shipped.map(|(number, _)| *number).collect()
    }

    pub(super) fn has_retirable(&self) -> bool {
        !self.retirable().is_empty()
    }

    /// Of the next record.
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Writes that these segments will go. What is in them need not be synced any more.
    pub(super) fn part_with(&mut self, gone: &[u64]) -> io::Result<()> {
        self.syncs.behind.retain(|(number, _)| !gone.contains(number));
        for number in gone {
            if let Some(segment) = self.segments.get_mut(number) {
                segment.leaving = true;
            }
        }
        self.count()
    }

    /// Removes segments that the log has said will go.
    pub(super) fn remove(&mut self, numbers: &[u64]) {
        for number in numbers {
            let Some(segment) = self.segments.remove(number) else { continue };
            let gone = if segment.damaged { self.disk.set_aside(*number) } else { self.disk.unlink(*number) };
            if let Err(error) = gone {
                tracing::warn!(%error, segment = number, "a shipped segment of the log could not be removed");
            }
        }
    }

    /// Records below this survive a power cut, if anybody waits for them.
    pub(super) fn durable(&self) -> u64 {
        self.syncs.durable
    }

    /// Written since the last sync began, if somebody waits for any of it.
    pub(super) fn waiting(&self) -> Option<u64> {
        (self.syncs.wanted > self.syncs.durable && !self.broken).then_some(self.syncs.bytes)
    }

    /// What is to be synced now.
    pub(super) fn begin_sync(&mut self) -> Sync {
        let current = self.segments.last_key_value().and_then(|(_, segment)| segment.file.clone());
        let Syncs { behind, created, in_folder, bytes, .. } = &mut self.syncs;
        *bytes = 0;
        Sync {
            files: behind.iter().map(|(_, file)| file.clone()).chain(current).collect(),
            folder: created > in_folder,
            behind: behind.last().map(|(number, _)| *number),
            created: *created,
            below: self.sequence,
        }
    }

    /// What was to be synced is.
    pub(super) fn end_sync(&mut self, sync: &Sync) {
        self.syncs.behind.retain(|(number, _)| Some(*number) > sync.behind);
        self.syncs.durable = self.syncs.durable.max(sync.below);
        self.syncs.in_folder = self.syncs.in_folder.max(sync.created);
    }
}
