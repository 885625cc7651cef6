//! The table of judgements beside the ledger's own, and which version answers better.
//!
//! An answer is found by its request id, which its response id holds and which is the ledger's primary key. A trace of
//! our own begins like its request's id, so that it is found there too; only traces that callers brought have an index.
//! What an answer was, and whose, its own row says: the row with `IS_ANSWER` and the judgement's request id.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension, Transaction, params};

use super::super::GroupBy;
use crate::accounting::feedback::{Answered, Change, Judgement, NAMES_MAX, Of, Score, Verdict};

/// The hexadecimal digits that a trace of our own shares with its request's id.
const SHARED_DIGITS: usize = 16;

/// Rows that are somebody's answer: no copy for comparison, no attempt that another took over, nothing that never began.
const IS_ANSWER: &str = "role <> 'shadow' AND outcome NOT IN ('failed_over', 'released')";

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
        None if names(transaction, &answered.request_id, judgement)? >= NAMES_MAX => return Ok(Verdict::TooManyNames),
        None => {
            write(transaction, INSERT, &answered.request_id, judgement)?;
            Change::Created
        }
        Some(last) => match write(transaction, UPDATE, &answered.request_id, judgement)? {
            0 => Change::Unchanged,
            _ if last == judgement.score => Change::Commented,
            _ => Change::Revised(last),
        },
    };
    Ok(Verdict::Taken { answered, change })
}

const ANSWERED: &str = "SELECT request_id, response_id, route, variant FROM ledger";

fn by_response(db: &Connection, id: &str, tenant: &str) -> rusqlite::Result<Vec<Answered>> {
    let Some(request_id) = id.strip_prefix("chatcmpl-").or_else(|| id.strip_prefix("cmpl-")) else {
        return Ok(Vec::new());
    };
    let sql = format!("{ANSWERED} WHERE request_id = ?1 AND response_id = ?2 AND tenant = ?3 AND {IS_ANSWER}");
    let mut query = db.prepare_cached(&sql)?;
    query.query_map([request_id, id, tenant], answered)?.collect()
}

fn by_trace(db: &Connection, id: &str, tenant: &str) -> rusqlite::Result<Vec<Answered>> {
    let shared = &id[..SHARED_DIGITS.min(id.len())];
    let mut query = db.prepare_cached(&trace_query())?;
    query.query_map([id, shared, tenant], answered)?.collect()
}

/// Answers of our own traces and of foreign ones, which none is both. At most two, as more would say no more: whoever has
/// one trace for everything must not make us read it all.
pub fn trace_query() -> String {
    let foreign = foreign_trace();
    // `g` comes after every hexadecimal digit.
    format!(
        "{ANSWERED} WHERE request_id BETWEEN ?2 AND ?2 || 'g' AND trace_id = ?1 AND tenant = ?3 AND {IS_ANSWER}
         UNION ALL {ANSWERED} WHERE trace_id = ?1 AND {foreign} AND tenant = ?3 AND {IS_ANSWER} LIMIT 2"
    )
}

fn answered(row: &rusqlite::Row<'_>) -> rusqlite::Result<Answered> {
    Ok(Answered { request_id: row.get(0)?, response_id: row.get(1)?, route: row.get(2)?, variant: row.get(3)? })
}

fn last_score(db: &Connection, request_id: &str, judgement: &Judgement) -> rusqlite::Result<Option<Score>> {
    let mut query =
        db.prepare_cached("SELECT number, label, kind FROM feedback WHERE request_id = ? AND name = ? AND key_id = ?")?;
    query
        .query_row([request_id, &judgement.name, &judgement.key_id], |row| {
            Ok(score(row.get(0)?, row.get(1)?, &row.get::<_, String>(2)?))
        })
        .optional()
}

/// Three columns as a score.
fn score(number: Option<f64>, label: Option<String>, kind: &str) -> Score {
    let number = number.unwrap_or_default();
    match label {
        Some(label) => Score::Label(label),
        None if kind == "boolean" => Score::Boolean(number == 1.0),
        None => Score::Number(number),
    }
}

/// How many names the key has judged the answer under.
fn names(db: &Connection, request_id: &str, judgement: &Judgement) -> rusqlite::Result<i64> {
    db.prepare_cached("SELECT COUNT(*) FROM feedback WHERE request_id = ? AND key_id = ?")?
        .query_row([request_id, &judgement.key_id], |row| row.get(0))
}

