//! The table of judgements beside the ledger's own.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension, Transaction, params};

use super::super::GroupBy;
use super::super::feedback::{self as shared, Answers, Judged, Last, SHARED_DIGITS};
use crate::accounting::feedback::{Answered, Change, Judgement, Of, Verdict};

/// The columns in the order of the table, with their SQLite types. A contract, as the ledger's own are.
pub const COLUMNS: [(&str, &str); 9] = [
    ("request_id", "TEXT NOT NULL"),
    ("name", "TEXT NOT NULL"),
    ("key_id", "TEXT NOT NULL"),
    ("kind", "TEXT NOT NULL"),
    ("number", "REAL"),
    ("label", "TEXT"),
    ("comment", "TEXT"),
    ("created_ns", "INTEGER NOT NULL"),
    ("updated_ns", "INTEGER NOT NULL"),
];

/// Writes a judgement down, if there is exactly one answer that it can be about.
pub fn judge(transaction: &Transaction<'_>, judgement: &Judgement) -> rusqlite::Result<Verdict> {
    let answered = match shared::one(found(transaction, judgement)?) {
        Ok(answered) => answered,
        Err(verdict) => return Ok(verdict),
    };
    let change = match last(transaction, &answered.request_id, judgement)? {
        None if !shared::has_room(names(transaction, &answered.request_id, judgement)?) => {
            return Ok(Verdict::TooManyNames);
        }
        None => {
            write(transaction, shared::INSERT, &answered.request_id, judgement)?;
            Change::Created
        }
        Some(last) => {
            let rows = write(transaction, shared::UPDATE, &answered.request_id, judgement)?;
            shared::change(last, judgement, rows as u64)
        }
    };
    Ok(Verdict::Taken { answered, change })
}

fn found(db: &Connection, Judgement { of, tenant, .. }: &Judgement) -> rusqlite::Result<Vec<Answered>> {
    match of {
        Of::Response(id) => {
            let Some(request_id) = shared::request_of(id) else { return Ok(Vec::new()) };
            let mut query = db.prepare_cached(&shared::by_response())?;
            query.query_map([request_id, id, tenant], answered)?.collect()
        }
        Of::Trace(id) => {
            let digits = &id[..SHARED_DIGITS.min(id.len())];
            let mut query = db.prepare_cached(&shared::by_trace())?;
            query.query_map([id, digits, tenant], answered)?.collect()
        }
    }
}

fn answered(row: &rusqlite::Row<'_>) -> rusqlite::Result<Answered> {
    Ok(Answered { request_id: row.get(0)?, response_id: row.get(1)?, route: row.get(2)?, variant: row.get(3)? })
}

fn last(db: &Connection, request_id: &str, judgement: &Judgement) -> rusqlite::Result<Option<Last>> {
    let mut query = db.prepare_cached(shared::LAST)?;
    query
        .query_row([request_id, &judgement.name, &judgement.key_id], |row| {
            let score = shared::score(row.get(0)?, row.get(1)?, &row.get::<_, String>(2)?);
            Ok(Last { score, created_ns: row.get(3)?, updated_ns: row.get(4)? })
        })
        .optional()
}

fn names(db: &Connection, request_id: &str, judgement: &Judgement) -> rusqlite::Result<i64> {
    db.prepare_cached(shared::NAMES)?.query_row([request_id, &judgement.key_id], |row| row.get(0))
}

/// Gives how many rows changed.
fn write(db: &Connection, sql: &str, request_id: &str, judgement: &Judgement) -> rusqlite::Result<usize> {
    let (number, label) = shared::columns(&judgement.score);
    db.prepare_cached(sql)?.execute(params![
        request_id,
        judgement.name,
        judgement.key_id,
        judgement.score.kind(),
        number,
        label,
        judgement.comment,
        judgement.at_ns,
    ])
}

/// Requests since `since_ns`, by group.
pub fn answers(db: &Connection, by: GroupBy, since_ns: i64) -> rusqlite::Result<Vec<Answers>> {
    let mut query = db.prepare(&shared::answers(by))?;
    let rows = query.query_map([since_ns], |row| {
        let count = |at| row.get::<_, i64>(at).map(|value| value.max(0).unsigned_abs());
        Ok(Answers {
            group: row.get(0)?,
            made: count(1)?,
            billed_nano_usd: count(2)?,
            from_cache: count(3)?,
            failed: count(4)?,
        })
    })?;
    rows.collect()
}

/// What was said of answers that began at `since_ns` or later, by group and name.
pub fn judged(db: &Connection, by: GroupBy, since_ns: i64) -> rusqlite::Result<BTreeMap<(String, String), Judged>> {
    let mut judged: BTreeMap<_, Judged> = BTreeMap::new();
    let mut query = db.prepare(&shared::judged(by))?;
    let mut rows = query.query([since_ns])?;
    while let Some(row) = rows.next()? {
        let of = judged.entry((row.get(0)?, row.get(1)?)).or_default();
        of.add(shared::score(row.get(2)?, row.get(3)?, &row.get::<_, String>(4)?));
    }
    Ok(judged)
}
