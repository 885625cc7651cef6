//! All ways of counting together: any rules, any interleaving of requests, any clock, limits that change meanwhile.

use std::collections::HashMap;
use std::time::Duration;

use jiff::tz::TimeZone;
use proptest::prelude::*;

use super::calendar::{Calendar, Period};
use super::rule::{Mode, Rule};
use super::set::{Claim, Counter, Moment, reserve};
use super::sliding::Sliding;
use super::slots::Slots;
use super::{Taken, Wait};
use crate::api::limit::{Of, Per};

const SECOND: u64 = 1_000_000_000;
const MINUTE: Duration = Duration::from_secs(60);
const DAY: i64 = 86_400 * SECOND as i64;
const TEN_YEARS: i64 = 3_650 * DAY;

/// Every kind of window.
const KINDS: [(Option<Per>, bool); 7] = [
    (None, false),
    (Some(Per::Second), false),
    (Some(Per::Second), true),
    (Some(Per::Minute), false),
    (Some(Per::Minute), true),
    (Some(Per::Day), false),
    (Some(Per::Month), false),
];

#[derive(Clone, Debug)]
enum Step {
    /// Both clocks go on together …
    Wait {
        ns: u64,
    },
    /// … the one that never runs backwards does, or nobody can trust anything …
    Back {
        ns: u64,
    },
    /// … and the calendar's may show whatever it likes.
    Jump {
        by_ns: i64,
    },
    Ask {
        amounts: Vec<u64>,
    },
    End {
        which: usize,
        used: f64,
    },
    Edit {
        which: usize,
        limit: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let ns = prop_oneof![Just(0), 0..2 * SECOND, 0..90 * SECOND, 0..40 * DAY.unsigned_abs()];
    prop_oneof![
        3 => ns.prop_map(|ns| Step::Wait { ns }),
        1 => (0..100 * SECOND).prop_map(|ns| Step::Back { ns }),
        1 => prop_oneof![-TEN_YEARS..TEN_YEARS, -DAY..DAY].prop_map(|by_ns| Step::Jump { by_ns }),
        6 => proptest::collection::vec(prop_oneof![Just(0u64), 1u64..40, 1u64..150], 6).prop_map(|amounts| Step::Ask { amounts }),
        5 => (any::<usize>(), 0.0f64..=1.0).prop_map(|(which, used)| Step::End { which, used }),
    ]
}

fn step_with_edits() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => step(),
        1 => (any::<usize>(), 1u64..200).prop_map(|(which, limit)| Step::Edit { which, limit }),
    ]
}

/// One rule's counter, and all that it let in: when, by the highest that the counter had seen of its clock, in which
/// period it counts, how much of it is charged.
struct Counted {
    kind: (Option<Per>, bool),
    counter: Counter,
    limit: u64,
    limit_max: u64,
    let_in: Vec<(Duration, i64, u64)>,
}

struct World {
    counted: Vec<Counted>,
    now: Duration,
    /// What counters have seen of the clock: they know nothing of what it showed when nobody was let in.
    highest: Duration,
    now_ns: i64,
    /// By request: what it took of each counter, and which entry of `let_in` says so.
    open: Vec<Vec<(Taken, usize)>>,
}

fn rule((per, exact): (Option<Per>, bool), limit: u64) -> Rule {
    Rule {
        name: "r".into(),
        limit,
        of: if per.is_none() { Of::Concurrency } else { Of::Tokens },
        per,
        by: Vec::new(),
        only: Vec::new(),
        zone: TimeZone::UTC,
        mode: Mode::Hard,
        exact,
        strict: false,
        wait: Duration::ZERO,
        shared: None,
    }
}

impl World {
    fn new(rules: &[(usize, u64)]) -> World {
        let (now, now_ns) = (Duration::from_secs(1_000), 20_000 * DAY);
        let counted = rules.iter().map(|(kind, limit)| {
            let kind = KINDS[*kind];
            let rule = rule(kind, *limit);
            let counter = Counter::new(&rule, *limit, moment(kind, now, now_ns), 0);
            Counted { kind, counter, limit: *limit, limit_max: *limit, let_in: Vec::new() }
        });
        World { counted: counted.collect(), now, highest: Duration::ZERO, now_ns, open: Vec::new() }
    }

