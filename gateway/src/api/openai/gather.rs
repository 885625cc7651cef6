//! Pieces of an answer → whole choices: for clients that want one document, and for the cache.

use std::collections::BTreeMap;

use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value};

use crate::answer::{Part, Piece};

/// Collects the parts of an answer by choice.
#[derive(Default)]
pub struct Gather {
    choices: BTreeMap<u32, Choice>,
    bytes: usize,
}

#[derive(Default)]
struct Choice {
    text: String,
    /// What deltas said beyond text; holds the text too, once there is more.
    message: Option<Map<String, Value>>,
    whole: Option<Box<RawValue>>,
    logprobs: Option<Value>,
    tokens: Vec<u32>,
}

impl Gather {
    pub fn add(&mut self, part: &Part) {
        let choice = self.choices.entry(part.index).or_default();
        self.bytes += part.bytes();
        match &part.piece {
            Piece::Text(text) => match &mut choice.message {
                None => choice.text.push_str(text),
                Some(message) => merge_field(message, "content", text.as_str().into()),
            },
            Piece::Message(raw) => choice.whole = Some(raw.clone()),
            Piece::Delta(raw) => {
                let text = std::mem::take(&mut choice.text);
                let message = choice.message.get_or_insert_with(|| {
                    let content = if text.is_empty() { Value::Null } else { text.into() };
                    Map::from_iter([("role".into(), "assistant".into()), ("content".into(), content)])
                });
                if let Ok(Value::Object(delta)) = serde_json::from_str(raw.get()) {
                    for (key, value) in delta {
                        merge_field(message, &key, value);
                    }
                }
            }
        }
        choice.tokens.extend_from_slice(&part.tokens);
        if let Some(logprobs) = part.logprobs.as_ref().and_then(|raw| serde_json::from_str(raw.get()).ok()) {
            append(choice.logprobs.get_or_insert(Value::Null), logprobs);
        }
    }

    /// About what it takes in memory.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The choices in order, each a text or a whole message. `count` says how many there must be; who said nothing is
    /// an empty text.
    pub fn finish(mut self, count: usize) -> Vec<Part> {
        (0..count as u32)
            .map(|index| {
                let choice = self.choices.remove(&index).unwrap_or_default();
                let made = choice.message.map(|mut message| {
                    strip_indices(&mut message);
                    to_raw_value(&message)
                });
                let piece = match (choice.whole, made) {
                    (Some(raw), _) | (None, Some(Ok(raw))) => Piece::Message(raw),
                    _ => Piece::Text(choice.text),
                };
                let logprobs = choice.logprobs.and_then(|logprobs| to_raw_value(&logprobs).ok());
                Part { index, piece, logprobs, tokens: choice.tokens }
            })
            .collect()
    }
}

/// Names that are said once, even where a server repeats them in every delta.
const SAID_ONCE: [&str; 5] = ["role", "id", "type", "name", "index"];

fn merge_field(into: &mut Map<String, Value>, key: &str, value: Value) {
    match into.get_mut(key) {
        Some(old) if SAID_ONCE.contains(&key) && !old.is_null() => {}
        Some(old) => merge(old, value),
        None => {
            into.insert(key.to_owned(), value);
        }
    }
}

/// Deltas add up: text is appended, objects are merged, list items with the same `index` are one item.
fn merge(into: &mut Value, more: Value) {
    match (into, more) {
        (_, Value::Null) => {}
        (Value::String(text), Value::String(more)) => text.push_str(&more),
        (Value::Object(into), Value::Object(more)) => {
            for (key, value) in more {
                merge_field(into, &key, value);
            }
        }
        (Value::Array(items), Value::Array(more)) => {
            for item in more {
                let same = item.get("index").cloned();
                match items.iter_mut().find(|old| same.is_some() && old.get("index") == same.as_ref()) {
                    Some(old) => merge(old, item),
                    None => items.push(item),
                }
            }
        }
        (into, more) => *into = more,
    }
}

/// Log-probabilities of later tokens come behind those of earlier ones. Nothing in their lists is one item.
fn append(into: &mut Value, more: Value) {
    match (into, more) {
        (_, Value::Null) => {}
        (Value::Object(into), Value::Object(more)) => {
            for (key, value) in more {
                append(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (Value::Array(items), Value::Array(more)) => items.extend(more),
        (into, more) => *into = more,
    }
}

/// In a whole message, tool calls carry no index.
fn strip_indices(message: &mut Map<String, Value>) {
    for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(call) = call.as_object_mut() {
            call.remove("index");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn delta(index: u32, delta: Value) -> Part {
        Part { index, piece: Piece::Delta(to_raw_value(&delta).unwrap()), logprobs: None, tokens: Vec::new() }
    }

    #[test]
    fn text_stays_text_and_choices_stay_apart() {
        let mut gather = Gather::default();
        for (index, text) in [(1, "b"), (0, "a"), (1, "c")] {
            gather.add(&Part::text(index, text));
        }
        let texts: Vec<_> = gather.finish(3).iter().map(|part| part.piece.text().to_owned()).collect();
        assert_eq!(texts, ["a", "bc", ""]);
    }

    #[test]
    fn log_probabilities_add_up_token_by_token() {
        let mut gather = Gather::default();
        for logprob in [-0.5, -0.5, -1.0] {
            // A token whose text is a name that means something elsewhere.
            let told = json!({"tokens": ["index"], "top_logprobs": [{"index": logprob}], "extra": null});
            gather.add(&Part { logprobs: to_raw_value(&told).ok(), ..Part::text(0, "index") });
        }
        let told: Value = serde_json::from_str(gather.finish(1)[0].logprobs.as_ref().unwrap().get()).unwrap();
        assert_eq!(
            told,
            json!({"tokens": ["index", "index", "index"], "extra": null,
                   "top_logprobs": [{"index": -0.5}, {"index": -0.5}, {"index": -1.0}]})
        );
    }

    #[test]
    fn deltas_of_a_tool_call_make_the_whole_message() {
        let mut gather = Gather::default();
        gather.add(&Part::text(0, "Let me "));
        gather.add(&delta(0, json!({"role": "assistant", "content": "see."})));
        let call = |extra: Value| json!({"tool_calls": [extra]});
        gather.add(&delta(
            0,
            call(json!({"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}})),
        ));
        gather.add(&delta(0, call(json!({"index": 0, "function": {"arguments": "{\"x\""}}))));
        gather.add(&delta(0, call(json!({"index": 0, "id": "c1", "function": {"arguments": ":1}"}}))));
        let parts = gather.finish(1);
        let Piece::Message(message) = &parts[0].piece else { panic!("a message") };
        let message: Value = serde_json::from_str(message.get()).unwrap();
        assert_eq!(
            message,
            json!({"role": "assistant", "content": "Let me see.",
                   "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"x\":1}"}}]})
        );
    }
}
