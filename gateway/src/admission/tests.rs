use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::accounting::core::{PicoPerToken, Price, Usage};
use crate::accounting::ledger::wal::tests::row;
use crate::accounting::row::{Outcome, Row, UsageSource};
use crate::accounting::settlement::{Costs, Durability, Held, JournalClosed, Slot, Spent};
use crate::auth::store::OwnLimits;

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
    fn store(&self, _row: Row) {}
}

struct World {
    admission: Admission,
    clock: Arc<Hands>,
    paper: Arc<Paper>,
    metrics: Arc<Metrics>,
    limits: Limits,
}

/// Prices are one nano-dollar a token.
const LIMITS: Limits =
    Limits { requests_per_minute: 1000, tokens_per_minute: 600, concurrency: 100, per_day: NanoUsd(1_000) };

impl World {
    fn new(limits: Limits, spent: &[(&str, u64)]) -> World {
        let clock = Arc::new(Hands(Mutex::new((20_000 * DAY, Instant::now()))));
        let (paper, metrics) = (Arc::new(Paper::default()), Arc::new(Metrics::new()));
        let by_key = spent.iter().map(|(key, nano)| ((*key).to_owned(), NanoUsd(*nano))).collect();
        let spent = SpentBefore { day: 20_000, by_key };
        let admission = Admission::new(paper.clone(), clock.clone(), metrics.clone(), spent);
        World { admission, clock, paper, metrics, limits }
    }

    fn knock(&self, caller: &Caller) -> Result<Door, Refusal> {
        self.admission.knock(caller, &self.limits)
    }

    fn admit(&self, door: &Door, tokens: u64) -> Result<Ticket, Refusal> {
        self.admission.admit(door, self.terms(tokens), Arc::default())
    }