    fn play(&mut self, step: &Step) {
        match step {
            Step::Wait { ns } => {
                self.now += Duration::from_nanos(*ns);
                self.now_ns = self.now_ns.saturating_add(*ns as i64);
            }
            Step::Back { ns } => self.now = self.now.saturating_sub(Duration::from_nanos(*ns)),
            Step::Jump { by_ns } => self.now_ns = self.now_ns.saturating_add(*by_ns),
            Step::Ask { amounts } => self.ask(amounts),
            Step::End { which, used } => {
                if !self.open.is_empty() {
                    let open = self.open.swap_remove(which % self.open.len());
                    self.end(open, *used);
                }
            }
            Step::Edit { which, limit } => {
                let which = which % self.counted.len();
                let counted = &mut self.counted[which];
                counted.limit = *limit;
                counted.limit_max = counted.limit_max.max(*limit);
                counted.counter.set_limit(self.now, *limit, Mode::Hard);
            }
        }
    }

    fn ask(&mut self, amounts: &[u64]) {
        let before: Vec<String> = self.counted.iter().map(|counted| format!("{:?}", counted.counter)).collect();
        let (now, now_ns, highest) = (self.now, self.now_ns, self.highest.max(self.now));
        let mut claims: Vec<Claim<'_>> = Vec::new();
        for (counted, amount) in self.counted.iter_mut().zip(amounts) {
            let at = moment(counted.kind, now, now_ns);
            claims.push(Claim { counter: &mut counted.counter, mode: Mode::Hard, at, amount: *amount });
        }
        match reserve(&mut claims) {
            Ok(taken) => {
                self.highest = highest;
                let mut open = Vec::new();
                for ((counted, taken), amount) in self.counted.iter_mut().zip(taken).zip(amounts) {
                    counted.let_in.push((highest, taken.mark, *amount));
                    open.push((taken, counted.let_in.len() - 1));
                }
                self.open.push(open);
            }
            Err(denied) => {
                let after: Vec<String> = self.counted.iter().map(|counted| format!("{:?}", counted.counter)).collect();
                assert_eq!(before, after, "a refusal changes nothing, to the bit");
                let state = denied.short.state;
                assert_eq!(state.limit, self.counted[denied.claim].limit);
                assert_eq!(denied.short.wait == Wait::Never, amounts[denied.claim] > state.limit, "{denied:?}");
            }
        }
    }

    fn end(&mut self, open: Vec<(Taken, usize)>, used: f64) {
        self.highest = self.highest.max(self.now);
        for (counted, (taken, entry)) in self.counted.iter_mut().zip(open) {
            let amount = &mut counted.let_in[entry].2;
            assert_eq!(*amount, taken.amount());
            *amount = (*amount as f64 * used) as u64;
            let used = *amount;
            counted.counter.settle(self.now, taken, used);
        }
    }

    /// What each limit promises, of all that was ever let in.
    fn check(&self) {
        for counted in &self.counted {
            let Counted { kind: (per, exact), limit_max, let_in, .. } = counted;
            let window = match per {
                None => continue,
                Some(Per::Second) => Duration::from_secs(1),
                Some(Per::Minute) => MINUTE,
                Some(Per::Day | Per::Month) => {
                    let mut periods: HashMap<i64, u64> = HashMap::new();
                    for (_, start, amount) in let_in {
                        *periods.entry(*start).or_default() += amount;
                    }
                    assert!(periods.values().all(|sum| sum <= limit_max), "{periods:?} of {limit_max}");
                    continue;
                }
            };
            for (first, (from, ..)) in let_in.iter().enumerate() {
                let mut sum = 0;
                for (to, _, amount) in &let_in[first..] {
                    sum += u128::from(*amount);
                    let passed = *to - *from;
                    if *exact && passed < window {
                        assert!(sum <= u128::from(*limit_max), "{sum} in {passed:?} of {limit_max}");
                    }
                    if !exact {
                        let refilled = passed.as_nanos() * u128::from(*limit_max) / window.as_nanos();
                        assert!(sum <= u128::from(*limit_max) + refilled + 1, "{sum} in {passed:?} of {limit_max}");
                    }
                }
            }
        }
    }
}

