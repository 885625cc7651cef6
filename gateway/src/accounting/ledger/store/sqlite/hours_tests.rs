//! What spending is asked of: hourly sums, and rows where an hour is cut.

use std::collections::BTreeMap;
use std::time::Instant;

use super::super::{Books as _, By, Period, Store as _};
use super::read::{SqliteBooks, spend_query};
use super::*;
use crate::accounting::core::{NanoUsd, Usage};
use crate::accounting::ledger::wal::tests::row as plain;

fn open() -> (tempfile::TempDir, Sqlite) {
    let folder = tempfile::tempdir().unwrap();
    let store = Sqlite::open(&folder.path().join("ledger.sqlite")).unwrap();
    (folder, store)
}

fn books(folder: &tempfile::TempDir) -> SqliteBooks {
    SqliteBooks::open(&folder.path().join("ledger.sqlite")).unwrap()
}

const HOUR: i64 = hours::HOUR_NS;

/// Rows at odd times of some days, of some keys and users.
fn rows() -> Vec<Row> {
    let row = |i: i64| Row {
        started_ns: i * 1_234_567_890_123 + 17,
        key_id: format!("k{}", i % 3),
        user_id: (i % 4 > 0).then(|| format!("u{}", i % 4)),
        usage: Usage::tokens(1 + i as u64 % 5, i as u64 % 7),
        billed: NanoUsd(i as u64 * 1001),
        ..plain(&format!("r{i}"))
    };
    (0..600).map(row).collect()
}

#[test]
fn spending_is_the_same_from_sums_as_from_rows_wherever_hours_are_cut() {
    let (folder, mut store) = open();
    let rows = rows();
    for some in rows.chunks(7) {
        store.ship(&some.iter().collect::<Vec<_>>(), &[]).unwrap();
        // Again: what was there already is not counted twice.
        store.ship(&some.iter().collect::<Vec<_>>(), &[]).unwrap();
    }
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
    let spend = books(&folder).spend(&[By::Day, By::Key, By::User], &periods).unwrap();
    let found: BTreeMap<_, _> = spend
        .iter()
        .map(|line| (line.by.clone(), (line.requests, line.input_tokens, line.output_tokens, line.billed.0)))
        .collect();
    assert_eq!(found.len(), spend.len());
    assert_eq!(found, expected);
    assert_eq!(books(&folder).uneven_hours(9).unwrap(), Vec::<String>::new());
}

#[test]
fn a_year_is_read_from_its_hours_and_no_row_of_whole_hours_is_touched() {
    let (folder, store) = open();
    // A year of forty groups an hour, and not one row behind them.
    let year =
        "WITH RECURSIVE hours (hour) AS (SELECT 490000 UNION ALL SELECT hour + 1 FROM hours WHERE hour < 498759),
                     keys (key) AS (SELECT 0 UNION ALL SELECT key + 1 FROM keys WHERE key < 39)
                INSERT INTO spend_hour SELECT hour, 'default', 'key' || key, '', 'assistant', 'glimmer-1', 'glimmer-1',
                    'primary', 'answered', 'v', 28, 1000, 0, 0, 100, 0, 50000, 0 FROM hours, keys";
    store.db.execute_batch(year).unwrap();
    let day = |day: i64| Period {
        name: format!("{day}"),
        first_ns: (490_000 + day * 24) * HOUR,
        past_ns: (490_000 + (day + 1) * 24) * HOUR,
    };
    let mut periods: Vec<Period> = (0..365).map(day).collect();
    periods[0].first_ns -= HOUR / 2;
    let by = [By::Key, By::Day];
    let began = Instant::now();
    let spend = books(&folder).spend(&by, &periods).unwrap();
    println!("{} lines of 9.8 million requests in {:?}", spend.len(), began.elapsed());
    assert_eq!(spend.len(), 365 * 40);
    assert_eq!(spend.iter().map(|line| line.requests).sum::<u64>(), 8760 * 40 * 28);

    let (sql, values) = spend_query(&by, &periods);
    assert_eq!(values.len(), 3 * (365 + 1), "a day is one span of whole hours; the first has half an hour more");
    let mut plan = store.db.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
    let steps = plan.query_map(params_from_iter(values), |row| row.get::<_, String>(3)).unwrap();
    let plan = steps.collect::<rusqlite::Result<Vec<_>>>().unwrap().join("\n");
    assert!(plan.contains("SEARCH spend_hour USING PRIMARY KEY (hour>? AND hour<?)"), "{plan}");
    assert!(plan.contains("SEARCH ledger USING INDEX ledger_by_time (started_ns>? AND started_ns<?)"), "{plan}");
    assert!(!plan.contains("SCAN ledger") && !plan.contains("SCAN spend_hour"), "{plan}");
}

#[test]
fn users_beyond_the_bound_share_one_sum_also_after_a_restart() {
    let (folder, mut store) = open();
    let user = |i: usize| Row { user_id: Some(format!("user {i}")), ..plain(&format!("r{i}")) };
    let many: Vec<Row> = (0..hours::USERS_MAX + 5).map(user).collect();
    store.ship(&many.iter().collect::<Vec<_>>(), &[]).unwrap();
    drop(store);
    let mut store = Sqlite::open(&folder.path().join("ledger.sqlite")).unwrap();
    let late = [user(hours::USERS_MAX + 5), Row { request_id: "again".into(), ..user(3) }];
    store.ship(&late.iter().collect::<Vec<_>>(), &[]).unwrap();
    let all = [Period { name: String::new(), first_ns: 0, past_ns: HOUR }];
    let spend = books(&folder).spend(&[By::User], &all).unwrap();
    let of = |name: &str| spend.iter().find(|line| line.by[0] == name).map(|line| line.requests);
    assert_eq!((spend.len(), of("other"), of("user 3")), (hours::USERS_MAX + 1, Some(6), Some(2)));
}

#[test]
fn a_row_that_is_there_stays_and_what_another_says_is_noticed() {
    let (folder, mut store) = open();
    let (first, other) = (plain("r"), Row { billed: NanoUsd(10), ..plain("r") });
    let fates = |store: &mut Sqlite, row: &Row| store.ship(&[row], &[]).unwrap().fates;
    assert_eq!(fates(&mut store, &first), [Fate::New]);
    assert_eq!(fates(&mut store, &first), [Fate::There]);
    assert_eq!(fates(&mut store, &other), [Fate::Different]);
    let there = books(&folder).row(&crate::accounting::ledger::wal::id(&first)).unwrap();
    assert_eq!(there, Some(first), "every column comes back as it went in");
}
