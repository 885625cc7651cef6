//! What the ledger asks of a store, asked of each that there is: SQLite, and a real Postgres.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use glassgate::accounting::core::{NanoUsd, Usage};
use glassgate::accounting::feedback::{Change, Judgement, Of, Score, Verdict};
use glassgate::accounting::ledger::disk::RealDisk;
use glassgate::accounting::ledger::store::months::Month;
use glassgate::accounting::ledger::store::postgres::Target;
use glassgate::accounting::ledger::store::{By, Database, Fate, GroupBy, Period, Store, hours};
use glassgate::accounting::ledger::totals::Sums;
use glassgate::accounting::ledger::verify::verify;
use glassgate::accounting::ledger::wal;
use glassgate::accounting::ledger::{Ledger, Settings};
use glassgate::accounting::reprice::Booked;
use glassgate::accounting::row::{Outcome, Role, Row, Service, Sum, UsageSource};
use glassgate::accounting::settlement::{Durability, Journal as _};
use glassgate::observe::metrics::Metrics;
use glassgate::ports::{Clock as _, SystemClock};

use crate::support::eventually;
use crate::support::postgres::Postgres;

pub const HOUR: i64 = hours::HOUR_NS;
const ALL: [i64; 2] = [i64::MIN, i64::MAX];

/// Plays a test on an empty store of each kind.
pub fn each(test: impl Fn(&Database)) {
    let folder = tempfile::tempdir().unwrap();
    test(&Database::of(folder.path()));
    let postgres = Postgres::start();
    test(&database(&postgres));
}

pub fn database(postgres: &Postgres) -> Database {
    Database::Postgres(Arc::new(Target::parse(&postgres.url(), None).unwrap()))
}

pub fn open(database: &Database, log: i64) -> Box<dyn Store> {
    database.opener(log)().unwrap()
}

pub fn row(id: &str) -> Row {
    Row {
        request_id: id.to_owned(),
        attempt: 0,
        role: Role::Primary,
        response_id: format!("chatcmpl-{id}"),
        trace_id: format!("{:0<32}", id.get(..16).unwrap_or("0")),
        started_ns: 1,
        ended_ns: 2,
        tenant: "default".into(),
        key_id: "k".into(),
        route: "assistant".into(),
        model: "glimmer-1".into(),
        variant: "glimmer-1".into(),
        provider: "glassgate".into(),
        op: "chat".into(),
        stream: true,
        cache: "none".into(),
        outcome: Outcome::Answered,
        usage: Usage { input: 7, cache_read: 1, cache_write: 2, output: 3, reasoning: 4 },
        usage_source: UsageSource::Counted,
        billed: NanoUsd(9),
        provider_cost: NanoUsd(1),
        price_version: "v".into(),
        config_hash: "h".into(),
        user_id: None,
        unpriced: true,
        service_tier: None,
        images: 0,
    }
}

/// The id of a request that began then.
pub fn id_at(ns: i64, number: usize) -> String {
    format!("{:012x}7abc8def{number:012x}", ns / 1_000_000)
}

pub fn ship(store: &mut dyn Store, rows: &[Row]) -> Vec<Fate> {
    store.ship(&rows.iter().collect::<Vec<_>>(), &[]).unwrap().fates
}

#[test]
fn a_row_comes_back_as_it_went_in_and_stays_as_it_is() {
    each(|database| {
        let mut store = open(database, 1);
        let odd = Row {
            user_id: Some("naïve 'quoted' \"名前\"\n\\".into()),
            stream: false,
            unpriced: false,
            service_tier: Some(Service::Flex),
            images: 3,
            ..row("odd")
        };
        let retry = Row { attempt: 1, role: Role::Retry, billed: NanoUsd(u64::MAX >> 2), ..row("odd") };
        let dated = row(&id_at(1_790_000_000_000_000_000, 1));
        let other = Row { billed: NanoUsd(10), ..row("odd") };
        assert_eq!(ship(&mut *store, &[odd.clone(), retry.clone()]), [Fate::New, Fate::New]);
        let again = [odd.clone(), other, dated.clone(), dated.clone()];
        assert_eq!(ship(&mut *store, &again), [Fate::There, Fate::Different, Fate::New, Fate::There]);
        assert_eq!(ship(&mut *store, &[]), []);
        let books = database.books().unwrap();
        for row in [&odd, &retry, &dated] {
            assert_eq!(books.row(&wal::id(row)).unwrap().as_ref(), Some(row));
        }
        assert_eq!(books.row(&wal::id(&row("nobody"))).unwrap(), None);
        assert_eq!(books.sums_of(1, i64::MIN).unwrap(), Sums::of([&odd, &retry, &dated]));
        assert_eq!(books.uneven_hours(9).unwrap(), Vec::<String>::new());
    });
}

