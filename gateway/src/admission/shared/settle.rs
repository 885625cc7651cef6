//! How grants end. That happens where nothing can wait, in a drop, so room to say it is taken before a grant is asked for;
//! a task of its own then says it, until it is heard.

use tokio::sync::mpsc::{self, OwnedPermit, Receiver, Sender};

use super::script::Settled;
use super::store::Store;

/// Grants that are open, or have ended and the store does not know yet. Beyond that there is no store.
const OPEN_MAX: usize = 16_384;
/// Of them told at once.
const TOLD_MAX: usize = 64;

pub fn queue() -> (Sender<Settled>, Receiver<Settled>) {
    mpsc::channel(OPEN_MAX)
}

/// A grant that is asked for, or there. Dropped, it is cancelled: the store may have given it without our knowing.
pub struct Open {
    room: Option<OwnedPermit<Settled>>,
    pub grant: String,
    parts: usize,
}

impl Open {
    /// `None` where there is no room.
    pub fn new(queue: &Sender<Settled>, grant: String, parts: usize) -> Option<Open> {
        let room = queue.clone().try_reserve_owned().ok()?;
        Some(Open { room: Some(room), grant, parts })
    }

    pub fn settle(mut self, parts: Vec<(u64, Option<u64>)>) {
        if let Some(room) = self.room.take() {
            room.send(Settled { grant: std::mem::take(&mut self.grant), parts });
        }
    }

    /// It was refused: there is nothing to end.
    pub fn forget(mut self) {
        self.room = None;
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(room) = self.room.take() {
            room.send(Settled::cancelled(std::mem::take(&mut self.grant), self.parts));
        }
    }
}

/// Tells the store for ever.
pub async fn send(store: &Store, mut queue: Receiver<Settled>) {
    let mut told = Vec::with_capacity(TOLD_MAX);
    while queue.recv_many(&mut told, TOLD_MAX).await > 0 {
        // To be told twice does no harm.
        while store.settle(&told).await.is_err() {
            store.back().await;
        }
        told.clear();
    }
}
