//! Reads single fields of `config.json`, says by name what is wrong with one, and remembers which were read.

use serde_json::{Map, Value};
use std::{cell::RefCell, collections::BTreeSet};

pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    read: RefCell<BTreeSet<&'static str>>,
}

/// Keys that change what a decoder computes, and the only value that is fine in a family that does not read them.
const MATTERS: &[(&str, Neutral)] = &[
    ("quantization_config", Neutral::Absent),
    ("clip_qkv", Neutral::Absent),
    ("use_bidirectional_attention", Neutral::False),
    ("use_qk_norm", Neutral::False),
    ("sliding_window", Neutral::Absent),
    ("use_sliding_window", Neutral::False),
    ("attn_logit_softcapping", Neutral::Absent),
    ("final_logit_softcapping", Neutral::Absent),
    ("query_pre_attn_scalar", Neutral::Absent),
    ("rope_local_base_freq", Neutral::Absent),
    ("partial_rotary_factor", Neutral::One),
    ("embedding_multiplier", Neutral::One),
    ("attention_multiplier", Neutral::One),
    ("residual_multiplier", Neutral::One),
    ("logits_scaling", Neutral::One),
    ("no_rope_layers", Neutral::Absent),
    ("no_rope_layer_interval", Neutral::Absent),
];

#[derive(Clone, Copy)]
enum Neutral {
    Absent,
    False,
    One,
}

impl<'a> Fields<'a> {
    pub fn new(map: &'a Map<String, Value>) -> Fields<'a> {
        Fields { map, read: RefCell::default() }
    }

    /// The value, unless it is absent or null.
    pub fn get(&self, name: &'static str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(name);
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Whether the file says nothing at all, not even null.
    pub fn is_silent(&self, name: &'static str) -> bool {
        self.read.borrow_mut().insert(name);
        !self.map.contains_key(name)
    }

    pub fn count(&self, name: &'static str, most: usize) -> Result<usize, String> {
        let value = self.get(name).ok_or_else(|| format!("`{name}` is missing"))?;
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (1..=most).contains(&n) => Ok(n),
            _ => Err(format!("`{name}` must be a whole number between 1 and {most}, got {value}")),
        }
    }

    pub fn count_or(&self, name: &'static str, most: usize, default: usize) -> Result<usize, String> {
        if self.get(name).is_some() { self.count(name, most) } else { Ok(default) }
    }

    pub fn positive(&self, name: &'static str) -> Result<Option<f64>, String> {
        self.get(name)
            .map(|value| match value.as_f64() {
                // Beyond these an f32 is zero or infinite.
                Some(x) if (1e-30..1e30).contains(&x) => Ok(x),
                _ => Err(format!("`{name}` must be a positive number, got {value}")),
            })
            .transpose()
    }

    pub fn positive_or(&self, name: &'static str, default: f64) -> Result<f64, String> {
        Ok(self.positive(name)?.unwrap_or(default))
    }

    pub fn required(&self, name: &'static str) -> Result<f64, String> {
        self.positive(name)?.ok_or_else(|| format!("`{name}` is missing"))
    }

    /// A list of positive numbers of just this length.
    pub fn positives(&self, name: &'static str, len: usize) -> Result<Vec<f32>, String> {
        let list = self.get(name).and_then(Value::as_array);
        let numbers: Option<Vec<f32>> = list.and_then(|list| {
            list.iter().map(|value| value.as_f64().filter(|x| (1e-30..1e30).contains(x)).map(|x| x as f32)).collect()
        });
        numbers
            .filter(|numbers| numbers.len() == len)
            .ok_or_else(|| format!("`{name}` must be a list of {len} positive numbers"))
    }

    pub fn flag(&self, name: &'static str, default: bool) -> Result<bool, String> {
        match self.get(name) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| format!("`{name}` must be true or false, got {value}")),
        }
    }

    pub fn text(&self, name: &'static str) -> Result<Option<&'a str>, String> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| format!("`{name}` must be a string, got {value}")),
        }
    }

    pub fn object(&self, name: &'static str) -> Result<Option<&'a Map<String, Value>>, String> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => {
                value.as_object().map(Some).ok_or_else(|| format!("`{name}` must be an object, got {value}"))
            }
        }
    }

    /// A token id or a list of them.
    pub fn ids(&self, name: &'static str) -> Result<Vec<u32>, String> {
        token_ids(self.get(name)).ok_or_else(|| format!("`{name}` must be a token id or a list of token ids"))
    }

    pub fn only(&self, name: &'static str, supported: &Value) -> Result<(), String> {
        match self.get(name) {
            Some(value) if value != supported => {
                Err(format!("`{name}` {value} is not supported (supported: {supported})"))
            }
            _ => Ok(()),
        }
    }

    /// Refuses what would change the answers and was not read.
    pub fn refuse_unread(&self) -> Result<(), String> {
        let read = self.read.borrow();
        for (name, neutral) in MATTERS.iter().filter(|(name, _)| !read.contains(name)) {
            let fine = match (self.map.get(*name), neutral) {
                (None | Some(Value::Null), _) => true,
                (Some(_), Neutral::Absent) => false,
                (Some(value), Neutral::False) => value.as_bool() == Some(false),
                (Some(value), Neutral::One) => value.as_f64() == Some(1.0),
            };
            if !fine {
                return Err(format!("`{name}` {} is not supported for this model_type", self.map[*name]));
            }
        }
        Ok(())
    }

    /// Refuses every key that was not read.
    pub fn refuse_all_unread(&self, of: &str) -> Result<(), String> {
        let read = self.read.borrow();
        let unread = self.map.iter().find(|(name, value)| !value.is_null() && !read.contains(name.as_str()));
        unread.map_or(Ok(()), |(name, value)| Err(format!("`{name}` {value} is not supported in {of}")))
    }
}

/// `None` if it is neither absent, nor an id, nor a list of ids.
pub(super) fn token_ids(value: Option<&Value>) -> Option<Vec<u32>> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(id).collect(),
        Some(value) => Some(vec![id(value)?]),
    }
}
