//! The ledger's tables, brought up to date.

use super::super::StoreError;
pub(super) use crate::database::migrate::lock;
use crate::database::migrate::{MigrateError, Migrations};
use crate::database::postgres::Session;

const LEDGER: Migrations = Migrations {
    table: "ledger_version",
    steps: &[
        include_str!("../../migrations/postgres/0001_ledger.sql"),
        include_str!("../../migrations/postgres/0002_adjustments.sql"),
    ],
};

/// Runs what is missing, all of it or nothing.
pub(super) async fn up(session: &mut Session) -> Result<(), StoreError> {
    LEDGER.up(session).await.map_err(|error| StoreError(error.to_string()))
}

/// # Errors
/// When the tables are not those that this version reads.
pub(super) async fn check(session: &mut Session) -> Result<(), StoreError> {
    match LEDGER.version(session).await? {
        None => Err(StoreError("there is no ledger in it; it begins with the first start of `glassgate serve`".into())),
        Some(version) if version > LEDGER.steps.len() => Err(StoreError(MigrateError::Newer.to_string())),
        Some(version) if version < LEDGER.steps.len() => Err(StoreError(
            "it was last written by an older glassgate; the next start of `glassgate serve` brings it up to date"
                .into(),
        )),
        Some(_) => Ok(()),
    }
}
