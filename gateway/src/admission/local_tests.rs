//! The store under every order of events that a scheduler tries, and under subjects without end.

use std::sync::atomic::AtomicU64;

use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};

use super::super::core::rule::{Mode, Subjects};
use super::super::rules::Bound;
use super::*;
use crate::api::limit::{Dimension, Of, Per};
use crate::ports::SystemClock;

/// Schedules that are tried of each story.
const SCHEDULES: usize = 20_000;
/// Of a thread in a story: hashes take more than shuttle gives.
const STACK_BYTES: usize = 1 << 20;
const BUDGET: u64 = 100;
const DAY: i64 = 86_400_000_000_000;

impl Locked for shuttle::sync::Mutex<Counter> {
    type Guard<'l> = shuttle::sync::MutexGuard<'l, Counter>;

    fn new(counter: Counter) -> Self {
        shuttle::sync::Mutex::new(counter)
    }
    fn lock(&self) -> Self::Guard<'_> {
        self.lock().unwrap()
    }
}

type Watched = Local<shuttle::sync::Mutex<Counter>>;

fn rule(name: &str, of: Of, per: Option<Per>, by: &[Dimension]) -> Arc<Rule> {
    Arc::new(Rule {
        name: name.into(),
        limit: BUDGET,
        of,
        per,
        by: by.to_vec(),
        only: Vec::new(),
        zone: jiff::tz::TimeZone::UTC,
        mode: Mode::Hard,
        exact: false,
        strict: true,
        wait: Duration::ZERO,
        shared: None,
    })
}

fn ask(rule: &Arc<Rule>, key: usize, limit: u64, amount: u64) -> Ask {
    let subjects = Subjects { key: format!("key-{key}"), ..Subjects::default() };
    let bound = Bound { rule: rule.clone(), limit };
    bound.ask(&subjects, amount, Duration::from_secs(1), 20_000 * DAY, 20_000 * DAY)
}

/// Takes in a wrong way: looks, lets go, and takes.
fn look_then_take(local: &Watched, asks: &[Ask]) -> Option<Granted<shuttle::sync::Mutex<Counter>>> {
    local.peek(asks).ok()?;
    let unbounded: Vec<Ask> = asks.iter().map(|ask| Ask { limit: u64::MAX >> 1, ..ask.clone() }).collect();
    local.take(&unbounded).ok()
}

type Take = fn(&Watched, &[Ask]) -> Option<Granted<shuttle::sync::Mutex<Counter>>>;

/// Four requests of two keys race for a budget that two of them fit in; two settle, one is dropped, one uses more than it
/// reserved; and an operator lowers a limit meanwhile.
fn story(take: Take) {
    let time = Arc::new(Time::new(Arc::new(SystemClock)));
    let local: Arc<Watched> = Arc::new(Local::new(time, Arc::default()));
    let rules = Arc::new([
        rule("all", Of::Usd, Some(Per::Day), &[]),
        rule("key", Of::Usd, Some(Per::Month), &[Dimension::Key]),
        rule("places", Of::Concurrency, None, &[Dimension::Key]),
    ]);
    let settled = Arc::new(AtomicU64::new(0));
    let requests = (0..4usize).map(|number| {
        let (local, rules, settled) = (local.clone(), rules.clone(), settled.clone());
        shuttle::thread::spawn(move || {
            let key = number % 2;
            let mut asks: Vec<Ask> =
                rules.iter().zip([BUDGET, BUDGET, 2]).map(|(rule, limit)| ask(rule, key, limit, 45)).collect();
            asks[2].amount = 1;
            // Whoever asks in another order locks in the same one.
            asks.rotate_left(number % 3);
            let Some(granted) = take(&local, &asks) else { return };
            let used = [45, 0, 60, 40][number];
            // No strict rule counts more than was reserved, as no caller is billed it.
            settled.fetch_add(used.min(45), Ordering::Relaxed);
            match number {
                1 => drop(granted),
                _ => Box::new(granted).settle(&|_| used),
            }
        })
    });
    let requests: Vec<_> = requests.collect();
    let operator = {
        let (local, rules) = (local.clone(), rules.clone());
        shuttle::thread::spawn(move || {
            let state = local.state(&ask(&rules[0], 0, BUDGET - 5, 0));
            assert!(state.used + state.held <= BUDGET, "{state:?}");
        })
    };
    for request in requests {
        request.join().unwrap();
    }
    operator.join().unwrap();
    let state = local.state(&ask(&rules[0], 0, BUDGET, 0));
    let settled = settled.load(Ordering::Relaxed);
    assert!(settled <= BUDGET, "{settled} of {BUDGET} are spent");
    assert_eq!((state.used, state.held), (settled, 0), "what was used is counted, and nothing is held");
    for key in 0..2 {
        assert_eq!(local.state(&ask(&rules[2], key, 2, 0)).held, 0);
    }
}

fn try_all(scheduler: impl Scheduler + 'static, take: Take) {
    let mut config = shuttle::Config::new();
    config.stack_size = STACK_BYTES;
    shuttle::Runner::new(scheduler, config).run(move || story(take));
}

#[test]
fn no_order_of_requests_ends_hang_ups_and_edits_overshoots_a_budget_or_holds_anything() {
    let take: Take = |local, asks| local.take(asks).ok();
    try_all(RandomScheduler::new(SCHEDULES), take);
    // With few switches, more of the rare orders are tried.
    try_all(PctScheduler::new(3, SCHEDULES), take);
}

#[test]
fn a_store_that_lets_go_between_looking_and_taking_is_found_out() {
    let found = std::panic::catch_unwind(|| try_all(RandomScheduler::new(SCHEDULES), look_then_take));
    assert!(found.is_err(), "the schedules prove nothing");
}

#[test]
fn who_makes_up_subjects_gets_no_more_memory_and_no_fresh_limit() {
    let time = Arc::new(Time::new(Arc::new(SystemClock)));
    let local: Local = Local { subjects_max: 16 * SHARDS, ..Local::new(time, Arc::default()) };
    let mut users = (*rule("users", Of::Requests, Some(Per::Minute), &[Dimension::User])).clone();
    users.limit = 2;
    let users = Arc::new(users);
    let take = |user: u32, seconds: u64| {
        let subjects = Subjects { user: Some(format!("user-{user}")), ..Subjects::default() };
        let bound = Bound { rule: users.clone(), limit: 2 };
        let granted = local.take(&[bound.ask(&subjects, 1, Duration::from_secs(seconds), 0, 0)]);
        granted.map(|granted| Box::new(granted).settle(&|_| 1)).is_ok()
    };
    let let_in = (0..5_000).filter(|user| take(*user, 1)).count();
    // Sixteen shards of sixteen, and one more in each for all others together, of two requests.
    assert!((16 * SHARDS..=SHARDS * (16 + 2)).contains(&let_in), "{let_in}");
    let family = local.family(&users);
    let known = || family.shards.iter().map(|shard| shard.read().cells.len()).sum::<usize>();
    assert!(known() <= SHARDS * 17, "{}", known());
    assert!(take(1, 1), "who was there before keeps what is left");
    // A minute later all are at rest, and go.
    assert!((5_000..5_100).all(|user| take(user, 100)));
    assert!(known() <= SHARDS * 17, "{}", known());
}
