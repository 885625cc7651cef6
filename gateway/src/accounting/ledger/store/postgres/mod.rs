//! The ledger in a Postgres that several gateways may share. The same rows, sums and judgements as in SQLite; what each log
//! has counted is kept apart, so that each can be held against its own.

pub mod adjust;
mod feedback;
mod migrate;
pub mod read;

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use tokio_postgres::types::ToSql;

use super::super::super::feedback::Judgement;
use super::super::super::row::{COLUMNS, Cell, Row};
use super::super::totals::Sums;
use super::super::wal::{Id, id};
use super::hours::{GROUP, SUMMED, Users};
use super::months::Month;
use super::{Fate, Shipped, Store, StoreError, sql};
pub use crate::database::postgres::Target;
use crate::database::postgres::{Link, STATEMENT_MAX, Session};

/// The database, open for writing. After an error the next call connects anew: what came of the last one nobody knows, and
/// every row says itself whether it is there.
pub struct Postgres {
    target: Target,
    log: i64,
    link: Option<Link>,
    users: Users,
    /// Months whose partitions are there.
    months: HashSet<Month>,
}

impl Postgres {
    /// Connects and brings the tables up to date. `log`: whose rows they are.
    ///
    /// # Errors
    /// When it cannot be reached or written, or a newer version has written it.
    pub fn open(target: &Target, log: i64) -> Result<Postgres, StoreError> {
        let (target, users, months) = (target.clone(), Users::default(), HashSet::new());
        let mut postgres = Postgres { target, log, link: None, users, months };
        postgres.run(async |session, _| migrate::up(session).await)?;
        Ok(postgres)
    }

    /// Does something on the connection, or on a new one.
    fn run<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut Session, &mut Context<'_>) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut link = match self.link.take().filter(Link::is_open) {
            Some(link) => link,
            None => Link::open(&self.target, STATEMENT_MAX)?,
        };
        let mut context = Context { log: self.log, users: &mut self.users, months: &mut self.months };
        let done = link.run(async |session| work(session, &mut context).await)?;
        // Only now: a connection that failed is dropped, and whatever was under way on it ends.
        self.link = Some(link);
        Ok(done)
    }
}

/// What is known from one call to the next.
struct Context<'p> {
    log: i64,
    users: &'p mut Users,
    months: &'p mut HashSet<Month>,
}

impl Store for Postgres {
    fn ship(&mut self, rows: &[&Row], judgements: &[&Judgement]) -> Result<Shipped, StoreError> {
        self.run(async |session, context| {
            make_months(session, context.months, rows).await?;
            let fates = begin(session, context.log, rows).await?;
            let mut verdicts = Vec::with_capacity(judgements.len());
            for judgement in judgements {
                verdicts.push(feedback::judge(session, judgement).await?);
            }
            commit(session, context, &super::new(rows, &fates)).await?;
            Ok(Shipped { fates, verdicts })
        })
    }

    /// What is committed is durable.
    fn sync(&mut self) -> Result<(), StoreError> {
        Ok(())
    }

    fn counts(&mut self) -> Result<Option<(i64, Sums)>, StoreError> {
        self.run(async |session, context| {
            let Some((epoch, before)) = read::counted_from(session, context.log).await? else { return Ok(None) };
            Ok(Some((epoch, read::sums_of_hours(session, context.log).await?.since(&before))))
        })
    }

    fn count_from(&mut self, epoch: i64) -> Result<(), StoreError> {
        self.run(async |session, context| {
            let sums = read::sums_of_hours(session, context.log).await?;
            let sums = sums.named().map(|(_, sum)| i64::try_from(sum).unwrap_or(i64::MAX));
            let numbers: Vec<i64> = [context.log, epoch].into_iter().chain(sums).collect();
            let values: Vec<&(dyn ToSql + Sync)> = numbers.iter().map(|number| number as &(dyn ToSql + Sync)).collect();
            // Nobody else writes to this log.
            let set = COUNTED.map(|column| format!("{column} = excluded.{column}")).join(", ");
            let places = (1..=values.len()).map(|at| format!("${at}")).collect::<Vec<_>>().join(", ");
            let sql = format!("INSERT INTO ledger_count VALUES ({places}) ON CONFLICT (log) DO UPDATE SET {set}");
            session.execute(&sql, &values).await.map(drop)
        })
    }

    fn keep_from(&mut self, month: Month) -> Result<bool, StoreError> {
        self.run(async |session, context| {
            // Who reads for a long time is not to stand between this and all who write: another time, then.
            session.batch("BEGIN; SET LOCAL lock_timeout = '1s'").await?;
            migrate::lock(session).await?;
            for sql in sql::KEEP_FROM {
                session.execute(&feedback::placed(sql), &[&month.first_id()]).await?;
            }
            for gone in months(session).await?.into_iter().filter(|there| *there < month) {
                session
                    .batch(&format!("DROP TABLE IF EXISTS ledger_{gone}, feedback_{gone}, adjustment_{gone}"))
                    .await?;
                context.months.remove(&gone);
            }
            session.batch("COMMIT").await?;
            Ok(false)
        })
    }

