//! What the database is asked: by commands and starts, beside gateways that may be writing.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use tokio_postgres::types::ToSql;

use super::super::feedback::{self as shared, Answers, Judged};
use super::super::hours::{self, GROUP, OF_A_ROW, SUMMED};
use super::super::{Books, By, GroupBy, Period, Spend, StoreError, adjust, ends, sql};
use super::feedback::placed;
use super::{migrate, parts};
use crate::accounting::core::{NanoUsd, Usage};
use crate::accounting::ledger::totals::Sums;
use crate::accounting::ledger::wal::{Id, id};
use crate::accounting::reprice::{Booked, Standing};
use crate::accounting::row::{Outcome, Role, Row, Service, Sum, UsageSource};
use crate::database::postgres::{Link, Session, Target};

/// Rows that are read at a time.
const FETCHED: usize = 1000;

/// One moment of the database.
pub struct PostgresBooks(RefCell<Link>);

impl PostgresBooks {
    /// # Errors
    /// When it cannot be reached, or its tables are another version's.
    pub fn open(target: &Target) -> Result<PostgresBooks, StoreError> {
        let mut link = Link::open(target, None)?;
        link.run(async |session| {
            // Whatever is asked, it is asked of one moment.
            session.batch("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
            migrate::check(session).await
        })?;
        Ok(PostgresBooks(RefCell::new(link)))
    }

    fn ask(&self, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<Vec<tokio_postgres::Row>, StoreError> {
        self.0.borrow_mut().run(async |session| session.query_long(sql, values).await)
    }

    /// Asks about periods.
    fn about(
        &self,
        periods: &[Period],
        question: impl Fn(&sql::Source<'_>) -> String,
    ) -> Result<Vec<tokio_postgres::Row>, StoreError> {
        let (hours, edges) = hours::cut(periods);
        let columns = |spans: &[hours::Span<'_>]| -> (Vec<String>, Vec<i64>, Vec<i64>) {
            let names = spans.iter().map(|(name, _, _)| (*name).to_owned()).collect();
            let ends = |of: fn(&hours::Span<'_>) -> i64| spans.iter().map(of).collect();
            (names, ends(|span| span.1), ends(|span| span.2))
        };
        let (hours, edges) = (columns(&hours), columns(&edges));
        let of = |first: usize| {
            format!("SELECT * FROM UNNEST(${first}::text[], ${}::bigint[], ${}::bigint[])", first + 1, first + 2)
        };
        let (from_hours, from_rows) = (of(1), of(4));
        let spans =
            format!("hours (period, first, past) AS ({from_hours}), edges (period, first, past) AS ({from_rows})");
        let question = question(&sql::Source { spans: &spans, join: "JOIN" });
        self.ask(&question, &[&hours.0, &hours.1, &hours.2, &edges.0, &edges.1, &edges.2])
    }
}

fn count(row: &tokio_postgres::Row, at: usize) -> u64 {
    row.get::<_, i64>(at).max(0).unsigned_abs()
}

fn read_row(row: &tokio_postgres::Row) -> Result<Row, StoreError> {
    fn read<T>(word: &str, parse: fn(&str) -> Option<T>) -> Result<T, StoreError> {
        let unknown = || StoreError(format!("the ledger says {word:?}, which no version of this program writes"));
        parse(word).ok_or_else(unknown)
    }
    fn word<T>(row: &tokio_postgres::Row, at: usize, parse: fn(&str) -> Option<T>) -> Result<T, StoreError> {
        read(row.get(at), parse)
    }
    Ok(Row {
        request_id: row.get(0),
        attempt: count(row, 1) as u32,
        role: word(row, 2, Role::parse)?,
        response_id: row.get(3),
        trace_id: row.get(4),
        started_ns: row.get(5),
        ended_ns: row.get(6),
        tenant: row.get(7),
        key_id: row.get(8),
        route: row.get(9),
        model: row.get(10),
        variant: row.get(11),
        provider: row.get(12),
        op: row.get(13),
        stream: row.get::<_, i64>(14) != 0,
        cache: row.get(15),
        outcome: word(row, 16, Outcome::parse)?,
        usage: Usage {
            input: count(row, 17),
            cache_read: count(row, 18),
            cache_write: count(row, 19),
            output: count(row, 20),
            reasoning: count(row, 21),
        },
        usage_source: word(row, 22, UsageSource::parse)?,
        billed: NanoUsd(count(row, 23)),
        provider_cost: NanoUsd(count(row, 24)),
        price_version: row.get(25),
        config_hash: row.get(26),
        user_id: row.get(27),
        unpriced: row.get::<_, i64>(28) != 0,
        service_tier: row.get::<_, Option<&str>>(29).map(|word| read(word, Service::parse)).transpose()?,
        images: count(row, 30),
    })
}

/// A row, and beside it what it counts as.
pub(super) fn booked(row: &tokio_postgres::Row) -> Result<Booked, StoreError> {
    let at = adjust::STANDING_AT;
    let standing = Standing {
        billed: NanoUsd(count(row, at)),
        provider_cost: NanoUsd(count(row, at + 1)),
        price_version: row.get(at + 2),
        unpriced: row.get::<_, i64>(at + 3) != 0,
    };
    Ok(Booked { row: read_row(row)?, standing, adjustments: row.get(at + 4) })
}

fn read_sums(row: &tokio_postgres::Row, at: usize) -> Sums {
    let tokens = std::array::from_fn(|kind| count(row, at + 1 + kind));
    Sums { rows: count(row, at), tokens, billed: count(row, at + 6), provider_cost: count(row, at + 7) }
}

/// Rows that are there under the ids of these.
pub(super) async fn rows_of(session: &mut Session, rows: &[&Row]) -> Result<HashMap<Id, Row>, StoreError> {
    let ids: Vec<&str> = rows.iter().map(|row| row.request_id.as_str()).collect();
    let question = format!("SELECT {} FROM ledger WHERE request_id = ANY($1)", sql::columns());
    let rows = session.query(&question, &[&ids]).await?;
    rows.iter().map(|row| read_row(row).map(|row| (id(&row), row))).collect()
}

const COUNTED_FROM: &str = "SELECT epoch, rows, input_tokens, cache_read_tokens, cache_write_tokens, output_tokens,
    reasoning_tokens, billed_nano_usd, provider_cost_nano_usd FROM ledger_count WHERE log = $1";

fn read_count(rows: &[tokio_postgres::Row]) -> Option<(i64, Sums)> {
    rows.first().map(|row| (row.get(0), read_sums(row, 1)))
}

/// The count of a log, and what was here of it when that began.
pub(super) async fn counted_from(session: &mut Session, log: i64) -> Result<Option<(i64, Sums)>, StoreError> {
    Ok(read_count(&session.query(COUNTED_FROM, &[&log]).await?))
}

pub(super) async fn kept_from(session: &mut Session) -> Result<Option<String>, StoreError> {
    Ok(session.query(sql::KEPT_FROM, &[]).await?.first().and_then(|row| row.get(0)))
}

/// All that is here of a log, as its hours say.
pub(super) async fn sums_of_hours(session: &mut Session, log: i64) -> Result<Sums, StoreError> {
    let question = format!("SELECT {} FROM spend_hour WHERE log = $1", sql::sums(&SUMMED[..8]));
    Ok(session.query(&question, &[&log]).await?.first().map_or_else(Sums::default, |row| read_sums(row, 0)))
}

impl Books for PostgresBooks {
    fn spent_between(&self, first_ns: i64, past_ns: i64, log: Option<i64>) -> Result<Vec<Sum>, StoreError> {
        let rows =
            self.about(&[Period { name: String::new(), first_ns, past_ns }], |source| sql::spent(source, log))?;
        let sum = |row: &tokio_postgres::Row| Sum {
            tenant: row.get(0),
            key_id: row.get(1),
            user: Some(row.get(2)).filter(|user: &String| !user.is_empty()),
            route: row.get(3),
            model: row.get(4),
            requests: count(row, 5),
            input_tokens: count(row, 6),
            output_tokens: count(row, 7),
            billed: NanoUsd(count(row, 8)),
        };
        Ok(rows.iter().map(sum).collect())
    }

    fn spend(&self, by: &[By], periods: &[Period]) -> Result<Vec<Spend>, StoreError> {
        let rows = self.about(periods, |source| sql::spend(by, source))?;
        let at = by.len();
        let spend = |row: &tokio_postgres::Row| Spend {
            by: (0..at).map(|at| row.get(at)).collect(),
            requests: count(row, at),
            input_tokens: count(row, at + 1),
            output_tokens: count(row, at + 2),
            billed: NanoUsd(count(row, at + 3)),
            provider_cost: NanoUsd(count(row, at + 4)),
        };
        Ok(rows.iter().map(spend).collect())
    }

    fn first_hour(&self) -> Result<Option<i64>, StoreError> {
        Ok(self.ask("SELECT MIN(hour) FROM spend_hour", &[])?.first().and_then(|row| row.get(0)))
    }

    fn rows(&self, first_ns: i64, past_ns: i64, each: &mut dyn FnMut(Booked) -> bool) -> Result<(), StoreError> {
        let booked_rows = sql::booked(&first_ns.to_string(), &past_ns.to_string());
        self.ask(&format!("DECLARE export NO SCROLL CURSOR FOR {booked_rows}"), &[])?;
        loop {
            let rows = self.ask(&format!("FETCH {FETCHED} FROM export"), &[])?;
            for row in &rows {
                if !each(booked(row)?) {
                    self.ask("CLOSE export", &[])?;
                    return Ok(());
                }
            }
            if rows.is_empty() {
                self.ask("CLOSE export", &[])?;
                return Ok(());
            }
        }
    }

    fn row(&self, id: &Id) -> Result<Option<Row>, StoreError> {
        let question =
            format!("SELECT {} FROM ledger WHERE request_id = $1 AND attempt = $2 AND role = $3", sql::columns());
        let (request, attempt, role) = parts(id);
        let rows =
            self.0.borrow_mut().run(async |session| session.query(&question, &[&request, &attempt, &role]).await)?;
        rows.first().map(read_row).transpose()
    }

    fn sums_of(&self, log: i64, since_ns: i64) -> Result<Sums, StoreError> {
        let sums = sql::sums(&OF_A_ROW[..8]);
        let rows =
            self.ask(&format!("SELECT {sums} FROM ledger WHERE log = $1 AND started_ns >= $2"), &[&log, &since_ns])?;
        Ok(rows.first().map_or_else(Sums::default, |row| read_sums(row, 0)))
    }

    fn counted_from(&self, log: i64) -> Result<Option<(i64, Sums)>, StoreError> {
        Ok(read_count(&self.ask(COUNTED_FROM, &[&log])?))
    }

    fn kept_from(&self) -> Result<Option<String>, StoreError> {
        self.0.borrow_mut().run(async |session| kept_from(session).await)
    }

    fn sums_of_hours(&self, log: i64) -> Result<Sums, StoreError> {
        self.0.borrow_mut().run(async |session| sums_of_hours(session, log).await)
    }

    fn uneven_hours(&self, most: usize) -> Result<Vec<String>, StoreError> {
        let after = self.kept_from()?.map_or(-1, |first| hours::partial(&first));
        let rows = self.ask(&sql::uneven(after, most), &[])?;
        let told = |row: &tokio_postgres::Row| {
            let group: Vec<String> = (1..GROUP.len()).map(|at| row.get(at)).collect();
            let off: Vec<i64> = (0..SUMMED.len()).map(|at| row.get(GROUP.len() + at)).collect();
            hours::uneven(row.get(0), &group, &off)
        };
        Ok(rows.iter().map(told).collect())
    }

    fn uneven_adjustments(&self, most: usize) -> Result<Vec<String>, StoreError> {
        let kept_from = self.kept_from()?;
        let unfounded = self.ask(&adjust::unfounded(kept_from.as_deref().unwrap_or_default(), most), &[])?;
        let unfounded =
            unfounded.iter().map(|row| adjust::unfounded_in_words(row.get(0), row.get(1), row.get(2), row.get(3)));
        let after = kept_from.as_deref().map_or(-1, hours::partial);
        let uneven = self.ask(&adjust::uneven(after), &[])?;
        let uneven = uneven.iter().map(|row| {
            let group: Vec<String> = (1..GROUP.len()).map(|at| row.get(at)).collect();
            adjust::uneven_in_words(row.get(0), &group, [row.get(GROUP.len()), row.get(GROUP.len() + 1)])
        });
        Ok(unfounded.chain(uneven.take(most)).collect())
    }

    fn requests_without_one_end(&self, most: usize) -> Result<Vec<String>, StoreError> {
        Ok(self.ask(&sql::ends(most), &[])?.iter().map(|row| ends(row.get(0), row.get(1))).collect())
    }

    fn answers(&self, by: GroupBy, since_ns: i64) -> Result<Vec<Answers>, StoreError> {
        let rows = self.ask(&placed(&shared::answers(by)), &[&since_ns])?;
        let answers = |row: &tokio_postgres::Row| Answers {
            group: row.get(0),
            made: count(row, 1),
            billed_nano_usd: count(row, 2),
            from_cache: count(row, 3),
            failed: count(row, 4),
        };
        Ok(rows.iter().map(answers).collect())
    }

    fn judged(&self, by: GroupBy, since_ns: i64) -> Result<BTreeMap<(String, String), Judged>, StoreError> {
        let mut judged: BTreeMap<_, Judged> = BTreeMap::new();
        for row in self.ask(&placed(&shared::judged(by)), &[&since_ns])? {
            let of = judged.entry((row.get(0), row.get(1))).or_default();
            of.add(shared::score(row.get(2), row.get(3), row.get(4)));
        }
        Ok(judged)
    }
}
