//! What settlement writes, into the log and on to the store.

use std::pin::Pin;
use std::time::Duration;

use super::super::row::Row;
use super::super::settlement::{Durability, Held, Journal, JournalClosed, Slot};
use super::log::Refused;
use super::{Ledger, Shared};

/// A disk that takes longer to confirm a row leaves it in doubt.
const SYNC_PATIENCE: Duration = Duration::from_secs(10);
/// Where rows are that the log would not take.
const NOWHERE: u64 = u64::MAX;

impl Journal for Shared {
    fn open(&self, row: &Row) -> Result<Slot, JournalClosed> {
        let mut state = self.lock();
        if state.closing {
            return Err(JournalClosed);
        }
        let opened = state.log.open(row);
        // A new segment may have made room to let old ones go.
        if state.log.has_retirable() {
            self.work.notify_one();
        }
        match opened {
            Ok(slot) => Ok(slot),
            Err(Refused::Full) => Err(JournalClosed),
            Err(Refused::Failed(error)) if state.log.is_broken() => {
                self.failed(&error);
                Err(JournalClosed)
            }
            Err(Refused::Failed(error)) => {
                self.metrics.ledger_failure();
                tracing::error!(%error, "the ledger cannot claim disk space; new requests are refused");
                Err(JournalClosed)
            }
        }
    }

    fn close(&self, slot: Slot, row: Row, durability: Durability) -> Result<Option<Box<Held>>, Box<Row>> {
        let mut state = self.lock();
        let was_broken = state.log.is_broken();
        let waits = durability == Durability::Power;
        match state.log.close(&slot, &row, waits) {
            Ok(place) if waits => {
                self.waiting.notify_one();
                Ok(Some(Box::new(Held { segment: place.segment, sequence: place.sequence, row })))
            }
            Ok(place) => {
                state.enqueue_row(place.segment, row, &self.work);
                Ok(None)
            }
            Err(error) => {
                if !was_broken {
                    self.failed(&error);
                }
                Err(Box::new(row))
            }
        }
    }

    fn durable(&self, sequence: u64) -> Pin<Box<dyn Future<Output = bool> + Send>> {
        let mut progress = self.progress.subscribe();
        Box::pin(async move {
            let known = progress.wait_for(|progress| progress.durable > sequence || progress.broken);
            let known = tokio::time::timeout(SYNC_PATIENCE, known).await;
            known.is_ok_and(|known| known.is_ok_and(|progress| progress.durable > sequence))
        })
    }

    fn ship(&self, held: Held) {
        self.lock().enqueue_row(held.segment, held.row, &self.work);
    }

    fn amend(&self, written: Option<Held>, row: Row) {
        let mut state = self.lock();
        let segment = state.log.amend(written.as_ref(), &row).unwrap_or_else(|error| {
            // The store is the only one to know, if it gets to.
            state.log.break_off();
            self.failed(&error);
            written.map_or(NOWHERE, |held| held.segment)
        });
        state.enqueue_row(segment, row, &self.work);
    }
}

impl Journal for Ledger {
    fn open(&self, row: &Row) -> Result<Slot, JournalClosed> {
        self.shared.open(row)
    }

    fn close(&self, slot: Slot, row: Row, durability: Durability) -> Result<Option<Box<Held>>, Box<Row>> {
        self.shared.close(slot, row, durability)
    }

    fn durable(&self, sequence: u64) -> Pin<Box<dyn Future<Output = bool> + Send>> {
        self.shared.durable(sequence)
    }

    fn ship(&self, held: Held) {
        self.shared.ship(held);
    }

    fn amend(&self, written: Option<Held>, row: Row) {
        self.shared.amend(written, row);
    }
}
