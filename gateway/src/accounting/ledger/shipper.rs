//! The one thread that writes to the store: rows of the log, and judgements. A store that is down only makes the queue
//! grow. What the log holds is removed when the store has it for good.

use std::time::{Duration, Instant};

use super::super::feedback::{Change, Judgement, Verdict};
use super::super::row::{Outcome, Row};
use super::store::months::Month;
use super::store::{Fate, Opener, Store, StoreError};
use super::{NO_COUNT, Shared, State, Unshipped};
use crate::observe::metrics::{Judged, Metrics};
use crate::ports::{Clock as _, SystemClock};

/// Rows in one transaction: large enough to make its cost vanish, small enough to keep the lag low.
pub(super) const BATCH_ROWS: usize = 1024;
/// While rows come quickly, a batch has so long to grow: a transaction for every few rows costs more than the rows do.
const GATHER: Duration = Duration::from_millis(50);
const RETRY: Duration = Duration::from_millis(200);

/// How often it is looked for months that need not be kept, and how long others have between two steps of letting go.
const TIDY_EVERY: Duration = Duration::from_secs(3600);
const TIDY_PAUSE: Duration = Duration::from_millis(50);

/// Ships until the ledger closes and the queue is empty, or the store is down then. `retain`: so many months are kept, if
/// not all.
pub(super) fn run(shared: &Shared, opener: &Opener, retain: Option<u32>) {
    ship_all(shared, opener, retain);
    // The log keeps rows for the next start. Nothing keeps judgements: whoever waits for a verdict hears that there is none.
    let mut state = shared.lock();
    state.queue.retain(|unshipped| unshipped.row().is_some());
    state.judgements = 0;
}

fn ship_all(shared: &Shared, opener: &Opener, retain: Option<u32>) {
    let Some(mut store) = connect(shared, opener) else { return };
    let mut tidy_at = retain.map(|_| Instant::now());
    // A row that comes alone is shipped at once.
    let mut gather_until = Instant::now();
    loop {
        let mut state = shared.lock();
        while !state.has_work() && !state.closing {
            match tidy_at {
                None => shared.work.wait(&mut state),
                Some(at) if shared.work.wait_until(&mut state, at).timed_out() => break,
                Some(_) => {}
            }
        }
        let (has_work, closing) = (state.has_work(), state.closing);
        if !has_work {
            drop(state);
            if closing {
                return;
            }
            tidy_at = tidy(&mut *store, retain);
            continue;
        }
        while (1..BATCH_ROWS).contains(&state.queue.len()) && !state.closing && !state.is_recovering() {
            if shared.work.wait_until(&mut state, gather_until).timed_out() {
                break;
            }
        }
        drop(state);
        let many = match step(shared, &mut *store) {
            Ok(shipped) => shipped > 1,
            Err(error) if !fell(shared, &error) => return,
            Err(_) => false,
        };
        if many {
            gather_until = Instant::now() + GATHER;
        }
        // Also where there is always something to ship.
        if tidy_at.is_some_and(|at| at <= Instant::now()) {
            tidy_at = tidy(&mut *store, retain);
        }
    }
}

/// Lets go of what need not be kept. Gives when to do so again.
fn tidy(store: &mut dyn Store, retain: Option<u32>) -> Option<Instant> {
    let months = retain?;
    let let_go = |store: &mut dyn Store| {
        // Whichever is earlier: a clock that is ahead must not cost anybody their rows.
        let now = Month::at(SystemClock.now_ns()).into_iter().chain(store.latest()?).min();
        now.map_or(Ok(false), |now| store.keep_from(now.before(months - 1)))
    };
    let pause = match let_go(store) {
        Ok(true) => TIDY_PAUSE,
        Ok(false) => TIDY_EVERY,
        Err(error) => {
            tracing::warn!(%error, "months that need not be kept cannot be dropped now");
            TIDY_EVERY
        }
    };
    Some(Instant::now() + pause)
}

