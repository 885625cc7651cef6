//! OpenAI's dialect from the other side: what we ask an upstream, and what it says.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value, json};

use super::request::{Op, Request};
use crate::accounting::core::Usage;
use crate::accounting::row::Service;
use crate::answer::{Finish, Part, Piece};

/// The body to send: the client's own fields, the upstream's name of the model, a bound, and usage in the stream.
pub fn ask(request: &Request, model: &str, output_max: u64) -> Vec<u8> {
    // Only what differs is written anew; the rest is borrowed from the client's document.
    let newer = request.op == Op::Chat && !is_set(&request.body, "max_tokens");
    let bound = if newer { "max_completion_tokens" } else { "max_tokens" };
    let mut body: Vec<(&str, Cow<'_, Value>)> = Vec::with_capacity(request.body.len() + 3);
    for (key, value) in &request.body {
        match key.as_str() {
            "model" | "max_tokens" | "max_completion_tokens" | "stream_options" => {}
            // Ours to tell. Who gets it all the same is a shadow, and may not know the field.
            "return_token_ids" => {}
            key => body.push((key, Cow::Borrowed(value))),
        }
    }
    body.push(("model", Cow::Owned(model.into())));
    // A vector has no length to bound.
    if request.op != Op::Embeddings {
        body.push((bound, Cow::Owned(output_max.into())));
    }
    if request.stream {
        let mut options = request.body.get("stream_options").and_then(Value::as_object).cloned().unwrap_or_default();
        options.insert("include_usage".into(), true.into());
        body.push(("stream_options", Cow::Owned(options.into())));
    }
    to_object(&body)
}

fn is_set(body: &Map<String, Value>, name: &str) -> bool {
    body.get(name).is_some_and(|value| !value.is_null())
}

fn to_object(fields: &[(&str, Cow<'_, Value>)]) -> Vec<u8> {
    use serde::ser::{SerializeMap, Serializer};
    let mut out = Vec::with_capacity(1024);
    let mut serializer = serde_json::Serializer::new(&mut out);
    // Values into memory: this has no way to fail.
    let _ = (|| {
        let mut map = (&mut serializer).serialize_map(Some(fields.len()))?;
        for (key, value) in fields {
            map.serialize_entry(key, value.as_ref())?;
        }
        map.end()
    })();
    out
}

/// What one event of a stream, or a whole document, says.
#[derive(Debug, Default)]
pub struct Said {
    pub parts: Vec<Part>,
    pub finishes: Vec<(u32, Finish)>,
    /// As it was reported, not yet believed.
    pub usage: Option<Value>,
    /// How it says that it serves this.
    pub service: Option<Service>,
    /// An error object where an answer should be.
    pub error: Option<Value>,
}

#[derive(Deserialize)]
struct Wire<'a> {
    #[serde(borrow, default)]
    choices: Option<Vec<WireChoice<'a>>>,
    #[serde(borrow, default)]
    data: Option<Vec<WireVector<'a>>>,
    #[serde(default)]
    usage: Option<Value>,
    #[serde(default)]
    service_tier: Option<Value>,
    #[serde(default)]
    error: Option<Value>,
}

#[derive(Deserialize)]
struct WireChoice<'a> {
    #[serde(default)]
    index: Option<u32>,
    #[serde(borrow, default)]
    delta: Option<&'a RawValue>,
    #[serde(borrow, default)]
    message: Option<&'a RawValue>,
    #[serde(default)]
    text: Option<String>,
    #[serde(borrow, default)]
    logprobs: Option<&'a RawValue>,
    #[serde(borrow, default)]
    finish_reason: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct WireVector<'a> {
    #[serde(default)]
    index: Option<u32>,
    #[serde(borrow)]
    embedding: &'a RawValue,
}

/// Reads one event's data or one document.
///
/// # Errors
/// What is wrong with it, for the log.
pub fn read(json: &[u8]) -> Result<Said, String> {
    let wire: Wire<'_> = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    if wire.choices.is_none() && wire.data.is_none() && wire.usage.is_none() && wire.error.is_none() {
        return Err("neither choices nor vectors nor usage nor an error".into());
    }
    let service = wire.service_tier.as_ref().and_then(Value::as_str).map(Service::told);
    let mut said = Said { usage: wire.usage, service, error: wire.error, ..Said::default() };
    for (place, vector) in (0..).zip(wire.data.into_iter().flatten()) {
        let index = vector.index.unwrap_or(place);
        let piece = Piece::Message(one_line(vector.embedding));
        said.parts.push(Part { index, piece, logprobs: None, tokens: Vec::new() });
        said.finishes.push((index, Finish::Stop));
    }
    for choice in wire.choices.into_iter().flatten() {
        let index = choice.index.unwrap_or(0);
        let logprobs = choice.logprobs.filter(|raw| raw.get() != "null").map(one_line);
        let piece = match (choice.delta, choice.message, choice.text) {
            (Some(delta), _, _) => delta_piece(delta),
            (None, Some(message), _) => Some(message_piece(message)),
            (None, None, text) => text.filter(|text| !text.is_empty()).map(Piece::Text),
        };
        // Log probabilities may come without text, and must not be lost.
        let piece = piece.or_else(|| logprobs.is_some().then(|| Piece::Text(String::new())));
        said.parts.extend(piece.map(|piece| Part { index, piece, logprobs, tokens: Vec::new() }));
        // Some servers say `""` where others say null.
        let word = choice.finish_reason.filter(|word| !word.is_empty());
        said.finishes.extend(word.map(|word| (index, Finish::parse(&word))));
    }
    Ok(said)
}

