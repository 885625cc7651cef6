//! Settlement against a model: any interleaving of requests, any ending, a crash at any byte.
//!
//! The model keeps, in a few lines, what must be true; the real `Ticket`, `Running` and log format are driven beside it.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use proptest::prelude::*;

use super::super::core::PicoPerToken;
use super::super::ledger::wal::{self, Kind, tests::row};
use super::super::price::{Rates, Tariff};
use super::super::reprice;
use super::*;

/// A journal of bytes in memory with a bound, built on the real format.
#[derive(Default)]
struct Paper {
    inner: Mutex<PaperState>,
    bytes_max: u64,
}

#[derive(Default)]
struct PaperState {
    bytes: Vec<u8>,
    reserved: u64,
    sequence: u64,
    broken: bool,
    /// Syncs fail from now on.
    unsyncable: bool,
    stored: Vec<Row>,
    shipped: Vec<Row>,
}

impl Journal for Paper {
    fn open(&self, row: &Row) -> Result<Slot, JournalClosed> {
        let mut state = self.inner.lock().unwrap();
        let before = state.bytes.len();
        let sequence = state.sequence;
        let length = wal::encode(sequence, Kind::Intent, row, &mut state.bytes);
        let slot = wal::slot_bytes(length);
        if state.broken || state.bytes.len() as u64 + state.reserved + slot > self.bytes_max {
            state.bytes.truncate(before);
            return Err(JournalClosed);
        }
        state.sequence += 1;
        state.reserved += slot;
        Ok(Slot { segment: 0, bytes: slot })
    }

    fn close(&self, slot: Slot, row: Row, durability: Durability) -> Result<Option<Box<Held>>, Box<Row>> {
        let mut state = self.inner.lock().unwrap();
        state.reserved -= slot.bytes;
        if state.broken {
            return Err(Box::new(row));
        }
        let sequence = state.sequence;
        let length = wal::encode(sequence, Kind::Terminal, &row, &mut state.bytes);
        state.sequence += 1;
        assert!(length as u64 <= slot.bytes, "a terminal row outgrew its slot");
        assert!(state.bytes.len() as u64 + state.reserved <= self.bytes_max, "the bound does not hold");
        match durability {
            Durability::Power => Ok(Some(Box::new(Held { segment: 0, sequence, row }))),
            Durability::Process => {
                state.shipped.push(row);
                Ok(None)
            }
        }
    }

    fn ship(&self, held: Held) {
        self.inner.lock().unwrap().shipped.push(held.row);
    }

    fn durable(&self, _sequence: u64) -> Pin<Box<dyn Future<Output = bool> + Send>> {
        Box::pin(std::future::ready(!self.inner.lock().unwrap().unsyncable))
    }

    fn amend(&self, written: Option<Held>, row: Row) {
        let mut state = self.inner.lock().unwrap();
        match written {
            Some(_) => state.shipped.push(row),
            None => state.stored.push(row),
        }
    }
}

/// The rows that stand in a log that is cut off here.
fn standing(bytes: &[u8]) -> Vec<Row> {
    wal::standing(wal::scan(bytes).records).into_iter().map(|(_, _, row)| row).collect()
}

struct Tick(AtomicU64);

impl Clock for Tick {
    fn now_ns(&self) -> i64 {
        self.0.fetch_add(1, Ordering::Relaxed) as i64
    }
    fn instant(&self) -> Instant {
        Instant::now()
    }
}

struct Count(AtomicU64);

