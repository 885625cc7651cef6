//! Which limits bind a caller, how each stands, and which says no first.

use std::sync::Arc;
use std::time::Duration;

use super::core::State;
use super::core::rule::{Mode, Rule, Subjects};
use super::counts::Ask;
use super::rules::Bound;
use super::{Admission, told};
use crate::api::limit::{Dimension, Only};
use crate::config::Limits;

/// A rule that binds, or may.
pub struct Standing {
    pub bound: Bound,
    /// `None` while it depends on what was not said.
    pub state: Option<State>,
    /// What it depends on.
    pub needs: Vec<Dimension>,
    /// When all of it is there again, in Unix nanoseconds, for what is used up.
    pub resets_ns: Option<i64>,
}

pub struct Explained {
    pub standings: Vec<Standing>,
    /// The rule that refuses a request now that costs anything at all, and when to come back, if ever.
    pub refuses: Option<(String, Option<Duration>)>,
    /// Of those that can refuse, the rule with the least left of its limit.
    pub nearest: Option<String>,
}

impl Admission {
    /// Looks, and takes nothing.
    pub fn explain(&self, subjects: &Subjects, limits: &Limits, rules: &[Arc<Rule>]) -> Explained {
        let (now, now_ns) = (self.watch.time.now(), self.watch.time.clock.now_ns());
        let mut standings = Vec::new();
        let mut asks: Vec<Ask> = Vec::new();
        let defaults = self.defaults.load();
        for bound in defaults.with(limits, rules).filter(|bound| may_bind(&bound.rule, subjects)) {
            let needs = needs(&bound.rule, subjects);
            let ask = needs.is_empty().then(|| bound.ask(subjects, 1, now, now_ns, now_ns));
            let state = ask.as_ref().map(|ask| self.counts.state(ask));
            let in_ns = |state: State| i64::try_from(state.reset.as_nanos()).unwrap_or(i64::MAX);
            let resets_ns = state.filter(|_| bound.rule.per.is_some()).map(|state| now_ns.saturating_add(in_ns(state)));
            asks.extend(ask);
            standings.push(Standing { bound, state, needs, resets_ns });
        }
        let denied = self.counts.peek(&asks).err();
        let left = |standing: &&Standing| {
            standing.state.map_or(f64::MAX, |state| state.remaining as f64 / state.limit.max(1) as f64)
        };
        let can_refuse = |standing: &&Standing| standing.state.is_some() && standing.bound.rule.mode != Mode::Soft;
        let nearest = standings.iter().filter(can_refuse).min_by(|a, b| left(a).total_cmp(&left(b)));
        Explained {
            refuses: denied.map(|denied| (asks[denied.ask].rule.name.clone(), told(denied.wait()))),
            nearest: nearest.map(|standing| standing.bound.rule.name.clone()),
            standings,
        }
    }
}

fn is_unknown(dimension: Dimension, subjects: &Subjects) -> bool {
    match dimension {
        Dimension::Route => subjects.route.is_none(),
        Dimension::Model => subjects.model.is_none(),
        Dimension::Ip => subjects.ip.is_none(),
        // Who says no user is one with all who say none.
        Dimension::Key | Dimension::Tenant | Dimension::User => false,
    }
}

fn needs(rule: &Rule, subjects: &Subjects) -> Vec<Dimension> {
    let only = rule.only.iter().filter_map(|(only, _)| match only {
        Only::By(dimension) => Some(*dimension),
        Only::Tag | Only::Tier => None,
    });
    let mut needs: Vec<Dimension> =
        rule.by.iter().copied().chain(only).filter(|dimension| is_unknown(*dimension, subjects)).collect();
    needs.sort_unstable();
    needs.dedup();
    needs
}

/// Whether nothing that is known keeps the rule from being about this caller.
fn may_bind(rule: &Rule, subjects: &Subjects) -> bool {
    let is_known = |only: &Only| !matches!(only, Only::By(dimension) if is_unknown(*dimension, subjects));
    let only = rule.only.iter().filter(|(only, _)| is_known(only)).cloned().collect();
    Rule { only, ..rule.clone() }.binds(subjects)
}
