//! The one thread that moves rows from the log to SQLite. A store that is down only makes the queue grow.

use std::time::Duration;

use rusqlite::Connection;

use super::{Shared, State, sqlite};

/// Rows in one transaction: large enough to make its cost vanish, small enough to keep the lag low.
const BATCH_ROWS: usize = 256;
const RETRY: Duration = Duration::from_millis(200);

/// Ships until the ledger closes and the queue is empty.
pub(super) fn run(shared: &Shared, mut store: Connection) {
    loop {
        let mut state = shared.lock();
        while state.queue.is_empty() && !state.closing {
            shared.work.wait(&mut state);
        }
        if state.queue.is_empty() {
            report(shared, &state);
            return;
        }
        let batch: Vec<_> = {
            let count = state.queue.len().min(BATCH_ROWS);
            state.queue.drain(..count).collect()
        };
        report(shared, &state);
        drop(state);

        match sqlite::insert(&mut store, batch.iter().map(|unshipped| &unshipped.row)) {
            Ok(_) => {
                let mut state = shared.lock();
                for unshipped in &batch {
                    if let Some(segment) = state.segments.get_mut(&unshipped.segment) {
                        segment.unshipped = segment.unshipped.saturating_sub(1);
                    }
                }
                delete_shipped(&mut state);
                shared.metrics.store_up("ledger", true);
                report(shared, &state);
            }
            Err(error) => {
                tracing::error!(%error, rows = batch.len(), "the ledger's store does not take rows; they wait in the log");
                shared.metrics.ledger_failure();
                shared.metrics.store_up("ledger", false);
                let mut state = shared.lock();
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

/// Deletes segments that hold nothing that is not in the store. The current one stays.
fn delete_shipped(state: &mut State) {
    let Some(current) = state.current() else {
        return;
    };
    state.segments.retain(|number, segment| {
        let done = *number != current && segment.open == 0 && segment.unshipped == 0;
        if done && let Err(error) = std::fs::remove_file(&segment.path) {
            tracing::warn!(%error, path = %segment.path.display(), "a shipped segment could not be deleted");
        }
        !done
    });
}

fn report(shared: &Shared, state: &State) {
    let lag = state.queue.front().map_or(Duration::ZERO, |oldest| oldest.since.elapsed());
    shared.metrics.ledger(state.queue.len(), state.total_bytes(), lag);
}
