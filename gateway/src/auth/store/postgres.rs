//! The key store that several gateways share: tables in their Postgres.

use std::cell::RefCell;
use std::error::Error;
use std::sync::Arc;

use tokio_postgres::types::{IsNull, ToSql, Type};

use super::sql::{Row, Sql, Value, unreadable};
use super::{OpenError, StoreError};
use crate::database::migrate::{MigrateError, Migrations};
use crate::database::postgres::{Link, STATEMENT_MAX, Session, Target};

const DIRECTORY: Migrations =
    Migrations { table: "glassgate_version", steps: &[include_str!("migrations/postgres/0001_directory.sql")] };

/// Waits for whoever makes a change now, and sees what they made.
const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED; SELECT n FROM glassgate_head FOR UPDATE";

/// One connection; after an error it is none any more.
pub(super) struct Postgres(RefCell<Option<Link>>);

impl Postgres {
    pub(super) fn open(target: &Target) -> Result<Postgres, OpenError> {
        let mut link = Link::open(target, STATEMENT_MAX)?;
        match link.run(async |session| Ok(DIRECTORY.up(session).await))? {
            Ok(()) => Ok(Postgres(RefCell::new(Some(link)))),
            Err(MigrateError::Store(error)) => Err(error.into()),
            Err(MigrateError::Newer) => Err(OpenError::Newer),
        }
    }

    fn run<T>(&self, work: impl AsyncFnOnce(&mut Session) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut place = self.0.borrow_mut();
        let ended = || StoreError("the connection to the database has ended".to_owned());
        let mut link = place.take().filter(Link::is_open).ok_or_else(ended)?;
        let done = link.run(work)?;
        // Only now: a connection that failed is dropped, and whatever was under way on it ends.
        *place = Some(link);
        Ok(done)
    }
}

impl Sql for Postgres {
    fn rows(&self, sql: &str, values: &[Value]) -> Result<Vec<Row>, StoreError> {
        let rows = self.run(async |session| session.query(&named(sql), &places(values)).await)?;
        let Some(first) = rows.first() else { return Ok(Vec::new()) };
        let names: Arc<[String]> = first.columns().iter().map(|column| column.name().to_owned()).collect();
        rows.iter().map(|row| Ok(Row::new(names.clone(), read(row)?))).collect()
    }

    fn execute(&self, sql: &str, values: &[Value]) -> Result<u64, StoreError> {
        self.run(async |session| session.execute(&named(sql), &places(values)).await)
    }

    fn begin(&self) -> Result<(), StoreError> {
        self.run(async |session| session.batch(BEGIN).await)
    }

    fn commit(&self) -> Result<(), StoreError> {
        self.run(async |session| session.batch("COMMIT").await).map_err(|StoreError(why)| {
            StoreError(format!("{why}; whether the change was made is not known, so look before you make it again"))
        })
    }

    fn abandon(&self) {
        // If this fails, so has the connection, and the server takes the change back.
        let _ = self.run(async |session| session.batch("ROLLBACK").await);
    }
}

fn named(sql: &str) -> String {
    sql.replace('#', "glassgate_").replace('?', "$")
}

fn places(values: &[Value]) -> Vec<&(dyn ToSql + Sync)> {
    values.iter().map(|value| value as &(dyn ToSql + Sync)).collect()
}

fn read(row: &tokio_postgres::Row) -> Result<Vec<Value>, StoreError> {
    let values = row.columns().iter().enumerate().map(|(at, column)| match *column.type_() {
        Type::INT8 => Ok(row.try_get::<_, Option<i64>>(at)?.into()),
        Type::TEXT => Ok(row.try_get::<_, Option<String>>(at)?.into()),
        Type::BYTEA => Ok(row.try_get::<_, Option<Vec<u8>>>(at)?.map_or(Value::Null, Value::Bytes)),
        ref other => Err(unreadable(column.name(), format!("it is of the type {other}, which nobody here made it"))),
    });
    values.collect()
}

impl ToSql for Value {
    fn to_sql(&self, kind: &Type, out: &mut bytes::BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        match self {
            Value::Null => Ok(IsNull::Yes),
            Value::Integer(number) => number.to_sql(kind, out),
            // The one character that no text in Postgres can hold; nothing here is called by it.
            Value::Text(text) => text.replace('\0', "\u{fffd}").to_sql(kind, out),
            Value::Bytes(bytes) => bytes.to_sql(kind, out),
        }
    }

    fn accepts(kind: &Type) -> bool {
        [Type::INT8, Type::TEXT, Type::BYTEA].contains(kind)
    }

    tokio_postgres::types::to_sql_checked!();
}
