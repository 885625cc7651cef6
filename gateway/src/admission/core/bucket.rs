//! A bucket that refills evenly, up to one window's worth: a burst of the limit, and the limit a second or a minute.

use std::time::Duration;

use super::{Short, State, Taken, Wait};

/// It takes back what was not used, exactly: it then is as if that had never been taken, so what would have run over
/// meanwhile is gone.
#[derive(Debug, PartialEq, Eq)]
pub struct Bucket {
    limit: u64,
    /// The window in nanoseconds. One of what is counted is as many units, so that every nanosecond refills whole ones.
    one: i128,
    /// In units; below zero is a debt.
    level: i128,
    /// Since when `level` holds.
    at: Duration,
    sequence: i64,
    /// For every open reservation the highest level since it was made: what it left out would have run over above that.
    /// Falling, and shared by neighbours with the same peak, so that there are never more of them than reservations.
    peaks: Vec<Peak>,
    /// What open reservations have taken.
    held: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Peak {
    /// The last reservation that it is about; those after the previous peak's share it.
    through: i64,
    level: i128,
    open: u32,
}

impl Bucket {
    pub fn new(limit: u64, window: Duration, now: Duration) -> Bucket {
        let one = i128::try_from(window.as_nanos()).unwrap_or(i128::MAX).max(1);
        let level = i128::from(limit) * one;
        Bucket { limit, one, level, at: now, sequence: 0, peaks: Vec::new(), held: 0 }
    }

    fn capacity(&self) -> i128 {
        i128::from(self.limit) * self.one
    }

    pub fn window(&self) -> Duration {
        Duration::from_nanos(u64::try_from(self.one).unwrap_or(u64::MAX))
    }

    pub fn state(&self, now: Duration) -> State {
        let level = self.level_at(now);
        let remaining = u64::try_from(level / self.one).unwrap_or(0);
        let gone = self.limit - remaining.min(self.limit);
        let held = self.held.min(gone);
        let reset = self.time_for(self.capacity() - level);
        State { limit: self.limit, used: gone - held, held, remaining, reset }
    }

    /// Another limit: what was used under the old one stays used, at most all of the new one. Debts stay debts.
    pub fn set_limit(&mut self, now: Duration, limit: u64) {
        if limit == self.limit {
            return;
        }
        self.refill(now);
        let change = (i128::from(limit) - i128::from(self.limit)) * self.one;
        self.level = (self.level + change).max(self.level.min(0));
        self.limit = limit;
        for peak in &mut self.peaks {
            peak.level = (peak.level + change).max(self.level);
        }
    }

    /// # Errors
    /// `Short`, and how long the rest takes to refill.
    pub fn check(&self, now: Duration, amount: u64) -> Result<(), Short> {
        let (level, wanted) = (self.level_at(now), i128::from(amount) * self.one);
        if amount == 0 || wanted <= level {
            return Ok(());
        }
        let wait = if wanted > self.capacity() { Wait::Never } else { Wait::For(self.time_for(wanted - level)) };
        Err(Short { state: self.state(now), wait })
    }

    /// Takes all of it, whether or not it is there.
    pub fn take(&mut self, now: Duration, amount: u64) -> Taken {
        self.refill(now);
        self.level -= i128::from(amount) * self.one;
        self.sequence += 1;
        self.held = self.held.saturating_add(amount);
        self.peaks.push(Peak { through: self.sequence, level: self.level, open: 1 });
        Taken { amount, mark: self.sequence, throttled: None }
    }

    /// Keeps what was used and gives back the rest. More than was taken becomes a debt.
    pub fn settle(&mut self, now: Duration, taken: Taken, used: u64) {
        self.refill(now);
        self.held = self.held.saturating_sub(taken.amount);
        let mine = self.peaks.partition_point(|peak| peak.through < taken.mark);
        let Some(peak) = self.peaks.get_mut(mine) else { return };
        peak.open = peak.open.saturating_sub(1);
        let unused = (i128::from(taken.amount) - i128::from(used)) * self.one;
        // Had it not been taken, the bucket would have run over at its peak.
        let back = unused.min(i128::from(self.limit) * self.one - peak.level);
        self.level += back;
        if back > 0 {
            // The levels since then were too low by as much, and so were the peaks that others remember of them.
            for peak in &mut self.peaks[mine..] {
                peak.level += back;
            }
            let level = self.peaks[mine].level;
            let from = self.peaks[..mine].partition_point(|peak| peak.level > level);
            self.merge(from, mine + 1, level);
        } else if self.peaks[mine].open == 0 {
            self.peaks.remove(mine);
        }
    }

    pub fn is_at_rest(&self, now: Duration) -> bool {
        self.peaks.is_empty() && self.level_at(now) == self.capacity()
    }

    fn refill(&mut self, now: Duration) {
        if now < self.at {
            return;
        }
        self.level = self.level_at(now);
        self.at = now;
        let from = self.peaks.partition_point(|peak| peak.level > self.level);
        self.merge(from, self.peaks.len(), self.level);
    }

    /// A clock that runs backwards refills nothing.
    fn level_at(&self, now: Duration) -> i128 {
        let passed = i128::try_from(now.saturating_sub(self.at).as_nanos()).unwrap_or(i128::MAX);
        let refilled = passed.saturating_mul(i128::from(self.limit));
        self.level.saturating_add(refilled).min(self.capacity())
    }

    /// Makes one peak of several, or none if nobody needs it any more.
    fn merge(&mut self, from: usize, to: usize, level: i128) {
        let Some(last) = self.peaks[from..to].last() else { return };
        let through = last.through;
        let open = self.peaks[from..to].iter().map(|peak| peak.open).sum();
        let merged = (open > 0).then_some(Peak { through, level, open });
        self.peaks.splice(from..to, merged);
    }

    /// How long so much takes to refill, rounded up.
    fn time_for(&self, units: i128) -> Duration {
        let nanos = units.max(0).unsigned_abs().div_ceil(u128::from(self.limit.max(1)));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
#[path = "bucket_model.rs"]
mod model;
