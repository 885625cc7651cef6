use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::before::Before;
use super::local::Local;
use super::*;
use crate::accounting::core::{PicoPerToken, Usage};
use crate::accounting::ledger::wal::tests::row;
use crate::accounting::price::{Extras, Price, Rates, Tariff};
use crate::accounting::row::{Outcome, Row, Sum, UsageSource};
use crate::accounting::settlement::{Costs, Durability, Held, JournalClosed, Most, Slot, Spent};
use crate::api::openai::ratelimit::Quota;
use crate::auth::store::OwnLimits;
use crate::ports::Clock;

const DAY: i64 = 86_400_000_000_000;

/// A clock that a test moves.
struct Hands(Mutex<(i64, Instant)>);

impl Hands {
    fn pass(&self, time: Duration) {
        let mut hands = self.0.lock();
        hands.0 += time.as_nanos() as i64;
        hands.1 += time;
    }
}

impl Clock for Hands {
    fn now_ns(&self) -> i64 {
        self.0.lock().0
    }
    fn instant(&self) -> Instant {
        self.0.lock().1
    }
}

/// A journal that takes everything until it is closed.
#[derive(Default)]
struct Paper {
    closed: AtomicBool,
}

impl Journal for Paper {
    fn open(&self, _row: &Row) -> Result<Slot, JournalClosed> {
        if self.closed.load(Ordering::Relaxed) { Err(JournalClosed) } else { Ok(Slot { segment: 0, bytes: 0 }) }
    }
    fn close(&self, _slot: Slot, _row: Row, _durability: Durability) -> Result<Option<Box<Held>>, Box<Row>> {
        Ok(None)
    }
    fn durable(&self, _sequence: u64) -> Pin<Box<dyn Future<Output = bool> + Send>> {
        Box::pin(std::future::ready(true))
    }
    fn ship(&self, _held: Held) {}
    fn amend(&self, _written: Option<Held>, _row: Row) {}
}

struct World {
    admission: Admission,
    clock: Arc<Hands>,
    paper: Arc<Paper>,
    metrics: Arc<Metrics>,
    limits: Limits,
    rules: Vec<Arc<Rule>>,
}

/// Prices are one nano-dollar a token.
const LIMITS: Limits =
    Limits { requests_per_minute: 1000, tokens_per_minute: 600, concurrency: 100, per_day: NanoUsd(1_000) };

impl World {
    fn new(limits: Limits, rules: &[Rule], spent: &[(&str, u64)]) -> World {
        let clock = Arc::new(Hands(Mutex::new((20_000 * DAY, Instant::now()))));
        let (paper, metrics) = (Arc::new(Paper::default()), Arc::new(Metrics::new()));
        let rules: Vec<Arc<Rule>> = rules.iter().cloned().map(Arc::new).collect();
        let sums = spent.iter().map(|(key, nano)| Sum {
            key_id: (*key).to_owned(),
            tenant: "default".to_owned(),
            billed: NanoUsd(*nano),
            ..Sum::default()
        });
        let sums: Vec<Sum> = sums.collect();
        let defaults = Defaults::default();
        let all = defaults.iter().chain(&rules).map(AsRef::as_ref);
        let since = |since, _| Ok::<_, ()>(if since <= 20_000 * DAY { sums.clone() } else { Vec::new() });
        let before = Before::read(all, clock.now_ns(), &Default::default(), since).unwrap();
        let time = Arc::new(Time::new(clock.clone()));
        let counts: Arc<Local> = Arc::new(Local::new(time.clone(), Arc::new(before)));
        let admission = Admission::new(paper.clone(), counts, time, metrics.clone());
        World { admission, clock, paper, metrics, limits, rules }
    }

    fn knock(&self, caller: &Caller) -> Result<Door, Refusal> {
        now(self.admission.knock(caller, &self.limits, &self.rules))
    }

    fn admit(&self, door: &mut Door, tokens: u64) -> Result<Ticket, Refusal> {
        now(self.admission.admit(door, self.terms(tokens), Arc::default()))
    }

