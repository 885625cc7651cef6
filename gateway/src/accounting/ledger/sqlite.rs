//! The ledger's table in SQLite: idempotent inserts, and the questions that `glassgate spend` asks.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior, params};

use super::super::core::NanoUsd;
use super::super::feedback::{Judgement, Verdict};
use super::super::row::{COLUMNS, Row, Sum};
use super::feedback;

/// Opens the ledger for writing and makes its tables.
pub fn open(path: &Path) -> rusqlite::Result<Connection> {
    let db = Connection::open(path)?;
    db.busy_timeout(Duration::from_secs(5))?;
    // NORMAL survives kill -9, which is what `durability = "process"` promises. A power cut may take the last commits.
    db.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;")?;
    let columns: Vec<String> = COLUMNS.iter().map(|(name, kind)| format!("{name} {kind}")).collect();
    db.execute_batch(&format!(
        "CREATE TABLE IF NOT EXISTS ledger ({}, PRIMARY KEY (request_id, attempt, role)) WITHOUT ROWID;
         CREATE INDEX IF NOT EXISTS ledger_by_time ON ledger (started_ns);",
        columns.join(", ")
    ))?;
    feedback::create(&db)?;
    Ok(db)
}

/// Opens the ledger for questions only; the gateway may be writing meanwhile.
pub fn open_readonly(path: &Path) -> rusqlite::Result<Connection> {
    let db = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    db.busy_timeout(Duration::from_secs(5))?;
    Ok(db)
}

/// Inserts rows in one transaction and returns which were new.
pub fn insert<'a>(db: &mut Connection, rows: impl IntoIterator<Item = &'a Row>) -> rusqlite::Result<Vec<bool>> {
    let transaction = begin(db)?;
    let new = add(&transaction, rows)?;
    transaction.commit()?;
    Ok(new)
}

/// Inserts rows and then judges, all in one transaction: a judgement finds every row that came before it.
pub fn ship<'a>(
    db: &mut Connection,
    rows: impl IntoIterator<Item = &'a Row>,
    judgements: impl IntoIterator<Item = &'a Judgement>,
) -> rusqlite::Result<Vec<Verdict>> {
    let transaction = begin(db)?;
    add(&transaction, rows)?;
    let judgements = judgements.into_iter();
    let verdicts = judgements.map(|judgement| feedback::judge(&transaction, judgement)).collect::<Result<_, _>>()?;
    transaction.commit()?;
    Ok(verdicts)
}

/// Begins to write, and waits for whoever else does: a transaction that began with reading would not be let wait.
fn begin(db: &mut Connection) -> rusqlite::Result<Transaction<'_>> {
    db.transaction_with_behavior(TransactionBehavior::Immediate)
}

/// A row that is there already stays as it is.
fn add<'a>(transaction: &Transaction<'_>, rows: impl IntoIterator<Item = &'a Row>) -> rusqlite::Result<Vec<bool>> {
    let names: Vec<&str> = COLUMNS.iter().map(|(name, _)| *name).collect();
    let places = vec!["?"; COLUMNS.len()].join(", ");
    let sql = format!(
        "INSERT INTO ledger ({}) VALUES ({places}) ON CONFLICT (request_id, attempt, role) DO NOTHING",
        names.join(", ")
    );
    let mut insert = transaction.prepare_cached(&sql)?;
    let mut new = Vec::new();
    for row in rows {
        let count = insert.execute(params![
            row.request_id,
            row.attempt,
            row.role.as_str(),
            row.response_id,
            row.trace_id,
            row.started_ns,
            row.ended_ns,
            row.tenant,
            row.key_id,
            row.route,
            row.model,
            row.variant,
            row.provider,
            row.op,
            row.stream,
            row.cache,
            row.outcome.as_str(),
            integer(row.usage.input),
            integer(row.usage.cache_read),
            integer(row.usage.cache_write),
            integer(row.usage.output),
            integer(row.usage.reasoning),
            row.usage_source.as_str(),
            integer(row.billed.0),
            integer(row.provider_cost.0),
            row.price_version,
            row.config_hash,
        ])?;
        new.push(count == 1);
    }
    Ok(new)
}

/// SQLite's integers are signed. Nine quintillion nano-dollars are more than there is.
fn integer(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// One line of `glassgate spend`.
#[derive(Debug, PartialEq, Eq, serde::Serialize)]
pub struct Spend {
    pub name: String,
    pub requests: u64,
    pub input_tokens: u64,
    pub output_tokens: u64,
    pub billed_nano_usd: u64,
    pub provider_cost_nano_usd: u64,
}

/// What spending can be grouped by. A closed set, so that no caller's text becomes SQL.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum GroupBy {
    Key,
    Tenant,
    Route,
    Model,
    Variant,
    Outcome,
}

impl GroupBy {
    pub fn column(self) -> &'static str {
        match self {
            GroupBy::Key => "key_id",
            GroupBy::Tenant => "tenant",
            GroupBy::Route => "route",
            GroupBy::Model => "model",
            GroupBy::Variant => "variant",
            GroupBy::Outcome => "outcome",
        }
    }
}

/// What limits have counted of requests that began at `since_ns` or later. What came from a cache was nobody's tokens, and
/// what was released nobody's request.
pub fn spent_since(db: &Connection, since_ns: i64) -> rusqlite::Result<Vec<Sum>> {
    let mut query = db.prepare(
        "SELECT tenant, key_id, route, model,
                SUM(attempt = 0 AND outcome <> 'released'),
                SUM(CASE WHEN cache IN ('none', 'miss') THEN input_tokens + cache_read_tokens + cache_write_tokens ELSE 0 END),
                SUM(CASE WHEN cache IN ('none', 'miss') THEN output_tokens + reasoning_tokens ELSE 0 END),
                SUM(billed_nano_usd)
         FROM ledger WHERE started_ns >= ? AND role <> 'shadow' GROUP BY 1, 2, 3, 4",
    )?;
    let rows = query.query_map([since_ns], |row| {
        let count = |at| row.get::<_, i64>(at).map(|value| value.max(0).unsigned_abs());
        Ok(Sum {
            tenant: row.get(0)?,
            key_id: row.get(1)?,
            route: row.get(2)?,
            model: row.get(3)?,
            requests: count(4)?,
            input_tokens: count(5)?,
            output_tokens: count(6)?,
            billed: NanoUsd(count(7)?),
        })
    })?;
    rows.collect()
}

/// Spending since `since_ns`, the dearest first.
pub fn spend(db: &Connection, by: GroupBy, since_ns: i64) -> rusqlite::Result<Vec<Spend>> {
    let mut query = db.prepare(&format!(
        "SELECT {column}, COUNT(*), SUM(input_tokens + cache_read_tokens + cache_write_tokens),
                SUM(output_tokens + reasoning_tokens), SUM(billed_nano_usd), SUM(provider_cost_nano_usd)
         FROM ledger WHERE started_ns >= ? GROUP BY 1 ORDER BY 5 DESC, 1",
        column = by.column()
    ))?;
    let rows = query.query_map([since_ns], |row| {
        let count = |at| row.get::<_, i64>(at).map(|value| value.max(0) as u64);
        Ok(Spend {
            name: row.get(0)?,
            requests: count(1)?,
            input_tokens: count(2)?,
            output_tokens: count(3)?,
            billed_nano_usd: count(4)?,
            provider_cost_nano_usd: count(5)?,
        })
    })?;
    rows.collect()
}
