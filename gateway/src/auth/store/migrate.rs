//! Brings a key store of an earlier version up to date: all of it or nothing, whoever else does the same.

use rusqlite::{Connection, Transaction, TransactionBehavior};

use super::OpenError;

/// In order; a store that has had `n` of them says so in `user_version`.
const MIGRATIONS: [&str; 3] = [
    include_str!("migrations/0001_callers.sql"),
    include_str!("migrations/0002_control.sql"),
    include_str!("migrations/0003_pepper.sql"),
];
const VERSION: i64 = MIGRATIONS.len() as i64;
const BEGIN: &str = include_str!("migrations/0000_begin.sql");

/// Columns that were once added without a version.
const ADDED: [(&str, &str); 3] =
    [("tokens_per_minute", "INTEGER"), ("concurrency", "INTEGER"), ("nano_usd_per_day", "INTEGER")];

/// Looks before it writes: a write would wake every gateway that follows this store.
pub fn migrate(db: &Connection) -> Result<(), OpenError> {
    if had(db)? == VERSION {
        return Ok(());
    }
    // Two processes may both have looked; the lock lets one of them be first.
    let lock = Transaction::new_unchecked(db, TransactionBehavior::Immediate)?;
    let had = had(&lock)?;
    if had == 0 {
        lock.execute_batch(BEGIN)?;
        for (name, kind) in missing(&lock)? {
            lock.execute_batch(&format!("ALTER TABLE keys ADD COLUMN {name} {kind}"))?;
        }
    }
    for migration in MIGRATIONS.iter().skip(had.unsigned_abs() as usize) {
        lock.execute_batch(migration)?;
    }
    lock.pragma_update(None, "user_version", VERSION)?;
    Ok(lock.commit()?)
}

fn had(db: &Connection) -> Result<i64, OpenError> {
    let found = db.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if found > VERSION { Err(OpenError::Newer) } else { Ok(found) }
}

fn missing(db: &Connection) -> rusqlite::Result<Vec<(&'static str, &'static str)>> {
    let mut query = db.prepare("SELECT name FROM pragma_table_info('keys')")?;
    let there: Vec<String> = query.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
    Ok(ADDED.into_iter().filter(|(name, _)| !there.iter().any(|there| there == name)).collect())
}
