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
    /// When the disk failed: the row is not durable, so no usage may leave.
    fn close(&self, slot: Slot, row: Row) -> Result<(), JournalClosed>;
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
    fn end(
        mut self,
        outcome: Outcome,
        usage: Usage,
        usage_source: UsageSource,
        compute: Duration,
    ) -> Result<Receipt, JournalClosed> {
        let receipt = Receipt {
            outcome,
            usage,
            usage_source,
            billed: self.price.cost(&usage),
            provider_cost: self.price.device_cost(compute),
        };
        self.row.ended_ns = self.clock.now_ns().max(self.row.started_ns);
        self.row.outcome = outcome;
        self.row.usage = usage;
        self.row.usage_source = usage_source;
        self.row.billed = receipt.billed;
        self.row.provider_cost = receipt.provider_cost;
        // The receipt stands even if the disk failed: the row still reaches the store, only its durability is in doubt.
        let _ = self.receipt.set(receipt);
        self.journal.close(self.slot, self.row).map(|()| receipt)
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
    let _ = debt.end(outcome, Usage::default(), UsageSource::Counted, Duration::ZERO);
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

    /// The most that this request can cost its caller.
    pub fn cost_max(&self) -> NanoUsd {
        self.debt.as_ref().map_or(NanoUsd(0), |debt| debt.row.billed)
    }

    /// Writes the terminal row. Only after this may bytes that carry usage leave.
    ///
    /// # Errors
    /// When the row is not durable: the answer must not pretend that it is.
    pub fn settle(mut self, outcome: Outcome, usage: Usage, compute: Duration) -> Result<Receipt, JournalClosed> {
        match self.debt.take() {
            Some(debt) => debt.end(outcome, usage, UsageSource::Counted, compute),
            None => Err(JournalClosed),
        }
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
        let (usage, source) = match &self.meter {
            Some(meter) => (Usage { output: meter.produced(), reasoning: 0, ..debt.row.usage }, UsageSource::Counted),
            None => (debt.row.usage, UsageSource::Reserved),
        };
        let _ = debt.end(outcome, usage, source, Duration::ZERO);
    }
}

#[cfg(test)]
#[path = "settlement_model.rs"]
mod model;
