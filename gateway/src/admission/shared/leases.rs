//! What this gateway has taken ahead of its requests: a part of a limit, from which most of them take without asking.
//!
//! A lease is deducted where it is counted when it is drawn, so all gateways together never let in more than the limit.
//! Who finds too little draws what is missing and a new part; the background draws the next part before one is used up, and
//! gives back what is too much, or what nobody has taken from for a while.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedMutexGuard, mpsc};

use super::script::{Reply, Want};
use super::settle::Name;
use super::store::{Away, Store};
use crate::admission::core::rule::Sharing;
use crate::admission::counts::{Ask, Time};
use crate::api::limit::Per;

const IDLE_AFTER: Duration = Duration::from_secs(2);
/// How often all of them are looked at.
const TEND_EVERY: Duration = Duration::from_millis(250);
/// Leases that wait to be looked at sooner.
const CALLS_MAX: usize = 1_024;
const WHOLE: u64 = 10_000;

pub struct Leases {
    cells: Mutex<HashMap<Name, Arc<Cell>>>,
    calls: mpsc::Sender<Call>,
    time: Arc<Time>,
}

/// What is to be looked at sooner.
pub enum Call {
    One(Arc<Cell>),
    /// All go back, and then nobody comes any more.
    Close(std::sync::mpsc::Sender<()>),
}

/// One lease.
pub struct Cell {
    key: String,
    amounts: Mutex<Amounts>,
    /// Held while the store is asked. It is told what is on lease, so it answers one question before the next.
    drawing: Arc<tokio::sync::Mutex<()>>,
}

struct Amounts {
    /// The last that was asked of it.
    ask: Ask,
    /// Below zero while it is being drawn, or is owed.
    left: i64,
    /// What requests under way have taken.
    held: i64,
    /// The store may believe that there is more.
    is_stale: bool,
}

impl Amounts {
    /// What is drawn at a time.
    fn block(&self) -> i64 {
        let share = self.ask.rule.shared.and_then(|Sharing { lease, .. }| lease).unwrap_or(0);
        let block = u128::from(self.ask.limit) * u128::from(share) / u128::from(WHOLE);
        i64::try_from(block).unwrap_or(i64::MAX).max(1)
    }

    fn leased(&self) -> u64 {
        u64::try_from(self.left.saturating_add(self.held)).unwrap_or(0)
    }

    fn take(&mut self, amount: u64) {
        self.left = self.left.saturating_sub(signed(amount));
        self.held = self.held.saturating_add(signed(amount));
    }

    fn is_low(&self) -> bool {
        self.left < self.block() / 2
    }

    fn is_idle(&self, now: Duration) -> bool {
        now.saturating_sub(self.ask.at.now) >= IDLE_AFTER
    }

    fn is_too_much(&self) -> bool {
        self.left > self.block().saturating_mul(2)
    }

    /// What refills comes back by itself: a lease of it is used when it is drawn, and never given back.
    fn refills(&self) -> bool {
        matches!(self.ask.rule.per, Some(Per::Second | Per::Minute))
    }
}

impl Cell {
    pub fn left(&self) -> u64 {
        u64::try_from(self.amounts.lock().left).unwrap_or(0)
    }

    /// Takes so much if it is there.
    fn take(&self, ask: &Ask) -> bool {
        let mut amounts = self.amounts.lock();
        amounts.ask = ask.clone();
        let is_there = ask.amount == 0 || amounts.left >= signed(ask.amount);
        if is_there {
            amounts.take(ask.amount);
        }
        is_there
    }

    /// Takes so much, and says what is to be drawn for it if it was not there. `books` is asked last: what is settled
    /// meanwhile then counts twice rather than never.
    fn take_or_draw(&self, ask: &Ask, books: impl FnOnce(&str, &Ask) -> u64) -> Option<Want> {
        let (least, most, leased) = {
            let mut amounts = self.amounts.lock();
            let leased = amounts.leased();
            amounts.take(ask.amount);
            let missing = amounts.left.min(0).unsigned_abs();
            (missing, missing.saturating_add(amounts.block().unsigned_abs()), leased)
        };
        (least > 0).then(|| Want {
            key: self.key.clone(),
            books: books(&self.key, ask),
            ask: ask.clone(),
            least,
            most,
            leased: Some(leased),
        })
    }

