//! What the ledger knows before anybody is served: what the last life left, and what was spent of budgets. A file of our own
//! must say so; a database that is down when we start is asked again until it does, and serving does not wait for it.

use std::sync::Arc;
use std::time::Duration;

use crate::accounting::ledger::store::{Database, StoreError};
use crate::accounting::ledger::{Ledger, Recovery};
use crate::admission::before::Before;
use crate::admission::rules::Defaults;
use crate::auth::directory::Directory;
use crate::observe::metrics::Metrics;

/// How long a start waits for what the last life left to be in the store.
const RECOVERY_PATIENCE: Duration = Duration::from_secs(30);
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// What is asked of the ledger.
pub(super) struct Beginning {
    pub(super) ledger: Arc<Ledger>,
    pub(super) store: Database,
    /// The limits of every key.
    pub(super) defaults: Defaults,
    pub(super) directory: Directory,
    pub(super) now_ns: i64,
    pub(super) metrics: Arc<Metrics>,
}

/// A beginning that the database has yet to tell of.
pub(super) struct Late(Beginning);

impl Beginning {
    /// What was spent before, or who finds it out later.
    ///
    /// # Errors
    /// Why a file of our own does not tell.
    pub(super) fn read(self) -> Result<(Before, Option<Late>), String> {
        let is_shared = matches!(self.store, Database::Postgres(_));
        if is_shared && !(self.ledger.is_reached(RECOVERY_PATIENCE) && self.directory.is_known()) {
            tracing::error!(
                "the database cannot be reached; until it is, budgets do not know what was spent before this start"
            );
            return Ok((Before::default(), Some(Late(self))));
        }
        let recovery = self.ledger.recovered(RECOVERY_PATIENCE).map_err(|why| format!("the ledger's store: {why}"))?;
        tell(&recovery, &self.metrics);
        // After the recovery: a request that was cut off by a kill counts at its bound.
        Ok((self.spent(i64::MAX).map_err(|why| format!("the ledger's store: {why}"))?, None))
    }

    fn spent(&self, past_ns: i64) -> Result<Before, StoreError> {
        let books = self.store.books()?;
        let (rules, callers) = (self.directory.rules(), self.directory.callers());
        let rules = self.defaults.iter().chain(&*rules).map(AsRef::as_ref);
        let log = self.ledger.log();
        Before::read(rules, self.now_ns, &callers, |since, of_all| {
            books.spent_between(since, past_ns, (!of_all).then_some(log))
        })
    }
}

impl Late {
    /// Waits for the database in a thread of its own, and adds what was spent to what was counted since.
    ///
    /// # Errors
    /// When there can be no thread.
    pub(super) fn catch_up(self, remember: impl Fn(Arc<Before>) + Send + 'static) -> std::io::Result<()> {
        let wait = move || {
            let Late(beginning) = self;
            let Some(recovery) = beginning.ledger.recovered_some_time() else { return };
            tell(&recovery, &beginning.metrics);
            // Whose it was, and what counts it, is in the same database.
            while !beginning.directory.is_known() {
                std::thread::sleep(ASK_AGAIN);
            }
            loop {
                // What began since is counted already.
                match beginning.spent(beginning.now_ns) {
                    Ok(before) => {
                        remember(Arc::new(before));
                        tracing::info!("the database is back; budgets know what was spent before this start");
                        return;
                    }
                    Err(error) => tracing::warn!(%error, "what was spent before this start is not known yet"),
                }
                std::thread::sleep(ASK_AGAIN);
            }
        };
        std::thread::Builder::new().name("ledger-late".to_owned()).spawn(wait).map(drop)
    }
}

/// What the last life left, for the operator.
fn tell(found: &Recovery, metrics: &Metrics) {
    metrics.ledger_recovered("settled", found.shipped);
    metrics.ledger_recovered("killed", found.killed.len());
    if found.shipped + found.killed.len() > 0 {
        tracing::warn!(settled = found.shipped, killed = ?found.killed, "the last life ended without a goodbye; its rows are recovered");
    }
    if found.damaged_bytes > 0 {
        tracing::error!(
            bytes = found.damaged_bytes,
            "the ledger's log was damaged; its files are kept as wal/*.damaged"
        );
    }
    if !found.missing.is_empty() {
        tracing::error!(segments = ?found.missing, "segments of the ledger's log, or their ends, are missing; rows that were only there are lost");
    }
    if !found.different.is_empty() {
        tracing::error!(requests = ?found.different, "the ledger's store says otherwise than its log; the store's rows stand");
    }
    if found.lost_end {
        tracing::error!("the ledger's log has lost its end, as in a power cut; what the store has of it stands");
    }
    if found.is_alarming() {
        metrics.ledger_failure();
    }
}