/// Rows at odd times of some days, of some keys and users, of all kinds.
pub fn many() -> Vec<Row> {
    let row = |i: i64| Row {
        started_ns: i * 1_234_567_890_123 + 17,
        attempt: (i % 9 == 8).into(),
        role: [Role::Primary, Role::Primary, Role::Shadow][i as usize % 3],
        outcome: [Outcome::Answered, Outcome::Released, Outcome::Aborted, Outcome::Answered][i as usize % 4],
        cache: ["none", "miss", "hit"][i as usize / 3 % 3].into(),
        key_id: format!("k{}", i % 3),
        user_id: (i % 4 > 0).then(|| format!("u{}", i % 4)),
        usage: Usage::tokens(1 + i as u64 % 5, i as u64 % 7),
        billed: NanoUsd(i as u64 * 1001),
        ..row(&format!("r{i}"))
    };
    (0..600).map(row).collect()
}

fn ship_twice(database: &Database, rows: &[Row]) {
    let mut store = open(database, 1);
    for some in rows.chunks(7) {
        ship(&mut *store, some);
        // Again: what was there already is not counted twice.
        assert!(ship(&mut *store, some).iter().all(|fate| *fate == Fate::There));
    }
}

#[test]
fn spending_is_the_same_from_sums_as_from_rows_wherever_hours_are_cut() {
    let rows = many();
    // Days of a zone at half past, cut in the middle of an hour at both ends; and one period within an hour.
    let mut periods: Vec<Period> = (0..9)
        .map(|day| Period {
            name: format!("day {day}"),
            first_ns: (day * 24 * HOUR - 11 * HOUR / 2).max(HOUR / 3),
            past_ns: (day + 1) * 24 * HOUR - 11 * HOUR / 2 + if day == 8 { 1_700_000_000_007 } else { 0 },
        })
        .collect();
    periods.push(Period { name: "minutes".into(), first_ns: 30 * HOUR + 5, past_ns: 30 * HOUR + HOUR / 2 });
    let mut expected: BTreeMap<Vec<String>, (u64, u64, u64, u64)> = BTreeMap::new();
    for period in &periods {
        let within = |row: &&Row| (period.first_ns..period.past_ns).contains(&row.started_ns);
        for row in rows.iter().filter(within) {
            let by = vec![period.name.clone(), row.key_id.clone(), row.user_id.clone().unwrap_or_default()];
            let sums = expected.entry(by).or_default();
            *sums = (sums.0 + 1, sums.1 + row.usage.prompt(), sums.2 + row.usage.completion(), sums.3 + row.billed.0);
        }
    }
    each(|database| {
        ship_twice(database, &rows);
        let books = database.books().unwrap();
        let spend = books.spend(&[By::Day, By::Key, By::User], &periods).unwrap();
        let found: BTreeMap<_, _> = spend
            .iter()
            .map(|line| (line.by.clone(), (line.requests, line.input_tokens, line.output_tokens, line.billed.0)))
            .collect();
        assert_eq!(found.len(), spend.len());
        assert_eq!(found, expected);
        let dearest = books.spend(&[By::Key], &periods[..1]).unwrap();
        assert!(dearest.is_sorted_by_key(|line| std::cmp::Reverse(line.billed)), "{dearest:?}");
        assert_eq!(books.uneven_hours(9).unwrap(), Vec::<String>::new());
        assert_eq!(books.first_hour().unwrap(), Some(0));
    });
}

