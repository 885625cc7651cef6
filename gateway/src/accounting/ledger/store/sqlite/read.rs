//! What the ledger is asked: by commands, beside a gateway that may be writing.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension, params, params_from_iter, types};

use super::super::feedback::{Answers, Judged};
use super::super::hours::{self, GROUP, SUMMED};
use super::super::{Books, By, GroupBy, Period, Spend, StoreError, adjust, ends, sql};
use super::{feedback, migrate};
use crate::accounting::core::{NanoUsd, Usage};
use crate::accounting::ledger::totals::Sums;
use crate::accounting::ledger::wal::Id;
use crate::accounting::reprice::{Booked, Standing};
use crate::accounting::row::{Outcome, Role, Row, Service, Sum, UsageSource};

/// One moment of the file.
pub struct SqliteBooks(Connection);

impl SqliteBooks {
    /// # Errors
    /// When the file cannot be read, or its tables are another version's.
    pub fn open(path: &Path) -> Result<SqliteBooks, StoreError> {
        let open = || {
            let db = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
            db.busy_timeout(Duration::from_secs(5))?;
            // Whatever is asked, it is asked of one moment.
            db.execute_batch("BEGIN")?;
            migrate::check(&db)?;
            Ok(SqliteBooks(db))
        };
        open().map_err(|error: StoreError| StoreError(format!("{}: {error}", path.display())))
    }
}

fn count(row: &rusqlite::Row<'_>, at: usize) -> rusqlite::Result<u64> {
    row.get::<_, i64>(at).map(|value| value.max(0).unsigned_abs())
}

fn read_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<Row> {
    fn read<T>(word: &str, at: usize, parse: fn(&str) -> Option<T>) -> rusqlite::Result<T> {
        let unknown = || format!("the ledger says {word:?}, which no version of this program writes");
        parse(word).ok_or_else(|| rusqlite::Error::FromSqlConversionFailure(at, types::Type::Text, unknown().into()))
    }
    fn word<T>(row: &rusqlite::Row<'_>, at: usize, parse: fn(&str) -> Option<T>) -> rusqlite::Result<T> {
        read(&row.get::<_, String>(at)?, at, parse)
    }
    Ok(Row {
        request_id: row.get(0)?,
        attempt: row.get(1)?,
        role: word(row, 2, Role::parse)?,
        response_id: row.get(3)?,
        trace_id: row.get(4)?,
        started_ns: row.get(5)?,
        ended_ns: row.get(6)?,
        tenant: row.get(7)?,
        key_id: row.get(8)?,
        route: row.get(9)?,
        model: row.get(10)?,
        variant: row.get(11)?,
        provider: row.get(12)?,
        op: row.get(13)?,
        stream: row.get(14)?,
        cache: row.get(15)?,
        outcome: word(row, 16, Outcome::parse)?,
        usage: Usage {
            input: count(row, 17)?,
            cache_read: count(row, 18)?,
            cache_write: count(row, 19)?,
            output: count(row, 20)?,
            reasoning: count(row, 21)?,
        },
        usage_source: word(row, 22, UsageSource::parse)?,
        billed: NanoUsd(count(row, 23)?),
        provider_cost: NanoUsd(count(row, 24)?),
        price_version: row.get(25)?,
        config_hash: row.get(26)?,
        user_id: row.get(27)?,
        unpriced: row.get(28)?,
        service_tier: row.get::<_, Option<String>>(29)?.map(|word| read(&word, 29, Service::parse)).transpose()?,
        images: count(row, 30)?,
    })
}

/// A row, and beside it what it counts as.
pub(super) fn booked(row: &rusqlite::Row<'_>) -> rusqlite::Result<Booked> {
    let at = adjust::STANDING_AT;
    let standing = Standing {
        billed: NanoUsd(count(row, at)?),
        provider_cost: NanoUsd(count(row, at + 1)?),
        price_version: row.get(at + 2)?,
        unpriced: row.get(at + 3)?,
    };
    Ok(Booked { row: read_row(row)?, standing, adjustments: row.get(at + 4)? })
}

