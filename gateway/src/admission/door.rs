//! A caller at the door: what binds them, and what they have left.

use std::sync::Arc;
use std::time::Duration;

use super::core::rule::{Rule, Subjects};
use super::counts::{Ask, Counts, Grant, Time};
use super::rules::Bound;
use crate::api::limit::Of;
use crate::api::openai::ratelimit::{Quota, Quotas};

/// Proof that a caller may go on to say what they want. Holds their place among the requests at a time, so it lives as long
/// as the request works.
pub struct Door {
    pub(super) counts: Arc<dyn Counts>,
    pub(super) time: Arc<Time>,
    pub(super) subjects: Subjects,
    pub(super) bound: Vec<Bound>,
    /// Given back when this is dropped.
    pub(super) _place: Option<Box<dyn Grant>>,
    /// What the headers tell of.
    pub(super) told: Vec<Ask>,
    pub(super) warning: Option<String>,
    pub(super) waited: Option<Duration>,
    /// Whether only this gateway's part of a shared limit was held to.
    pub(super) is_apart: bool,
}

impl Door {
    /// What the caller has left now.
    pub fn quotas(&self) -> Quotas {
        quotas(&*self.counts, &self.told)
    }

    /// OpenAI's `x-ratelimit-*` headers, a warning where a budget that does not refuse is spent, and how long it took to be
    /// let in, if that was not at once; and whether what gateways count together was out of reach.
    pub fn headers(&self) -> Vec<(&'static str, String)> {
        let warning = self.warning.iter().map(|warning| ("x-glassgate-budget-warning", warning.clone()));
        let waited = self.waited.map(|waited| ("x-glassgate-waited-ms", waited.as_millis().to_string()));
        let is_apart = self.is_apart.then(|| ("x-ratelimit-mode", "local".to_owned()));
        self.quotas().headers().into_iter().chain(warning).chain(waited).chain(is_apart).collect()
    }

    /// Whether a rule that may bind this request wants to know the most that can be, where the most likely is not that.
    pub fn is_strict(&self) -> bool {
        self.bound.iter().any(|bound| bound.rule.strict)
    }

    /// What is asked of every rule that binds the request and fits `which`, of a request that began at `began_ns`.
    pub(super) fn asks(&self, began_ns: i64, which: impl Fn(&Rule) -> Option<u64>) -> Vec<Ask> {
        self.asks_for(&self.subjects, began_ns, which)
    }

    /// As `asks`, for a request of others.
    pub(super) fn asks_for(
        &self,
        subjects: &Subjects,
        began_ns: i64,
        which: impl Fn(&Rule) -> Option<u64>,
    ) -> Vec<Ask> {
        let (now, now_ns) = (self.time.now(), self.time.clock.now_ns());
        let binding = self.bound.iter().filter(|bound| bound.rule.binds(subjects));
        let ask = |bound: &Bound| Some(bound.ask(subjects, which(&bound.rule)?, now, began_ns, now_ns));
        binding.filter_map(ask).collect()
    }
}

/// The limits of requests and of tokens that have the least left.
fn quotas(counts: &dyn Counts, told: &[Ask]) -> Quotas {
    let tightest = |of: Of| {
        let states = told.iter().filter(|ask| ask.rule.of == of).map(|ask| counts.state(ask));
        let state = states.min_by_key(|state| state.remaining);
        // A key's own limits are always among them.
        state.map_or(Quota { limit: 0, remaining: 0, reset: Duration::ZERO }, |state| Quota {
            limit: state.limit,
            remaining: state.remaining,
            reset: state.reset,
        })
    };
    Quotas { requests: tightest(Of::Requests), tokens: tightest(Of::Tokens) }
}
