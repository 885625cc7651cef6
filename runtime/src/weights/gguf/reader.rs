//! The bytes of a GGUF header, each claim checked against the file before memory is spent on it.
//!
//! Layout (version 2 and 3, little endian): magic, version u32, tensors u64, pairs u64; the pairs; the tensor table;
//! padding; data. Source: the format's specification in the ggml repository.

use super::metadata::Value;
use std::{
    fs::File,
    io::{BufReader, Read},
};

/// Headers hold a vocabulary and little else; the largest known ones come to about 20 MB.
const HEADER_BYTES_MAX: u64 = 256 << 20;
/// A string in memory costs several times a short one in the file.
const ITEMS_MAX: u64 = 1 << 22;
const KEY_BYTES_MAX: u64 = 1 << 10;

/// Reads forward and knows how much is left of what it may read.
pub(super) struct Reader<'a> {
    file: BufReader<&'a File>,
    /// Bytes read.
    at: u64,
    end: u64,
}

/// Why a header cannot be believed; reads after the file's name.
pub(super) type Because<T> = Result<T, String>;

impl<'a> Reader<'a> {
    pub fn new(file: &'a File, file_bytes: u64) -> Reader<'a> {
        Reader { file: BufReader::with_capacity(1 << 16, file), at: 0, end: file_bytes.min(HEADER_BYTES_MAX) }
    }

    /// Where in the file the next byte is.
    pub fn position(&self) -> u64 {
        self.at
    }

    fn claim(&mut self, bytes: u64, what: &str) -> Because<()> {
        match self.at.checked_add(bytes) {
            Some(at) if at <= self.end => {
                self.at = at;
                Ok(())
            }
            _ if self.end == HEADER_BYTES_MAX => Err(format!("has a header of more than {HEADER_BYTES_MAX} bytes")),
            _ => Err(format!("is truncated or damaged: {what} at byte {} reaches beyond its end", self.at)),
        }
    }

    fn fill(&mut self, bytes: &mut [u8], what: &str) -> Because<()> {
        self.claim(bytes.len() as u64, what)?;
        self.file.read_exact(bytes).map_err(|error| format!("cannot be read at its {what}: {error}"))
    }

    pub fn bytes<const N: usize>(&mut self, what: &str) -> Because<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    pub fn u32(&mut self, what: &str) -> Because<u32> {
        self.bytes(what).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, what: &str) -> Because<u64> {
        self.bytes(what).map(u64::from_le_bytes)
    }

    /// A count of things that take at least `least` bytes each.
    pub fn count(&mut self, least: u64, what: &str) -> Because<u64> {
        let count = self.u64(what)?;
        let fits = count.checked_mul(least).is_some_and(|bytes| bytes <= self.end - self.at);
        if fits && count <= ITEMS_MAX {
            Ok(count)
        } else {
            Err(format!("is truncated or damaged: it claims {count} {what}, more than it can hold"))
        }
    }

    /// The name of a pair or a tensor.
    pub fn name(&mut self, what: &str) -> Because<String> {
        let len = self.u64(what)?;
        if len > KEY_BYTES_MAX {
            return Err(format!("claims a {what} of {len} bytes (at most {KEY_BYTES_MAX})"));
        }
        self.text(len, what)
    }

    fn string(&mut self, what: &str) -> Because<String> {
        let len = self.u64(what)?;
        self.text(len, what)
    }

    fn text(&mut self, len: u64, what: &str) -> Because<String> {
        if len > self.end - self.at {
            return Err(format!("is truncated or damaged: {what} claims {len} bytes of text"));
        }
        let mut bytes = vec![0; len as usize];
        self.fill(&mut bytes, what)?;
        String::from_utf8(bytes).map_err(|_| format!("{what} is not UTF-8"))
    }

    /// The value of the pair `key`.
    pub fn value(&mut self, key: &str) -> Because<Value> {
        let what = format!("value of `{key}`");
        match self.u32(&what)? {
            8 => self.string(&what).map(Value::Text),
            9 => self.array(key, &what),
            kind => self.number(kind, key, &what),
        }
    }

    fn array(&mut self, key: &str, what: &str) -> Because<Value> {
        let kind = self.u32(what)?;
        if kind == 9 {
            return Err(format!("`{key}` is an array of arrays, which no known key is"));
        }
        let least = if kind == 8 { 8 } else { width(kind).ok_or_else(|| unknown(kind, key))? };
        let count = self.count(least, &format!("items of `{key}`"))?;
        if kind == 8 {
            return (0..count).map(|_| self.string(what)).collect::<Because<_>>().map(Value::Texts);
        }
        let numbers = (0..count).map(|_| {
            Ok(match self.number(kind, key, what)? {
                Value::Whole(n) => n as f64,
                Value::Real(x) => x,
                Value::Flag(flag) => f64::from(u8::from(flag)),
                Value::Text(_) | Value::Texts(_) | Value::Numbers(_) => f64::NAN,
            })
        });
        numbers.collect::<Because<_>>().map(Value::Numbers)
    }

    fn number(&mut self, kind: u32, key: &str, what: &str) -> Because<Value> {
        Ok(match kind {
            0 => Value::Whole(u8::from_le_bytes(self.bytes(what)?).into()),
            1 => Value::Whole(i8::from_le_bytes(self.bytes(what)?).into()),
            2 => Value::Whole(u16::from_le_bytes(self.bytes(what)?).into()),
            3 => Value::Whole(i16::from_le_bytes(self.bytes(what)?).into()),
            4 => Value::Whole(u32::from_le_bytes(self.bytes(what)?).into()),
            5 => Value::Whole(i32::from_le_bytes(self.bytes(what)?).into()),
            6 => Value::Real(f32::from_le_bytes(self.bytes(what)?).into()),
            7 => match self.bytes(what)? {
                [0] => Value::Flag(false),
                [1] => Value::Flag(true),
                [other] => return Err(format!("`{key}` is neither true nor false but {other}")),
            },
            10 => Value::Whole(u64::from_le_bytes(self.bytes(what)?).into()),
            11 => Value::Whole(i64::from_le_bytes(self.bytes(what)?).into()),
            12 => Value::Real(f64::from_le_bytes(self.bytes(what)?)),
            other => return Err(unknown(other, key)),
        })
    }
}

/// Bytes of one number of each type.
fn width(kind: u32) -> Option<u64> {
    Some(match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        _ => return None,
    })
}

fn unknown(kind: u32, key: &str) -> String {
    format!("`{key}` has the unknown type {kind}")
}