/// One row by what it is unique by.
pub(super) fn row(db: &Connection, (request, attempt, role): &Id) -> rusqlite::Result<Option<Row>> {
    let question = format!("SELECT {} FROM ledger WHERE request_id = ? AND attempt = ? AND role = ?", sql::columns());
    db.prepare_cached(&question)?.query_row(params![request, attempt, role.as_str()], read_row).optional()
}

fn read_sums(row: &rusqlite::Row<'_>, at: usize) -> rusqlite::Result<Sums> {
    let mut tokens = [0; 5];
    for (kind, tokens) in tokens.iter_mut().enumerate() {
        *tokens = count(row, at + 1 + kind)?;
    }
    Ok(Sums { rows: count(row, at)?, tokens, billed: count(row, at + 6)?, provider_cost: count(row, at + 7)? })
}

/// The count of the log, and what was here when it began.
pub(super) fn counted_from(db: &Connection) -> rusqlite::Result<Option<(i64, Sums)>> {
    db.query_row("SELECT * FROM ledger_count", [], |row| Ok((row.get(0)?, read_sums(row, 1)?))).optional()
}

pub(super) fn kept_from(db: &Connection) -> rusqlite::Result<Option<String>> {
    db.prepare_cached(sql::KEPT_FROM)?.query_row([], |row| row.get(0))
}

/// All that is here, as its hours say.
pub(super) fn sums_of_hours(db: &Connection) -> rusqlite::Result<Sums> {
    db.query_row(&format!("SELECT {} FROM spend_hour", sql::sums(&SUMMED[..8])), [], |row| read_sums(row, 0))
}

/// `VALUES` of so many triples, or a query with no result.
fn triples(count: usize) -> String {
    match count {
        0 => "SELECT NULL, NULL, NULL WHERE 0".to_owned(),
        count => format!("VALUES {}", vec!["(?, ?, ?)"; count].join(", ")),
    }
}

