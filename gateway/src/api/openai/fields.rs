//! Reads a request object field by field, so that every refusal names its field.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::refusal::Refusal;

pub struct Fields(pub Map<String, Value>);

impl Fields {
    /// # Errors
    /// `BadJson` with the position, or `BadParam` if the document is no object.
    pub fn parse(body: &[u8]) -> Result<Fields, Refusal> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Fields(map)),
            Ok(_) => Err(Refusal::BadParam { param: "body".into(), why: "must be a JSON object".into() }),
            Err(error) => {
                // serde_json appends the position to its message; we give it in our own words.
                let text = error.to_string();
                let why = text.split(" at line ").next().unwrap_or_default().to_owned();
                Err(Refusal::BadJson { line: error.line(), column: error.column(), why })
            }
        }
    }

    /// A field that is present and not null.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    pub fn string(&self, name: &str) -> Result<Option<&str>, Refusal> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| bad(name, "must be a string"))
    }

    pub fn boolean(&self, name: &str) -> Result<Option<bool>, Refusal> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| bad(name, "must be true or false"))
    }

    pub fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, Refusal> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value
            .as_f64()
            .filter(|number| range.contains(number))
            .map(Some)
            .ok_or_else(|| bad(name, format!("must be a number from {} to {}", range.start(), range.end())))
    }

    pub fn integer(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, Refusal> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value
            .as_i64()
            .filter(|number| range.contains(number))
            .map(Some)
            .ok_or_else(|| bad(name, format!("must be a whole number from {} to {}", range.start(), range.end())))
    }
}

pub fn bad(param: impl Into<String>, why: impl Into<String>) -> Refusal {
    Refusal::BadParam { param: param.into(), why: why.into() }
}

pub fn unsupported(param: impl Into<String>, why: impl Into<String>) -> Refusal {
    Refusal::Unsupported { param: param.into(), why: why.into() }
}
