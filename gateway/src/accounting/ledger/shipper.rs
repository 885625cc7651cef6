//! The one thread that writes to SQLite: rows of the log, and judgements. A store that is down only makes the queue grow.

use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::super::feedback::{Change, Judgement, Verdict};
use super::{Shared, Unshipped, sqlite};
use crate::observe::metrics::{Judged, Metrics};

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
            return;
        }
        while state.queue.len() < BATCH_ROWS && !state.closing {
            if shared.work.wait_until(&mut state, gather_until).timed_out() {
                break;
            }
        }
        let count = state.queue.len().min(BATCH_ROWS);
        let mut batch: Vec<_> = state.queue.drain(..count).collect();
        state.judgements -= batch.iter().filter_map(Unshipped::judgement).count();
        batch.retain(|unshipped| !unshipped.is_forsaken());
        let rows = || batch.iter().filter_map(Unshipped::row);
        state.shipping = rows().next().map(|(_, _, since)| (rows().count(), since));
        drop(state);

        let judgements = batch.iter().filter_map(Unshipped::judgement);
        match sqlite::ship(&mut store, rows().map(|(_, row, _)| row), judgements) {
            Ok(verdicts) => {
                let mut state = shared.lock();
                state.shipping = None;
                if batch.len() > 1 {
                    gather_until = Instant::now() + GATHER;
                }
                for (segment, _, _) in rows() {
                    if let Some(segment) = state.segments.get_mut(&segment) {
                        segment.unshipped = segment.unshipped.saturating_sub(1);
                    }
                }
                state.delete_shipped();
                shared.metrics.store_up("ledger", true);
                drop(state);
                tell(&shared.metrics, batch, verdicts);
            }
            Err(error) => {
                let (rows, judgements) = (rows().count(), batch.len() - rows().count());
                tracing::error!(%error, rows, judgements, "the ledger's store cannot be written; rows wait in the log, judgements in memory");
                shared.metrics.ledger_failure();
                shared.metrics.store_up("ledger", false);
                let mut state = shared.lock();
                state.shipping = None;
                let giving_up = state.closing;
                state.judgements += judgements;
                for unshipped in batch.into_iter().rev() {
                    state.queue.push_front(unshipped);
                }
                if giving_up {
                    // The log keeps them; the next start ships them.
                    return;
                }
                shared.work.wait_for(&mut state, RETRY);
            }
        }
    }
}

/// Counts what was said of answers, and says so to whoever said it.
fn tell(metrics: &Metrics, batch: Vec<Unshipped>, verdicts: Vec<Verdict>) {
    let judgements = batch.into_iter().filter_map(|unshipped| match unshipped {
        Unshipped::Row { .. } => None,
        Unshipped::Judgement { judgement, reply } => Some((judgement, reply)),
    });
    for ((judgement, reply), verdict) in judgements.zip(verdicts) {
        count(metrics, &judgement, &verdict);
        // Whoever left has no need to know.
        let _ = reply.send(verdict);
    }
}

fn count(metrics: &Metrics, judgement: &Judgement, verdict: &Verdict) {
    let Verdict::Taken { answered, change } = verdict else { return };
    let by = Judged { tenant: &judgement.tenant, route: &answered.route, variant: &answered.variant };
    if let Change::Revised(old) = change {
        metrics.feedback_revised(by, &judgement.name, old);
    }
    if matches!(change, Change::Created | Change::Revised(_)) {
        metrics.feedback(by, &judgement.name, &judgement.score);
    }
}
