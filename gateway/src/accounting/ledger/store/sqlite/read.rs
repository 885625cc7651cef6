//! What the ledger is asked: by commands, beside a gateway that may be writing.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension, params, params_from_iter, types};

use super::super::{Books, By, GroupBy, Period, Spend, StoreError};
use super::hours::HOUR_NS;
use super::{feedback, migrate};
use crate::accounting::core::{NanoUsd, Usage};
use crate::accounting::ledger::totals::Sums;
use crate::accounting::ledger::wal::Id;
use crate::accounting::row::{COLUMNS, Outcome, Role, Row, Sum, UsageSource};

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

/// The columns of a row, in their order.
fn columns() -> String {
    COLUMNS.map(|(name, _)| name).join(", ")
}

fn read_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<Row> {
    fn word<T>(row: &rusqlite::Row<'_>, at: usize, parse: fn(&str) -> Option<T>) -> rusqlite::Result<T> {
        let word: String = row.get(at)?;
        let unknown = || format!("the ledger says {word:?}, which no version of this program writes");
        parse(&word).ok_or_else(|| rusqlite::Error::FromSqlConversionFailure(at, types::Type::Text, unknown().into()))
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
    })
}

/// One row by what it is unique by.
pub(super) fn row(db: &Connection, (request, attempt, role): &Id) -> rusqlite::Result<Option<Row>> {
    let sql = format!("SELECT {} FROM ledger WHERE request_id = ? AND attempt = ? AND role = ?", columns());
    db.prepare_cached(&sql)?.query_row(params![request, attempt, role.as_str()], read_row).optional()
}

const SUMS: &str = "COUNT(*), COALESCE(SUM(input_tokens), 0), COALESCE(SUM(cache_read_tokens), 0),
    COALESCE(SUM(cache_write_tokens), 0), COALESCE(SUM(output_tokens), 0), COALESCE(SUM(reasoning_tokens), 0),
    COALESCE(SUM(billed_nano_usd), 0), COALESCE(SUM(provider_cost_nano_usd), 0)";

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

/// All that is here, as its hours say.
pub(super) fn sums_of_hours(db: &Connection) -> rusqlite::Result<Sums> {
    let sums = SUMS.replace("COUNT(*)", "COALESCE(SUM(requests), 0)");
    db.query_row(&format!("SELECT {sums} FROM spend_hour"), [], |row| read_sums(row, 0))
}

/// `VALUES` of so many triples, or a query with no result.
fn triples(count: usize) -> String {
    match count {
        0 => "SELECT NULL, NULL, NULL WHERE 0".to_owned(),
        count => format!("VALUES {}", vec!["(?, ?, ?)"; count].join(", ")),
    }
}

/// The question of `spend` and what it is about: whole hours are read from their sums, what is left at the ends of each
/// period from its rows.
pub(super) fn spend_query(by: &[By], periods: &[Period]) -> (String, Vec<types::Value>) {
    let (mut hours, mut edges) = (Vec::new(), Vec::new());
    for Period { name, first_ns, past_ns } in periods {
        let first = first_ns.div_euclid(HOUR_NS) + i64::from(first_ns.rem_euclid(HOUR_NS) > 0);
        let past = past_ns.div_euclid(HOUR_NS);
        if first >= past {
            edges.push((name, *first_ns, *past_ns));
            continue;
        }
        hours.push((name, first, past));
        edges.push((name, *first_ns, first.saturating_mul(HOUR_NS)));
        edges.push((name, past.saturating_mul(HOUR_NS), *past_ns));
    }
    edges.retain(|(_, first, past)| first < past);
    let values = hours.iter().chain(&edges).flat_map(|(name, first, past)| {
        [types::Value::Text((*name).clone()), types::Value::Integer(*first), types::Value::Integer(*past)]
    });
    let groups = (1..=by.len()).map(|at| at.to_string()).collect::<Vec<_>>().join(", ");
    let names = by.iter().map(|by| by.column()).collect::<Vec<_>>().join(", ");
    let order = if by.contains(&By::Day) { "period, billed DESC" } else { "billed DESC" };
    let sql = format!(
        "WITH hours (period, first, past) AS ({hours}), edges (period, first, past) AS ({edges})
         SELECT {names}, SUM(requests), SUM(input), SUM(output), SUM(billed) AS billed, SUM(cost) FROM (
             SELECT period, tenant, key_id, user_id, route, model, variant, outcome, requests,
                    input_tokens + cache_read_tokens + cache_write_tokens AS input,
                    output_tokens + reasoning_tokens AS output, billed_nano_usd AS billed,
                    provider_cost_nano_usd AS cost
             FROM hours CROSS JOIN spend_hour ON hour >= first AND hour < past
             UNION ALL
             SELECT period, tenant, key_id, COALESCE(user_id, ''), route, model, variant, outcome, 1,
                    input_tokens + cache_read_tokens + cache_write_tokens, output_tokens + reasoning_tokens,
                    billed_nano_usd, provider_cost_nano_usd
             FROM edges CROSS JOIN ledger ON started_ns >= first AND started_ns < past
         ) GROUP BY {groups} ORDER BY {order}, {groups}",
        hours = triples(hours.len()),
        edges = triples(edges.len()),
    );
    (sql, values.collect())
}

