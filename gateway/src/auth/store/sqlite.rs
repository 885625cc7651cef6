//! The key store of one gateway: a file in its data folder.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, ToSql, params_from_iter};

use super::sql::{Row, Sql, Value};
use super::{OpenError, StoreError, migrate};

pub(super) struct Sqlite(Connection);

impl Sqlite {
    pub(super) fn open(path: &Path) -> Result<Sqlite, OpenError> {
        let open = || -> Result<Connection, StoreError> {
            let db = Connection::open(path)?;
            db.busy_timeout(Duration::from_secs(5))?;
            db.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;")?;
            Ok(db)
        };
        let db = open()?;
        migrate::migrate(&db)?;
        Ok(Sqlite(db))
    }
}

impl Sql for Sqlite {
    fn rows(&self, sql: &str, values: &[Value]) -> Result<Vec<Row>, StoreError> {
        let mut query = self.0.prepare_cached(&named(sql))?;
        let names: Arc<[String]> = query.column_names().map(str::to_owned).collect();
        let mut rows = query.query(params_from_iter(values))?;
        let mut found = Vec::new();
        while let Some(row) = rows.next()? {
            let values = (0..names.len()).map(|at| row.get_ref(at)?.try_into());
            found.push(Row::new(names.clone(), values.collect::<Result<_, StoreError>>()?));
        }
        Ok(found)
    }

    fn execute(&self, sql: &str, values: &[Value]) -> Result<u64, StoreError> {
        Ok(self.0.prepare_cached(&named(sql))?.execute(params_from_iter(values))? as u64)
    }

    fn begin(&self) -> Result<(), StoreError> {
        Ok(self.0.execute_batch("BEGIN IMMEDIATE")?)
    }

    fn commit(&self) -> Result<(), StoreError> {
        Ok(self.0.execute_batch("COMMIT")?)
    }

    fn abandon(&self) {
        if let Err(error) = self.0.execute_batch("ROLLBACK") {
            tracing::debug!(%error, "a change that was not made has not been taken back; the file's next user does it");
        }
    }
}

fn named(sql: &str) -> String {
    sql.replace('#', "")
}

impl ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self {
            Value::Null => ValueRef::Null,
            Value::Integer(number) => ValueRef::Integer(*number),
            Value::Text(text) => ValueRef::Text(text.as_bytes()),
            Value::Bytes(bytes) => ValueRef::Blob(bytes),
        }))
    }
}

impl TryFrom<ValueRef<'_>> for Value {
    type Error = StoreError;

    fn try_from(value: ValueRef<'_>) -> Result<Value, StoreError> {
        match value {
            ValueRef::Null => Ok(Value::Null),
            ValueRef::Integer(number) => Ok(Value::Integer(number)),
            ValueRef::Text(text) => Ok(Value::Text(String::from_utf8_lossy(text).into_owned())),
            ValueRef::Blob(bytes) => Ok(Value::Bytes(bytes.to_vec())),
            ValueRef::Real(_) => Err(StoreError("there is a number in it that nobody here wrote".to_owned())),
        }
    }
}