#[test]
fn what_limits_counted_is_known_from_any_moment_on() {
    let rows = many();
    each(|database| {
        ship_twice(database, &rows);
        let books = database.books().unwrap();
        for (first, past) in [(0, i64::MAX), (30 * HOUR + HOUR / 2, i64::MAX), (3 * HOUR, 100 * HOUR + 1)] {
            let mut expected: BTreeMap<(String, Option<String>), [u64; 4]> = BTreeMap::new();
            let counts = |row: &&Row| row.role != Role::Shadow && (first..past).contains(&row.started_ns);
            for row in rows.iter().filter(counts) {
                let sums = expected.entry((row.key_id.clone(), row.user_id.clone())).or_default();
                let is_made = row.cache != "hit";
                sums[0] += u64::from(row.attempt == 0 && row.outcome != Outcome::Released);
                sums[1] += if is_made { row.usage.prompt() } else { 0 };
                sums[2] += if is_made { row.usage.completion() } else { 0 };
                sums[3] += row.billed.0;
            }
            let spent = books.spent_between(first, past, None).unwrap();
            let sums = |sum: &Sum| [sum.requests, sum.input_tokens, sum.output_tokens, sum.billed.0];
            let found = spent.iter().map(|sum| ((sum.key_id.clone(), sum.user.clone()), sums(sum)));
            assert_eq!(found.collect::<BTreeMap<_, _>>(), expected, "{first} to {past}");
        }
    });
}

#[test]
fn users_beyond_the_bound_share_one_sum_also_after_a_restart() {
    each(|database| {
        let user = |i: usize| Row { user_id: Some(format!("user {i}")), ..row(&format!("r{i}")) };
        let many: Vec<Row> = (0..hours::USERS_MAX + 5).map(user).collect();
        ship(&mut *open(database, 1), &many);
        let late = [user(hours::USERS_MAX + 5), Row { request_id: "again".into(), ..user(3) }];
        ship(&mut *open(database, 1), &late);
        let all = [Period { name: String::new(), first_ns: 0, past_ns: HOUR }];
        let books = database.books().unwrap();
        let spend = books.spend(&[By::User], &all).unwrap();
        let of = |name: &str| spend.iter().find(|line| line.by[0] == name).map(|line| line.requests);
        assert_eq!((spend.len(), of("other"), of("user 3")), (hours::USERS_MAX + 1, Some(6), Some(2)));
        assert_eq!(books.uneven_hours(9).unwrap(), Vec::<String>::new());
    });
}

#[test]
fn rows_are_told_by_when_they_began_until_nobody_wants_more() {
    each(|database| {
        let rows = many();
        ship(&mut *open(database, 1), &rows);
        let books = database.books().unwrap();
        let read = |[first, past]: [i64; 2], most: usize| {
            let mut told = Vec::new();
            let mut each = |booked: Booked| {
                told.push(booked.row);
                told.len() < most
            };
            books.rows(first, past, &mut each).unwrap();
            told
        };
        assert_eq!(read(ALL, usize::MAX), rows);
        assert_eq!(read(ALL, 5), rows[..5]);
        assert_eq!(read([rows[3].started_ns, rows[9].started_ns], usize::MAX), rows[3..9]);
    });
}

fn judgement(of: &str, score: Score, at_ns: i64) -> Judgement {
    let of = match of.strip_prefix("trace ") {
        Some(trace) => Of::Trace(trace.to_owned()),
        None => Of::Response(of.to_owned()),
    };
    let (name, tenant, key_id) = ("correct".into(), "default".into(), "k".into());
    Judgement { of, name, score, comment: None, tenant, key_id, at_ns }
}

