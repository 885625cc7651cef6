//! What clients think of answers. One judgement for each answer, name and key: the last value counts, once.

use serde::{Serialize, Serializer};

/// Names under which one key may judge one answer: what can be said for nothing must not fill the disk.
pub const NAMES_MAX: i64 = 16;

/// A judgement's value.
#[derive(Clone, Debug, PartialEq)]
pub enum Score {
    Boolean(bool),
    /// Finite, and not large.
    Number(f64),
    Label(String),
}

impl Score {
    /// What the table calls it.
    pub fn kind(&self) -> &'static str {
        match self {
            Score::Boolean(_) => "boolean",
            Score::Number(_) => "number",
            Score::Label(_) => "label",
        }
    }
}

impl Serialize for Score {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Score::Boolean(is) => serializer.serialize_bool(*is),
            Score::Number(number) => serializer.serialize_f64(*number),
            Score::Label(label) => serializer.serialize_str(label),
        }
    }
}

/// Which answer is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Of {
    /// `chatcmpl-…` or `cmpl-…`.
    Response(String),
    /// 32 lower-case hexadecimal digits.
    Trace(String),
}

/// What somebody says of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Judgement {
    pub of: Of,
    pub name: String,
    pub score: Score,
    pub comment: Option<String>,
    /// Whose answer it must be.
    pub tenant: String,
    pub key_id: String,
    pub at_ns: i64,
}

impl Judgement {
    /// The same for the same answer, name and key: who sends it again can tell that it is the same.
    pub fn id(&self, request_id: &str) -> String {
        let mut hash = blake3::Hasher::new();
        for part in [request_id, &self.name, &self.key_id] {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        format!("fb-{}", &hash.finalize().to_hex()[..32])
    }
}

/// The answer that was judged, as the ledger knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answered {
    pub request_id: String,
    pub response_id: String,
    pub route: String,
    pub variant: String,
}

/// What a judgement changed.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    Created,
    Unchanged,
    /// The value stands, with other words.
    Commented,
    /// Holds the value that no longer counts.
    Revised(Score),
}

impl Change {
    pub fn as_str(&self) -> &'static str {
        match self {
            Change::Created => "created",
            Change::Unchanged => "unchanged",
            Change::Commented | Change::Revised(_) => "revised",
        }
    }
}

/// What became of a judgement.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    Taken {
        answered: Answered,
        change: Change,
    },
    /// The tenant has no such answer, or it has not ended.
    NoSuchAnswer,
    /// The trace holds more than one.
    SeveralAnswers,
    /// The key has judged the answer under as many names as there may be.
    TooManyNames,
}
