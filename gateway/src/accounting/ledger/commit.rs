//! Group commit: one sync makes durable whatever was written until it began, for everybody who waits.

use std::time::{Duration, Instant};

use super::Shared;

/// So much written makes a sync worth its while at once; less waits for others to come along.
const GATHER_BYTES: u64 = 64 << 10;

/// How far the log has come.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Progress {
    /// Records below this survive a power cut, if anybody waits for them.
    pub(super) durable: u64,
    /// No more will.
    pub(super) broken: bool,
}

impl Shared {
    /// Makes all that was written until now survive a power cut. A disk that fails at this is not asked again: it may have
    /// forgotten what it failed at.
    pub(super) fn sync(&self) -> bool {
        let _one_at_a_time = self.syncing.lock();
        let sync = {
            let mut state = self.lock();
            if state.log.is_broken() {
                return false;
            }
            state.log.begin_sync()
        };
        let synced = sync.files.iter().try_for_each(|file| file.sync());
        let synced = synced.and_then(|()| if sync.folder { self.disk.sync_folder() } else { Ok(()) });
        let mut state = self.lock();
        match &synced {
            Ok(()) => state.log.end_sync(&sync),
            Err(error) => {
                state.log.break_off();
                self.failed(error);
            }
        }
        self.progress.send_modify(|progress| progress.durable = state.log.durable());
        synced.is_ok()
    }
}

/// Syncs for whoever waits, until the ledger closes. `every`: how long the first of them waits for others.
pub(super) fn run(shared: &Shared, every: Duration) {
    loop {
        let mut state = shared.lock();
        while state.log.waiting().is_none() && !state.closing {
            shared.waiting.wait(&mut state);
        }
        let deadline = Instant::now() + every;
        while state.log.waiting().is_some_and(|bytes| bytes < GATHER_BYTES) && !state.closing {
            if shared.waiting.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        if state.log.waiting().is_none() {
            if state.closing {
                return;
            }
            continue;
        }
        drop(state);
        shared.sync();
    }
}
