//! The named values of a GGUF header. A value that is there and of the wrong kind is an error, never a default.

use super::reader::Because;
use std::collections::BTreeMap;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Whole(i128),
    Real(f64),
    Flag(bool),
    Text(String),
    /// Of any numeric type.
    Numbers(Vec<f64>),
    Texts(Vec<String>),
}

#[derive(Debug, Default)]
pub(super) struct Metadata(BTreeMap<String, Value>);

impl Metadata {
    pub fn insert(&mut self, key: String, value: Value) -> Because<()> {
        if self.0.contains_key(&key) {
            return Err(format!("`{key}` comes twice"));
        }
        self.0.insert(key, value);
        Ok(())
    }

    pub fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    pub fn text(&self, key: &str) -> Because<Option<&str>> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(format!("`{key}` must be a string")),
        }
    }

    /// A whole number from 0 on.
    pub fn count(&self, key: &str) -> Because<Option<u64>> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Whole(n)) => {
                u64::try_from(*n).map(Some).map_err(|_| format!("`{key}` must not be negative, got {n}"))
            }
            Some(_) => Err(format!("`{key}` must be a whole number")),
        }
    }

    pub fn require_count(&self, key: &str) -> Because<u64> {
        self.count(key)?.ok_or_else(|| format!("`{key}` is missing"))
    }

    pub fn real(&self, key: &str) -> Because<Option<f64>> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Real(x)) if x.is_finite() => Ok(Some(*x)),
            Some(_) => Err(format!("`{key}` must be a finite floating-point number")),
        }
    }

    pub fn flag(&self, key: &str) -> Because<Option<bool>> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Flag(flag)) => Ok(Some(*flag)),
            Some(_) => Err(format!("`{key}` must be true or false")),
        }
    }

    pub fn numbers(&self, key: &str) -> Because<Option<&[f64]>> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Numbers(numbers)) => Ok(Some(numbers)),
            Some(_) => Err(format!("`{key}` must be an array of numbers")),
        }
    }

    pub fn texts(&self, key: &str) -> Because<Option<&[String]>> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Texts(texts)) => Ok(Some(texts)),
            Some(_) => Err(format!("`{key}` must be an array of strings")),
        }
    }
}