/// Days and months as a clock in UTC with months of thirty days has them: where they really begin is not asked here.
fn moment((per, _): (Option<Per>, bool), now: Duration, now_ns: i64) -> Moment {
    let length = match per {
        Some(Per::Day) => DAY,
        Some(Per::Month) => 30 * DAY,
        _ => i64::MAX,
    };
    let start_ns = now_ns.div_euclid(length).saturating_mul(length);
    Moment { now, period: Period { start_ns, end_ns: start_ns.saturating_add(length), now_ns } }
}

fn rules() -> impl Strategy<Value = Vec<(usize, u64)>> {
    proptest::collection::vec((0..KINDS.len(), 1u64..120), 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn every_limit_holds_under_any_clock_and_a_refusal_takes_nothing(rules in rules(), steps in proptest::collection::vec(step(), 1..100)) {
        let mut world = World::new(&rules);
        for step in &steps {
            world.play(step);
        }
        world.check();
    }

    #[test]
    fn a_limit_that_changes_lets_nobody_beyond_the_highest_it_was_in_a_day_or_an_exact_window(
        kinds in proptest::collection::vec((prop_oneof![Just(2usize), Just(4), Just(5), Just(6)], 1u64..120), 1..5),
        steps in proptest::collection::vec(step_with_edits(), 1..100),
    ) {
        let mut world = World::new(&kinds);
        for step in &steps {
            world.play(step);
        }
        world.check();
    }

    #[test]
    fn nothing_is_held_when_everything_has_ended(rules in rules(), steps in proptest::collection::vec(step_with_edits(), 1..100)) {
        let mut world = World::new(&rules);
        for step in &steps {
            world.play(step);
        }
        for open in std::mem::take(&mut world.open) {
            world.end(open, 0.5);
        }
        for counted in &world.counted {
            let at = moment(counted.kind, world.highest, world.now_ns);
            prop_assert_eq!(counted.counter.state(at).held, 0);
            let later = Moment { now: world.highest + Duration::from_secs(600), ..at };
            if !counted.kind.0.is_some_and(Per::is_calendar) {
                prop_assert!(counted.counter.is_at_rest(later), "{:?}", counted.counter);
                prop_assert_eq!(counted.counter.state(later).remaining, counted.limit);
            }
        }
    }

    #[test]
    fn an_exact_window_says_how_long_to_wait_and_that_is_enough(
        taken in proptest::collection::vec((0u64..2_000, 1u64..40), 1..20),
        wanted in 1u64..=100,
    ) {
        let mut sliding = Sliding::new(100, MINUTE);
        let mut now = Duration::ZERO;
        for (ms, amount) in taken {
            now += Duration::from_millis(ms);
            if sliding.check(now, amount).is_ok() {
                let taken = sliding.take(now, amount);
                sliding.settle(now, taken, amount);
            }
        }
        if let Err(short) = sliding.check(now, wanted) {
            let Wait::For(wait) = short.wait else { panic!("{short:?}") };
            prop_assert!(wait <= MINUTE + MINUTE / 64);
            prop_assert!(sliding.check(now + wait - Duration::from_nanos(1), wanted).is_err());
            prop_assert!(sliding.check(now + wait, wanted).is_ok());
        }
    }
}

const NOW: Duration = Duration::ZERO;

fn day(number: i64) -> Period {
    Period { start_ns: number * DAY, end_ns: (number + 1) * DAY, now_ns: number * DAY }
}

#[test]
fn a_clock_that_jumps_gives_no_second_budget_and_takes_none_away() {
    let mut budget = Calendar::new(5_000, day(100), 4_000);
    let mut fits =
        |cost, number| budget.check(NOW, day(number), cost).map(|()| drop(budget.take(NOW, day(number), cost))).is_ok();
    assert!(!fits(1_001, 100), "what was spent before the start counts");
    assert!(!fits(1_001, 3), "a day long ago counts as the first that is known");
    assert!(fits(5_000, 40_000), "far ahead is a day of its own");
    assert!(!fits(1_001, 100), "and today is as it was left");
    assert!(fits(5_000, 101) && fits(5_000, 102), "the days that follow are whole");
    assert!(fits(0, 102), "what costs nothing needs no budget");
}

#[test]
fn a_request_that_spans_midnight_counts_on_the_day_it_began() {
    let mut budget = Calendar::new(5_000, day(100), 0);
    let yesterday = budget.take(NOW, day(100), 5_000);
    let today = budget.take(NOW, day(101), 5_000);
    budget.settle(NOW, yesterday, 4_000);
    budget.settle(NOW, today, 1_000);
    assert!(budget.check(NOW, day(100), 1_001).is_err());
    assert!(budget.check(NOW, day(101), 4_000).is_ok());
    assert_eq!(budget.state(day(101)).used, 1_000);
}

#[test]
fn beyond_a_throttled_budget_requests_pass_at_their_own_pace() {
    let rule = Rule { mode: Mode::Throttle { requests: 2, per: Per::Minute }, ..rule((Some(Per::Day), false), 100) };
    let at = |seconds| Moment { now: Duration::from_secs(seconds), period: day(100) };
    let mut counter = Counter::new(&rule, 100, at(0), 0);
    let ask = |counter: &mut Counter, seconds, amount| {
        counter.set_limit(Duration::from_secs(seconds), 100, rule.mode);
        let claim = Claim { counter, mode: rule.mode, at: at(seconds), amount };
        reserve(&mut [claim]).map(|mut taken| taken.remove(0)).map_err(|denied| denied.short.wait)
    };
    let first = ask(&mut counter, 0, 100).unwrap();
    counter.settle(NOW, first, 100);
    // What did nothing gives its turn back, what costs nothing needs none.
    let dropped = ask(&mut counter, 0, 500).unwrap();
    counter.settle(NOW, dropped, 0);
    assert!(ask(&mut counter, 0, 0).is_ok());
    for _ in 0..2 {
        let beyond = ask(&mut counter, 0, 500).unwrap();
        counter.settle(NOW, beyond, 300);
    }
    assert_eq!(ask(&mut counter, 0, 1), Err(Wait::For(Duration::from_secs(30))));
    assert!(ask(&mut counter, 30, 1).is_ok());
    assert_eq!(counter.state(at(30)).used, 700, "all of it is counted");
    // An edit of the pace keeps what was used of it, and none refuses until the day ends.
    counter.set_limit(Duration::from_secs(30), 100, Mode::Throttle { requests: 1, per: Per::Minute });
    assert!(counter.check(at(30), 1).is_err());
    counter.set_limit(Duration::from_secs(30), 100, Mode::Hard);
    assert_eq!(counter.check(at(30), 1).unwrap_err().wait, Wait::For(day(100).ends_in()));
}

#[test]
fn of_several_limits_the_one_that_takes_longest_is_told() {
    let now = Duration::ZERO;
    let minute = (Some(Per::Minute), false);
    let mut slots = Counter::Slots(Slots::new(1));
    let mut bucket = Counter::new(&rule(minute, 10), 10, moment(minute, now, 0), 0);
    let at = moment(minute, now, 0);
    let mut claims = [
        Claim { counter: &mut slots, mode: Mode::Hard, at, amount: 1 },
        Claim { counter: &mut bucket, mode: Mode::Hard, at, amount: 10 },
    ];
    assert_eq!(reserve(&mut claims).unwrap().len(), 2);
    let denied = reserve(&mut claims).unwrap_err();
    assert_eq!((denied.claim, denied.short.wait), (1, Wait::For(MINUTE)), "a place may be free any moment");
    claims[1].amount = 11;
    assert_eq!(reserve(&mut claims).unwrap_err().short.wait, Wait::Never);
    claims[1].mode = Mode::Soft;
    claims[0].amount = 0;
    assert!(reserve(&mut claims).is_ok(), "who only warns refuses nobody");
}
