//! What spending is asked of: hourly sums, and rows where an hour is cut.

use std::time::Instant;

use super::super::{Books as _, By, Period, Store as _};
use super::super::{hours as sums, sql};
use super::read::{SqliteBooks, about};
use super::*;
use crate::accounting::ledger::wal::tests::row as plain;

fn open() -> (tempfile::TempDir, Sqlite) {
    let folder = tempfile::tempdir().unwrap();
    let store = Sqlite::open(&folder.path().join("ledger.sqlite")).unwrap();
    (folder, store)
}

fn books(folder: &tempfile::TempDir) -> SqliteBooks {
    SqliteBooks::open(&folder.path().join("ledger.sqlite")).unwrap()
}

const HOUR: i64 = sums::HOUR_NS;

#[test]
fn a_year_is_read_from_its_hours_and_no_row_of_whole_hours_is_touched() {
    let (folder, store) = open();
    // A year of forty groups an hour, and not one row behind them.
    let year =
        "WITH RECURSIVE hours (hour) AS (SELECT 490000 UNION ALL SELECT hour + 1 FROM hours WHERE hour < 498759),
                     keys (key) AS (SELECT 0 UNION ALL SELECT key + 1 FROM keys WHERE key < 39)
                INSERT INTO spend_hour SELECT hour, 'default', 'key' || key, '', 'assistant', 'glimmer-1', 'glimmer-1',
                    'primary', 'answered', 'v', 28, 1000, 0, 0, 100, 0, 50000, 0, 28, 1000, 100, 0, 0 FROM hours, keys";
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

    let (sql, values) = about(&periods, |source| sql::spend(&by, source));
    assert_eq!(values.len(), 3 * (365 + 1), "a day is one span of whole hours; the first has half an hour more");
    let mut plan = store.db.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
    let steps = plan.query_map(params_from_iter(values), |row| row.get::<_, String>(3)).unwrap();
    let plan = steps.collect::<rusqlite::Result<Vec<_>>>().unwrap().join("\n");
    assert!(plan.contains("SEARCH spend_hour USING PRIMARY KEY (hour>? AND hour<?)"), "{plan}");
    assert!(plan.contains("SEARCH ledger USING INDEX ledger_by_time (started_ns>? AND started_ns<?)"), "{plan}");
    assert!(!plan.contains("SCAN ledger") && !plan.contains("SCAN spend_hour"), "{plan}");
}

#[test]
fn sums_of_before_limits_were_counted_by_the_hour_are_completed_from_their_rows() {
    let (folder, mut store) = open();
    let row = |i: usize| Row {
        user_id: (!i.is_multiple_of(3)).then(|| format!("user {i}")),
        cache: ["none", "hit"][i % 2].into(),
        ..plain(&format!("r{i}"))
    };
    // So many that some users share a sum.
    let rows: Vec<Row> = (0..sums::USERS_MAX * 3 / 2 + 20).map(row).collect();
    store.ship(&rows.iter().collect::<Vec<_>>(), &[]).unwrap();
    let before = books(&folder).spent_between(0, HOUR, None).unwrap();
    let names = ["begun", "made_input_tokens", "made_output_tokens"];
    let adjusted = ["billed_adjusted_nano_usd", "provider_cost_adjusted_nano_usd"];
    let of_hours = names.iter().chain(&adjusted).map(|name| format!("ALTER TABLE spend_hour DROP COLUMN {name};"));
    let of_rows = ["service_tier", "images"].map(|name| format!("ALTER TABLE ledger DROP COLUMN {name};"));
    let back: String = of_hours.chain(of_rows).collect();
    store
        .db
        .execute_batch(&format!("{back} DROP TABLE ledger_kept; DROP TABLE adjustment; PRAGMA user_version = 2"))
        .unwrap();
    drop(store);
    drop(Sqlite::open(&folder.path().join("ledger.sqlite")).unwrap());
    assert_eq!(books(&folder).spent_between(0, HOUR, None).unwrap(), before);
    assert_eq!(books(&folder).uneven_hours(9).unwrap(), Vec::<String>::new());
}