/// A question about periods, and what it is about.
pub(super) fn about(periods: &[Period], question: impl Fn(&sql::Source<'_>) -> String) -> (String, Vec<types::Value>) {
    let (hours, edges) = hours::cut(periods);
    let values = hours.iter().chain(&edges).flat_map(|(name, first, past)| {
        [types::Value::Text((*name).to_owned()), types::Value::Integer(*first), types::Value::Integer(*past)]
    });
    let (hours, past) = (triples(hours.len()), triples(edges.len()));
    let spans = format!("hours (period, first, past) AS ({hours}), edges (period, first, past) AS ({past})");
    (question(&sql::Source { spans: &spans, join: "CROSS JOIN" }), values.collect())
}

impl Books for SqliteBooks {
    fn spent_between(&self, first_ns: i64, past_ns: i64, _log: Option<i64>) -> Result<Vec<Sum>, StoreError> {
        let (question, values) =
            about(&[Period { name: String::new(), first_ns, past_ns }], |source| sql::spent(source, None));
        let mut query = self.0.prepare(&question)?;
        let rows = query.query_map(params_from_iter(values), |row| {
            Ok(Sum {
                tenant: row.get(0)?,
                key_id: row.get(1)?,
                user: Some(row.get(2)?).filter(|user: &String| !user.is_empty()),
                route: row.get(3)?,
                model: row.get(4)?,
                requests: count(row, 5)?,
                input_tokens: count(row, 6)?,
                output_tokens: count(row, 7)?,
                billed: NanoUsd(count(row, 8)?),
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    fn spend(&self, by: &[By], periods: &[Period]) -> Result<Vec<Spend>, StoreError> {
        let (question, values) = about(periods, |source| sql::spend(by, source));
        let mut query = self.0.prepare(&question)?;
        let rows = query.query_map(params_from_iter(values), |row| {
            let at = by.len();
            Ok(Spend {
                by: (0..at).map(|at| row.get(at)).collect::<Result<_, _>>()?,
                requests: count(row, at)?,
                input_tokens: count(row, at + 1)?,
                output_tokens: count(row, at + 2)?,
                billed: NanoUsd(count(row, at + 3)?),
                provider_cost: NanoUsd(count(row, at + 4)?),
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    fn first_hour(&self) -> Result<Option<i64>, StoreError> {
        Ok(self.0.query_row("SELECT MIN(hour) FROM spend_hour", [], |row| row.get(0))?)
    }

    fn rows(&self, first_ns: i64, past_ns: i64, each: &mut dyn FnMut(Booked) -> bool) -> Result<(), StoreError> {
        let mut query = self.0.prepare(&sql::booked("?", "?"))?;
        let mut rows = query.query([first_ns, past_ns])?;
        while let Some(row) = rows.next()? {
            if !each(booked(row)?) {
                break;
            }
        }
        Ok(())
    }

    fn row(&self, id: &Id) -> Result<Option<Row>, StoreError> {
        Ok(row(&self.0, id)?)
    }

    fn sums_of(&self, _log: i64, since_ns: i64) -> Result<Sums, StoreError> {
        let sql = format!("SELECT {} FROM ledger WHERE started_ns >= ?", sql::sums(&hours::OF_A_ROW[..8]));
        Ok(self.0.query_row(&sql, [since_ns], |row| read_sums(row, 0))?)
    }

    fn counted_from(&self, _log: i64) -> Result<Option<(i64, Sums)>, StoreError> {
        Ok(counted_from(&self.0)?)
    }

    fn kept_from(&self) -> Result<Option<String>, StoreError> {
        Ok(kept_from(&self.0)?)
    }

    fn sums_of_hours(&self, _log: i64) -> Result<Sums, StoreError> {
        Ok(sums_of_hours(&self.0)?)
    }

    fn uneven_hours(&self, most: usize) -> Result<Vec<String>, StoreError> {
        let after = self.kept_from()?.map_or(-1, |first| hours::partial(&first));
        let mut query = self.0.prepare(&sql::uneven(after, most))?;
        let rows = query.query_map([], |row| {
            let group: Vec<String> = (1..GROUP.len()).map(|at| row.get(at)).collect::<Result<_, _>>()?;
            let off = (0..SUMMED.len()).map(|at| row.get(GROUP.len() + at)).collect::<Result<Vec<_>, _>>()?;
            Ok(hours::uneven(row.get(0)?, &group, &off))
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    fn uneven_adjustments(&self, most: usize) -> Result<Vec<String>, StoreError> {
        let kept_from = self.kept_from()?;
        let mut query = self.0.prepare(&adjust::unfounded(kept_from.as_deref().unwrap_or_default(), most))?;
        let unfounded = query.query_map([], |row| {
            let (request, role): (String, String) = (row.get(0)?, row.get(2)?);
            Ok(adjust::unfounded_in_words(&request, row.get(1)?, &role, row.get(3)?))
        })?;
        let mut told: Vec<String> = unfounded.collect::<Result<_, _>>()?;
        let after = kept_from.map_or(-1, |first| hours::partial(&first));
        let mut query = self.0.prepare(&adjust::uneven(after))?;
        let uneven = query.query_map([], |row| {
            let group: Vec<String> = (1..GROUP.len()).map(|at| row.get(at)).collect::<Result<_, _>>()?;
            Ok(adjust::uneven_in_words(row.get(0)?, &group, [row.get(GROUP.len())?, row.get(GROUP.len() + 1)?]))
        })?;
        told.extend(uneven.take(most).collect::<Result<Vec<_>, _>>()?);
        Ok(told)
    }

    fn requests_without_one_end(&self, most: usize) -> Result<Vec<String>, StoreError> {
        let mut query = self.0.prepare(&sql::ends(most))?;
        let rows = query.query_map([], |row| Ok(ends(&row.get::<_, String>(0)?, row.get(1)?)))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    fn answers(&self, by: GroupBy, since_ns: i64) -> Result<Vec<Answers>, StoreError> {
        Ok(feedback::answers(&self.0, by, since_ns)?)
    }

    fn judged(&self, by: GroupBy, since_ns: i64) -> Result<BTreeMap<(String, String), Judged>, StoreError> {
        Ok(feedback::judged(&self.0, by, since_ns)?)
    }
}