    fn fill(&self, amount: u64) {
        let mut amounts = self.amounts.lock();
        amounts.left = amounts.left.saturating_add(signed(amount));
        amounts.is_stale = false;
    }

    fn give_back(&self, amount: u64, used: u64) -> bool {
        let mut amounts = self.amounts.lock();
        amounts.held = amounts.held.saturating_sub(signed(amount));
        amounts.left = amounts.left.saturating_add(signed(amount)).saturating_sub(signed(used));
        if !amounts.refills() {
            // What was used beyond it is in this gateway's books.
            amounts.left = amounts.left.max(-amounts.held);
        }
        amounts.is_too_much()
    }

    /// Draws the next part, or gives back what is too much.
    async fn tend(&self, store: &Store, now: Duration, books: &impl Fn(&str, &Ask) -> u64) {
        let _one_at_a_time = self.drawing.lock().await;
        let (ask, most, leased) = {
            let mut amounts = self.amounts.lock();
            let (block, is_idle) = (amounts.block(), amounts.is_idle(now));
            let back = match (is_idle, amounts.is_too_much()) {
                (true, _) => amounts.left.max(0),
                (_, true) if !amounts.refills() => amounts.left - block,
                _ => 0,
            };
            amounts.left -= back;
            let most = if !is_idle && amounts.is_low() { block - amounts.left } else { 0 };
            if most == 0 && (amounts.refills() || back == 0 && !amounts.is_stale) {
                return;
            }
            (amounts.ask.clone(), most.unsigned_abs(), amounts.leased())
        };
        let want =
            Want { key: self.key.clone(), books: books(&self.key, &ask), ask, least: 0, most, leased: Some(leased) };
        match store.reserve("", &[want]).await {
            Ok(Reply::Taken(got)) => self.fill(got.iter().map(|got| got.amount).sum()),
            Ok(Reply::Short(..)) => {}
            Err(_) => self.doubt(),
        }
    }

    /// Nobody knows whether it was filled.
    fn doubt(&self) {
        let mut amounts = self.amounts.lock();
        amounts.is_stale = !amounts.refills();
    }
}

/// What a request takes from a lease. Dropped, all of it goes back.
pub struct Drawn {
    cell: Arc<Cell>,
    ask: Ask,
    is_taken: bool,
    leases: Arc<Leases>,
}

impl Drawn {
    pub fn is_taken(&self) -> bool {
        self.is_taken
    }

    pub fn settle(mut self, used: u64) {
        self.end(used);
    }

    fn end(&mut self, used: u64) {
        if std::mem::take(&mut self.is_taken) && self.cell.give_back(self.ask.amount, used) {
            self.leases.call(&self.cell);
        }
    }
}

impl Drop for Drawn {
    fn drop(&mut self) {
        self.end(0);
    }
}

/// Leases that have too little for a request, which nobody else draws meanwhile.
pub struct Lacking {
    /// Which of them.
    pub at: Vec<usize>,
    cells: Vec<Arc<Cell>>,
    _drawing: Vec<OwnedMutexGuard<()>>,
    pub wants: Vec<Want>,
    is_answered: bool,
}

impl Lacking {
    /// Those that have not been taken from, each locked in the order of its name. All of them are then.
    ///
    /// # Errors
    /// `Away`, if the store left somebody without an answer for whom this waited: to ask as well would be to wait twice.
    pub async fn find(drawn: &mut [Drawn], store: &Store, books: impl Fn(&str, &Ask) -> u64) -> Result<Lacking, Away> {
        let lost = store.lost();
        let mut lacking: Vec<(usize, &mut Drawn)> =
            drawn.iter_mut().enumerate().filter(|(_, drawn)| !drawn.is_taken).collect();
        lacking.sort_unstable_by(|one, other| one.1.cell.key.cmp(&other.1.cell.key));
        let mut found =
            Lacking { at: Vec::new(), cells: Vec::new(), _drawing: Vec::new(), wants: Vec::new(), is_answered: false };
        for (at, drawn) in lacking {
            let guard = drawn.cell.drawing.clone().lock_owned().await;
            if store.lost() != lost {
                return Err(Away);
            }
            let want = drawn.cell.take_or_draw(&drawn.ask, &books);
            drawn.is_taken = true;
            // Somebody else may have drawn enough meanwhile.
            if let Some(want) = want {
                found.at.push(at);
                found.cells.push(drawn.cell.clone());
                found._drawing.push(guard);
                found.wants.push(want);
            }
        }
        Ok(found)
    }

