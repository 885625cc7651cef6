//! What was said of answers: what both stores share of the table of judgements, and which version answers better.
//!
//! An answer is found by its request id, which its response id holds and which is the ledger's primary key. A trace of
//! our own begins like its request's id, so that it is found there too; only traces that callers brought have an index.
//! What an answer was, and whose, its own row says: the row with `IS_ANSWER` and the judgement's request id.
//!
//! Questions have their places numbered as `?1`; a store that writes them otherwise replaces them.

use std::collections::BTreeMap;

use super::GroupBy;
use super::adjust::ADJUSTED;
use crate::accounting::feedback::{Answered, Change, Judgement, NAMES_MAX, Score, Verdict};

/// The hexadecimal digits that a trace of our own shares with its request's id.
pub const SHARED_DIGITS: usize = 16;

/// Rows that are somebody's answer: no copy for comparison, no attempt that another took over, nothing that never began.
const IS_ANSWER: &str = "role <> 'shadow' AND outcome NOT IN ('failed_over', 'released')";

const ANSWERED: &str = "SELECT request_id, response_id, route, variant FROM ledger";

/// The request id in a response id of ours.
pub fn request_of(response_id: &str) -> Option<&str> {
    response_id.strip_prefix("chatcmpl-").or_else(|| response_id.strip_prefix("cmpl-"))
}

/// By request id, response id and tenant.
pub fn by_response() -> String {
    format!("{ANSWERED} WHERE request_id = ?1 AND response_id = ?2 AND tenant = ?3 AND {IS_ANSWER}")
}

/// By trace id, its shared digits and the tenant: answers of our own traces and of foreign ones, which none is both. At
/// most two, as more would say no more: whoever has one trace for everything must not make us read it all.
pub fn by_trace() -> String {
    let foreign = format!("substr(trace_id, 1, {SHARED_DIGITS}) <> substr(request_id, 1, {SHARED_DIGITS})");
    // `g` comes after every hexadecimal digit.
    format!(
        "{ANSWERED} WHERE request_id BETWEEN ?2 AND ?2 || 'g' AND trace_id = ?1 AND tenant = ?3 AND {IS_ANSWER}
         UNION ALL {ANSWERED} WHERE trace_id = ?1 AND {foreign} AND tenant = ?3 AND {IS_ANSWER} LIMIT 2"
    )
}

/// The one answer that a judgement can be about.
///
/// # Errors
/// What to say if it is none, or several.
pub fn one(mut found: Vec<Answered>) -> Result<Answered, Verdict> {
    let answered = found.pop().ok_or(Verdict::NoSuchAnswer)?;
    if found.is_empty() { Ok(answered) } else { Err(Verdict::SeveralAnswers) }
}

/// What a key has said of an answer under a name: score, and when first and last.
pub const LAST: &str = "SELECT number, label, kind, created_ns, updated_ns FROM feedback
    WHERE request_id = ?1 AND name = ?2 AND key_id = ?3";

pub struct Last {
    pub score: Score,
    pub created_ns: i64,
    pub updated_ns: i64,
}

/// How many names the key has judged the answer under.
pub const NAMES: &str = "SELECT COUNT(*) FROM feedback WHERE request_id = ?1 AND key_id = ?2";

/// Whether there is room for a new name, beside so many.
pub fn has_room(names: i64) -> bool {
    names < NAMES_MAX
}

pub const INSERT: &str =
    "INSERT INTO feedback (request_id, name, key_id, kind, number, label, comment, created_ns, updated_ns)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?8)";
/// A comment stays until another comes; what changes nothing leaves the row as it is.
pub const UPDATE: &str =
    "UPDATE feedback SET kind = ?4, number = ?5, label = ?6, comment = COALESCE(?7, comment), updated_ns = ?8
    WHERE request_id = ?1 AND name = ?2 AND key_id = ?3
      AND (kind <> ?4 OR number IS DISTINCT FROM ?5 OR label IS DISTINCT FROM ?6
           OR (CAST(?7 AS TEXT) IS NOT NULL AND comment IS DISTINCT FROM ?7))";

/// What an update of so many rows was.
pub fn change(last: Last, judgement: &Judgement, rows: u64) -> Change {
    // It was written before, by a commit of which nobody knew what became of it.
    let is_mine = last.created_ns == judgement.at_ns && last.updated_ns == judgement.at_ns;
    match rows {
        0 if is_mine => Change::Created,
        0 => Change::Unchanged,
        _ if last.score == judgement.score => Change::Commented,
        _ => Change::Revised(last.score),
    }
}

/// Three columns as a score.
pub fn score(number: Option<f64>, label: Option<String>, kind: &str) -> Score {
    let number = number.unwrap_or_default();
    match label {
        Some(label) => Score::Label(label),
        None if kind == "boolean" => Score::Boolean(number == 1.0),
        None => Score::Number(number),
    }
}

/// A score in its two columns.
pub fn columns(score: &Score) -> (Option<f64>, Option<&str>) {
    match score {
        Score::Boolean(is) => (Some(f64::from(u8::from(*is))), None),
        Score::Number(number) => (Some(*number), None),
        Score::Label(label) => (None, Some(label)),
    }
}

/// Requests since `?1`, by group, in the order of `Answers`.
pub fn answers(by: GroupBy) -> String {
    let has_answer = "outcome IN ('answered', 'aborted')";
    let is_replay = "cache IN ('hit', 'coalesced')";
    let sum = |of: &str, condition: String| format!("CAST(SUM(CASE WHEN {condition} THEN {of} ELSE 0 END) AS BIGINT)");
    format!(
        "SELECT {column}, {made}, {billed}, {told}, {failed}
         FROM (SELECT {column}, ledger.role, outcome, cache,
                      COALESCE(billed_after_nano_usd, billed_nano_usd) AS billed
               FROM ledger {ADJUSTED} WHERE started_ns >= ?1) AS answered
         WHERE {IS_ANSWER} GROUP BY 1 ORDER BY 1",
        column = by.column(),
        made = sum("1", format!("{has_answer} AND NOT {is_replay}")),
        billed = sum("billed", format!("{has_answer} AND NOT {is_replay}")),
        told = sum("1", format!("{has_answer} AND {is_replay}")),
        failed = sum("1", format!("NOT {has_answer}")),
    )
}

/// What was said of answers that began at `?1` or later: group, name and the three columns of a score.
pub fn judged(by: GroupBy) -> String {
    format!(
        "SELECT ledger.{column}, name, number, label, kind
         FROM feedback JOIN ledger USING (request_id) WHERE started_ns >= ?1 AND {IS_ANSWER}",
        column = by.column()
    )
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

impl Judged {
    pub fn add(&mut self, score: Score) {
        match score {
            Score::Boolean(is) => self.booleans[usize::from(is)] += 1,
            Score::Number(number) => self.numbers.add(number),
            Score::Label(label) => *self.labels.entry(label).or_default() += 1,
        }
    }
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