    fn latest(&mut self) -> Result<Option<Month>, StoreError> {
        self.run(async |session, _| Ok(months(session).await?.into_iter().max()))
    }
}

/// Months that have partitions.
async fn months(session: &mut Session) -> Result<Vec<Month>, StoreError> {
    let names = "SELECT CAST(relname AS TEXT) FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid
        WHERE inhparent = CAST('ledger' AS REGCLASS)";
    let partitions = session.query(names, &[]).await?;
    Ok(partitions.iter().filter_map(|row| row.get::<_, &str>(0).strip_prefix("ledger_")?.parse().ok()).collect())
}

const COUNTED: [&str; 9] = [
    "epoch",
    "rows",
    "input_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "output_tokens",
    "reasoning_tokens",
    "billed_nano_usd",
    "provider_cost_nano_usd",
];

/// Makes the partitions that rows need, apart from what is shipped. Attached they wait for nobody who reads or writes, and
/// nobody for them.
async fn make_months(session: &mut Session, known: &mut HashSet<Month>, rows: &[&Row]) -> Result<(), StoreError> {
    let needed: HashSet<Month> = rows.iter().filter_map(|row| Month::of(&row.request_id)).collect();
    if needed.is_subset(known) {
        return Ok(());
    }
    session.batch("BEGIN").await?;
    migrate::lock(session).await?;
    *known = months(session).await?.into_iter().collect();
    for month in &needed - known {
        let (first, past) = (month.first_id(), month.next().first_id());
        for table in ["ledger", "feedback"] {
            session
                .batch(&format!(
                    "CREATE TABLE {table}_{month} (LIKE {table} INCLUDING ALL);
                     ALTER TABLE {table} ATTACH PARTITION {table}_{month} FOR VALUES FROM ('{first}') TO ('{past}')"
                ))
                .await?;
        }
        known.insert(month);
    }
    session.batch("COMMIT").await
}

/// Begins with rows. One that is there already stays as it is.
async fn begin(session: &mut Session, log: i64, rows: &[&Row]) -> Result<Vec<Fate>, StoreError> {
    if rows.is_empty() {
        session.batch("BEGIN").await?;
        return Ok(Vec::new());
    }
    let columns = columns(rows);
    let mut values: Vec<&(dyn ToSql + Sync)> = columns.iter().map(|column| column as &(dyn ToSql + Sync)).collect();
    values.push(&log);
    if session.begin(&insert(), &values).await? == rows.len() as u64 {
        return Ok(vec![Fate::New; rows.len()]);
    }
    // Some are there, which is rare: only then it is worth its time to be told which are not.
    session.batch("ROLLBACK; BEGIN").await?;
    let told = format!("{} RETURNING request_id, attempt, role", insert());
    let inserted = session.query(&told, &values).await?;
    let mut inserted: HashSet<(String, i64, String)> =
        inserted.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect();
    // Of two that are the same in one batch the first is new.
    let is_new: Vec<bool> = rows
        .iter()
        .map(|row| inserted.remove(&(row.request_id.clone(), row.attempt.into(), row.role.as_str().to_owned())))
        .collect();
    let old: Vec<&Row> = rows.iter().zip(&is_new).filter(|(_, is_new)| !**is_new).map(|(row, _)| *row).collect();
    let (there, kept_from) = match old.is_empty() {
        true => (HashMap::new(), None),
        false => (read::rows_of(session, &old).await?, read::kept_from(session).await?),
    };
    let fate = |row: &Row| match there.get(&id(row)) {
        Some(there) if cells(row) == cells(there) => Fate::There,
        None if super::is_gone(row, kept_from.as_deref()) => Fate::There,
        _ => Fate::Different,
    };
    Ok(rows.iter().zip(is_new).map(|(row, is_new)| if is_new { Fate::New } else { fate(row) }).collect())
}

fn insert() -> String {
    let names = COLUMNS.map(|(name, _)| name).join(", ");
    let places: Vec<String> = COLUMNS
        .iter()
        .enumerate()
        .map(|(at, (_, kind))| format!("${}::{}[]", at + 1, if is_text(kind) { "text" } else { "bigint" }))
        .collect();
    format!(
        "INSERT INTO ledger ({names}, log) SELECT *, ${log}::bigint FROM UNNEST({places}) AS fresh ({names})
         WHERE request_id >= COALESCE(({kept_from}), '')
         ON CONFLICT DO NOTHING",
        log = COLUMNS.len() + 1,
        kept_from = sql::KEPT_FROM,
        places = places.join(", ")
    )
}

