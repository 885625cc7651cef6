//! How grants end. That happens where nothing can wait, in a drop, so room to say it is taken before a grant is asked for;
//! a task of its own then says it, until it is heard.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::mpsc::{self, OwnedPermit, Receiver, Sender};

use super::script::Settled;
use super::store::Store;

/// Grants that are open, or have ended and the store does not know yet. Beyond that there is no store.
const OPEN_MAX: usize = 16_384;
/// Of them told at once.
const TOLD_MAX: usize = 64;

/// A counter, and where its day or month begins.
pub type Name = (String, i64);

/// How a grant ended, and what of it this gateway's books have counted.
pub struct Ended {
    settled: Settled,
    counted: Vec<(Name, u64)>,
}

/// What the store is to be told.
pub enum Message {
    Ended(Ended),
    /// That was all; who sends this hears when it is told.
    Close(std::sync::mpsc::Sender<()>),
}

/// What the books have counted and the store has not: until it has, it believes that it is held.
#[derive(Default)]
pub struct Untold(Mutex<HashMap<Name, u64>>);

impl Untold {
    pub fn get(&self, name: &Name) -> u64 {
        self.0.lock().get(name).copied().unwrap_or(0)
    }

    pub fn add(&self, counted: &[(Name, u64)]) {
        let mut untold = self.0.lock();
        for (name, amount) in counted {
            *untold.entry(name.clone()).or_default() += amount;
        }
    }

    fn told(&self, counted: Vec<(Name, u64)>) {
        let mut untold = self.0.lock();
        for (name, amount) in counted {
            if let Entry::Occupied(mut left) = untold.entry(name) {
                *left.get_mut() = left.get().saturating_sub(amount);
                if *left.get() == 0 {
                    left.remove();
                }
            }
        }
    }
}

pub fn queue() -> (Sender<Message>, Receiver<Message>) {
    mpsc::channel(OPEN_MAX)
}

/// A grant that is asked for, or there. Dropped, it is cancelled: the store may have given it without our knowing.
pub struct Open {
    room: Option<OwnedPermit<Message>>,
    pub grant: String,
    parts: usize,
}

impl Open {
    /// `None` where there is no room.
    pub fn new(queue: &Sender<Message>, grant: String, parts: usize) -> Option<Open> {
        let room = queue.clone().try_reserve_owned().ok()?;
        Some(Open { room: Some(room), grant, parts })
    }

    /// `counted` is already among what is untold.
    pub fn settle(mut self, parts: Vec<u64>, counted: Vec<(Name, u64)>) {
        self.end(parts, counted);
    }

    /// It was refused: there is nothing to end.
    pub fn forget(mut self) {
        self.room = None;
    }

    fn end(&mut self, parts: Vec<u64>, counted: Vec<(Name, u64)>) {
        if let Some(room) = self.room.take() {
            let settled = Settled { grant: std::mem::take(&mut self.grant), parts };
            room.send(Message::Ended(Ended { settled, counted }));
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.end(vec![0; self.parts], Vec::new());
    }
}

/// Tells the store for ever.
pub async fn send(store: &Store, mut queue: Receiver<Message>, untold: Arc<Untold>) {
    let mut messages = Vec::with_capacity(TOLD_MAX);
    while queue.recv_many(&mut messages, TOLD_MAX).await > 0 {
        let (mut ended, mut closed) = (Vec::with_capacity(messages.len()), Vec::new());
        for message in messages.drain(..) {
            match message {
                Message::Ended(one) => ended.push(one),
                Message::Close(done) => closed.push(done),
            }
        }
        // To be told twice does no harm.
        while store.settle(ended.iter().map(|ended| &ended.settled)).await.is_err() {
            store.back().await;
        }
        ended.into_iter().for_each(|ended| untold.told(ended.counted));
        // Nobody may be waiting any more.
        closed.into_iter().for_each(|done| done.send(()).unwrap_or_default());
    }
}

/// `done` hears when everything before is told.
pub fn close(queue: &Sender<Message>, done: std::sync::mpsc::Sender<()>) {
    let _ = queue.try_send(Message::Close(done));
}
