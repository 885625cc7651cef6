//! Brings a database's tables up to date. `ledger_version` says how far they are; a migration that was ever released never
//! changes. Of several gateways that start at once, one does it and the others wait.

use super::super::StoreError;
use super::connect::Session;

const MIGRATIONS: [&str; 2] = [
    include_str!("../../migrations/postgres/0001_ledger.sql"),
    include_str!("../../migrations/postgres/0002_adjustments.sql"),
];
/// Of the lock under which it is done: "glassgat" in ASCII.
const LOCK: i64 = 0x676c_6173_7367_6174;

/// `None` where there are no tables yet.
async fn version(session: &mut Session) -> Result<Option<usize>, StoreError> {
    let there = session.query("SELECT to_regclass('ledger_version') IS NOT NULL", &[]).await?;
    if there.first().is_none_or(|row| !row.get::<_, bool>(0)) {
        return Ok(None);
    }
    let rows = session.query("SELECT version FROM ledger_version", &[]).await?;
    Ok(rows.first().map(|row| row.get::<_, i64>(0).max(0) as usize))
}

/// Runs what is missing, all of it or nothing.
pub(super) async fn up(session: &mut Session) -> Result<(), StoreError> {
    // Who only writes rows need not be allowed to make tables.
    if version(session).await? == Some(MIGRATIONS.len()) {
        return Ok(());
    }
    session.batch("BEGIN").await?;
    lock(session).await?;
    session.batch("CREATE TABLE IF NOT EXISTS ledger_version (version BIGINT NOT NULL)").await?;
    let version = version(session).await?.unwrap_or(0);
    let Some(missing) = MIGRATIONS.get(version..) else { return Err(newer()) };
    for migration in missing {
        session.batch(migration).await?;
    }
    let now = MIGRATIONS.len();
    session.batch(&format!("DELETE FROM ledger_version; INSERT INTO ledger_version VALUES ({now}); COMMIT")).await
}

/// Whoever changes tables does so alone, until the end of the transaction.
pub(super) async fn lock(session: &Session) -> Result<(), StoreError> {
    session.batch(&format!("SELECT pg_advisory_xact_lock({LOCK})")).await
}

/// # Errors
/// When the tables are not those that this version reads.
pub(super) async fn check(session: &mut Session) -> Result<(), StoreError> {
    match version(session).await? {
        None => Err(StoreError("there is no ledger in it; it begins with the first start of `glassgate serve`".into())),
        Some(version) if version > MIGRATIONS.len() => Err(newer()),
        Some(version) if version < MIGRATIONS.len() => Err(StoreError(
            "it was last written by an older glassgate; the next start of `glassgate serve` brings it up to date"
                .into(),
        )),
        Some(_) => Ok(()),
    }
}

fn newer() -> StoreError {
    StoreError("it was written by a newer glassgate; use that one, or another `storage.database`".into())
}