/// A delta that says something beyond its role: text alone as text, anything more as it came.
fn delta_piece(delta: &RawValue) -> Option<Piece> {
    let fields: Map<String, Value> = serde_json::from_str(delta.get()).ok()?;
    let is_empty = |value: &Value| value.is_null() || value.as_str() == Some("");
    let mut text = None;
    for (key, value) in fields {
        match key.as_str() {
            "role" => {}
            _ if is_empty(&value) => {}
            "content" if value.is_string() => text = Some(value),
            _ => return Some(Piece::Delta(one_line(delta))),
        }
    }
    match text {
        Some(Value::String(text)) => Some(Piece::Text(text)),
        _ => None,
    }
}

/// A message of text alone is text, so that it looks like every other answer.
fn message_piece(message: &RawValue) -> Piece {
    match delta_piece(message) {
        Some(Piece::Text(text)) => Piece::Text(text),
        None => Piece::Text(String::new()),
        Some(_) => Piece::Message(one_line(message)),
    }
}

/// As it came, but on one line: an event of ours ends with the line.
fn one_line(raw: &RawValue) -> Box<RawValue> {
    if !raw.get().contains(['\n', '\r']) {
        return raw.to_owned();
    }
    let value: Value = serde_json::from_str(raw.get()).unwrap_or_default();
    to_raw_value(&value).unwrap_or_else(|_| raw.to_owned())
}

/// A usage object as disjoint buckets, if it can be true: whole numbers, parts within their wholes, no more output than
/// was allowed, no more input than the request has bytes.
pub fn credible(usage: &Value, input_max: u64, output_max: u64) -> Option<Usage> {
    // Absent and null details are zero; a detail that is no count is not to be believed.
    let detail = |group: &str, name: &str| match usage.get(group).and_then(|details| details.get(name)) {
        None | Some(Value::Null) => Some(0),
        Some(count) => count.as_u64(),
    };
    let prompt = usage.get("prompt_tokens")?.as_u64()?;
    // A completion without tokens may leave its count out.
    let completion = match usage.get("completion_tokens") {
        None | Some(Value::Null) => 0,
        Some(count) => count.as_u64()?,
    };
    let cache_read = detail("prompt_tokens_details", "cached_tokens")?;
    let reasoning = detail("completion_tokens_details", "reasoning_tokens")?;
    if prompt > input_max || completion > output_max {
        return None;
    }
    Some(Usage {
        input: prompt.checked_sub(cache_read)?,
        cache_read,
        cache_write: 0,
        output: completion.checked_sub(reasoning)?,
        reasoning,
    })
}