    fn terms(&self, tokens: u64) -> Terms {
        let reservation = Usage::tokens(0, tokens);
        let price = Price { output: PicoPerToken(1_000), ..Price::default() };
        Terms {
            row: Row { started_ns: self.clock.now_ns(), ..row("r") },
            price,
            costs: Costs::Nothing,
            reservation,
            tokens_max: reservation.total(),
            cost_max: price.cost(&reservation),
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

fn alice() -> Caller {
    Caller::for_tests("alice", OwnLimits::default())
}

fn spent(tokens: u64) -> Spent {
    Spent { usage: Usage::tokens(0, tokens), source: UsageSource::Counted, compute: Duration::ZERO }
}

fn left(door: &Door) -> u64 {
    door.quotas().tokens.remaining
}

#[test]
fn a_request_reserves_the_most_it_could_use_and_keeps_what_it_used() {
    let world = World::new(LIMITS, &[]);
    let door = world.knock(&alice()).unwrap();
    let running = world.admit(&door, 500).unwrap().start();
    assert_eq!((left(&door), world.reserved()), (100, (500.0, 0.000_000_5)));
    running.settle(Outcome::Answered, spent(20), true).unwrap();
    assert_eq!((left(&door), world.reserved()), (580, (0.0, 0.0)));
    // Whatever happens before any work gives all of it back.
    drop(world.admit(&door, 500).unwrap());
    world.admit(&door, 500).unwrap().start().release();
    let _ = world.admit(&door, 500).unwrap().settle_hit(Usage::tokens(0, 300), UsageSource::Counted, "exact");
    world.paper.closed.store(true, Ordering::Relaxed);
    assert_eq!(world.admit(&door, 500).err(), Some(Refusal::LedgerFull));
    assert_eq!((left(&door), world.reserved()), (580, (0.0, 0.0)));
}

#[test]
fn a_wait_that_was_told_is_enough() {
    let world = World::new(Limits { per_day: NanoUsd(10_000), ..LIMITS }, &[]);
    let door = world.knock(&alice()).unwrap();
    world.admit(&door, 600).unwrap().start().settle(Outcome::Answered, spent(600), true).unwrap();
    let refusal = world.admit(&door, 7).err().unwrap();
    let wait = refusal.retry_after().unwrap();
    assert_eq!(wait, Duration::from_millis(700), "ten tokens a second");
    assert_eq!(refusal.quotas().unwrap().tokens, Quota { limit: 600, remaining: 0, reset: Duration::from_secs(60) });
    world.clock.pass(wait - Duration::from_nanos(1));
    assert!(world.admit(&door, 7).is_err());
    world.clock.pass(Duration::from_nanos(1));
    assert!(world.admit(&door, 7).is_ok());
    let never = world.admit(&door, 601).err().unwrap();
    assert_eq!((never.retry_after(), never.describe().should_retry), (None, Some(false)));
}

#[test]
fn a_refused_request_takes_nothing_from_any_other_limit() {
    let world = World::new(Limits { concurrency: 1, requests_per_minute: 2, ..LIMITS }, &[]);
    let door = world.knock(&alice()).unwrap();
    // Refused by concurrency: no request is counted.
    for _ in 0..5 {
        let refusal = world.knock(&alice()).err().unwrap();
        assert!(matches!(refusal, Refusal::ConcurrencyLimited { limit: 1, .. }), "{refusal:?}");
        assert_eq!(refusal.quotas().unwrap().requests.remaining, 1);
    }
    // Refused by tokens: no money is reserved. Refused by the budget: no tokens.
    assert!(matches!(world.admit(&door, 601).err(), Some(Refusal::TokensLimited { .. })));
    let dear = Terms { cost_max: NanoUsd(1_001), ..world.terms(10) };
    let refusal = world.admission.admit(&door, dear, Arc::default()).err().unwrap();
    assert!(matches!(refusal, Refusal::BudgetSpent { held: NanoUsd(0), .. }), "{refusal:?}");
    assert_eq!((left(&door), world.reserved()), (600, (0.0, 0.0)));
    drop(door);
    // Refused per minute: its place is free again.
    drop(world.knock(&alice()).unwrap());
    for _ in 0..3 {
        assert!(matches!(world.knock(&alice()).err(), Some(Refusal::RequestsLimited { .. })));
    }
    for (kind, allowed, denied) in
        [("concurrency", 2.0, 5.0), ("requests", 2.0, 3.0), ("tokens", 0.0, 1.0), ("budget", 0.0, 1.0)]
    {
        assert_eq!((world.counted(kind, "allowed"), world.counted(kind, "denied")), (allowed, denied), "{kind}");
    }
}

#[test]
fn a_budget_counts_what_was_spent_before_the_start_and_begins_anew_at_midnight() {
    let world = World::new(LIMITS, &[("alice", 600)]);
    let door = world.knock(&alice()).unwrap();
    let refusal = world.admit(&door, 401).err().unwrap();
    let Refusal::BudgetSpent { limit, spent: used, held, requested, resets_ns, reset } = refusal else {
        panic!("{refusal:?}")
    };
    assert_eq!((limit.0, used.0, held.0, requested.0), (1_000, 600, 0, 401));
    assert_eq!((resets_ns, reset), (20_001 * DAY, Duration::from_secs(86_400)));
    let running = world.admit(&door, 400).unwrap().start();
    world.clock.pass(Duration::from_secs(86_400));
    // It began yesterday, so it is yesterday's.
    running.settle(Outcome::Answered, spent(400), true).unwrap();
    let today = world.admit(&door, 600).unwrap().start();
    today.settle(Outcome::Answered, spent(600), true).unwrap();
    assert!(matches!(world.admit(&door, 401).err(), Some(Refusal::BudgetSpent { spent: NanoUsd(600), .. })));
    // Nobody else pays for it.
    let bob = world.knock(&Caller::for_tests("bob", OwnLimits::default())).unwrap();
    assert!(world.admit(&bob, 600).is_ok());
}

#[test]
fn a_keys_own_limits_beat_the_default_and_a_change_keeps_what_was_used() {
    let mut world = World::new(LIMITS, &[]);
    let own = OwnLimits {
        requests_per_minute: Some(7),
        tokens_per_minute: Some(100),
        concurrency: Some(1),
        per_day: Some(NanoUsd(50)),
    };
    let carol = world.knock(&Caller::for_tests("carol", own)).unwrap();
    assert_eq!((carol.quotas().requests.limit, carol.quotas().tokens.limit), (7, 100));
    assert!(matches!(world.admit(&carol, 51).err(), Some(Refusal::BudgetSpent { limit: NanoUsd(50), .. })));
    assert!(world.knock(&Caller::for_tests("carol", own)).is_err(), "one at a time");

    let door = world.knock(&alice()).unwrap();
    world.admit(&door, 200).unwrap().start().settle(Outcome::Answered, spent(200), true).unwrap();
    world.limits = Limits { tokens_per_minute: 300, requests_per_minute: 10, per_day: NanoUsd(250), ..LIMITS };
    let door = world.knock(&alice()).unwrap();
    assert_eq!(left(&door), 100, "200 of 300 are used");
    assert_eq!(door.quotas().requests.remaining, 8, "two requests were made");
    assert!(matches!(world.admit(&door, 51).err(), Some(Refusal::BudgetSpent { .. })), "200 of 250 are spent");
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
    let world = World::new(Limits { requests_per_minute: 1_000_000, tokens_per_minute: 1_000_000, ..LIMITS }, &[]);
    let billed = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let (world, billed) = (&world, &billed);
            scope.spawn(move || {
                for i in 0..200 {
                    let Ok(door) = world.knock(&alice()) else { continue };
                    let Ok(ticket) = world.admit(&door, 40) else { continue };
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
    while let Ok(ticket) = world.admit(&world.knock(&alice()).unwrap(), 40) {
        billed += ticket.start().settle(Outcome::Answered, spent(40), true).unwrap().billed.0;
    }
    assert!(billed <= 1_000 && billed > 960, "{billed} of 1000: nothing over, and no room for another 40 left");
    assert_eq!(world.reserved(), (0.0, 0.0));
}