/// Opens the store, however long that takes; `None` if the ledger closes before.
fn connect(shared: &Shared, opener: &Opener) -> Option<Box<dyn Store>> {
    loop {
        match opener() {
            Ok(store) => return Some(store),
            Err(error) if !fell(shared, &error) => return None,
            Err(_) => {}
        }
    }
}

/// The store is down: says so and waits. False if there is no time to: the log keeps the rows, and the next start ships
/// them.
fn fell(shared: &Shared, error: &StoreError) -> bool {
    shared.metrics.ledger_failure();
    shared.metrics.store_up("ledger", false);
    let mut state = shared.lock();
    let (rows, judgements) = (state.queue.len() - state.judgements, state.judgements);
    let why = error.to_string();
    // Once for each cause: it may be away for hours.
    if state.down.as_ref() != Some(&why) {
        tracing::error!(%error, rows, judgements, "the ledger's store cannot be written; rows wait in the log, judgements in memory");
    }
    state.down = Some(why);
    shared.recovered.notify_all();
    if state.closing {
        return false;
    }
    shared.work.wait_for(&mut state, RETRY);
    true
}

/// Ships one batch, if there is any, and removes what the log need not hold any longer. Gives how much was shipped.
///
/// # Errors
/// When the store does not take it. Then everything is as it was.
pub(super) fn step(shared: &Shared, store: &mut dyn Store) -> Result<usize, StoreError> {
    // Before the first living row is shipped, and after the last one that was recovered.
    conclude(shared, store)?;
    let shipped = ship(shared, store)?;
    conclude(shared, store)?;
    retire(shared, store)?;
    Ok(shipped)
}

fn ship(shared: &Shared, store: &mut dyn Store) -> Result<usize, StoreError> {
    let mut state = shared.lock();
    // What was recovered is counted apart from what comes after it.
    let most = if state.is_recovering() { state.recovering } else { state.queue.len() };
    let count = most.min(BATCH_ROWS).min(state.queue.len());
    if count == 0 {
        return Ok(0);
    }
    let mut batch: Vec<_> = state.queue.drain(..count).collect();
    state.judgements -= batch.iter().filter_map(Unshipped::judgement).count();
    let taken = batch.len();
    batch.retain(|unshipped| !unshipped.is_forsaken());
    let waits = batch.iter().filter_map(Unshipped::row).map(|(_, _, since)| since);
    state.shipping = waits.clone().next().map(|since| (waits.count(), since));
    drop(state);

    let rows: Vec<&Row> = batch.iter().filter_map(Unshipped::row).map(|(_, row, _)| row).collect();
    let judgements: Vec<&Judgement> = batch.iter().filter_map(Unshipped::judgement).collect();
    let outcome = store.ship(&rows, &judgements);
    let mut state = shared.lock();
    state.shipping = None;
    let shipped = match outcome {
        Ok(shipped) => shipped,
        Err(error) => {
            state.judgements += judgements.len();
            for unshipped in batch.into_iter().rev() {
                state.queue.push_front(unshipped);
            }
            return Err(error);
        }
    };
    for (segment, _, _) in batch.iter().filter_map(Unshipped::row) {
        if let Some(segment) = state.log.segment(segment) {
            segment.unshipped = segment.unshipped.saturating_sub(1);
        }
    }
    if state.down.take().is_some() {
        tracing::info!("the ledger's store is back");
    }
    let broken = state.log.is_broken();
    if state.is_recovering() {
        state.recovering -= taken;
        batch.iter().zip(&shipped.fates).for_each(|(unshipped, fate)| state.note(unshipped, *fate));
    }
    drop(state);
    shared.metrics.store_up("ledger", true);
    tell(&shared.metrics, batch, shipped.verdicts);
    if broken && store.counts()?.is_none_or(|(count, _)| count != NO_COUNT) {
        // What is shipped now the log does not hold, or holds otherwise: it is no witness any more.
        store.count_from(NO_COUNT)?;
    }
    Ok(taken)
}

