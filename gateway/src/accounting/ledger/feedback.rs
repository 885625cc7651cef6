//! The table of judgements beside the ledger's own, and which version answers better.
//!
//! An answer is found by its request id, which its response id holds and which is the ledger's primary key. A trace of
//! our own begins like its request's id, so that it is found there too; only traces that callers brought have an index.

use rusqlite::{Connection, OptionalExtension, Transaction, params};

use super::super::feedback::{Answered, Change, Judgement, Of, Score, Verdict};
use super::sqlite::GroupBy;

/// The hexadecimal digits that a trace of our own shares with its request's id.
const SHARED_DIGITS: usize = 16;

/// Rows that are somebody's answer: no copy for comparison, no attempt that another took over, nothing that never began.
const IS_ANSWER: &str = "role <> 'shadow' AND outcome NOT IN ('failed_over', 'released')";

/// The columns in the order of the table, with their SQLite types. A contract, as the ledger's own are.
pub const COLUMNS: [(&str, &str); 13] = [
    ("request_id", "TEXT NOT NULL"),
    ("name", "TEXT NOT NULL"),
    ("key_id", "TEXT NOT NULL"),
    ("tenant", "TEXT NOT NULL"),
    ("route", "TEXT NOT NULL"),
    ("model", "TEXT NOT NULL"),
    ("variant", "TEXT NOT NULL"),
    ("kind", "TEXT NOT NULL"),
    ("number", "REAL"),
    ("label", "TEXT"),
    ("comment", "TEXT"),
    ("created_ns", "INTEGER NOT NULL"),
    ("updated_ns", "INTEGER NOT NULL"),
];

/// Makes the table, and the index of the traces that are not ours.
pub fn create(db: &Connection) -> rusqlite::Result<()> {
    let columns: Vec<String> = COLUMNS.iter().map(|(name, kind)| format!("{name} {kind}")).collect();
    db.execute_batch(&format!(
        "CREATE TABLE IF NOT EXISTS feedback ({}, PRIMARY KEY (request_id, name, key_id)) WITHOUT ROWID;
         CREATE INDEX IF NOT EXISTS ledger_by_foreign_trace ON ledger (trace_id) WHERE {};",
        columns.join(", "),
        foreign_trace()
    ))
}

fn foreign_trace() -> String {
    format!("substr(trace_id, 1, {SHARED_DIGITS}) <> substr(request_id, 1, {SHARED_DIGITS})")
}

/// Writes a judgement down, if there is exactly one answer that it can be about.
pub fn judge(transaction: &Transaction<'_>, judgement: &Judgement) -> rusqlite::Result<Verdict> {
    let mut found = match &judgement.of {
        Of::Response(id) => by_response(transaction, id, &judgement.tenant)?,
        Of::Trace(id) => by_trace(transaction, id, &judgement.tenant)?,
    };
    let Some(answered) = found.pop() else { return Ok(Verdict::NoSuchAnswer) };
    if !found.is_empty() {
        return Ok(Verdict::SeveralAnswers);
    }
    let change = match last_score(transaction, &answered.request_id, judgement)? {
        None => {
            insert(transaction, &answered, judgement)?;
            Change::Created
        }
        Some(last) => {
            update(transaction, &answered.request_id, judgement)?;
            if last == judgement.score { Change::Unchanged } else { Change::Revised(last) }
        }
    };
    Ok(Verdict::Taken { answered, change })
}

const ANSWERED: &str = "SELECT request_id, response_id, route, model, variant FROM ledger";

fn by_response(db: &Connection, id: &str, tenant: &str) -> rusqlite::Result<Vec<Answered>> {
    let Some(request_id) = id.strip_prefix("chatcmpl-").or_else(|| id.strip_prefix("cmpl-")) else {
        return Ok(Vec::new());
    };
    let sql = format!("{ANSWERED} WHERE request_id = ?1 AND response_id = ?2 AND tenant = ?3 AND {IS_ANSWER}");
    let mut query = db.prepare_cached(&sql)?;
    query.query_map([request_id, id, tenant], answered)?.collect()
}

/// At most two: more would say no more.
fn by_trace(db: &Connection, id: &str, tenant: &str) -> rusqlite::Result<Vec<Answered>> {
    let shared = &id[..SHARED_DIGITS.min(id.len())];
    let foreign = foreign_trace();
    // `g` comes after every hexadecimal digit.
    let sql = format!(
        "{ANSWERED} WHERE request_id BETWEEN ?2 AND ?2 || 'g' AND trace_id = ?1 AND tenant = ?3 AND {IS_ANSWER}
         UNION {ANSWERED} WHERE trace_id = ?1 AND {foreign} AND tenant = ?3 AND {IS_ANSWER} LIMIT 2"
    );
    let mut query = db.prepare_cached(&sql)?;
    query.query_map([id, shared, tenant], answered)?.collect()
}

