//! `Ticket → Running → settled`: every admitted request ends in exactly one priced row, whatever happens to it.
//!
//! The values carry the duty. A `Ticket` dropped is released and costs nothing; a `Running` dropped is settled with the
//! tokens counted so far, else with its reservation, so that neither a hang-up nor a panic is free. The journal has
//! reserved room for the last row since admission. Nothing here knows tokio, pingora or a file.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::core::{NanoUsd, Price, Usage};
use super::row::{Outcome, Row, UsageSource};
use crate::ports::{Clock, Meter};

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

/// Where intents and terminal rows are written before anything depends on them.
pub trait Journal: Send + Sync {
    /// Writes the intent and reserves room for its end. `row` is what will stand if we never come back.
    ///
    /// # Errors
    /// When there is no room for both: the request must be refused.
    fn open(&self, row: &Row) -> Result<Slot, JournalClosed>;

    /// Writes the terminal row into the reserved room.
    ///
    /// # Errors
    /// The row, when the disk failed: it is not durable, so no usage may leave.
    fn close(&self, slot: Slot, row: Row) -> Result<(), Box<Row>>;

    /// Takes a row that the log would not take, for the store alone.
    fn store(&self, row: Row);
}

/// How a request was settled. The record, the span, the log line and the metrics all read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    pub outcome: Outcome,
    pub usage: Usage,
    pub usage_source: UsageSource,
    pub billed: NanoUsd,
    pub provider_cost: NanoUsd,
}

/// What both states carry: the row as it would stand at the bound, and how to end it.
struct Debt {
    row: Row,
    price: Price,
    slot: Slot,
    journal: Arc<dyn Journal>,
    clock: Arc<dyn Clock>,
    receipt: Arc<OnceLock<Receipt>>,
}

impl Debt {
    /// `delivered`: whether any of the answer has left. What nobody got is not charged if its row is in doubt.
    fn end(mut self, outcome: Outcome, used: Used, delivered: bool) -> Result<Receipt, JournalClosed> {
        self.row.ended_ns = self.clock.now_ns().max(self.row.started_ns);
        let receipt = fill(&mut self.row, &self.price, outcome, used);
        match self.journal.close(self.slot, self.row) {
            Ok(()) => {
                let _ = self.receipt.set(receipt);
                Ok(receipt)
            }
            Err(mut row) => {
                let used = if delivered { used } else { Used::NOTHING };
                let _ = self.receipt.set(fill(&mut row, &self.price, Outcome::Failed, used));
                self.journal.store(*row);
                Err(JournalClosed)
            }
        }
    }
}

/// What a settlement is about.
#[derive(Clone, Copy)]
struct Used {
    usage: Usage,
    source: UsageSource,
    compute: Duration,
}

impl Used {
    const NOTHING: Used = Used {
        usage: Usage { input: 0, cache_read: 0, cache_write: 0, output: 0, reasoning: 0 },
        source: UsageSource::Counted,
        compute: Duration::ZERO,
    };
}

fn fill(row: &mut Row, price: &Price, outcome: Outcome, used: Used) -> Receipt {
    row.outcome = outcome;
    row.usage = used.usage;
    row.usage_source = used.source;
    row.billed = price.cost(&used.usage);
    row.provider_cost = price.device_cost(used.compute);
    Receipt {
        outcome,
        usage: used.usage,
        usage_source: used.source,
        billed: row.billed,
        provider_cost: row.provider_cost,
    }
}

/// What a request may use at the most, and who it belongs to.
pub struct Terms {
    /// The row's identity; outcome, usage and money are filled in here.
    pub row: Row,
    pub price: Price,
    pub reservation: Usage,
}

/// Leave to spend up to a reservation. Dropped, it gives everything back.
#[must_use]
pub struct Ticket(Option<Debt>);

impl Ticket {
    /// Writes the intent. `receipt` will hold how it ended, for the request's record.
    ///
    /// # Errors
    /// When the journal has no room for intent and end.
    pub fn admit(
        terms: Terms,
        journal: Arc<dyn Journal>,
        clock: Arc<dyn Clock>,
        receipt: Arc<OnceLock<Receipt>>,
    ) -> Result<Ticket, JournalClosed> {
        let Terms { mut row, price, reservation } = terms;
        // The intent is the row that recovery will let stand if this process is killed.
        row.ended_ns = row.started_ns;
        row.outcome = Outcome::Killed;
        row.usage = reservation;
        row.usage_source = UsageSource::Reserved;
        row.billed = price.cost(&reservation);
        row.provider_cost = NanoUsd(0);
        let slot = journal.open(&row)?;
        Ok(Ticket(Some(Debt { row, price, slot, journal, clock, receipt })))
    }

    /// The most that this request can cost its caller.
    pub fn cost_max(&self) -> NanoUsd {
        self.0.as_ref().map_or(NanoUsd(0), |debt| debt.row.billed)
    }

    /// From here on, tokens may be produced and are owed.
    pub fn start(mut self) -> Running {
        Running { debt: self.0.take(), meter: None }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(debt) = self.0.take() {
            release(debt);
        }
    }
}

fn release(debt: Debt) {
    // A panic before any work still ends as `panicked`, so that the row tells the same story as the log.
    let outcome = if std::thread::panicking() { Outcome::Panicked } else { Outcome::Released };
    // A drop has nobody to tell about a failed disk; the journal itself stops admitting.
    let _ = debt.end(outcome, Used::NOTHING, false);
}

/// Work under way. It must be settled; dropped, it settles itself.
#[must_use]
pub struct Running {
    debt: Option<Debt>,
    meter: Option<Arc<dyn Meter>>,
}

impl Running {
    /// From now on a drop is settled by this count instead of by the reservation.
    pub fn measured_by(mut self, meter: Arc<dyn Meter>) -> Self {
        self.meter = Some(meter);
        self
    }

    /// What is owed if it ends here: the prompt and what was counted, else the reservation.
    pub fn usage_so_far(&self) -> Usage {
        self.debt.as_ref().map_or(Usage::default(), |debt| self.counted(debt).usage)
    }

    fn counted(&self, debt: &Debt) -> Used {
        let reserved = debt.row.usage;
        let (usage, source) = match &self.meter {
            Some(meter) => (Usage { output: meter.produced(), reasoning: 0, ..reserved }, UsageSource::Counted),
            None => (reserved, UsageSource::Reserved),
        };
        Used { usage, source, compute: Duration::ZERO }
    }

    /// Writes the terminal row. Only after this may bytes that carry usage leave. `delivered`: whether any of the answer
    /// has left already.
    ///
    /// # Errors
    /// When the row is not durable: the answer must not pretend that it is.
    pub fn settle(
        mut self,
        outcome: Outcome,
        usage: Usage,
        compute: Duration,
        delivered: bool,
    ) -> Result<Receipt, JournalClosed> {
        let used = Used { usage, source: UsageSource::Counted, compute };
        self.debt.take().map_or(Err(JournalClosed), |debt| debt.end(outcome, used, delivered))
    }

    /// The backend would not take it: nothing was produced, nothing is owed.
    pub fn release(mut self) {
        if let Some(debt) = self.debt.take() {
            release(debt);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some(debt) = self.debt.take() else { return };
        let outcome = if std::thread::panicking() { Outcome::Panicked } else { Outcome::Aborted };
        let used = self.counted(&debt);
        let _ = debt.end(outcome, used, true);
    }
}

#[cfg(test)]
#[path = "settlement_model.rs"]
mod model;