/// An upstream's refusal in its own words: (message, param, code).
pub fn error(body: &[u8]) -> (Option<String>, Option<String>, Option<String>) {
    let body: Value = serde_json::from_slice(body).unwrap_or(json!({}));
    // OpenAI nests it; some servers do not, or send a plain string.
    let error = body.get("error").filter(|error| !error.is_null()).unwrap_or(&body);
    let text = |name: &str| error.get(name).and_then(Value::as_str).map(str::to_owned);
    (error.as_str().map(str::to_owned).or_else(|| text("message")), text("param"), text("code"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(body: &str) -> Request {
        Request::parse(Op::Chat, body.as_bytes()).unwrap()
    }

    #[test]
    fn an_upstream_gets_the_clients_fields_its_own_model_a_bound_and_is_asked_for_usage() {
        let asked = |body: &str| serde_json::from_slice::<Value>(&ask(&request(body), "real", 77)).unwrap();
        let found = asked(r#"{"model":"route","messages":[{"role":"user","content":"x"}],"tools":[{"a":1}],"x":[1]}"#);
        let expected = json!({"messages": [{"role": "user", "content": "x"}], "tools": [{"a": 1}], "x": [1], "model": "real", "max_completion_tokens": 77});
        assert_eq!(found, expected);
        let found = asked(r#"{"model":"r","stream":true,"max_tokens":5,"messages":[{"role":"user","content":"x"}]}"#);
        assert_eq!((&found["max_tokens"], &found["stream_options"]), (&json!(77), &json!({"include_usage": true})));
        assert!(found.get("max_completion_tokens").is_none());
    }

    #[test]
    fn only_usage_that_can_be_true_is_believed() {
        let found = |usage: Value| credible(&usage, 100, 50);
        let good = json!({"prompt_tokens": 10, "completion_tokens": 8, "prompt_tokens_details": {"cached_tokens": 4},
                          "completion_tokens_details": {"reasoning_tokens": 3}});
        assert_eq!(found(good), Some(Usage { input: 6, cache_read: 4, cache_write: 0, output: 5, reasoning: 3 }));
        for absurd in [
            json!({}),
            json!(null),
            json!({"prompt_tokens": -1, "completion_tokens": 1}),
            json!({"prompt_tokens": 1.5, "completion_tokens": 1}),
            json!({"prompt_tokens": "7", "completion_tokens": 1}),
            json!({"prompt_tokens": 101, "completion_tokens": 1}),
            json!({"prompt_tokens": 1, "completion_tokens": 51}),
            json!({"prompt_tokens": 1, "completion_tokens": 18446744073709551615u64}),
            json!({"prompt_tokens": 1, "completion_tokens": 1e30}),
            json!({"prompt_tokens": 1, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 2}}),
            json!({"prompt_tokens": 1, "completion_tokens": 1, "completion_tokens_details": {"reasoning_tokens": 2}}),
        ] {
            assert_eq!(found(absurd.clone()), None, "{absurd}");
        }
    }

    #[test]
    fn deltas_of_text_are_text_and_others_stay_as_they_came() {
        let said = read(br#"{"choices":[{"index":0,"delta":{"role":"assistant","content":""}},{"index":1,"delta":{"content":"hi","refusal":null}},
            {"index":2,"delta":{"tool_calls":[{"index":0}]},"finish_reason":"tool_calls"}],"usage":null}"#).unwrap();
        assert_eq!(said.parts.len(), 2);
        assert_eq!(said.parts[0].piece.text(), "hi");
        assert!(matches!(&said.parts[1].piece, Piece::Delta(raw) if raw.get().contains("tool_calls")));
        assert_eq!(said.finishes, [(2, Finish::ToolCalls)]);
        for garbage in ["", "{", "[]", "{}", r#"{"choices":7}"#, "\u{feff}"] {
            assert!(read(garbage.as_bytes()).is_err(), "{garbage}");
        }
    }
}
