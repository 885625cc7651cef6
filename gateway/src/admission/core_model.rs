//! The account against a model: any interleaving of requests, any time between them, clocks that jump.
//!
//! The model is what a limit means, in a few lines: a bucket or a day from which only what was used was ever taken.

use proptest::prelude::*;

use super::*;

const PER_MINUTE: u32 = 1000;
const PER_DAY: NanoUsd = NanoUsd(5_000);

#[derive(Clone, Copy, Debug)]
enum Step {
    Wait {
        ms: u64,
    },
    Ask {
        tokens: u64,
        cost: u64,
    },
    /// Ends one of the open requests, having used so much of its reservation.
    End {
        which: usize,
        used: f64,
    },
    /// Ends one that did nothing.
    Drop {
        which: usize,
    },
    Day {
        jump: i64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (0u64..40_000).prop_map(|ms| Step::Wait { ms }),
        4 => (0u64..=1100, 0u64..2_000).prop_map(|(tokens, cost)| Step::Ask { tokens, cost }),
        3 => (any::<usize>(), 0.0f64..=1.0).prop_map(|(which, used)| Step::End { which, used }),
        1 => any::<usize>().prop_map(|which| Step::Drop { which }),
        1 => (-2i64..=2).prop_map(|jump| Step::Day { jump }),
    ]
}

/// A request that was let in, and what it is charged: its reservation until it ends, then what it used.
#[derive(Clone, Copy, Debug)]
struct Admitted {
    at: Duration,
    tokens: u64,
    day: i64,
    cost: u64,
}

struct World {
    account: Account,
    now: Duration,
    day: i64,
    admitted: Vec<Admitted>,
    open: Vec<(usize, Reservation)>,
}

impl World {
    fn new() -> World {
        let account = Account::new(PER_MINUTE, Duration::ZERO, 100, NanoUsd(0));
        World { account, now: Duration::ZERO, day: 100, admitted: Vec::new(), open: Vec::new() }
    }

    /// `overrun`: how often what a request uses may be of what it reserved.
    fn play(&mut self, step: Step, overrun: f64) {
        match step {
            Step::Wait { ms } => self.now += Duration::from_millis(ms),
            Step::Day { jump } => self.day += jump,
            Step::Ask { tokens, cost } => {
                let ask = Ask { tokens, cost_max: NanoUsd(cost), day: self.day };
                if let Ok(reservation) = self.account.reserve(self.now, PER_DAY, ask) {
                    let day = reservation.day;
                    self.open.push((self.admitted.len(), reservation));
                    self.admitted.push(Admitted { at: self.now, tokens, day, cost });
                }
            }
            Step::End { which, used } => self.end(which, used * overrun),
            Step::Drop { which } => self.end(which, 0.0),
        }
    }

    fn end(&mut self, which: usize, used: f64) {
        if self.open.is_empty() {
            return;
        }
        let (number, reservation) = self.open.swap_remove(which % self.open.len());
        let admitted = &mut self.admitted[number];
        // Money is bounded by the reservation: what a caller pays follows from tokens that were bounded.
        admitted.cost = (admitted.cost as f64 * used.min(1.0)) as u64;
        admitted.tokens = (admitted.tokens as f64 * used) as u64;
        self.account.settle(self.now, reservation, admitted.tokens, NanoUsd(admitted.cost));
    }

    /// The level of a plain bucket from which every request took what it is charged when it came.
    fn as_if(&self) -> i128 {
        let capacity = i128::from(PER_MINUTE) * TOKEN;
        let (mut level, mut at) = (capacity, Duration::ZERO);
        let mut pass = |until: Duration, take: u64| {
            level = (level + (until - at).as_nanos() as i128 * i128::from(PER_MINUTE)).min(capacity);
            level -= i128::from(take) * TOKEN;
            at = until;
        };
        for request in &self.admitted {
            pass(request.at, request.tokens);
        }
        pass(self.now, 0);
        level
    }

