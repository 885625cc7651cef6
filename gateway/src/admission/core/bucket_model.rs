//! The bucket against a model: any interleaving of requests, any time between them.
//!
//! The model is what a limit means, in a few lines: a bucket from which only what was used was ever taken.

use proptest::prelude::*;

use super::*;

const LIMIT: u64 = 1000;
const MINUTE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug)]
enum Step {
    Wait {
        ms: u64,
    },
    Ask {
        amount: u64,
    },
    /// Ends one of the open requests, having used so much of its reservation.
    End {
        which: usize,
        used: f64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (0u64..40_000).prop_map(|ms| Step::Wait { ms }),
        4 => (1u64..=1100).prop_map(|amount| Step::Ask { amount }),
        4 => (any::<usize>(), 0.0f64..=1.0).prop_map(|(which, used)| Step::End { which, used }),
    ]
}

/// A request that was let in, and what it is charged: its reservation until it ends, then what it used.
#[derive(Clone, Copy, Debug)]
struct Admitted {
    at: Duration,
    amount: u64,
}

struct World {
    bucket: Bucket,
    now: Duration,
    admitted: Vec<Admitted>,
    open: Vec<(usize, Taken)>,
}

impl World {
    fn new() -> World {
        let bucket = Bucket::new(LIMIT, MINUTE, Duration::ZERO);
        World { bucket, now: Duration::ZERO, admitted: Vec::new(), open: Vec::new() }
    }

    /// `overrun`: how often what a request uses may be of what it reserved.
    fn play(&mut self, step: Step, overrun: f64) {
        match step {
            Step::Wait { ms } => self.now += Duration::from_millis(ms),
            Step::Ask { amount } => {
                if self.bucket.check(self.now, amount).is_ok() {
                    self.open.push((self.admitted.len(), self.bucket.take(self.now, amount)));
                    self.admitted.push(Admitted { at: self.now, amount });
                }
            }
            Step::End { which, used } => self.end(which, used * overrun),
        }
    }

    fn end(&mut self, which: usize, used: f64) {
        if self.open.is_empty() {
            return;
        }
        let (number, taken) = self.open.swap_remove(which % self.open.len());
        let admitted = &mut self.admitted[number];
        admitted.amount = (admitted.amount as f64 * used) as u64;
        self.bucket.settle(self.now, taken, admitted.amount);
    }

    /// The level of a plain bucket from which every request took what it is charged when it came.
    fn as_if(&self) -> i128 {
        let one = self.bucket.one;
        let capacity = i128::from(LIMIT) * one;
        let (mut level, mut at) = (capacity, Duration::ZERO);
        let mut pass = |until: Duration, take: u64| {
            level = (level + (until - at).as_nanos() as i128 * i128::from(LIMIT)).min(capacity);
            level -= i128::from(take) * one;
            at = until;
        };
        for request in &self.admitted {
            pass(request.at, request.amount);
        }
        pass(self.now, 0);
        level
    }

    fn level(&mut self) -> i128 {
        self.bucket.refill(self.now);
        self.bucket.level
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
            prop_assert!(world.bucket.peaks.len() <= world.open.len(), "bounded by what is open");
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
                    sum += i128::from(to.amount) * world.bucket.one;
                    let refilled = (to.at - from.at).as_nanos() as i128 * i128::from(LIMIT);
                    prop_assert!(sum <= i128::from(LIMIT) * world.bucket.one + refilled);
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
    fn nothing_is_held_when_everything_has_ended(steps in proptest::collection::vec(step(), 1..80)) {
        let mut world = World::new();
        for step in steps {
            world.play(step, 1.0);
        }
        while !world.open.is_empty() {
            world.end(0, 0.5);
        }
        prop_assert!(world.bucket.peaks.is_empty());
        prop_assert_eq!(world.bucket.held, 0);
        world.now += MINUTE;
        prop_assert_eq!(world.bucket.state(world.now).remaining, LIMIT);
        prop_assert!(world.bucket.is_at_rest(world.now));
    }

    #[test]
    fn a_wait_is_exactly_as_long_as_it_must_be(taken in 0u64..=1000, wanted in 1u64..=1000, later in 0u64..60_000_000_000) {
        let mut bucket = Bucket::new(LIMIT, MINUTE, Duration::ZERO);
        let _ = bucket.take(Duration::ZERO, taken);
        let now = Duration::from_nanos(later);
        if let Err(short) = bucket.check(now, wanted) {
            let Wait::For(wait) = short.wait else { panic!("{short:?}") };
            prop_assert!(bucket.check(now + wait - Duration::from_nanos(1), wanted).is_err());
            prop_assert!(bucket.check(now + wait, wanted).is_ok());
        }
    }

    #[test]
    fn another_limit_forgives_nothing_and_forgets_no_debt(
        steps in proptest::collection::vec(step(), 1..40),
        limits in proptest::collection::vec(1u64..3000, 1..6),
    ) {
        let mut world = World::new();
        let one = world.bucket.one;
        for (i, step) in steps.into_iter().enumerate() {
            world.play(step, 2.0);
            let before = world.level();
            let (old, new) = (world.bucket.limit, limits[i % limits.len()]);
            world.bucket.set_limit(world.now, new);
            let (after, new) = (world.level(), i128::from(new));
            let used = i128::from(old) * one - before;
            prop_assert!(after <= new * one, "never more than the new limit");
            // What was used stays used, as far as the new limit goes.
            prop_assert!(after == new * one - used || after == before.min(0) && used > new * one);
            let peaks = &world.bucket.peaks;
            prop_assert!(peaks.iter().all(|peak| peak.level <= new * one && peak.level >= after));
            prop_assert!(peaks.is_sorted_by(|a, b| a.level >= b.level && a.through < b.through));
        }
    }
}