impl Meter for Count {
    fn produced(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What happens to one request after it was admitted.
#[derive(Clone, Copy, Debug)]
enum Fate {
    DroppedBeforeStart,
    PanickedBeforeStart,
    RefusedByBackend,
    Answered {
        tokens: u64,
    },
    AbortedBeforeStream,
    AbortedInStream {
        tokens: u64,
    },
    TimedOut {
        tokens: u64,
    },
    Panicked {
        tokens: u64,
    },
    DroppedUnmeasured,
    StillRunning {
        tokens: u64,
    },
    /// So many attempts that gave nothing, then an answer.
    FailedOver {
        attempts: u32,
        tokens: u64,
    },
    /// The process dies in a later attempt.
    StillRunningLater {
        attempts: u32,
    },
}

fn fate() -> impl Strategy<Value = Fate> {
    let tokens = 0u64..64;
    prop_oneof![
        Just(Fate::DroppedBeforeStart),
        Just(Fate::PanickedBeforeStart),
        Just(Fate::RefusedByBackend),
        tokens.clone().prop_map(|tokens| Fate::Answered { tokens }),
        Just(Fate::AbortedBeforeStream),
        tokens.clone().prop_map(|tokens| Fate::AbortedInStream { tokens }),
        tokens.clone().prop_map(|tokens| Fate::TimedOut { tokens }),
        tokens.clone().prop_map(|tokens| Fate::Panicked { tokens }),
        Just(Fate::DroppedUnmeasured),
        tokens.clone().prop_map(|tokens| Fate::StillRunning { tokens }),
        (1u32..4, tokens).prop_map(|(attempts, tokens)| Fate::FailedOver { attempts, tokens }),
        (1u32..4).prop_map(|attempts| Fate::StillRunningLater { attempts }),
    ]
}

const PROMPT: u64 = 7;
const OUTPUT_MAX: u64 = 64;
const IMAGES: u64 = 2;
const ASKED: Extras = Extras { images: IMAGES, service: None };

fn terms(id: &str, hold: Box<dyn Hold>) -> Terms {
    let reservation = Usage::tokens(PROMPT, OUTPUT_MAX);
    Terms {
        row: Row { images: IMAGES, ..row(id) },
        price: price(),
        costs: Costs::DeviceTime,
        reservation,
        most: Most::of(&reservation, ASKED, &price()),
        bound: None,
        billed_max: None,
        is_charged: true,
        durability: Durability::Process,
        hold,
    }
}

fn spent(tokens: u64) -> Spent {
    // Some upstreams tell how they served it.
    let service = (tokens % 2 == 1).then_some(Service::Priority);
    Spent { usage: Usage::tokens(PROMPT, tokens), service, ..Spent::NOTHING }
}

fn price() -> Price {
    let (input, output) = (PicoPerToken(20_000), PicoPerToken(80_000));
    let rates = Rates { input, output, ..Rates::default() };
    let standard = Tariff { rates, image: NanoUsd(70), request: NanoUsd(9), ..Tariff::default() };
    let priority = Tariff { image: NanoUsd(100), ..standard.clone() };
    Price { standard, services: [(Service::Priority, priority)].into(), ..Price::default() }
}

/// (outcome, tokens produced) that the ledger must show for a fate.
fn expected(fate: Fate) -> (Outcome, Usage, UsageSource) {
    let counted = |outcome, tokens| (outcome, Usage::tokens(PROMPT, tokens), UsageSource::Counted);
    let nothing = |outcome| (outcome, Usage::default(), UsageSource::Counted);
    let reserved = |outcome| (outcome, Usage::tokens(PROMPT, OUTPUT_MAX), UsageSource::Reserved);
    match fate {
        Fate::DroppedBeforeStart | Fate::RefusedByBackend => nothing(Outcome::Released),
        Fate::PanickedBeforeStart => nothing(Outcome::Panicked),
        Fate::Answered { tokens } => counted(Outcome::Answered, tokens),
        Fate::AbortedBeforeStream => counted(Outcome::Aborted, 0),
        Fate::AbortedInStream { tokens } => counted(Outcome::Aborted, tokens),
        Fate::TimedOut { tokens } => counted(Outcome::TimedOut, tokens),
        Fate::Panicked { tokens } => counted(Outcome::Panicked, tokens),
        Fate::DroppedUnmeasured => reserved(Outcome::Aborted),
        Fate::StillRunning { .. } | Fate::StillRunningLater { .. } => reserved(Outcome::Killed),
        Fate::FailedOver { tokens, .. } => counted(Outcome::Answered, tokens),
    }
}

/// Starts, and fails over so often.
fn later(ticket: Ticket, attempts: u32) -> Running {
    (0..attempts).fold(ticket.start(), |running, _| {
        let next = Attempt {
            role: Role::Fallback,
            model: "other".into(),
            variant: "other".into(),
            provider: "upstream".into(),
            price: price(),
            costs: Costs::Tokens,
            reservation: Usage::tokens(PROMPT, OUTPUT_MAX),
        };
        running.fail_over(next).expect("room")
    })
}

fn attempts(fate: Fate) -> usize {
    match fate {
        Fate::FailedOver { attempts, .. } | Fate::StillRunningLater { attempts } => attempts as usize,
        _ => 0,
    }
}

/// Plays `fate` on a ticket and gives back what is still running.
fn play(ticket: Ticket, fate: Fate) -> Option<Running> {
    let metered = |ticket: Ticket, tokens| ticket.start().measured_by(Arc::new(Count(AtomicU64::new(tokens))));
    let settle = |running: Running, outcome, tokens| {
        let receipt = running.settle(outcome, spent(tokens), true);
        assert!(receipt.is_ok(), "settling found no room");
    };
    match fate {
        Fate::DroppedBeforeStart => drop(ticket),
        Fate::PanickedBeforeStart => {
            let _ = catch_unwind(AssertUnwindSafe(move || {
                let _held = ticket;
                std::panic::resume_unwind(Box::new("before start"));
            }));
        }
        Fate::RefusedByBackend => ticket.start().release(),
        Fate::Answered { tokens } => settle(metered(ticket, tokens), Outcome::Answered, tokens),
        Fate::AbortedBeforeStream => drop(metered(ticket, 0)),
        Fate::AbortedInStream { tokens } => drop(metered(ticket, tokens)),
        Fate::TimedOut { tokens } => settle(metered(ticket, tokens), Outcome::TimedOut, tokens),
        Fate::Panicked { tokens } => {
            let running = metered(ticket, tokens);
            let _ = catch_unwind(AssertUnwindSafe(move || {
                let _held = running;
                std::panic::resume_unwind(Box::new("in the stream"));
            }));
        }
        Fate::DroppedUnmeasured => drop(ticket.start()),
        Fate::StillRunning { tokens } => return Some(metered(ticket, tokens)),
        Fate::FailedOver { attempts, tokens } => settle(later(ticket, attempts), Outcome::Answered, tokens),
        Fate::StillRunningLater { attempts } => return Some(later(ticket, attempts)),
    }
    None
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Requests overlap, the process is killed at the end: one right row each, whatever happened.
    #[test]
    fn every_admitted_request_leaves_exactly_one_right_row(
        fates in proptest::collection::vec(fate(), 1..24),
        order in any::<u64>(),
    ) {
        let paper = Arc::new(Paper { bytes_max: 1 << 20, ..Paper::default() });
        let clock: Arc<dyn Clock> = Arc::new(Tick(AtomicU64::new(1)));
        let mut tickets = Vec::new();
        for (i, fate) in fates.iter().enumerate() {
            let receipt = Arc::new(OnceLock::new());
            let terms = terms(&format!("r{i}"), Box::new(()));
            let ticket = Ticket::admit(terms, paper.clone(), clock.clone(), receipt.clone()).expect("room");
            prop_assert_eq!(ticket.cost_max(), price().most(&Usage::tokens(PROMPT, OUTPUT_MAX), ASKED));
            tickets.push((i, *fate, ticket, receipt));
        }
        let middle = (order as usize) % tickets.len();
        tickets.rotate_left(middle);
        let mut alive = Vec::new();
        let mut receipts = HashMap::new();
        for (i, fate, ticket, receipt) in tickets {
            alive.extend(play(ticket, fate));
            receipts.insert(format!("r{i}"), (fate, receipt));
        }
        // kill -9: what still runs never gets to settle.
        let bytes = paper.inner.lock().unwrap().bytes.clone();
        let rows = standing(&bytes);
        let (left, rows): (Vec<Row>, Vec<Row>) =
            rows.into_iter().partition(|row| row.outcome == Outcome::FailedOver);
        prop_assert_eq!(left.len(), fates.iter().map(|fate| attempts(*fate)).sum::<usize>());
        prop_assert!(left.iter().all(|row| row.billed == NanoUsd(0) && row.usage == Usage::default()));
        prop_assert!(left.iter().all(|row| reprice::cost(row, &price()) == (NanoUsd(0), NanoUsd(0))));
        prop_assert_eq!(rows.len(), fates.len(), "one row ends a request");
        for row in &rows {
            let (fate, receipt) = &receipts[&row.request_id];
            let (outcome, usage, source) = expected(*fate);
            prop_assert_eq!(row.outcome, outcome);
            prop_assert_eq!(row.usage, usage);
            prop_assert_eq!(row.usage_source, source);
            let billed = match outcome {
                Outcome::Killed => price().most(&usage, ASKED),
                _ => price().cost(&usage, row.extras()),
            };
            prop_assert_eq!((row.billed, row.images), (billed, IMAGES));
            prop_assert_eq!(reprice::cost(row, &price()), (row.billed, row.provider_cost), "by its own price it costs the same");
            match receipt.get() {
                Some(receipt) => prop_assert_eq!((receipt.outcome, receipt.usage, receipt.billed), (outcome, usage, row.billed)),
                None => {
                    prop_assert!(matches!(fate, Fate::StillRunning { .. } | Fate::StillRunningLater { .. }), "no receipt")
                }
            }
        }
        let held = paper.inner.lock().unwrap().reserved;
        prop_assert_eq!(held > 0, !alive.is_empty(), "slots are held by what runs, and by nothing else");
        drop(alive);
        prop_assert_eq!(paper.inner.lock().unwrap().reserved, 0);
    }

    /// What was acknowledged before any byte of the log is still there when the log is cut at that byte.
    #[test]
    fn a_crash_at_any_byte_loses_no_acknowledged_row(
        fates in proptest::collection::vec(fate(), 1..12),
        cut in 0.0f64..=1.0,
    ) {
        let paper = Arc::new(Paper { bytes_max: 1 << 20, ..Paper::default() });
        let clock: Arc<dyn Clock> = Arc::new(Tick(AtomicU64::new(1)));
        let mut written = Vec::new();
        let mut alive = Vec::new();
        for (i, fate) in fates.iter().enumerate() {
            let receipt = Arc::new(OnceLock::new());
            let terms = terms(&format!("r{i}"), Box::new(()));
            let ticket = Ticket::admit(terms, paper.clone(), clock.clone(), receipt.clone()).expect("room");
            let admitted_at = paper.inner.lock().unwrap().bytes.len();
            alive.extend(play(ticket, *fate));
            let settled_at = receipt.get().map(|_| paper.inner.lock().unwrap().bytes.len());
            written.push((admitted_at, settled_at, *fate));
        }
        let bytes = paper.inner.lock().unwrap().bytes.clone();
        let at = (bytes.len() as f64 * cut) as usize;
        let mut rows: HashMap<String, Row> = HashMap::new();
        for row in standing(&bytes[..at]) {
            if row.outcome != Outcome::FailedOver {
                let id = row.request_id.clone();
                prop_assert!(rows.insert(id, row).is_none(), "two rows end one request");
            }
        }
        for (i, (admitted_at, settled_at, fate)) in written.iter().enumerate() {
            let found = rows.get(&format!("r{i}"));
            prop_assert_eq!(found.is_some(), *admitted_at <= at);
            let Some(found) = found else { continue };
            match settled_at {
                Some(settled_at) if *settled_at <= at => prop_assert_eq!(found.outcome, expected(*fate).0),
                _ => prop_assert_eq!(found.outcome, Outcome::Killed),
            }
        }
    }

    /// A full journal refuses at the door; whoever got in always finds room for the end.
    #[test]
    fn a_full_journal_refuses_the_next_and_never_the_admitted(bytes_max in 1_000u64..20_000) {
        let paper = Arc::new(Paper { bytes_max, ..Paper::default() });
        let clock: Arc<dyn Clock> = Arc::new(Tick(AtomicU64::new(1)));
        let mut admitted = Vec::new();
        for i in 0.. {
            let terms = terms(&format!("r{i}"), Box::new(()));
            match Ticket::admit(terms, paper.clone(), clock.clone(), Arc::new(OnceLock::new())) {
                Ok(ticket) => admitted.push(ticket.start()),
                Err(JournalClosed) => break,
            }
        }
        let count = admitted.len();
        for running in admitted {
            prop_assert!(running.settle(Outcome::Answered, spent(u64::MAX), true).is_ok());
        }
        let bytes = paper.inner.lock().unwrap().bytes.clone();
        let rows = standing(&bytes);
        prop_assert_eq!(rows.iter().filter(|row| row.outcome == Outcome::Answered).count(), count);
    }
}

#[test]
fn a_disk_that_fails_is_said_and_what_nobody_got_is_not_charged() {
    for delivered in [false, true] {
        let paper = Arc::new(Paper { bytes_max: 1 << 20, ..Paper::default() });
        let receipt = Arc::new(OnceLock::new());
        let terms = terms("r", Box::new(()));
        let clock: Arc<dyn Clock> = Arc::new(Tick(AtomicU64::new(1)));
        let running = Ticket::admit(terms, paper.clone(), clock, receipt.clone()).expect("room").start();
        paper.inner.lock().unwrap().broken = true;
        let usage = Usage::tokens(PROMPT, 3);
        let settled = running.settle(Outcome::Answered, spent(3), delivered);
        assert_eq!(settled, Err(JournalClosed), "usage must not leave before it is durable");
        let receipt = receipt.get().expect("the record has its receipt");
        let stored = &paper.inner.lock().unwrap().stored[0];
        let owed = if delivered { usage } else { Usage::default() };
        assert_eq!((receipt.outcome, receipt.usage), (Outcome::Failed, owed));
        assert_eq!(
            (stored.outcome, stored.usage, stored.billed),
            (Outcome::Failed, owed, price().cost(&owed, stored.extras()))
        );
    }
}

#[test]
fn a_row_that_must_survive_a_power_cut_is_told_and_shipped_once_it_would() {
    for (unsyncable, delivered) in [(false, true), (true, false), (true, true)] {
        let paper = Arc::new(Paper { bytes_max: 1 << 20, ..Paper::default() });
        let receipt = Arc::new(OnceLock::new());
        let terms = Terms { durability: Durability::Power, ..terms("r", Box::new(())) };
        let clock: Arc<dyn Clock> = Arc::new(Tick(AtomicU64::new(1)));
        let running = Ticket::admit(terms, paper.clone(), clock, receipt.clone()).expect("room").start();
        paper.inner.lock().unwrap().unsyncable = unsyncable;
        let pending = running.end(Outcome::Answered, spent(3), delivered);
        assert!(receipt.get().is_none() && paper.inner.lock().unwrap().shipped.is_empty(), "told too early");
        let mut durable = std::pin::pin!(pending.durable());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        let std::task::Poll::Ready(told) = durable.as_mut().poll(&mut context) else { panic!("paper syncs at once") };
        let receipt = receipt.get().expect("the record has its receipt");
        let owed = if !unsyncable || delivered { Usage::tokens(PROMPT, 3) } else { Usage::default() };
        let outcome = if unsyncable { Outcome::Failed } else { Outcome::Answered };
        assert_eq!(told.is_ok(), !unsyncable);
        let shipped = &paper.inner.lock().unwrap().shipped;
        assert_eq!(shipped.len(), 1);
        let billed = price().cost(&owed, shipped[0].extras());
        assert_eq!((receipt.outcome, receipt.usage, receipt.billed), (outcome, owed, billed));
        assert_eq!((shipped[0].outcome, shipped[0].usage), (outcome, owed));
    }
}

#[test]
fn whoever_does_not_wait_for_the_disk_leaves_the_row_as_it_was_written() {
    let paper = Arc::new(Paper { bytes_max: 1 << 20, ..Paper::default() });
    let receipt = Arc::new(OnceLock::new());
    let terms = Terms { durability: Durability::Power, ..terms("r", Box::new(())) };
    let clock: Arc<dyn Clock> = Arc::new(Tick(AtomicU64::new(1)));
    let running = Ticket::admit(terms, paper.clone(), clock, receipt.clone()).expect("room").start();
    drop(running.end(Outcome::Answered, spent(3), true).durable());
    assert_eq!(receipt.get().expect("told").outcome, Outcome::Answered);
    assert_eq!(paper.inner.lock().unwrap().shipped.len(), 1);
}