    fn terms(&self, tokens: u64) -> Terms {
        let reservation = Usage::tokens(0, tokens);
        let rates = Rates { output: PicoPerToken(1_000), ..Rates::default() };
        let price = Price { standard: Tariff { rates, ..Tariff::default() }, ..Price::default() };
        Terms {
            row: Row { started_ns: self.clock.now_ns(), ..row("r") },
            most: Most::of(&reservation, Extras::default(), &price),
            price,
            costs: Costs::Tokens,
            reservation,
            bound: None,
            billed_max: None,
            is_charged: true,
            durability: Durability::Process,
            hold: Box::new(()),
        }
    }

    fn reserved(&self) -> (f64, f64) {
        let text = self.metrics.encode();
        let read = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).expect("the gauge");
            line.rsplit(' ').next().unwrap().parse().unwrap()
        };
        (read("gateway_reserved_tokens "), read("gateway_reserved_usd "))
    }

    fn counted(&self, kind: &str, decision: &str) -> f64 {
        let labels = format!("decision=\"{decision}\",kind=\"{kind}\",scope=\"key\"");
        let text = self.metrics.encode();
        let line = text.lines().find(|line| line.contains(&labels)).expect("the series is there from the start");
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }
}

/// What never has to wait is there at once.
fn now<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    match future.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop())) {
        std::task::Poll::Ready(value) => value,
        std::task::Poll::Pending => panic!("it waits"),
    }
}

/// The limit that said no, in figures: which, of how much, used, held and asked for.
fn figures(refusal: Option<Refusal>) -> (String, u64, u64, u64, u64) {
    match refusal {
        Some(Refusal::Limited(reached)) => {
            let Reached { rule, limit, used, held, requested, .. } = *reached;
            (rule, limit, used, held, requested)
        }
        other => panic!("no limit said no: {other:?}"),
    }
}

fn said_no(refusal: Option<Refusal>, rule: &str) -> bool {
    figures(refusal).0 == rule
}

fn alice() -> Caller {
    Caller::for_tests("alice", OwnLimits::default())
}

fn spent(tokens: u64) -> Spent {
    Spent { usage: Usage::tokens(0, tokens), ..Spent::NOTHING }
}

fn left(door: &Door) -> u64 {
    door.quotas().tokens.remaining
}

#[test]
fn a_request_reserves_the_most_it_could_use_and_keeps_what_it_used() {
    let world = World::new(LIMITS, &[], &[]);
    let mut door = world.knock(&alice()).unwrap();
    let running = world.admit(&mut door, 500).unwrap().start();
    assert_eq!((left(&door), world.reserved()), (100, (500.0, 0.000_000_5)));
    running.settle(Outcome::Answered, spent(20), true).unwrap();
    assert_eq!((left(&door), world.reserved()), (580, (0.0, 0.0)));
    // Whatever happens before any work gives all of it back.
    drop(world.admit(&mut door, 500).unwrap());
    world.admit(&mut door, 500).unwrap().start().release();
    let _ = world.admit(&mut door, 500).unwrap().settle_hit(Usage::tokens(0, 300), UsageSource::Counted, "exact");
    world.paper.closed.store(true, Ordering::Relaxed);
    assert_eq!(world.admit(&mut door, 500).err(), Some(Refusal::LedgerFull));
    assert_eq!((left(&door), world.reserved()), (580, (0.0, 0.0)));
}

#[test]
fn a_wait_that_was_told_is_enough() {
    let world = World::new(Limits { per_day: NanoUsd(10_000), ..LIMITS }, &[], &[]);
    let mut door = world.knock(&alice()).unwrap();
    world.admit(&mut door, 600).unwrap().start().settle(Outcome::Answered, spent(600), true).unwrap();
    let refusal = world.admit(&mut door, 7).err().unwrap();
    let wait = refusal.retry_after().unwrap();
    assert_eq!(wait, Duration::from_millis(700), "ten tokens a second");
    assert_eq!(refusal.quotas().unwrap().tokens, Quota { limit: 600, remaining: 0, reset: Duration::from_secs(60) });
    world.clock.pass(wait - Duration::from_nanos(1));
    assert!(world.admit(&mut door, 7).is_err());
    world.clock.pass(Duration::from_nanos(1));
    assert!(world.admit(&mut door, 7).is_ok());
    let never = world.admit(&mut door, 601).err().unwrap();
    assert_eq!((never.retry_after(), never.describe().should_retry), (None, Some(false)));
}

