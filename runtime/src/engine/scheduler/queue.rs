//! Who waits, by number. Nothing here takes longer than a search in a queue of a hundred thousand.

use super::{Entry, SequenceId};
use crate::engine::request::Class;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

#[derive(Default)]
pub(super) struct Queue {
    /// The choices that wait for an entry's prompt have the numbers that follow its own.
    entries: BTreeMap<SequenceId, Entry>,
    /// Of those that never had blocks.
    deadlines: BTreeSet<(Instant, SequenceId)>,
    /// Sequences of each class.
    counts: [usize; 3],
}

impl Queue {
    pub fn push(&mut self, entry: Entry) {
        self.counts[entry.ask.class as usize] += 1 + entry.forks.len();
        self.deadlines.extend(deadline(&entry));
        self.entries.insert(entry.id, entry);
    }

    /// The entry that this sequence waits in, as itself or as a choice that begins as its copy.
    pub fn take(&mut self, id: SequenceId) -> Option<Entry> {
        let (&at, _) = self.entries.range(..=id).next_back().filter(|(_, entry)| entry.holds(id))?;
        let entry = self.entries.remove(&at)?;
        self.counts[entry.ask.class as usize] -= 1 + entry.forks.len();
        if let Some(deadline) = deadline(&entry) {
            self.deadlines.remove(&deadline);
        }
        Some(entry)
    }

    /// One whose deadline has passed.
    pub fn late(&self, now: Instant) -> Option<SequenceId> {
        self.deadlines.first().filter(|(deadline, _)| *deadline <= now).map(|&(_, id)| id)
    }

    pub fn get(&self, id: SequenceId) -> Option<&Entry> {
        self.entries.get(&id)
    }

    /// Its class, its number and its forks must stay.
    pub fn get_mut(&mut self, id: SequenceId) -> Option<&mut Entry> {
        self.entries.get_mut(&id)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }

    pub fn in_class(&self, class: Class) -> usize {
        self.counts[class as usize]
    }

    /// Sequences, choices that wait for another's prompt among them.
    pub fn len(&self) -> usize {
        self.counts.iter().sum()
    }
}

fn deadline(entry: &Entry) -> Option<(Instant, SequenceId)> {
    let deadline = entry.ask.deadline.filter(|_| !entry.has_started)?;
    Some((deadline, entry.id))
}
