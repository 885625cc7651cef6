//! What both databases are asked in the same words: tables are written `#keys`, places `?1`, and each says them in its way.

use std::sync::Arc;

use super::StoreError;

pub(super) trait Sql: Send {
    fn rows(&self, sql: &str, values: &[Value]) -> Result<Vec<Row>, StoreError>;

    /// Gives how many rows changed.
    fn execute(&self, sql: &str, values: &[Value]) -> Result<u64, StoreError>;

    /// Begins a change, when nobody else is making one.
    fn begin(&self) -> Result<(), StoreError>;

    fn commit(&self) -> Result<(), StoreError>;

    /// What was begun leaves nothing.
    fn abandon(&self);
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Null,
    Integer(i64),
    Text(String),
    Bytes(Vec<u8>),
}

pub(super) struct Row {
    names: Arc<[String]>,
    values: Vec<Value>,
}

impl Row {
    pub(super) fn new(names: Arc<[String]>, values: Vec<Value>) -> Row {
        Row { names, values }
    }

    pub(super) fn get<T: Read>(&self, column: &str) -> Result<T, StoreError> {
        let found = self.names.iter().zip(&self.values).find(|(name, _)| *name == column);
        let read = found.and_then(|(_, value)| T::read(value));
        read.ok_or_else(|| unreadable(column, "it holds nothing of the kind that belongs there"))
    }
}

/// What a column holds that nobody here wrote is an error: a list that reads shorter than it is would allow too much.
pub(super) fn unreadable(column: &str, why: impl std::fmt::Display) -> StoreError {
    StoreError(format!("column `{column}`: {why}"))
}

/// What a value of a column can be read as.
pub(super) trait Read: Sized {
    fn read(value: &Value) -> Option<Self>;
}

impl Read for i64 {
    fn read(value: &Value) -> Option<i64> {
        if let Value::Integer(number) = value { Some(*number) } else { None }
    }
}

impl Read for u32 {
    fn read(value: &Value) -> Option<u32> {
        i64::read(value)?.try_into().ok()
    }
}

impl Read for String {
    fn read(value: &Value) -> Option<String> {
        if let Value::Text(text) = value { Some(text.clone()) } else { None }
    }
}

impl Read for [u8; 32] {
    fn read(value: &Value) -> Option<[u8; 32]> {
        if let Value::Bytes(bytes) = value { bytes.as_slice().try_into().ok() } else { None }
    }
}

impl<T: Read> Read for Option<T> {
    fn read(value: &Value) -> Option<Option<T>> {
        if *value == Value::Null { Some(None) } else { T::read(value).map(Some) }
    }
}

impl From<i64> for Value {
    fn from(number: i64) -> Value {
        Value::Integer(number)
    }
}

impl From<u32> for Value {
    fn from(number: u32) -> Value {
        Value::Integer(number.into())
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::Text(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Value {
        Value::Text(text)
    }
}

impl From<[u8; 32]> for Value {
    fn from(bytes: [u8; 32]) -> Value {
        Value::Bytes(bytes.into())
    }
}

impl<T: Into<Value>> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Value {
        value.map_or(Value::Null, Into::into)
    }
}