const GROUP: &str = "tenant, key_id, route, model, variant, role, outcome, price_version";
const SUMMED: &str = "input_tokens, cache_read_tokens, cache_write_tokens, output_tokens, reasoning_tokens,
    billed_nano_usd, provider_cost_nano_usd";

impl Books for SqliteBooks {
    fn spent_since(&self, since_ns: i64) -> Result<Vec<Sum>, StoreError> {
        let mut query = self.0.prepare(
            "SELECT tenant, key_id, user_id, route, model,
                    SUM(attempt = 0 AND outcome <> 'released'),
                    SUM(CASE WHEN cache IN ('none', 'miss') THEN input_tokens + cache_read_tokens + cache_write_tokens ELSE 0 END),
                    SUM(CASE WHEN cache IN ('none', 'miss') THEN output_tokens + reasoning_tokens ELSE 0 END),
                    SUM(billed_nano_usd)
             FROM ledger WHERE started_ns >= ? AND role <> 'shadow' GROUP BY 1, 2, 3, 4, 5",
        )?;
        let rows = query.query_map([since_ns], |row| {
            Ok(Sum {
                tenant: row.get(0)?,
                key_id: row.get(1)?,
                user: row.get(2)?,
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
        let (sql, values) = spend_query(by, periods);
        let mut query = self.0.prepare(&sql)?;
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

    fn rows(&self, first_ns: i64, past_ns: i64, each: &mut dyn FnMut(Row) -> bool) -> Result<(), StoreError> {
        let sql =
            format!("SELECT {} FROM ledger WHERE started_ns >= ? AND started_ns < ? ORDER BY started_ns", columns());
        let mut query = self.0.prepare(&sql)?;
        let mut rows = query.query([first_ns, past_ns])?;
        while let Some(row) = rows.next()? {
            if !each(read_row(row)?) {
                break;
            }
        }
        Ok(())
    }

    fn row(&self, id: &Id) -> Result<Option<Row>, StoreError> {
        Ok(row(&self.0, id)?)
    }

    fn sums_since(&self, since_ns: i64) -> Result<Sums, StoreError> {
        let sql = format!("SELECT {SUMS} FROM ledger WHERE started_ns >= ?");
        Ok(self.0.query_row(&sql, [since_ns], |row| read_sums(row, 0))?)
    }

    fn counted_from(&self) -> Result<Option<(i64, Sums)>, StoreError> {
        Ok(counted_from(&self.0)?)
    }

    fn uneven_hours(&self, most: usize) -> Result<Vec<String>, StoreError> {
        let differences = SUMMED.replace(", ", "), SUM(").replace(",\n    ", "), SUM(");
        let negative = SUMMED.replace(", ", ", -").replace(",\n    ", ", -");
        let sql = format!(
            "SELECT hour, {GROUP}, SUM(requests), SUM({differences}) FROM (
                 SELECT hour, {GROUP}, requests, {SUMMED} FROM spend_hour
                 UNION ALL SELECT started_ns / {HOUR_NS}, {GROUP}, -1, -{negative} FROM ledger
             ) GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9
             HAVING SUM(requests) <> 0 OR SUM({any}) <> 0 LIMIT ?",
            any = differences.replace(", ", " <> 0 OR ")
        );
        let mut query = self.0.prepare(&sql)?;
        let names: Vec<String> = query.column_names().map(str::to_owned).collect();
        let rows = query.query_map([most as i64], |row| {
            let group: Vec<String> = (1..9).map(|at| row.get(at)).collect::<Result<_, _>>()?;
            let mut off = Vec::new();
            for (at, name) in names.iter().enumerate().skip(9) {
                let difference: i64 = row.get(at)?;
                if difference != 0 {
                    off.push(format!("{difference:+} {}", name.trim_start_matches("SUM(").trim_end_matches(')')));
                }
            }
            let hour: i64 = row.get(0)?;
            let time = time::OffsetDateTime::from_unix_timestamp(hour.saturating_mul(3600));
            let time =
                time.map_or_else(|_| hour.to_string(), |time| format!("{} {:02}:00 UTC", time.date(), time.hour()));
            Ok(format!("{time} {}: its sum is off its rows by {}", group.join(" "), off.join(", ")))
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    fn requests_without_one_end(&self, most: usize) -> Result<Vec<String>, StoreError> {
        let mut query = self.0.prepare(
            "SELECT request_id, SUM(outcome <> 'failed_over') AS ends FROM ledger WHERE role <> 'shadow'
             GROUP BY request_id HAVING ends <> 1 LIMIT ?",
        )?;
        let rows = query.query_map([most as i64], |row| {
            let (request, ends): (String, i64) = (row.get(0)?, row.get(1)?);
            Ok(format!("request {request} has {ends} rows that end it"))
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    fn answers(&self, by: GroupBy, since_ns: i64) -> Result<Vec<feedback::Answers>, StoreError> {
        Ok(feedback::answers(&self.0, by, since_ns)?)
    }

    fn judged(&self, by: GroupBy, since_ns: i64) -> Result<BTreeMap<(String, String), feedback::Judged>, StoreError> {
        Ok(feedback::judged(&self.0, by, since_ns)?)
    }
}