#[test]
fn a_refused_request_takes_nothing_from_any_limit() {
    let world = World::new(Limits { concurrency: 1, requests_per_minute: 2, ..LIMITS }, &[], &[]);
    let mut door = world.knock(&alice()).unwrap();
    for _ in 0..5 {
        let refusal = world.knock(&alice()).err().unwrap();
        assert!(said_no(Some(refusal.clone()), "concurrency"), "{refusal:?}");
        assert_eq!(refusal.quotas().unwrap().requests.remaining, 2);
    }
    // Refused by tokens: no money is reserved. Refused by the budget: no tokens. No request is counted for either.
    assert!(said_no(world.admit(&mut door, 601).err(), "tokens_per_minute"));
    let terms = world.terms(10);
    let dear = Terms { most: Most { cost: NanoUsd(1_001), ..terms.most }, ..terms };
    let refusal = now(world.admission.admit(&mut door, dear, Arc::default())).err().unwrap();
    assert_eq!(refusal.quotas().unwrap(), door.quotas());
    assert_eq!(figures(Some(refusal)), ("usd_per_day".into(), 1_000, 0, 0, 1_001));
    assert_eq!((door.quotas().requests.remaining, left(&door), world.reserved()), (2, 600, (0.0, 0.0)));
    // What did nothing was no request, and what was answered from the cache is one.
    drop(world.admit(&mut door, 1).unwrap());
    assert_eq!(door.quotas().requests.remaining, 2);
    let _ = world.admit(&mut door, 1).unwrap().settle_hit(Usage::tokens(0, 300), UsageSource::Counted, "exact");
    world.admit(&mut door, 1).unwrap().start().settle(Outcome::Answered, spent(0), true).unwrap();
    assert_eq!((door.quotas().requests.remaining, left(&door)), (0, 600));
    assert!(said_no(world.admit(&mut door, 1).err(), "requests_per_minute"));
    drop(door);
    // Nobody's body is read for a request that cannot pass, and its place is free again.
    for _ in 0..3 {
        assert!(said_no(world.knock(&alice()).err(), "requests_per_minute"));
    }
    world.clock.pass(Duration::from_secs(30));
    assert!(world.knock(&alice()).is_ok());
    for (kind, allowed, denied) in
        [("concurrency", 3.0, 5.0), ("requests", 3.0, 4.0), ("tokens", 3.0, 1.0), ("budget", 3.0, 1.0)]
    {
        assert_eq!((world.counted(kind, "allowed"), world.counted(kind, "denied")), (allowed, denied), "{kind}");
    }
}

#[test]
fn who_does_not_listen_is_not_even_heard() {
    let world = World::new(Limits { requests_per_minute: 20, ..LIMITS }, &[], &[]);
    let refused: Vec<Refusal> = (0..100).filter_map(|_| world.knock(&alice()).err()).collect();
    assert!((15..=20).contains(&refused.len()), "eighty a minute, whatever becomes of them: {}", refused.len());
    assert!(refused.iter().all(|refusal| matches!(refusal, Refusal::Flooded { limit: 80, .. })), "{refused:?}");
    assert!(world.knock(&Caller::for_tests("bob", OwnLimits::default())).is_ok());
}

