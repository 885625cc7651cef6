//! The ledger in one SQLite file: idempotent inserts, and sums by the hour beside them.

pub mod adjust;
pub mod feedback;
mod hours;
pub mod migrate;
pub mod read;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ToSql, Transaction, TransactionBehavior, params_from_iter, types};

use super::super::super::feedback::Judgement;
use super::super::super::row::{COLUMNS, Cell, Row};
use super::super::totals::Sums;
use super::hours::Users;
use super::months::Month;
use super::{Fate, Shipped, Store, StoreError, sql};

impl ToSql for Cell<'_> {
    fn to_sql(&self) -> rusqlite::Result<types::ToSqlOutput<'_>> {
        Ok(match self {
            Cell::Text(text) => types::ToSqlOutput::Borrowed(types::ValueRef::Text(text.as_bytes())),
            Cell::Integer(number) => types::ToSqlOutput::Owned(types::Value::Integer(*number)),
            Cell::Null => types::ToSqlOutput::Owned(types::Value::Null),
        })
    }
}

/// The file, open for writing.
pub struct Sqlite {
    db: Connection,
    path: PathBuf,
    users: Users,
    /// To sync it by, and the last to be dropped: closing any descriptor of the file gives up the locks that `db` has on it
    /// (POSIX), and then another process that closes the ledger removes what SQLite has not yet merged.
    file: File,
}

impl Sqlite {
    /// Opens the ledger and brings its tables up to date.
    ///
    /// # Errors
    /// When the file cannot be opened or written, or a newer version has written it.
    pub fn open(path: &Path) -> Result<Sqlite, StoreError> {
        let open = || {
            let mut db = Connection::open(path)?;
            db.busy_timeout(Duration::from_secs(5))?;
            // NORMAL survives kill -9. What must survive a power cut is synced before the log forgets it.
            db.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;")?;
            migrate::up(&mut db)?;
            Ok((File::open(path)?, db))
        };
        let (file, db) = open().map_err(|error: StoreError| StoreError(format!("{}: {error}", path.display())))?;
        Ok(Sqlite { db, path: path.to_owned(), users: Users::default(), file })
    }
}

impl Store for Sqlite {
    fn ship(&mut self, rows: &[&Row], judgements: &[&Judgement]) -> Result<Shipped, StoreError> {
        let transaction = begin(&mut self.db)?;
        let fates = add(&transaction, rows)?;
        hours::add(&transaction, &mut self.users, &super::new(rows, &fates))?;
        let verdicts = judgements.iter().map(|judgement| feedback::judge(&transaction, judgement));
        let verdicts = verdicts.collect::<Result<_, _>>()?;
        transaction.commit()?;
        Ok(Shipped { fates, verdicts })
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        let mut log = self.path.clone().into_os_string();
        log.push("-wal");
        let sync = |path: &Path| File::open(path)?.sync_all();
        // What was committed is in SQLite's own log, which is there as long as somebody has the ledger open.
        let synced = sync(Path::new(&log));
        let folder = self.path.parent().unwrap_or(Path::new("."));
        let synced = synced.and_then(|()| self.file.sync_all()).and_then(|()| sync(folder));
        synced.map_err(|error| StoreError(format!("{}: {error}", self.path.display())))
    }

    fn counts(&mut self) -> Result<Option<(i64, Sums)>, StoreError> {
        let Some((epoch, before)) = read::counted_from(&self.db)? else { return Ok(None) };
        Ok(Some((epoch, read::sums_of_hours(&self.db)?.since(&before))))
    }

    fn count_from(&mut self, epoch: i64) -> Result<(), StoreError> {
        let transaction = begin(&mut self.db)?;
        transaction.execute("DELETE FROM ledger_count", [])?;
        let sums = read::sums_of_hours(&transaction)?;
        let values = [epoch].into_iter().chain(sums.named().map(|(_, sum)| i64::try_from(sum).unwrap_or(i64::MAX)));
        transaction.execute("INSERT INTO ledger_count VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", params_from_iter(values))?;
        Ok(transaction.commit()?)
    }

    fn keep_from(&mut self, month: Month) -> Result<bool, StoreError> {
        let first_id = month.first_id();
        let transaction = begin(&mut self.db)?;
        for sql in sql::KEEP_FROM {
            transaction.execute(sql, [&first_id])?;
        }
        // Ids rise with time, so these are the first pages of the table, and new rows take them again.
        let mut gone = 0;
        for table in ["ledger", "feedback", "adjustment"] {
            let first = format!("SELECT request_id FROM {table} WHERE request_id < ?1 ORDER BY 1 LIMIT {FORGOTTEN}");
            let sql = format!("DELETE FROM {table} WHERE request_id IN ({first})");
            gone += transaction.execute(&sql, [&first_id])?;
        }
        transaction.commit()?;
        Ok(gone >= FORGOTTEN)
    }

    fn latest(&mut self) -> Result<Option<Month>, StoreError> {
        let latest: Option<String> = self.db.query_row("SELECT MAX(request_id) FROM ledger", [], |row| row.get(0))?;
        Ok(latest.as_deref().and_then(Month::of))
    }
}

/// Rows that go in one transaction.
const FORGOTTEN: usize = 1000;

/// Begins to write, and waits for whoever else does: a transaction that began with reading would not be let wait.
fn begin(db: &mut Connection) -> rusqlite::Result<Transaction<'_>> {
    db.transaction_with_behavior(TransactionBehavior::Immediate)
}

/// A row that is there already stays as it is.
fn add(transaction: &Transaction<'_>, rows: &[&Row]) -> rusqlite::Result<Vec<Fate>> {
    let names: Vec<&str> = COLUMNS.iter().map(|(name, _)| *name).collect();
    let places = vec!["?"; COLUMNS.len()].join(", ");
    let sql = format!(
        "INSERT INTO ledger ({}) VALUES ({places}) ON CONFLICT (request_id, attempt, role) DO NOTHING",
        names.join(", ")
    );
    let mut insert = transaction.prepare_cached(&sql)?;
    let kept_from = read::kept_from(transaction)?;
    let mut fates = Vec::with_capacity(rows.len());
    for row in rows {
        if super::is_gone(row, kept_from.as_deref()) {
            fates.push(Fate::There);
            continue;
        }
        let fate = match insert.execute(params_from_iter(row.cells()))? {
            0 if read::row(transaction, &super::super::wal::id(row))?.as_ref() == Some(*row) => Fate::There,
            0 => Fate::Different,
            _ => Fate::New,
        };
        fates.push(fate);
    }
    Ok(fates)
}

#[cfg(test)]
mod hours_tests;