#[test]
fn an_answer_is_judged_once_by_each_name_and_the_last_word_counts() {
    let foreign = "f".repeat(32);
    let answer = row(&id_at(1_790_000_000_000_000_000, 1));
    let own_trace = format!("{}{}", &answer.request_id[..16], "a".repeat(16));
    let answer = Row { trace_id: own_trace.clone(), ..answer };
    let twins = ["b", "c"].map(|id| Row { trace_id: foreign.clone(), ..row(id) });
    let replay = Row { cache: "hit".into(), billed: NanoUsd(0), ..row("d") };
    let failed = Row { outcome: Outcome::Failed, ..row("e") };
    each(|database| {
        let mut store = open(database, 1);
        // A judgement finds a row that comes with it.
        let first = judgement(&answer.response_id, Score::Boolean(true), 1);
        let shipped = store.ship(&[&answer, &twins[0], &twins[1], &replay, &failed], &[&first]).unwrap();
        let change = |verdict: &Verdict| match verdict {
            Verdict::Taken { change, .. } => change.clone(),
            verdict => panic!("{verdict:?}"),
        };
        assert_eq!(change(&shipped.verdicts[0]), Change::Created);
        let mut judge = |judgement: &Judgement| store.ship(&[], &[judgement]).unwrap().verdicts.remove(0);
        assert_eq!(change(&judge(&first)), Change::Created, "nobody knew whether the last commit was one");
        let later = judgement(&format!("trace {own_trace}"), Score::Boolean(true), 2);
        assert_eq!(change(&judge(&later)), Change::Unchanged);
        let said = Judgement { comment: Some("so\0 so".into()), ..later.clone() };
        assert_eq!(change(&judge(&said)), Change::Commented);
        let revised = judgement(&answer.response_id, Score::Boolean(false), 3);
        assert_eq!(change(&judge(&revised)), Change::Revised(Score::Boolean(true)));
        for (name, score) in
            [("mark", Score::Number(0.5)), ("mark", Score::Number(0.25)), ("kind", Score::Label("x".into()))]
        {
            judge(&Judgement { name: name.into(), score, ..revised.clone() });
        }
        assert_eq!(judge(&judgement("chatcmpl-nobody", Score::Boolean(true), 4)), Verdict::NoSuchAnswer);
        assert_eq!(judge(&Judgement { tenant: "theirs".into(), ..revised.clone() }), Verdict::NoSuchAnswer);
        assert_eq!(judge(&judgement(&format!("trace {foreign}"), Score::Boolean(true), 4)), Verdict::SeveralAnswers);
        let names = (0..20).map(|i| judge(&Judgement { name: format!("name {i}"), ..revised.clone() }));
        assert_eq!(names.filter(|verdict| *verdict == Verdict::TooManyNames).count(), 20 - (16 - 3));

        let books = database.books().unwrap();
        let answers = books.answers(GroupBy::Route, 0).unwrap();
        assert_eq!(answers.len(), 1);
        let told = (answers[0].made, answers[0].billed_nano_usd, answers[0].from_cache, answers[0].failed);
        assert_eq!(told, (3, 27, 1, 1));
        let judged = books.judged(GroupBy::Variant, 0).unwrap();
        let of = |name: &str| &judged[&("glimmer-1".to_owned(), name.to_owned())];
        assert_eq!((of("correct").booleans, of("kind").labels["x"]), ([1, 0], 1));
        assert_eq!((of("mark").numbers.count, of("mark").numbers.mean), (1, 0.25));
    });
}

#[test]
fn a_count_begins_with_what_is_there_and_each_log_has_its_own() {
    each(|database| {
        let mut store = open(database, 1);
        assert_eq!(store.counts().unwrap(), None);
        ship(&mut *store, &[row("before")]);
        store.count_from(7).unwrap();
        assert_eq!(store.counts().unwrap(), Some((7, Sums::default())));
        ship(&mut *store, &[row("before"), row("after")]);
        assert_eq!(store.counts().unwrap(), Some((7, Sums::of([&row("after")]))));
        assert_eq!(database.books().unwrap().counted_from(1).unwrap(), Some((7, Sums::of([&row("before")]))));
        let Database::Postgres(_) = database else { return };
        let mut another = open(database, 2);
        assert_eq!(another.counts().unwrap(), None);
        another.count_from(9).unwrap();
        ship(&mut *another, &[row("theirs"), row("after")]);
        assert_eq!(another.counts().unwrap(), Some((9, Sums::of([&row("theirs")]))));
        assert_eq!(store.counts().unwrap(), Some((7, Sums::of([&row("after")]))));
        assert_eq!(database.books().unwrap().sums_of(2, i64::MIN).unwrap(), Sums::of([&row("theirs")]));
    });
}

#[test]
fn a_ledger_is_whole_through_its_lives_on_either_store() {
    each(|database| {
        let folder = tempfile::tempdir().unwrap();
        let life = |names: std::ops::Range<usize>| {
            let metrics = Arc::new(Metrics::new());
            let ledger = Ledger::open(folder.path(), database, Settings::default(), metrics).unwrap();
            let found = ledger.recovered(Duration::from_secs(60)).unwrap();
            for i in names {
                let row = row(&format!("r{i}"));
                let slot = ledger.open(&Row { outcome: Outcome::Killed, ..row.clone() }).unwrap();
                if i % 10 > 0 {
                    ledger.close(slot, row, Durability::Process).unwrap();
                }
            }
            ledger.shut_down();
            found
        };
        life(0..30);
        assert_eq!(life(30..60).killed.len(), 3);
        assert_eq!(life(60..60).killed.len(), 3);
        let legs = verify(&RealDisk::new(folder.path().join("wal")), || database.books(), None).unwrap();
        assert!(legs.iter().all(|leg| leg.is_whole()), "{legs:?}");
        assert!(legs.iter().any(|leg| leg.name == "control totals" && leg.told.starts_with("60 rows")), "{legs:?}");
    });
}

