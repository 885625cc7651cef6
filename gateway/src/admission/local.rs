//! Counts in this process: a counter for each rule and subject, and a request takes from several at once or from none.
//!
//! Locks are taken in the order of the counters' numbers, so no two requests can wait for each other.

use std::collections::HashMap;
use std::ops::DerefMut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use foldhash::fast::RandomState;
use parking_lot::{Mutex, MutexGuard, RwLock};

use super::before::Before;
use super::core::rule::{Rule, Subject};
use super::core::set::{self, Claim, Counter, Moment};
use super::core::{State, Taken};
use super::counts::{Ask, Counts, Denied, Grant, Time};

/// Subjects of a rule that clients may choose, over all shards. At the bound those at rest are forgotten; where none is,
/// newcomers share one counter.
const SUBJECTS_MAX: usize = 100_000;
const SHARDS: usize = 16;
/// A full shard is looked through once in this time at the most.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// What a counter is locked by. A test has locks of its own, under which every order of events can be tried.
pub trait Locked: Send + Sync + 'static {
    type Guard<'l>: DerefMut<Target = Counter>;

    fn new(counter: Counter) -> Self;
    fn lock(&self) -> Self::Guard<'_>;
}

impl Locked for Mutex<Counter> {
    type Guard<'l> = MutexGuard<'l, Counter>;

    fn new(counter: Counter) -> Self {
        Mutex::new(counter)
    }
    fn lock(&self) -> Self::Guard<'_> {
        self.lock()
    }
}

/// By what no client chooses the bytes of.
type Quick<K, V> = HashMap<K, V, RandomState>;

/// A counter and its place in the order of locks.
struct Cell<L> {
    number: u64,
    counter: L,
}

/// The counters of one rule.
struct Family<L> {
    rule: Arc<Rule>,
    shards: [RwLock<Shard<L>>; SHARDS],
    subjects_max: usize,
}

struct Shard<L> {
    cells: Quick<Subject, Arc<Cell<L>>>,
    swept: Option<Duration>,
}

impl<L> Default for Shard<L> {
    fn default() -> Self {
        Shard { cells: Quick::default(), swept: None }
    }
}

pub struct Local<L = Mutex<Counter>> {
    /// By the rules' names. One that counts something else since an edit has a family of its own: requests that began
    /// before the edit may still ask the other.
    families: RwLock<Quick<String, Vec<Arc<Family<L>>>>>,
    numbers: AtomicU64,
    time: Arc<Time>,
    before: RwLock<Arc<Before>>,
    subjects_max: usize,
}

impl<L: Locked> Local<L> {
    pub fn new(time: Arc<Time>, before: Arc<Before>) -> Local<L> {
        let before = RwLock::new(before);
        Local { families: RwLock::default(), numbers: AtomicU64::new(0), time, before, subjects_max: SUBJECTS_MAX }
    }

    /// What was used before this process began, known only now: counters that were made without it count it, too.
    pub fn remember(&self, before: Arc<Before>) {
        // Held, no counter is made meanwhile.
        let mut known = self.before.write();
        for family in self.families.read().values().flatten() {
            for shard in &family.shards {
                for (subject, cell) in &shard.read().cells {
                    if let Some((period, used)) = before.used(&family.rule, *subject) {
                        cell.counter.lock().add_before(period, used);
                    }
                }
            }
        }
        *known = before;
    }

    /// A rule that counts something else than the one of its name before begins anew.
    fn family(&self, rule: &Arc<Rule>) -> Arc<Family<L>> {
        let fits = |family: &&Arc<Family<L>>| Arc::ptr_eq(&family.rule, rule) || family.rule.counts_like(rule);
        if let Some(family) = self.families.read().get(&rule.name).and_then(|named| named.iter().find(fits)) {
            return family.clone();
        }
        let mut families = self.families.write();
        let named = families.entry(rule.name.clone()).or_default();
        if let Some(family) = named.iter().find(fits) {
            return family.clone();
        }
        let subjects_max = if rule.is_clients_choice() { self.subjects_max / SHARDS } else { usize::MAX };
        let family = Arc::new(Family { rule: rule.clone(), shards: Default::default(), subjects_max });
        named.push(family.clone());
        family
    }

    fn cell(&self, ask: &Ask) -> Arc<Cell<L>> {
        self.place(ask).1
    }

    /// Whose counter an ask is counted in: its subject's, or that of all for whom there is no room.
    pub(super) fn subject(&self, ask: &Ask) -> Subject {
        self.place(ask).0
    }

    fn place(&self, ask: &Ask) -> (Subject, Arc<Cell<L>>) {
        let family = self.family(&ask.rule);
        let shard = &family.shards[usize::from(ask.subject.0[0]) % SHARDS];
        if let Some(cell) = shard.read().cells.get(&ask.subject) {
            return (ask.subject, cell.clone());
        }
        // In this order: `remember` finds every counter that was made without what it knows.
        let before = self.before.read();
        let mut shard = shard.write();
        let subject = if shard.has_room(ask, family.subjects_max) { ask.subject } else { Subject::OTHER };
        let make = || {
            let (period, used) = before.first(&ask.rule, subject, ask.at.period);
            let counter = Counter::new(&ask.rule, ask.limit, Moment { period, ..ask.at }, used);
            Arc::new(Cell { number: self.numbers.fetch_add(1, Ordering::Relaxed), counter: L::new(counter) })
        };
        (subject, shard.cells.entry(subject).or_insert_with(make).clone())
    }
}