    pub fn fill(mut self, amounts: impl Iterator<Item = u64>) {
        self.is_answered = true;
        self.cells.iter().zip(amounts).for_each(|(cell, amount)| cell.fill(amount));
    }

    /// There was too little.
    pub fn refuse(mut self) {
        self.is_answered = true;
    }
}

impl Drop for Lacking {
    fn drop(&mut self) {
        if !self.is_answered {
            self.cells.iter().for_each(|cell| cell.doubt());
        }
    }
}

impl Leases {
    pub fn new(time: Arc<Time>) -> (Arc<Leases>, mpsc::Receiver<Call>) {
        let (calls, called) = mpsc::channel(CALLS_MAX);
        (Arc::new(Leases { cells: Mutex::default(), calls, time }), called)
    }

    /// Takes what is asked, if it is there.
    pub fn take(self: &Arc<Self>, key: String, ask: &Ask) -> Drawn {
        let cell = self.cell(key, ask);
        let is_taken = cell.take(ask);
        if is_taken && cell.amounts.lock().is_low() {
            self.call(&cell);
        }
        Drawn { cell, ask: ask.clone(), is_taken, leases: self.clone() }
    }

    pub fn left(&self, key: String, ask: &Ask) -> u64 {
        let cells = self.cells.lock();
        cells.get(&(key, ask.at.period.start_ns)).map_or(0, |cell| cell.left())
    }

    fn cell(&self, key: String, ask: &Ask) -> Arc<Cell> {
        let make = || {
            let amounts = Amounts { ask: ask.clone(), left: 0, held: 0, is_stale: false };
            Arc::new(Cell { key: key.clone(), amounts: Mutex::new(amounts), drawing: Arc::default() })
        };
        self.cells.lock().entry((key.clone(), ask.at.period.start_ns)).or_insert_with(make).clone()
    }

    /// Where too many wait, it is looked at in its turn.
    fn call(&self, cell: &Arc<Cell>) {
        let _ = self.calls.try_send(Call::One(cell.clone()));
    }

    /// Gives everything back; `done` hears of it.
    pub fn close(&self, done: std::sync::mpsc::Sender<()>) {
        let _ = self.calls.try_send(Call::Close(done));
    }

    /// Looks after all of them for ever.
    pub async fn tend(&self, store: &Store, mut called: mpsc::Receiver<Call>, books: impl Fn(&str, &Ask) -> u64) {
        let mut look = tokio::time::interval(TEND_EVERY);
        loop {
            let (cells, now, done) = tokio::select! {
                Some(call) = called.recv() => match call {
                    Call::One(cell) => (vec![cell], self.time.now(), None),
                    // By then all are idle.
                    Call::Close(done) => (self.cells.lock().values().cloned().collect(), Duration::MAX, Some(done)),
                },
                _ = look.tick() => (self.due(), self.time.now(), None),
            };
            for cell in cells {
                cell.tend(store, now, &books).await;
            }
            // Nobody may be waiting any more.
            let _ = done.map(|done| done.send(()));
        }
    }

    /// Those that have something to give back. Those that nobody needs any more go.
    fn due(&self) -> Vec<Arc<Cell>> {
        let now = self.time.now();
        let mut due = Vec::new();
        self.cells.lock().retain(|_, cell| {
            let amounts = cell.amounts.lock();
            let is_due = amounts.is_stale || amounts.is_idle(now) && amounts.left > 0 || amounts.is_too_much();
            if is_due {
                due.push(cell.clone());
            }
            // Who holds one has got it from here.
            is_due || !amounts.is_idle(now) || amounts.held > 0 || Arc::strong_count(cell) > 1
        });
        due
    }
}

fn signed(amount: u64) -> i64 {
    i64::try_from(amount).unwrap_or(i64::MAX)
}
