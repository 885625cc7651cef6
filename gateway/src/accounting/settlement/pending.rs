//! Between a terminal row that is written and one that is durable.

use std::sync::{Arc, OnceLock};

use super::super::row::Outcome;
use super::{Held, Hold, Journal, JournalClosed, Rate, Receipt, Spent};

/// Whoever has to know how a request was settled.
pub(super) struct Told {
    pub(super) cell: Arc<OnceLock<Receipt>>,
    pub(super) holds: Vec<Box<dyn Hold>>,
    /// Whose answer it is, or who was asked last.
    pub(super) model: String,
}

impl Told {
    pub(super) fn tell(self, receipt: Receipt, is_kept: bool) -> Result<Receipt, JournalClosed> {
        let _ = self.cell.set(receipt);
        self.holds.into_iter().for_each(|hold| hold.settle(&receipt, &self.model));
        if is_kept { Ok(receipt) } else { Err(JournalClosed) }
    }
}

/// A request whose terminal row is written. Only once it is durable may bytes that carry usage leave. Dropped, the row
/// stands as it was written.
#[must_use]
pub enum Pending {
    Told(Result<Receipt, JournalClosed>),
    Waits(Waits),
}

/// A row that the disk has not confirmed.
pub struct Waits(Option<Box<Waiting>>);

pub(super) struct Waiting {
    pub(super) held: Box<Held>,
    pub(super) receipt: Receipt,
    pub(super) rate: Rate,
    /// What is owed if the disk fails.
    pub(super) in_doubt: Spent,
    pub(super) journal: Arc<dyn Journal>,
    pub(super) told: Told,
}

impl From<Waiting> for Pending {
    fn from(waiting: Waiting) -> Pending {
        Pending::Waits(Waits(Some(Box::new(waiting))))
    }
}

impl Waiting {
    fn confirm(mut self, is_durable: bool) -> Result<Receipt, JournalClosed> {
        if is_durable {
            self.journal.ship(*self.held);
        } else {
            let mut row = self.held.row.clone();
            self.receipt = self.rate.fill(&mut row, Outcome::Failed, self.in_doubt);
            self.journal.amend(Some(*self.held), row);
        }
        self.told.tell(self.receipt, is_durable)
    }
}

impl Pending {
    /// Waits until the row is as durable as its route asks.
    ///
    /// # Errors
    /// When it is not known to be: the answer must not pretend that it is.
    pub async fn durable(self) -> Result<Receipt, JournalClosed> {
        match self {
            Pending::Told(outcome) => outcome,
            Pending::Waits(mut waits) => {
                let Some(waiting) = &waits.0 else { return Err(JournalClosed) };
                let is_durable = waiting.journal.durable(waiting.held.sequence).await;
                waits.0.take().map_or(Err(JournalClosed), |waiting| waiting.confirm(is_durable))
            }
        }
    }

    /// For work that nobody is told of: written is enough.
    ///
    /// # Errors
    /// When it is not even that.
    pub fn now(self) -> Result<Receipt, JournalClosed> {
        match self {
            Pending::Told(outcome) => outcome,
            Pending::Waits(mut waits) => waits.0.take().map_or(Err(JournalClosed), |waiting| waiting.confirm(true)),
        }
    }
}

impl Drop for Waits {
    fn drop(&mut self) {
        if let Some(waiting) = self.0.take() {
            let _ = waiting.confirm(true);
        }
    }
}
