//! Databases that things are kept in: why one did not do what it was asked to, how a Postgres is reached, and how tables there
//! are brought up to date.

pub mod migrate;
pub mod postgres;

/// Why a store did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StoreError(pub String);

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> StoreError {
        StoreError(error.to_string())
    }
}

impl From<std::io::Error> for StoreError {
    fn from(error: std::io::Error) -> StoreError {
        StoreError(error.to_string())
    }
}