#[test]
fn a_budget_counts_what_was_spent_before_the_start_and_begins_anew_at_midnight() {
    let world = World::new(LIMITS, &[], &[("alice", 600)]);
    let mut door = world.knock(&alice()).unwrap();
    let refusal = world.admit(&mut door, 401).err().unwrap();
    assert_eq!(refusal.reached().unwrap().resets, Some((20_001 * DAY, Duration::from_secs(86_400))));
    assert_eq!(figures(Some(refusal)), ("usd_per_day".into(), 1_000, 600, 0, 401));
    let running = world.admit(&mut door, 400).unwrap().start();
    world.clock.pass(Duration::from_secs(86_400));
    // It began yesterday, so it is yesterday's.
    running.settle(Outcome::Answered, spent(400), true).unwrap();
    let today = world.admit(&mut door, 600).unwrap().start();
    today.settle(Outcome::Answered, spent(600), true).unwrap();
    assert_eq!(figures(world.admit(&mut door, 401).err()), ("usd_per_day".into(), 1_000, 600, 0, 401));
    // Nobody else pays for it.
    let mut bob = world.knock(&Caller::for_tests("bob", OwnLimits::default())).unwrap();
    assert!(world.admit(&mut bob, 600).is_ok());
}

#[test]
fn a_keys_own_limits_beat_the_default_and_a_change_keeps_what_was_used() {
    let mut world = World::new(LIMITS, &[], &[]);
    let own = OwnLimits {
        requests_per_minute: Some(7),
        tokens_per_minute: Some(100),
        concurrency: Some(1),
        per_day: Some(NanoUsd(50)),
    };
    let mut carol = world.knock(&Caller::for_tests("carol", own)).unwrap();
    assert_eq!((carol.quotas().requests.limit, carol.quotas().tokens.limit), (7, 100));
    assert_eq!(figures(world.admit(&mut carol, 51).err()), ("usd_per_day".into(), 50, 0, 0, 51));
    assert!(world.knock(&Caller::for_tests("carol", own)).is_err(), "one at a time");

    let mut door = world.knock(&alice()).unwrap();
    world.admit(&mut door, 200).unwrap().start().settle(Outcome::Answered, spent(200), true).unwrap();
    world.limits = Limits { tokens_per_minute: 300, requests_per_minute: 10, per_day: NanoUsd(250), ..LIMITS };
    let mut door = world.knock(&alice()).unwrap();
    assert_eq!(left(&door), 100, "200 of 300 are used");
    assert_eq!(door.quotas().requests.remaining, 9, "one request was made");
    assert!(said_no(world.admit(&mut door, 51).err(), "usd_per_day"), "200 of 250 are spent");
    world.limits = Limits { tokens_per_minute: 1000, per_day: NanoUsd(1_000), ..LIMITS };
    let door = world.knock(&alice()).unwrap();
    assert_eq!(left(&door), 800);
    // Another edit of the key counts for the next request.
    drop(carol);
    let more = OwnLimits { tokens_per_minute: Some(200), ..own };
    assert_eq!(left(&world.knock(&Caller::for_tests("carol", more)).unwrap()), 200);
}

#[test]
fn racing_threads_never_promise_more_than_the_budget_and_leave_nothing_reserved() {
    let world = World::new(Limits { requests_per_minute: 1_000_000, tokens_per_minute: 1_000_000, ..LIMITS }, &[], &[]);
    let billed = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let (world, billed) = (&world, &billed);
            scope.spawn(move || {
                for i in 0..200 {
                    let Ok(mut door) = world.knock(&alice()) else { continue };
                    let Ok(ticket) = world.admit(&mut door, 40) else { continue };
                    let used = (thread * 7 + i) % 41;
                    if used % 5 == 0 {
                        continue;
                    }
                    let receipt = ticket.start().settle(Outcome::Answered, spent(used), true).unwrap();
                    billed.fetch_add(receipt.billed.0, Ordering::Relaxed);
                }
            });
        }
    });
    let mut billed = billed.into_inner();
    // Who raced may have been refused for what others gave back later: the rest is asked for in peace.
    while let Ok(ticket) = world.admit(&mut world.knock(&alice()).unwrap(), 40) {
        billed += ticket.start().settle(Outcome::Answered, spent(40), true).unwrap().billed.0;
    }
    assert!(billed <= 1_000 && billed > 960, "{billed} of 1000: nothing over, and no room for another 40 left");
    assert_eq!(world.reserved(), (0.0, 0.0));
}

#[path = "rules_tests.rs"]
mod of_rules;
