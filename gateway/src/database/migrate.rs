//! Brings tables of a Postgres up to date. A migration that was ever released never changes. Of several gateways that start at
//! once, one does it and the others wait.

use super::StoreError;
use super::postgres::Session;

/// Of the lock under which it is done: "glassgat" in ASCII.
const LOCK: i64 = 0x676c_6173_7367_6174;

/// What makes some tables, in order.
pub struct Migrations {
    /// The table that says how far they are.
    pub table: &'static str,
    pub steps: &'static [&'static str],
}

#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("it was written by a newer glassgate; use that one, or another `storage.database`")]
    Newer,
}

impl Migrations {
    /// How far the tables are; `None` where there are none yet.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn version(&self, session: &mut Session) -> Result<Option<usize>, StoreError> {
        let Migrations { table, .. } = self;
        let there = session.query(&format!("SELECT to_regclass('{table}') IS NOT NULL"), &[]).await?;
        if there.first().is_none_or(|row| !row.get::<_, bool>(0)) {
            return Ok(None);
        }
        let rows = session.query(&format!("SELECT version FROM {table}"), &[]).await?;
        Ok(rows.first().map(|row| row.get::<_, i64>(0).max(0) as usize))
    }

    /// Runs what is missing, all of it or nothing.
    ///
    /// # Errors
    /// When the tables cannot be written, or a newer version has made them.
    pub async fn up(&self, session: &mut Session) -> Result<(), MigrateError> {
        let Migrations { table, steps } = self;
        // Who only writes rows need not be allowed to make tables.
        if self.version(session).await? == Some(steps.len()) {
            return Ok(());
        }
        session.batch("BEGIN").await?;
        lock(session).await?;
        session.batch(&format!("CREATE TABLE IF NOT EXISTS {table} (version BIGINT NOT NULL)")).await?;
        let version = self.version(session).await?.unwrap_or(0);
        let Some(missing) = steps.get(version..) else { return Err(MigrateError::Newer) };
        for step in missing {
            session.batch(step).await?;
        }
        let now = steps.len();
        Ok(session.batch(&format!("DELETE FROM {table}; INSERT INTO {table} VALUES ({now}); COMMIT")).await?)
    }
}

/// Whoever changes tables does so alone, until the end of the transaction.
///
/// # Errors
/// When the others take too long.
pub async fn lock(session: &Session) -> Result<(), StoreError> {
    session.batch(&format!("SELECT pg_advisory_xact_lock({LOCK})")).await
}