fn answered(row: &rusqlite::Row<'_>) -> rusqlite::Result<Answered> {
    Ok(Answered {
        request_id: row.get(0)?,
        response_id: row.get(1)?,
        route: row.get(2)?,
        model: row.get(3)?,
        variant: row.get(4)?,
    })
}

fn last_score(db: &Connection, request_id: &str, judgement: &Judgement) -> rusqlite::Result<Option<Score>> {
    let mut query =
        db.prepare_cached("SELECT number, label, kind FROM feedback WHERE request_id = ? AND name = ? AND key_id = ?")?;
    query
        .query_row([request_id, &judgement.name, &judgement.key_id], |row| {
            let (number, label): (Option<f64>, Option<String>) = (row.get(0)?, row.get(1)?);
            let kind: String = row.get(2)?;
            let number = number.unwrap_or_default();
            Ok(match label {
                Some(label) => Score::Label(label),
                None if kind == "boolean" => Score::Boolean(number == 1.0),
                None => Score::Number(number),
            })
        })
        .optional()
}

/// A score in its two columns.
fn columns(score: &Score) -> (Option<f64>, Option<&str>) {
    match score {
        Score::Boolean(is) => (Some(f64::from(u8::from(*is))), None),
        Score::Number(number) => (Some(*number), None),
        Score::Label(label) => (None, Some(label)),
    }
}

fn insert(db: &Connection, answered: &Answered, judgement: &Judgement) -> rusqlite::Result<()> {
    let (number, label) = columns(&judgement.score);
    db.prepare_cached(
        "INSERT INTO feedback (request_id, name, key_id, tenant, route, model, variant,
                               kind, number, label, comment, created_ns, updated_ns)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?12)",
    )?
    .execute(params![
        answered.request_id,
        judgement.name,
        judgement.key_id,
        judgement.tenant,
        answered.route,
        answered.model,
        answered.variant,
        judgement.score.kind(),
        number,
        label,
        judgement.comment,
        judgement.at_ns,
    ])?;
    Ok(())
}

/// A comment stays until another comes; what changes nothing leaves the row as it is.
fn update(db: &Connection, request_id: &str, judgement: &Judgement) -> rusqlite::Result<()> {
    let (number, label) = columns(&judgement.score);
    db.prepare_cached(
        "UPDATE feedback SET kind = ?4, number = ?5, label = ?6, comment = COALESCE(?7, comment), updated_ns = ?8
         WHERE request_id = ?1 AND name = ?2 AND key_id = ?3
           AND (kind <> ?4 OR number IS NOT ?5 OR label IS NOT ?6 OR (?7 IS NOT NULL AND comment IS NOT ?7))",
    )?
    .execute(params![
        request_id,
        judgement.name,
        judgement.key_id,
        judgement.score.kind(),
        number,
        label,
        judgement.comment,
        judgement.at_ns,
    ])?;
    Ok(())
}

/// The answers of one group, and what they cost.
#[derive(Debug, PartialEq, Eq)]
pub struct Answers {
    pub group: String,
    pub count: u64,
    pub billed_nano_usd: u64,
}

/// Answers since `since_ns`, by group.
pub fn answers(db: &Connection, by: GroupBy, since_ns: i64) -> rusqlite::Result<Vec<Answers>> {
    let mut query = db.prepare(&format!(
        "SELECT {column}, COUNT(*), SUM(billed_nano_usd) FROM ledger
         WHERE started_ns >= ? AND {IS_ANSWER} GROUP BY 1 ORDER BY 1",
        column = by.column()
    ))?;
    let rows = query.query_map([since_ns], |row| {
        let count = |at| row.get::<_, i64>(at).map(|value| value.max(0).unsigned_abs());
        Ok(Answers { group: row.get(0)?, count: count(1)?, billed_nano_usd: count(2)? })
    })?;
    rows.collect()
}

/// All judgements of one kind with one name about the answers of one group. Those with labels are told apart by label.
#[derive(Debug, PartialEq)]
pub struct Judged {
    pub group: String,
    pub name: String,
    pub kind: String,
    pub label: Option<String>,
    pub count: u64,
    pub sum: f64,
    pub sum_of_squares: f64,
}

/// What was said of answers that began at `since_ns` or later.
pub fn judged(db: &Connection, by: GroupBy, since_ns: i64) -> rusqlite::Result<Vec<Judged>> {
    let is_answer = IS_ANSWER;
    let mut query = db.prepare(&format!(
        "SELECT ledger.{column}, feedback.name, feedback.kind, feedback.label, COUNT(*),
                TOTAL(number), TOTAL(number * number)
         FROM feedback JOIN ledger USING (request_id)
         WHERE started_ns >= ? AND {is_answer} GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4",
        column = by.column()
    ))?;
    let rows = query.query_map([since_ns], |row| {
        Ok(Judged {
            group: row.get(0)?,
            name: row.get(1)?,
            kind: row.get(2)?,
            label: row.get(3)?,
            count: row.get::<_, i64>(4)?.max(0).unsigned_abs(),
            sum: row.get(5)?,
            sum_of_squares: row.get(6)?,
        })
    })?;
    rows.collect()
}
