//! Rows a second into the ledger's stores, each beside a plain batched insert of the same rows into the same tables: what
//! sums by the hour, counting once and being asked by others cost. And a year's spending, told from those sums.

use std::sync::Arc;
use std::time::{Duration, Instant};

use glassgate::accounting::core::{NanoUsd, Usage};
use glassgate::accounting::ledger::store::postgres::Target;
use glassgate::accounting::ledger::store::{By, Database, Period};
use glassgate::accounting::row::{COLUMNS, Cell, Outcome, Role, Row, UsageSource};
use serde_json::json;
use tokio_postgres::types::ToSql;

use super::postgres::Postgres;
use super::report::{Rounds, publish};

const ROUNDS: usize = 7;
const ROWS: usize = 20_480;
/// As the shipper's.
const BATCH_ROWS: usize = 1024;
const HOUR_NS: i64 = 3_600_000_000_000;
/// 2026-01-01, in hours.
const FIRST_HOUR: i64 = 490_896;
const YEAR_HOURS: i64 = 8_760;

pub fn run(root: &std::path::Path) {
    let postgres = Postgres::start_with(&[]);
    let plain_postgres = Postgres::start_with(&[]);
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let at = |postgres: &Postgres| Database::Postgres(Arc::new(Target::parse(&postgres.url(), None).unwrap()));
    let open = |database: &Database| (database.opener(1))().unwrap();
    let sqlite = Database::Sqlite(path("ours"));
    // The same tables, filled by somebody else.
    drop(open(&Database::Sqlite(path("plain"))));
    drop(open(&at(&plain_postgres)));
    let mut ours = [open(&sqlite), open(&at(&postgres))];
    let mut theirs: [Box<dyn Plain>; 2] =
        [Box::new(PlainSqlite::open(&path("plain"))), Box::new(PlainPostgres::open(&plain_postgres))];

    let mut rounds = Rounds::default();
    for round in 0..=ROUNDS {
        let rows: Vec<Row> = (0..ROWS).map(|number| row(round * ROWS + number)).collect();
        let mut measured = json!({});
        for (at, name) in ["sqlite", "postgres"].into_iter().enumerate() {
            let (store, plain) = (&mut ours[at], &mut theirs[at]);
            let ours = seconds(&rows, |batch| drop(store.ship(&batch.iter().collect::<Vec<_>>(), &[]).unwrap()));
            let theirs = seconds(&rows, |batch| plain.insert(batch));
            measured[format!("{name}_ours")] = (ROWS as f64 / ours.as_secs_f64()).into();
            measured[format!("{name}_theirs")] = (ROWS as f64 / theirs.as_secs_f64()).into();
            println!(
                "{name}: {:.0} and {:.0} rows/s",
                measured[format!("{name}_ours")],
                measured[format!("{name}_theirs")]
            );
        }
        // The first round warms caches and files.
        if round > 0 {
            rounds.0.push(measured);
        }
    }
    drop(ours);
    rusqlite::Connection::open(path("ours")).unwrap().execute_batch(&year("")).unwrap();
    postgres.ask(&format!("{}; ANALYZE", year("log, ")));
    for round in &mut rounds.0 {
        round["sqlite_year"] = spend(&sqlite).into();
        round["postgres_year"] = spend(&at(&postgres)).into();
    }
    let table = [
        ("ledger / plain insert, SQLite, rows/s", rounds.over("sqlite_ours", "sqlite_theirs")),
        ("ledger / plain insert, Postgres, rows/s", rounds.over("postgres_ours", "postgres_theirs")),
        ("rows/s into SQLite", rounds.of("sqlite_ours")),
        ("rows/s into Postgres", rounds.of("postgres_ours")),
        ("a year by key and day, 350,400 hourly sums, SQLite, seconds", rounds.of("sqlite_year")),
        ("… Postgres, seconds", rounds.of("postgres_year")),
    ];
    let table: Vec<_> = table.into_iter().map(|(name, spread)| (name.to_owned(), spread)).collect();
    publish(root, "ledger.json", &table, json!({"rounds": ROUNDS, "rows": ROWS, "batch_rows": BATCH_ROWS}));
}

/// A busy hour or two of some callers, each with a few users.
fn row(number: usize) -> Row {
    let began = FIRST_HOUR * HOUR_NS + number as i64 * 40_000_000;
    let request_id = format!("{:012x}7abc8def{number:012x}", began / 1_000_000);
    Row {
        attempt: 0,
        role: Role::Primary,
        response_id: format!("chatcmpl-{request_id}"),
        trace_id: format!("{}{:016x}", &request_id[..16], number),
        request_id,
        started_ns: began,
        ended_ns: began + 1_000_000_000,
        tenant: format!("tenant-{}", number % 4),
        key_id: format!("{:016x}", number % 20),
        route: "assistant".into(),
        model: format!("glimmer-{}", 1 + number % 2),
        variant: format!("glimmer-{}", 1 + number % 2),
        provider: "glassgate".into(),
        op: "chat".into(),
        stream: number.is_multiple_of(2),
        cache: "miss".into(),
        outcome: Outcome::Answered,
        usage: Usage::tokens(100 + number as u64 % 900, 50),
        usage_source: UsageSource::Counted,
        billed: NanoUsd(5_000),
        provider_cost: NanoUsd(700),
        price_version: "2026-11-01".into(),
        config_hash: "0123456789ab".into(),
        user_id: Some(format!("user-{}", number % 100)),
        unpriced: false,
        service_tier: None,
        images: 0,
    }
}

