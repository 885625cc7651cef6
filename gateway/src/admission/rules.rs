//! Which rules bind a request, and what it asks of each.

use std::sync::Arc;
use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};

use super::core::calendar::Period;
use super::core::rule::{Mode, Rule, Sharing, Subjects};
use super::core::set::Moment;
use super::counts::Ask;
use crate::api::limit::{Dimension, Of, Per};
use crate::config::Limits;

/// The rules that `[limits]` writes as four numbers; each key may have others.
pub struct Defaults([Arc<Rule>; 4]);

/// The names of these rules, which are their keys in the file.
pub const DEFAULTS: [&str; 4] = ["concurrency", "requests_per_minute", "tokens_per_minute", "usd_per_day"];

/// A rule that may bind a request, with the limit that counts for its caller.
#[derive(Clone, Debug)]
pub struct Bound {
    pub rule: Arc<Rule>,
    pub limit: u64,
}

impl Default for Defaults {
    fn default() -> Self {
        Defaults::new(None)
    }
}

impl Defaults {
    pub fn new(shared: Option<Sharing>) -> Defaults {
        let by_key = |name: &str, of, per| {
            Arc::new(Rule {
                name: name.to_owned(),
                limit: 0,
                of,
                per,
                by: vec![Dimension::Key],
                only: Vec::new(),
                zone: TimeZone::UTC,
                mode: Mode::Hard,
                exact: false,
                strict: false,
                wait: Duration::ZERO,
                shared,
            })
        };
        Defaults([
            by_key(DEFAULTS[0], Of::Concurrency, None),
            by_key(DEFAULTS[1], Of::Requests, Some(Per::Minute)),
            by_key(DEFAULTS[2], Of::Tokens, Some(Per::Minute)),
            by_key(DEFAULTS[3], Of::Usd, Some(Per::Day)),
        ])
    }

    /// The four with a caller's limits, then the file's own.
    pub fn with<'r>(&'r self, limits: &Limits, rules: &'r [Arc<Rule>]) -> impl Iterator<Item = Bound> + 'r {
        let of_caller = [
            u64::from(limits.concurrency),
            u64::from(limits.requests_per_minute),
            u64::from(limits.tokens_per_minute),
            limits.per_day.0,
        ];
        let defaults = self.0.iter().zip(of_caller).map(|(rule, limit)| Bound { rule: rule.clone(), limit });
        defaults.chain(rules.iter().map(|rule| Bound { rule: rule.clone(), limit: rule.limit }))
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Rule>> {
        self.0.iter()
    }

    /// The rule of money a day, of which operators see how much is used.
    pub fn per_day(&self) -> &Arc<Rule> {
        &self.0[3]
    }
}

/// The day or month of a moment in a rule's time zone; all of time for what follows no calendar.
pub fn period(rule: &Rule, now_ns: i64) -> Period {
    let always = Period { start_ns: i64::MIN, end_ns: i64::MAX, now_ns };
    match rule.per.filter(|per| per.is_calendar()) {
        Some(per) => {
            bounds(per, &rule.zone, now_ns).map_or(always, |(start_ns, end_ns)| Period { start_ns, end_ns, now_ns })
        }
        None => always,
    }
}

/// Where a day or a month of a zone begins and ends. A day that a change of clocks makes longer or shorter is one all the
/// same. `None` where the calendar ends, in the year 9999.
fn bounds(per: Per, zone: &TimeZone, now_ns: i64) -> Option<(i64, i64)> {
    let now = Timestamp::from_nanosecond(i128::from(now_ns)).ok()?.to_zoned(zone.clone());
    let first = match per {
        Per::Month => now.first_of_month().ok()?,
        _ => now,
    };
    let start = first.start_of_day().ok()?;
    let next = match per {
        Per::Month => start.checked_add(jiff::Span::new().months(1)).ok()?,
        _ => start.checked_add(jiff::Span::new().days(1)).ok()?,
    };
    let ns = |at: &Zoned| i64::try_from(at.timestamp().as_nanosecond()).ok();
    Some((ns(&start)?, ns(&next.start_of_day().ok()?)?))
}

impl Bound {
    /// At a request's beginning, which decides its day, and now.
    pub fn ask(&self, subjects: &Subjects, amount: u64, now: Duration, began_ns: i64, now_ns: i64) -> Ask {
        let period = Period { now_ns, ..period(&self.rule, began_ns) };
        let subject = self.rule.subject(subjects);
        Ask { rule: self.rule.clone(), subject, limit: self.limit, amount, at: Moment { now, period } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR_NS: i64 = 3_600_000_000_000;

    fn rule(zone: &str, per: Per) -> Rule {
        let zone = TimeZone::get(zone).unwrap();
        let day = Defaults::default().per_day().as_ref().clone();
        Rule { zone, per: Some(per), ..day }
    }

    fn ns(text: &str) -> i64 {
        text.parse::<Timestamp>().unwrap().as_nanosecond() as i64
    }

    #[test]
    fn a_day_is_the_zones_own_also_when_its_clocks_change() {
        for (zone, at, start, hours) in [
            ("UTC", "2026-11-21T23:59:59Z", "2026-11-21T00:00:00Z", 24.0),
            ("Europe/Berlin", "2026-03-29T12:00:00Z", "2026-03-28T23:00:00Z", 23.0),
            ("Europe/Berlin", "2026-10-25T00:30:00Z", "2026-10-24T22:00:00Z", 25.0),
            ("America/New_York", "2026-03-08T05:00:00Z", "2026-03-08T05:00:00Z", 23.0),
            ("Australia/Lord_Howe", "2026-04-04T20:00:00Z", "2026-04-04T13:00:00Z", 24.5),
            // There was no midnight that day.
            ("America/Sao_Paulo", "2018-11-04T03:00:00Z", "2018-11-04T03:00:00Z", 23.0),
        ] {
            let day = period(&rule(zone, Per::Day), ns(at));
            assert_eq!(
                (day.start_ns, (day.end_ns - day.start_ns) as f64 / HOUR_NS as f64),
                (ns(start), hours),
                "{zone} {at}"
            );
        }
        let month = period(&rule("Europe/Berlin", Per::Month), ns("2026-10-31T23:30:00Z"));
        assert_eq!((month.start_ns, month.end_ns), (ns("2026-10-31T23:00:00Z"), ns("2026-11-30T23:00:00Z")));
    }

    #[test]
    fn days_and_months_follow_each_other_without_a_gap() {
        for zone in ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Pacific/Apia", "UTC"] {
            for (per, count, shortest, longest) in [(Per::Day, 800, 22, 26), (Per::Month, 30, 27 * 24, 32 * 24)] {
                let rule = rule(zone, per);
                let mut at = ns("2025-01-15T12:00:00Z");
                for _ in 0..count {
                    let this = period(&rule, at);
                    assert!((this.start_ns..this.end_ns).contains(&at), "{zone} {this:?}");
                    let length = this.end_ns - this.start_ns;
                    assert!((shortest * HOUR_NS..longest * HOUR_NS).contains(&length), "{zone} {this:?}");
                    let next = period(&rule, this.end_ns);
                    assert_eq!((next.start_ns, period(&rule, this.end_ns - 1).start_ns), (this.end_ns, this.start_ns));
                    at = this.end_ns;
                }
            }
        }
    }
}