    fn level(&mut self) -> i128 {
        self.account.tokens.refill(self.now);
        self.account.tokens.level
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_refund_leaves_the_bucket_as_if_only_what_was_used_had_been_taken(steps in proptest::collection::vec(step(), 1..80)) {
        let mut world = World::new();
        for step in steps {
            world.play(step, 1.0);
            prop_assert_eq!(world.level(), world.as_if());
            prop_assert!(world.account.tokens.peaks.len() <= world.open.len(), "bounded by what is open");
        }
    }

    #[test]
    fn no_window_holds_more_than_a_burst_and_what_refills_in_it(steps in proptest::collection::vec(step(), 1..80)) {
        let mut world = World::new();
        for step in steps {
            world.play(step, 1.0);
            for (first, from) in world.admitted.iter().enumerate() {
                let mut sum = 0;
                for to in &world.admitted[first..] {
                    sum += i128::from(to.tokens) * TOKEN;
                    let refilled = (to.at - from.at).as_nanos() as i128 * i128::from(PER_MINUTE);
                    prop_assert!(sum <= i128::from(PER_MINUTE) * TOKEN + refilled);
                }
            }
        }
    }

    #[test]
    fn a_debt_is_remembered(steps in proptest::collection::vec(step(), 1..80)) {
        let mut world = World::new();
        for step in steps {
            let before = world.admitted.len();
            let level = world.level();
            world.play(step, 3.0);
            prop_assert!(world.level() <= world.as_if(), "what was used beyond a reservation was forgiven");
            if level < 0 {
                prop_assert_eq!(world.admitted.len(), before, "nobody is let in while there is a debt");
            }
        }
    }

    #[test]
    fn no_day_spends_or_promises_more_than_its_budget(steps in proptest::collection::vec(step(), 1..120)) {
        let mut world = World::new();
        for step in steps {
            world.play(step, 1.0);
            let mut days = std::collections::HashMap::new();
            for request in &world.admitted {
                *days.entry(request.day).or_insert(0) += request.cost;
            }
            prop_assert!(days.values().all(|sum| *sum <= PER_DAY.0), "{days:?}");
            for day in &world.account.budget.days {
                prop_assert_eq!(day.spent + day.held, days.get(&day.number).copied().unwrap_or(0));
            }
            prop_assert!(world.account.budget.days.len() <= DAYS_MAX);
        }
    }

    #[test]
    fn nothing_is_held_when_everything_has_ended(steps in proptest::collection::vec(step(), 1..80)) {
        let mut world = World::new();
        for step in steps {
            world.play(step, 1.0);
        }
        while !world.open.is_empty() {
            world.end(0, 0.5);
        }
        prop_assert!(world.account.tokens.peaks.is_empty());
        prop_assert!(world.account.budget.days.iter().all(|day| day.held == 0));
        world.now += Duration::from_secs(60);
        prop_assert_eq!(world.account.tokens.remaining(world.now), u64::from(PER_MINUTE));
    }

    #[test]
    fn a_wait_is_exactly_as_long_as_it_must_be(taken in 0u64..=1000, wanted in 1u64..=1000, later in 0u64..60_000_000_000) {
        let mut bucket = Bucket::new(PER_MINUTE, Duration::ZERO);
        prop_assert!(bucket.take(Duration::ZERO, taken).is_ok());
        let now = Duration::from_nanos(later);
        if let Err(denied) = bucket.take(now, wanted) {
            let Denied::Tokens { wait: Some(wait) } = denied else { panic!("{denied:?}") };
            prop_assert!(bucket.take(now + wait - Duration::from_nanos(1), wanted).is_err());
            prop_assert!(bucket.take(now + wait, wanted).is_ok());
        }
    }

    #[test]
    fn another_limit_forgives_nothing_and_forgets_no_debt(
        steps in proptest::collection::vec(step(), 1..40),
        limits in proptest::collection::vec(1u32..3000, 1..6),
    ) {
        let mut world = World::new();
        for (i, step) in steps.into_iter().enumerate() {
            world.play(step, 2.0);
            let before = world.level();
            let (old, new) = (i128::from(world.account.tokens.limit()), i128::from(limits[i % limits.len()]));
            world.account.tokens.set_limit(world.now, new as u32);
            let after = world.level();
            let used = old * TOKEN - before;
            prop_assert!(after <= new * TOKEN, "never more than the new limit");
            // What was used stays used, as far as the new limit goes.
            prop_assert!(after == new * TOKEN - used || after == before.min(0) && used > new * TOKEN);
            let peaks = &world.account.tokens.peaks;
            prop_assert!(peaks.iter().all(|peak| peak.level <= new * TOKEN && peak.level >= after));
            prop_assert!(peaks.is_sorted_by(|a, b| a.level >= b.level && a.through < b.through));
        }
    }
}

fn ask(tokens: u64, cost: u64, day: i64) -> Ask {
    Ask { tokens, cost_max: NanoUsd(cost), day }
}

#[test]
fn what_one_limit_refuses_takes_nothing_from_the_other() {
    let mut account = Account::new(PER_MINUTE, Duration::ZERO, 100, NanoUsd(0));
    let denied = account.reserve(Duration::ZERO, PER_DAY, ask(1001, 10, 100));
    assert_eq!(denied, Err(Denied::Tokens { wait: None }), "it can never pass");
    let denied = account.reserve(Duration::ZERO, PER_DAY, ask(10, 5_001, 100));
    assert_eq!(denied, Err(Denied::Budget { spent: NanoUsd(0), held: NanoUsd(0), day: 100 }));
    assert!(account.reserve(Duration::ZERO, PER_DAY, ask(1000, 5_000, 100)).is_ok(), "both are still whole");
    let free = account.reserve(Duration::from_secs(60), PER_DAY, ask(1000, 0, 100));
    assert!(free.is_ok(), "what costs nothing needs no budget");
}

#[test]
fn a_request_that_spans_midnight_counts_on_the_day_it_began() {
    let mut account = Account::new(PER_MINUTE, Duration::ZERO, 100, NanoUsd(0));
    let yesterday = account.reserve(Duration::ZERO, PER_DAY, ask(1, 5_000, 100)).unwrap();
    let today = account.reserve(Duration::ZERO, PER_DAY, ask(1, 5_000, 101)).unwrap();
    account.settle(Duration::ZERO, yesterday, 1, NanoUsd(4_000));
    account.settle(Duration::ZERO, today, 1, NanoUsd(1_000));
    assert!(account.reserve(Duration::ZERO, PER_DAY, ask(1, 1_001, 100)).is_err());
    assert!(account.reserve(Duration::ZERO, PER_DAY, ask(1, 4_000, 101)).is_ok());
}

#[test]
fn a_clock_that_jumps_gives_no_second_budget_and_takes_none_away() {
    let mut account = Account::new(PER_MINUTE, Duration::from_secs(9), 100, NanoUsd(4_000));
    let now = Duration::from_secs(9);
    let fits = |account: &mut Account, cost, day| account.reserve(now, PER_DAY, ask(0, cost, day)).is_ok();
    assert!(!fits(&mut account, 1_001, 100), "what was spent before the start counts");
    assert!(!fits(&mut account, 1_001, 3), "a day long ago counts as the first that is known");
    assert!(fits(&mut account, 5_000, 40_000), "far ahead is a day of its own");
    assert!(!fits(&mut account, 1_001, 100), "and today is as it was left");
    assert!(fits(&mut account, 5_000, 101) && fits(&mut account, 5_000, 102), "the days that follow are whole");
    // Monotonic time does not run backwards; if it did, nothing would refill.
    assert_eq!(account.tokens.remaining(Duration::ZERO), 1000);
    assert!(account.reserve(now, PER_DAY, ask(1000, 0, 102)).is_ok());
    assert_eq!(account.tokens.remaining(Duration::ZERO), 0);
}

#[test]
fn requests_at_a_time_are_counted_up_to_the_limit() {
    let mut account = Account::new(PER_MINUTE, Duration::ZERO, 100, NanoUsd(0));
    assert!(account.enter(2) && account.enter(2) && !account.enter(2));
    account.leave();
    assert!(account.enter(2) && !account.enter(1));
}

#[test]
fn days_are_utc_days_also_before_the_epoch() {
    assert_eq!((day(-1), day(0), day(DAY_NS - 1), day(DAY_NS)), (-1, 0, 0, 1));
    assert_eq!(day_start_ns(day(1_700_000_000_123_456_789)), 1_699_920_000_000_000_000);
}
