//! Brings a file's tables up to date. `PRAGMA user_version` says how far they are; a migration that was ever released
//! never changes.

use rusqlite::Connection;

use super::super::StoreError;

const MIGRATIONS: [&str; 4] = [
    include_str!("../../migrations/sqlite/0001_ledger.sql"),
    include_str!("../../migrations/sqlite/0002_hours.sql"),
    include_str!("../../migrations/sqlite/0003_counted.sql"),
    include_str!("../../migrations/sqlite/0004_adjustments.sql"),
];

fn version(db: &Connection) -> rusqlite::Result<usize> {
    db.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0)).map(|version| version.max(0) as usize)
}

/// Runs what is missing, all of it or nothing.
pub fn up(db: &mut Connection) -> Result<(), StoreError> {
    let transaction = super::begin(db)?;
    let version = version(&transaction)?;
    let Some(missing) = MIGRATIONS.get(version..) else { return Err(newer()) };
    for migration in missing {
        transaction.execute_batch(migration)?;
    }
    transaction.pragma_update(None, "user_version", MIGRATIONS.len() as i64)?;
    Ok(transaction.commit()?)
}

/// # Errors
/// When the tables are not those that this version reads.
pub fn check(db: &Connection) -> Result<(), StoreError> {
    match version(db)? {
        version if version > MIGRATIONS.len() => Err(newer()),
        version if version < MIGRATIONS.len() => Err(StoreError(
            "it was last written by an older glassgate; the next start of `glassgate serve` brings it up to date"
                .into(),
        )),
        _ => Ok(()),
    }
}

fn newer() -> StoreError {
    StoreError("it was written by a newer glassgate; use that one, or another --data-dir".into())
}
