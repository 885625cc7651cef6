//! Waiting for a limit instead of being refused by it, where a rule allows that.
//!
//! There is a line for each counter that somebody waits for. Only who is next in it tries, and takes everything at once or
//! nothing: nobody holds a part while they wait. They try again when something came back to a counter, or when the time has
//! passed that they were told.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::core::order::{Order, Place};
use super::core::rule::Subject;
use super::core::{Short, Wait};
use super::counts::{Ask, Counts, Denied, Grant};

/// A counter's name among all.
type Name = (String, Subject);

#[derive(Default)]
pub struct Queue {
    lines: Mutex<HashMap<Name, Arc<Line>>>,
    /// How many lines there are, so that who ends need not look where nobody waits.
    count: AtomicUsize,
}

#[derive(Default)]
struct Line(Mutex<(Order, HashMap<Place, Arc<Notify>>)>);

impl Line {
    /// Wakes who is next: somebody went, or something came back.
    fn call_next(&self) {
        let line = self.0.lock();
        if let Some(call) = line.0.next().and_then(|place| line.1.get(&place)) {
            call.notify_one();
        }
    }
}

/// Why somebody was not let in.
pub struct Refused {
    pub denied: Denied,
    /// How long they waited, if as long as they could.
    pub waited: Option<Duration>,
}

impl Queue {
    /// Takes all that is asked for, waiting as long as the rule allows that has no room.
    ///
    /// # Errors
    /// `Refused`, by a rule for which nobody waits, by one whose line is full, or after its time.
    pub async fn take(
        &self,
        counts: &dyn Counts,
        asks: &[Ask],
        key: &str,
    ) -> Result<(Box<dyn Grant>, Option<Duration>), Refused> {
        let line = self.busy(asks);
        let denied = match line {
            Some(_) => None,
            None => match counts.reserve(asks).await {
                Ok(grant) => return Ok((grant, None)),
                Err(denied) => Some(denied),
            },
        };
        // Who comes after those that wait waits too, although there may be room for them.
        let at = denied.map_or(line.unwrap_or_default(), |denied| denied.ask);
        let refused = |denied, waited| Refused { denied, waited };
        let (began, wait) = (Instant::now(), asks[at].rule.wait);
        if let Some(denied) = denied.filter(|denied| wait.is_zero() || denied.wait() == Wait::Never) {
            return Err(refused(denied, None));
        }
        let Some(waiting) = self.join(&asks[at], key) else {
            // There is no room in the line, and who went past it would go past all that wait there.
            let short = || Short { state: counts.state(&asks[at]), wait: Wait::ForOthers };
            return Err(refused(denied.unwrap_or_else(|| Denied { ask: at, short: Some(short()) }), None));
        };
        let deadline = began + wait;
        loop {
            // Who is not next has nothing to try: they are called.
            let mut retry = deadline;
            let is_over = Instant::now() >= deadline;
            if waiting.is_next() || is_over {
                match counts.reserve(asks).await {
                    Ok(grant) => {
                        waiting.went_in();
                        return Ok((grant, Some(began.elapsed())));
                    }
                    Err(denied) if is_over => return Err(refused(denied, Some(began.elapsed()))),
                    Err(denied) => {
                        if asks[denied.ask].rule.wait.is_zero() || denied.wait() == Wait::Never {
                            return Err(refused(denied, None));
                        }
                        retry = match denied.wait() {
                            Wait::For(wait) => deadline.min(Instant::now() + wait),
                            _ => deadline,
                        };
                    }
                }
            }
            tokio::select! {
                () = waiting.call.notified() => {}
                () = sleep_until(retry) => {}
            }
        }
    }

    /// Something came back to some counter. Who is next in a line may have been waiting for it, also if the line is for
    /// another one.
    pub fn freed(&self) {
        if self.count.load(Ordering::Acquire) > 0 {
            self.lines.lock().values().for_each(|line| line.call_next());
        }
    }

    /// The first of the asks for which others wait.
    fn busy(&self, asks: &[Ask]) -> Option<usize> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let lines = self.lines.lock();
        asks.iter()
            .position(|ask| !ask.rule.wait.is_zero() && lines.contains_key(&(ask.rule.name.clone(), ask.subject)))
    }

    fn join(&self, ask: &Ask, key: &str) -> Option<Waiting<'_>> {
        let name = (ask.rule.name.clone(), ask.subject);
        let mut lines = self.lines.lock();
        let line = lines.entry(name.clone()).or_default().clone();
        let call = Arc::new(Notify::new());
        let place = {
            let mut inner = line.0.lock();
            let place = inner.0.join(key, ask.amount)?;
            inner.1.insert(place, call.clone());
            place
        };
        self.count.store(lines.len(), Ordering::Release);
        Some(Waiting { queue: self, name, line, place, call, went_in: false })
    }
}

/// A place in a line, given up when this is dropped: also by who hangs up.
struct Waiting<'q> {
    queue: &'q Queue,
    name: Name,
    line: Arc<Line>,
    place: Place,
    call: Arc<Notify>,
    went_in: bool,
}

impl Waiting<'_> {
    fn is_next(&self) -> bool {
        self.line.0.lock().0.next() == Some(self.place)
    }

    fn went_in(mut self) {
        self.went_in = true;
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut lines = self.queue.lines.lock();
        let is_empty = {
            let mut inner = self.line.0.lock();
            inner.0.leave(self.place, self.went_in);
            inner.1.remove(&self.place);
            inner.0.is_empty()
        };
        if is_empty {
            lines.remove(&self.name);
            self.queue.count.store(lines.len(), Ordering::Release);
        }
        self.line.call_next();
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