fn seconds(rows: &[Row], mut insert: impl FnMut(&[Row])) -> Duration {
    let began = Instant::now();
    rows.chunks(BATCH_ROWS).for_each(&mut insert);
    began.elapsed()
}

/// Somebody who only inserts.
trait Plain {
    fn insert(&mut self, batch: &[Row]);
}

fn names() -> String {
    COLUMNS.map(|(name, _)| name).join(", ")
}

struct PlainSqlite(rusqlite::Connection);

impl PlainSqlite {
    fn open(path: &std::path::Path) -> PlainSqlite {
        let db = rusqlite::Connection::open(path).unwrap();
        db.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL").unwrap();
        PlainSqlite(db)
    }
}

impl Plain for PlainSqlite {
    fn insert(&mut self, batch: &[Row]) {
        let places = vec!["?"; COLUMNS.len()].join(", ");
        let transaction = self.0.transaction().unwrap();
        let sql = format!("INSERT INTO ledger ({}) VALUES ({places})", names());
        let mut insert = transaction.prepare_cached(&sql).unwrap();
        for row in batch {
            insert.execute(rusqlite::params_from_iter(row.cells())).unwrap();
        }
        drop(insert);
        transaction.commit().unwrap();
    }
}

struct PlainPostgres {
    runtime: tokio::runtime::Runtime,
    client: tokio_postgres::Client,
    insert: tokio_postgres::Statement,
}

impl PlainPostgres {
    fn open(postgres: &Postgres) -> PlainPostgres {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        postgres.ask("CREATE TABLE ledger_2026 PARTITION OF ledger FOR VALUES FROM ('0') TO ('1')");
        let kinds = COLUMNS.iter().enumerate();
        let places: Vec<String> = kinds
            .map(|(at, (_, kind))| {
                format!("${}::{}[]", at + 1, if kind.starts_with("TEXT") { "text" } else { "bigint" })
            })
            .collect();
        let sql = format!("INSERT INTO ledger ({}, log) SELECT *, 1 FROM UNNEST({})", names(), places.join(", "));
        let (client, insert) = runtime.block_on(async {
            let (client, connection) = tokio_postgres::connect(&postgres.url(), tokio_postgres::NoTls).await.unwrap();
            tokio::spawn(connection);
            let insert = client.prepare(&sql).await.unwrap();
            (client, insert)
        });
        PlainPostgres { runtime, client, insert }
    }
}

impl Plain for PlainPostgres {
    fn insert(&mut self, batch: &[Row]) {
        let cells: Vec<_> = batch.iter().map(Row::cells).collect();
        let text = |at: usize| -> Vec<Option<&str>> {
            cells.iter().map(|cells| if let Cell::Text(text) = cells[at] { Some(text) } else { None }).collect()
        };
        let integer = |at: usize| -> Vec<Option<i64>> {
            cells.iter().map(|cells| if let Cell::Integer(number) = cells[at] { Some(number) } else { None }).collect()
        };
        let columns: Vec<Box<dyn ToSql + Sync>> = COLUMNS
            .iter()
            .enumerate()
            .map(|(at, (_, kind))| -> Box<dyn ToSql + Sync> {
                if kind.starts_with("TEXT") { Box::new(text(at)) } else { Box::new(integer(at)) }
            })
            .collect();
        let values: Vec<&(dyn ToSql + Sync)> = columns.iter().map(AsRef::as_ref).collect();
        self.runtime.block_on(self.client.execute(&self.insert, &values)).unwrap();
    }
}

/// A year of forty groups an hour, and not one row behind them.
fn year(log: &str) -> String {
    let one = if log.is_empty() { "" } else { "1, " };
    let sums = "requests, input_tokens, cache_read_tokens, cache_write_tokens, output_tokens, reasoning_tokens,
        billed_nano_usd, provider_cost_nano_usd, begun, made_input_tokens, made_output_tokens";
    format!(
        "WITH RECURSIVE hours (h) AS (SELECT {first} UNION ALL SELECT h + 1 FROM hours WHERE h < {last}),
             keys (k) AS (SELECT 0 UNION ALL SELECT k + 1 FROM keys WHERE k < 39)
         INSERT INTO spend_hour (hour, {log}tenant, key_id, user_id, route, model, variant, role, outcome, price_version, {sums})
         SELECT h, {one}'year', 'key' || k, '', 'assistant', 'glimmer-1', 'glimmer-1', 'primary', 'answered', 'v',
                28, 1000, 0, 0, 100, 0, 50000, 0, 28, 1000, 100 FROM hours, keys",
        first = FIRST_HOUR,
        last = FIRST_HOUR + YEAR_HOURS - 1
    )
}

/// How long `spend --by key,day` takes for the year, days beginning in the middle of an hour.
fn spend(database: &Database) -> f64 {
    let day = |day: i64| Period {
        name: format!("{day}"),
        first_ns: (FIRST_HOUR + day * 24) * HOUR_NS + HOUR_NS / 2,
        past_ns: (FIRST_HOUR + (day + 1) * 24) * HOUR_NS + HOUR_NS / 2,
    };
    let periods: Vec<Period> = (0..365).map(day).collect();
    let began = Instant::now();
    let spend = database.books().unwrap().spend(&[By::Key, By::Day], &periods).unwrap();
    let took = began.elapsed();
    assert!(spend.len() >= 365 * 40, "{} lines", spend.len());
    took.as_secs_f64()
}
