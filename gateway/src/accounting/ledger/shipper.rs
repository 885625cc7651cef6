//! The one thread that moves rows from the log to SQLite. A store that is down only makes the queue grow.

use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::{Shared, State, sqlite};

/// Rows in one transaction: large enough to make its cost vanish, small enough to keep the lag low.
pub(super) const BATCH_ROWS: usize = 256;
/// While rows come quickly, a batch has so long to grow: a transaction for every few rows costs more than the rows do.
const GATHER: Duration = Duration::from_millis(20);
const RETRY: Duration = Duration::from_millis(200);

/// Ships until the ledger closes and the queue is empty.
pub(super) fn run(shared: &Shared, mut store: Connection) {
    // A row that comes alone is shipped at once.
    let mut gather_until = Instant::now();
    loop {
        let mut state = shared.lock();
        while state.queue.is_empty() && !state.closing {
            shared.work.wait(&mut state);
        }
        if state.queue.is_empty() {
            report(shared, &state);
            return;
        }
        report(shared, &state);
        while state.queue.len() < BATCH_ROWS && !state.closing {
            if shared.work.wait_until(&mut state, gather_until).timed_out() {
                break;
            }
        }
        let batch: Vec<_> = {
            let count = state.queue.len().min(BATCH_ROWS);
            state.queue.drain(..count).collect()
        };
        state.shipping = batch.first().map(|oldest| (batch.len(), oldest.since));
        report(shared, &state);
        drop(state);

        match sqlite::insert(&mut store, batch.iter().map(|unshipped| &unshipped.row)) {
            Ok(_) => {
                let mut state = shared.lock();
                state.shipping = None;
                if batch.len() > 1 {
                    gather_until = Instant::now() + GATHER;
                }
                for unshipped in &batch {
                    if let Some(segment) = state.segments.get_mut(&unshipped.segment) {
                        segment.unshipped = segment.unshipped.saturating_sub(1);
                    }
                }
                state.delete_shipped();
                shared.metrics.store_up("ledger", true);
                report(shared, &state);
            }
            Err(error) => {
                tracing::error!(%error, rows = batch.len(), "the ledger's store does not take rows; they wait in the log");
                shared.metrics.ledger_failure();
                shared.metrics.store_up("ledger", false);
                let mut state = shared.lock();
                state.shipping = None;
                let giving_up = state.closing;
                for unshipped in batch.into_iter().rev() {
                    state.queue.push_front(unshipped);
                }
                report(shared, &state);
                if giving_up {
                    // The log keeps them; the next start ships them.
                    return;
                }
                shared.work.wait_for(&mut state, RETRY);
            }
        }
    }
}

fn report(shared: &Shared, state: &State) {
    let oldest = state.shipping.map(|(_, since)| since).or_else(|| state.queue.front().map(|oldest| oldest.since));
    let rows = state.queue.len() + state.shipping.map_or(0, |(rows, _)| rows);
    shared.metrics.ledger(rows, state.total_bytes(), oldest.map_or(Duration::ZERO, |since| since.elapsed()));
}