fn is_text(kind: &str) -> bool {
    kind.starts_with("TEXT")
}

/// One column of some rows.
#[derive(Debug)]
enum Column<'r> {
    Texts(Vec<Option<Cow<'r, str>>>),
    Integers(Vec<Option<i64>>),
}

impl ToSql for Column<'_> {
    fn to_sql(
        &self,
        kind: &tokio_postgres::types::Type,
        out: &mut bytes::BytesMut,
    ) -> Result<tokio_postgres::types::IsNull, Box<dyn std::error::Error + Sync + Send>> {
        match self {
            Column::Texts(texts) => texts.to_sql(kind, out),
            Column::Integers(integers) => integers.to_sql(kind, out),
        }
    }

    fn accepts(kind: &tokio_postgres::types::Type) -> bool {
        <Vec<Option<&str>>>::accepts(kind) || <Vec<Option<i64>>>::accepts(kind)
    }

    tokio_postgres::types::to_sql_checked!();
}

fn columns<'r>(rows: &[&'r Row]) -> Vec<Column<'r>> {
    let mut columns: Vec<Column<'r>> = COLUMNS
        .iter()
        .map(|(_, kind)| match is_text(kind) {
            true => Column::Texts(Vec::with_capacity(rows.len())),
            false => Column::Integers(Vec::with_capacity(rows.len())),
        })
        .collect();
    for row in rows {
        for (column, cell) in columns.iter_mut().zip(row.cells()) {
            match (column, cell) {
                (Column::Texts(texts), Cell::Text(text)) => texts.push(Some(storable(text))),
                (Column::Texts(texts), _) => texts.push(None),
                (Column::Integers(integers), Cell::Integer(integer)) => integers.push(Some(integer)),
                (Column::Integers(integers), _) => integers.push(None),
            }
        }
    }
    columns
}

/// The one character that no text in Postgres can hold must not keep a row out of it.
fn storable(text: &str) -> Cow<'_, str> {
    if text.contains('\0') { Cow::Owned(text.replace('\0', "\u{fffd}")) } else { Cow::Borrowed(text) }
}

/// What of a row is stored.
fn cells(row: &Row) -> Vec<Cow<'_, str>> {
    let cells = row.cells().into_iter();
    cells
        .map(|cell| match cell {
            Cell::Text(text) => storable(text),
            Cell::Integer(number) => Cow::Owned(number.to_string()),
            Cell::Null => Cow::Borrowed("\0"),
        })
        .collect()
}

/// Adds rows that are new to the sums of their hours, and commits.
async fn commit(session: &mut Session, context: &mut Context<'_>, rows: &[&Row]) -> Result<(), StoreError> {
    if rows.is_empty() {
        return session.batch("COMMIT").await;
    }
    let rows = || rows.iter().copied();
    for hour in context.users.unknown(rows()) {
        let known = "SELECT DISTINCT user_id FROM spend_hour WHERE hour = $1 AND log = $2";
        let known = session.query(known, &[&hour, &context.log]).await?;
        context.users.learn(hour, known.iter().map(|row| row.get(0)).collect());
    }
    let groups = context.users.group(rows());
    let hours: Vec<i64> = groups.keys().map(|(hour, _)| *hour).collect();
    let names = (0..GROUP.len()).map(|at| groups.keys().map(|(_, group)| storable(group[at])).collect::<Vec<_>>());
    let sums = (0..SUMMED.len()).map(|at| groups.values().map(|sums| sums.columns()[at]).collect::<Vec<i64>>());
    let (names, sums): (Vec<_>, Vec<_>) = (names.collect(), sums.collect());
    let mut values: Vec<&(dyn ToSql + Sync)> = vec![&context.log, &hours];
    values.extend(names.iter().map(|column| column as &(dyn ToSql + Sync)));
    values.extend(sums.iter().map(|column| column as &(dyn ToSql + Sync)));
    session.commit(&upsert(), &values).await
}

fn upsert() -> String {
    let more = SUMMED.map(|column| format!("{column} = spend_hour.{column} + excluded.{column}")).join(", ");
    let (group, summed) = (GROUP.join(", "), SUMMED.join(", "));
    let texts = (0..GROUP.len()).map(|at| format!("${}::text[]", at + 3));
    let integers = (0..SUMMED.len()).map(|at| format!("${}::bigint[]", at + 3 + GROUP.len()));
    let places = texts.chain(integers).collect::<Vec<_>>().join(", ");
    format!(
        "INSERT INTO spend_hour (log, hour, {group}, {summed})
         SELECT $1::bigint, * FROM UNNEST($2::bigint[], {places})
         ON CONFLICT (hour, log, {group}) DO UPDATE SET {more}"
    )
}

/// A row's id as three columns.
fn parts((request, attempt, role): &Id) -> (&str, i64, &'static str) {
    (request, i64::from(*attempt), role.as_str())
}