impl State {
    /// What became of a row of the last life.
    fn note(&mut self, unshipped: &Unshipped, fate: Fate) {
        let Unshipped::Row { row, is_cut_off, .. } = unshipped else { return };
        match fate {
            Fate::New if row.outcome == Outcome::Killed => self.recovery.killed.push(row.request_id.clone()),
            Fate::New => self.recovery.shipped += 1,
            Fate::There => {}
            // The store has its end, which was in a segment that is gone.
            Fate::Different if *is_cut_off => {}
            Fate::Different => self.recovery.different.push(row.request_id.clone()),
        }
        if *is_cut_off && fate != Fate::Different {
            self.cut_off.add(row);
        }
    }
}

/// Once all that was recovered is in the store, the log counts it, and both agree on what they count from.
fn conclude(shared: &Shared, store: &mut dyn Store) -> Result<(), StoreError> {
    let state = shared.lock();
    if state.is_concluded || state.is_recovering() {
        return Ok(());
    }
    let (epoch, same) = (state.log.epoch, state.recovery.different.is_empty());
    // Living rows are not in the store yet.
    let counted = state.counted_before.plus(&state.cut_off);
    let is_cut_off = state.cut_off.rows > 0;
    drop(state);
    if is_cut_off {
        // The log is about to say that they have their end.
        store.sync()?;
    }
    let before = store.counts()?;
    let belongs = before.is_none_or(|(before, _)| before == epoch || before == NO_COUNT) || epoch == shared.epoch;
    let lost_end = before.is_some_and(|(before, here)| before == epoch && here.rows > counted.rows);
    let goes_on = same && !lost_end && before.is_some_and(|(before, _)| before == epoch);
    if !goes_on {
        // What was cut off is counted once: until the log says for good that it was, nobody counts.
        store.count_from(if is_cut_off { NO_COUNT } else { shared.epoch })?;
    }
    if !belongs {
        tracing::error!("the ledger's log and its store do not belong together: one of them was replaced");
        shared.metrics.ledger_failure();
    }
    let mut state = shared.lock();
    state.recovery.lost_end = lost_end;
    let State { log, cut_off, counted_before, began_at, .. } = &mut *state;
    log.ended_below = *began_at;
    log.sums = match goes_on {
        true => log.sums.plus(cut_off),
        // The store had all of the last life when this count began.
        false => log.sums.since(&std::mem::take(counted_before)),
    };
    log.epoch = if goes_on { epoch } else { shared.epoch };
    if let Err(error) = log.recount() {
        // Without it the next start would count what was recovered again.
        log.break_off();
        shared.failed(&error);
    }
    if !goes_on && is_cut_off {
        drop(state);
        if shared.sync() {
            store.count_from(shared.epoch)?;
        }
        state = shared.lock();
    }
    state.is_concluded = true;
    state.down = None;
    shared.recovered.notify_all();
    Ok(())
}

/// Removes segments that the store holds for good: first the store is made to, then the log says that they go.
fn retire(shared: &Shared, store: &mut dyn Store) -> Result<(), StoreError> {
    let (concluded, shipped) = {
        let state = shared.lock();
        (state.is_concluded, state.log.retirable())
    };
    if shipped.is_empty() || !concluded {
        return Ok(());
    }
    store.sync()?;
    let mut state = shared.lock();
    // Meanwhile another may be shipped, and there may be no room left to say that these go.
    let gone: Vec<u64> = state.log.retirable().into_iter().filter(|number| shipped.contains(number)).collect();
    if gone.is_empty() {
        return Ok(());
    }
    if let Err(error) = state.log.part_with(&gone) {
        shared.failed(&error);
        return Ok(());
    }
    drop(state);
    if shared.sync() {
        shared.lock().log.remove(&gone);
    }
    Ok(())
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
