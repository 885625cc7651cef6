//! The models that have memory, from the first byte of their load until the last is given back. What they need together
//! is never more than may be taken.

use super::stats::Stats;
use crate::{
    memory::{Mebibytes, Memory},
    report::ModelState,
};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

pub(crate) struct Roster {
    memory_max: u64,
    models: Mutex<Vec<Arc<Stats>>>,
}

impl Roster {
    pub fn new(memory_max: u64) -> Arc<Roster> {
        Arc::new(Roster { memory_max, models: Mutex::default() })
    }

    /// Sets memory aside for a model that is about to load. `Err` says what is missing.
    pub fn admit(self: &Arc<Roster>, stats: Stats) -> Result<Resident, String> {
        let mut models = self.models();
        let taken: u64 = models.iter().map(|stats| stats.memory_now()).sum();
        if taken.saturating_add(stats.memory.peak()) > self.memory_max {
            return Err(no_room(&stats.memory, taken, self.memory_max));
        }
        let stats = Arc::new(stats);
        models.push(Arc::clone(&stats));
        Ok(Resident { roster: Arc::clone(self), stats, has_no_handles: false, cut_at: None })
    }

    /// In the order in which they came.
    pub fn models(&self) -> MutexGuard<'_, Vec<Arc<Stats>>> {
        self.models.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn memory_max(&self) -> u64 {
        self.memory_max
    }
}

fn no_room(needs: &Memory, taken: u64, max: u64) -> String {
    let [peak, free, max] = [needs.peak(), max.saturating_sub(taken), max].map(Mebibytes);
    format!(
        "needs {peak} of memory ({needs}), and {free} of the {max} that models may take are free: quantise it, give it a \
         smaller KV pool, unload another model or let models take more"
    )
}

/// A model's place among the others. Whoever owns the model's memory owns this too, and drops it last.
pub(crate) struct Resident {
    roster: Arc<Roster>,
    pub stats: Arc<Stats>,
    has_no_handles: bool,
    cut_at: Option<Instant>,
}

impl Resident {
    /// Nobody is left who could ask for anything.
    pub fn retire(&mut self) {
        self.stats.enter(ModelState::Draining);
        self.has_no_handles = true;
    }

    /// Who still has a handle may ask until then; nobody is answered afterwards. The first such word holds.
    pub fn drain(&mut self, cut_at: Instant) {
        self.stats.enter(ModelState::Draining);
        self.cut_at.get_or_insert(cut_at);
    }

    pub fn cut_at(&self) -> Option<Instant> {
        self.cut_at
    }

    pub fn is_cut(&self, now: Instant) -> bool {
        self.cut_at.is_some_and(|at| at <= now)
    }

    /// Whether a model that has nothing to do may be freed.
    pub fn may_go(&self, now: Instant) -> bool {
        self.has_no_handles || self.is_cut(now)
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        self.roster.models().retain(|other| !Arc::ptr_eq(other, &self.stats));
    }
}