#[test]
fn months_that_need_not_be_kept_go_and_their_sums_stay() {
    // The first of some months of 2026, UTC.
    let months = [1_767_225_600, 1_769_904_000, 1_772_323_200, 1_775_001_600].map(|second: i64| second * 1_000_000_000);
    each(|database| {
        let mut store = open(database, 1);
        store.count_from(7).unwrap();
        let of = |month: i64, number: usize| {
            let began = month + (number as i64 % 20) * HOUR;
            Row { started_ns: began, ..row(&id_at(began, number)) }
        };
        let rows: Vec<Row> = months.iter().flat_map(|month| (0..700).map(|number| of(*month, number))).collect();
        // The last attempt of a request begins when its month has ended.
        let late = Row { started_ns: months[2] + HOUR, attempt: 1, ..row(&id_at(months[2] - 1, 1)) };
        let all: Vec<&Row> = rows.iter().chain([&late]).collect();
        store.ship(&all, &[&judgement(&rows[0].response_id, Score::Boolean(true), 1)]).unwrap();
        let judged = || database.books().unwrap().judged(GroupBy::Variant, 0).unwrap().len();
        assert_eq!((store.latest().unwrap(), judged()), (Month::of(&rows[2100].request_id), 1));

        let march = Month::of(&rows[1400].request_id).unwrap();
        let steps = (0..).take_while(|_| store.keep_from(march).unwrap()).count();
        assert!(steps <= 2, "{steps}");
        let books = database.books().unwrap();
        let mut left = Vec::new();
        let mut each = |booked: Booked| {
            left.push(booked.row.request_id);
            true
        };
        books.rows(i64::MIN, i64::MAX, &mut each).unwrap();
        assert_eq!(left.len(), 1400);
        assert!(left.iter().all(|id| Month::of(id) >= Some(march)));
        assert_eq!(judged(), 0, "what was said of them goes with them");
        let year = [Period { name: String::new(), first_ns: 0, past_ns: months[3] + 720 * HOUR }];
        assert_eq!(books.spend(&[By::Tenant], &year).unwrap()[0].requests, 2801, "what was spent stays spent");
        assert_eq!(books.uneven_hours(9).unwrap(), Vec::<String>::new());
        assert_eq!(store.counts().unwrap().unwrap().1.rows, 2801);
        assert_eq!(books.sums_of_hours(1).unwrap().rows, 2801);
        // A row that comes again after that is not counted again, and a new one is.
        let again = ship(&mut *store, &[rows[0].clone(), rows[2000].clone(), of(months[3], 999)]);
        assert_eq!(again, [Fate::There, Fate::There, Fate::New]);
        assert_eq!(store.counts().unwrap().unwrap().1.rows, 2802);
    });
}

#[test]
fn a_ledger_that_keeps_some_months_lets_go_of_older_ones_and_is_still_whole() {
    each(|database| {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings { retain: Some(2), ..Settings::default() };
        let now = SystemClock.now_ns();
        let life = |rows: &[Row]| {
            let ledger = Ledger::open(folder.path(), database, settings, Arc::new(Metrics::new())).unwrap();
            ledger.recovered(Duration::from_secs(60)).unwrap();
            for row in rows {
                let slot = ledger.open(row).unwrap();
                ledger.close(slot, row.clone(), Durability::Process).unwrap();
            }
            ledger
        };
        let old_rows = || {
            let mut old = 0;
            let mut count = |_| {
                old += 1;
                true
            };
            database.books().unwrap().rows(i64::MIN, now - 90 * 24 * HOUR, &mut count).unwrap();
            old
        };
        let at = |days: i64| {
            let began = now - days * 24 * HOUR;
            Row { started_ns: began, ..row(&id_at(began, days as usize)) }
        };
        // In a life of its own: what the log still has must be in the store.
        let old: Vec<Row> = [200, 150, 100].map(at).into();
        ship(&mut *open(database, 5), &old);
        // What is old is told by the newest row, which may come after this life has looked.
        life(&[at(0)]).shut_down();
        let ledger = life(&[]);
        eventually("old months to go", || (old_rows() == 0).then_some(()));
        ledger.shut_down();
        let legs = verify(&RealDisk::new(folder.path().join("wal")), || database.books(), None).unwrap();
        let bad: Vec<_> = legs.iter().filter(|leg| !leg.is_whole()).collect();
        assert!(bad.is_empty(), "{bad:?}");
    });
}