impl<L: Locked> Shard<L> {
    /// Whether a subject may have a counter of its own, after those at rest have gone.
    fn has_room(&mut self, ask: &Ask, most: usize) -> bool {
        if self.cells.len() < most || self.cells.contains_key(&ask.subject) {
            return true;
        }
        if self.swept.is_none_or(|swept| ask.at.now.saturating_sub(swept) >= SWEEP_EVERY) {
            self.swept = Some(ask.at.now);
            // Who holds one has got it from here: whoever else counts is seen.
            self.cells.retain(|_, cell| Arc::strong_count(cell) > 1 || !cell.counter.lock().is_at_rest(ask.at));
        }
        self.cells.len() < most
    }
}

/// The asks' counters by number, which is the order of locks. Rules have names of their own, so no two are one.
fn in_order<L>(asks: &[Ask], cell: impl Fn(&Ask) -> Arc<Cell<L>>) -> Vec<(usize, Arc<Cell<L>>)> {
    let mut cells: Vec<(usize, Arc<Cell<L>>)> = asks.iter().map(cell).enumerate().collect();
    cells.sort_unstable_by_key(|(_, cell)| cell.number);
    cells
}

/// Locks all of them and looks at them at once.
fn together<L: Locked, T>(
    asks: &[Ask],
    cells: &[(usize, Arc<Cell<L>>)],
    look: impl FnOnce(&mut [Claim<'_>]) -> Result<T, set::Denied>,
) -> Result<T, Denied> {
    let mut guards: Vec<L::Guard<'_>> = cells.iter().map(|(_, cell)| cell.counter.lock()).collect();
    let mut claims = Vec::with_capacity(asks.len());
    for ((at, _), counter) in cells.iter().zip(&mut guards) {
        let ask = &asks[*at];
        counter.set_limit(ask.at.now, ask.limit, ask.rule.mode);
        claims.push(Claim { counter, mode: ask.rule.mode, at: ask.at, amount: ask.amount });
    }
    look(&mut claims).map_err(|denied| Denied { ask: cells[denied.claim].0, short: Some(denied.short) })
}

impl<L: Locked> Local<L> {
    pub(super) fn take(&self, asks: &[Ask]) -> Result<Granted<L>, Denied> {
        self.take_by(asks, set::reserve)
    }

    /// Takes whether or not there is room: somebody else has said that there is.
    pub(super) fn take_anyway(&self, asks: &[Ask]) -> Granted<L> {
        let taken = self.take_by(asks, |claims| Ok(set::take(claims)));
        taken.unwrap_or_else(|_| Granted { held: Vec::new(), time: self.time.clone() })
    }

    fn take_by(
        &self,
        asks: &[Ask],
        take: impl FnOnce(&mut [Claim<'_>]) -> Result<Vec<Taken>, set::Denied>,
    ) -> Result<Granted<L>, Denied> {
        let cells = in_order(asks, |ask| self.cell(ask));
        let taken = together(asks, &cells, take)?;
        let held = cells.into_iter().zip(taken).map(|((at, cell), taken)| (asks[at].rule.clone(), cell, taken));
        Ok(Granted { held: held.collect(), time: self.time.clone() })
    }
}

#[async_trait]
impl<L: Locked> Counts for Local<L> {
    fn peek(&self, asks: &[Ask]) -> Result<(), Denied> {
        let cells = in_order(asks, |ask| self.cell(ask));
        together(asks, &cells, |claims| set::check(claims))
    }

    async fn reserve(&self, asks: &[Ask]) -> Result<Box<dyn Grant>, Denied> {
        Ok(Box::new(self.take(asks)?))
    }

    fn state(&self, ask: &Ask) -> State {
        let cell = self.cell(ask);
        let mut counter = cell.counter.lock();
        counter.set_limit(ask.at.now, ask.limit, ask.rule.mode);
        counter.state(ask.at)
    }
}

/// What was taken for a request. Dropped, all of it goes back.
pub(super) struct Granted<L: Locked = Mutex<Counter>> {
    held: Vec<(Arc<Rule>, Arc<Cell<L>>, Taken)>,
    time: Arc<Time>,
}

impl<L: Locked> Grant for Granted<L> {
    fn settle(mut self: Box<Self>, used: &dyn Fn(&Rule) -> u64) {
        self.end(used);
    }
}

impl<L: Locked> Granted<L> {
    pub(super) fn end(&mut self, used: &dyn Fn(&Rule) -> u64) {
        let now = self.time.now();
        for (rule, cell, taken) in self.held.drain(..) {
            let used = used(&rule);
            // A strict rule reserved the most that can be: it is never exceeded by what it let in.
            let used = if rule.strict { used.min(taken.amount()) } else { used };
            cell.counter.lock().settle(now, taken, used);
        }
    }
}

impl<L: Locked> Drop for Granted<L> {
    fn drop(&mut self) {
        self.end(&|_| 0);
    }
}

#[cfg(test)]
#[path = "local_tests.rs"]
mod tests;
