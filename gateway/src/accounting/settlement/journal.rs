//! What settlement asks of the journal that it writes to.

use std::pin::Pin;

use super::super::row::Row;

/// The journal cannot take more: it is full, or its disk failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the ledger cannot take more rows")]
pub struct JournalClosed;

/// Room in the journal for one terminal row. Made by `Journal::open`, given back to `Journal::close`.
#[derive(Debug, PartialEq, Eq)]
pub struct Slot {
    /// Where the intent was written.
    pub segment: u64,
    /// Bytes held for the terminal row.
    pub bytes: u64,
}

/// What an acknowledged row must survive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// The end of this process, also by `kill -9`: the row is written.
    #[default]
    Process,
    /// The end of the machine's power: the row is synced.
    Power,
}

/// A terminal row that is written and not yet durable. It goes to the store when the journal is told what became of it.
#[derive(Debug)]
pub struct Held {
    pub segment: u64,
    pub sequence: u64,
    pub row: Row,
}

/// Where intents and terminal rows are written before anything depends on them.
pub trait Journal: Send + Sync {
    /// Writes the intent and reserves room for its end. `row` is what will stand if we never come back.
    ///
    /// # Errors
    /// When there is no room for both: the request must be refused.
    fn open(&self, row: &Row) -> Result<Slot, JournalClosed>;

    /// Writes the terminal row into the reserved room and hands it to the store; with `Durability::Power` the caller has
    /// to wait until it is durable, and to hand it on.
    ///
    /// # Errors
    /// The row, when the disk failed: it is not written, so no usage may leave.
    fn close(&self, slot: Slot, row: Row, durability: Durability) -> Result<Option<Box<Held>>, Box<Row>>;

    /// Ends when the record is durable, or with `false` when it cannot be known to become so.
    fn durable(&self, sequence: u64) -> Pin<Box<dyn Future<Output = bool> + Send>>;

    /// Hands a held row to the store, as it was written.
    fn ship(&self, held: Held);

    /// Writes that a row ended otherwise than it was written, or at last where that failed, and hands it to the store.
    /// The log is told first: what it says when this process dies is what the store will say.
    fn amend(&self, written: Option<Held>, row: Row);
}