/// A score in its two columns.
fn columns(score: &Score) -> (Option<f64>, Option<&str>) {
    match score {
        Score::Boolean(is) => (Some(f64::from(u8::from(*is))), None),
        Score::Number(number) => (Some(*number), None),
        Score::Label(label) => (None, Some(label)),
    }
}

const INSERT: &str =
    "INSERT INTO feedback (request_id, name, key_id, kind, number, label, comment, created_ns, updated_ns)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?8)";
/// A comment stays until another comes; what changes nothing leaves the row as it is.
const UPDATE: &str =
    "UPDATE feedback SET kind = ?4, number = ?5, label = ?6, comment = COALESCE(?7, comment), updated_ns = ?8
    WHERE request_id = ?1 AND name = ?2 AND key_id = ?3
      AND (kind <> ?4 OR number IS NOT ?5 OR label IS NOT ?6 OR (?7 IS NOT NULL AND comment IS NOT ?7))";

/// Gives how many rows changed.
fn write(db: &Connection, sql: &str, request_id: &str, judgement: &Judgement) -> rusqlite::Result<usize> {
    let (number, label) = columns(&judgement.score);
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

/// What became of the requests of one group.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Answers {
    pub group: String,
    /// Answers that a model made for it, to their end or until the client left, and what those cost.
    pub made: u64,
    pub billed_nano_usd: u64,
    /// Told again, for nothing: they say nothing of what an answer costs.
    pub from_cache: u64,
    pub failed: u64,
}

/// Requests since `since_ns`, by group.
pub fn answers(db: &Connection, by: GroupBy, since_ns: i64) -> rusqlite::Result<Vec<Answers>> {
    let has_answer = "outcome IN ('answered', 'aborted')";
    let is_replay = "cache IN ('hit', 'coalesced')";
    let mut query = db.prepare(&format!(
        "SELECT {column}, SUM({has_answer} AND NOT {is_replay}),
                SUM(billed_nano_usd * ({has_answer} AND NOT {is_replay})),
                SUM({has_answer} AND {is_replay}), SUM(NOT {has_answer})
         FROM ledger WHERE started_ns >= ? AND {IS_ANSWER} GROUP BY 1 ORDER BY 1",
        column = by.column()
    ))?;
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

/// What was said of the answers of one group under one name.
#[derive(Debug, Default, PartialEq)]
pub struct Judged {
    /// How often `false`, and `true`.
    pub booleans: [u64; 2],
    pub numbers: Moments,
    pub labels: BTreeMap<String, u64>,
}

/// Count, mean and variance of numbers as they come (B. P. Welford 1962, Technometrics 4, 419–420): sums of squares would
/// cancel where the numbers are large and alike.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moments {
    pub count: u64,
    pub mean: f64,
    /// Of the squares of the distances from the mean.
    sum: f64,
}

impl Moments {
    pub fn add(&mut self, number: f64) {
        self.count += 1;
        let before = number - self.mean;
        self.mean += before / self.count as f64;
        self.sum += before * (number - self.mean);
    }

    /// Of the sample; one number alone has none.
    pub fn variance(&self) -> Option<f64> {
        (self.count > 1).then(|| self.sum / (self.count - 1) as f64)
    }
}

/// What was said of answers that began at `since_ns` or later, by group and name.
pub fn judged(db: &Connection, by: GroupBy, since_ns: i64) -> rusqlite::Result<BTreeMap<(String, String), Judged>> {
    let mut judged: BTreeMap<_, Judged> = BTreeMap::new();
    let mut query = db.prepare(&format!(
        "SELECT ledger.{column}, name, number, label, kind
         FROM feedback JOIN ledger USING (request_id) WHERE started_ns >= ? AND {IS_ANSWER}",
        column = by.column()
    ))?;
    let mut rows = query.query([since_ns])?;
    while let Some(row) = rows.next()? {
        let of = judged.entry((row.get(0)?, row.get(1)?)).or_default();
        match score(row.get(2)?, row.get(3)?, &row.get::<_, String>(4)?) {
            Score::Boolean(is) => of.booleans[usize::from(is)] += 1,
            Score::Number(number) => of.numbers.add(number),
            Score::Label(label) => *of.labels.entry(label).or_default() += 1,
        }
    }
    Ok(judged)
}
