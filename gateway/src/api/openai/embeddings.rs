//! `POST /v1/embeddings`: what is particular about the request, and the answer as clients read it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value};

use super::answer::Head;
use super::fields::{Fields, bad, unsupported};
use super::request::is_token;
use crate::accounting::core::Usage;
use crate::answer::{Part, Piece};
use crate::api::glassgate::Glassgate;
use crate::ports::Prompt;
use crate::refusal::Refusal;

/// Texts in one request, as with OpenAI.
const TEXTS_MAX: usize = 2048;
/// No model makes longer vectors.
const DIMENSIONS_MAX: i64 = 1 << 16;

/// How a vector is written: as numbers, or as its little-endian f32s in base64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Float,
    Base64,
}

/// Checks what every backend needs to be right.
pub(super) fn check(fields: &Fields) -> Result<(), Refusal> {
    let wrong = || {
        let why =
            format!("must be a text, a list of token ids, or a list of 1 to {TEXTS_MAX} of either; none may be empty");
        bad("input", why)
    };
    let is_one = |value: &Value| match value {
        Value::String(text) => !text.is_empty(),
        Value::Array(ids) => !ids.is_empty() && ids.iter().all(is_token),
        _ => false,
    };
    let input = fields.get("input").ok_or_else(|| bad("input", "is missing"))?;
    let is_fine = is_one(input)
        || input.as_array().is_some_and(|many| (1..=TEXTS_MAX).contains(&many.len()) && many.iter().all(is_one));
    if !is_fine {
        return Err(wrong());
    }
    if fields.boolean("stream")? == Some(true) {
        return Err(unsupported("stream", "embeddings come in one piece"));
    }
    if !matches!(fields.string("encoding_format")?, None | Some("float" | "base64")) {
        return Err(bad("encoding_format", "must be \"float\" or \"base64\""));
    }
    fields.boolean("truncate")?;
    fields.integer("dimensions", 1..=DIMENSIONS_MAX)?;
    Ok(())
}

/// What an embedded model has to read.
pub(super) fn texts(body: &Map<String, Value>) -> Result<Vec<Prompt>, Refusal> {
    let is_cut = body.get("truncate") == Some(&Value::Bool(true));
    let one = |value: &Value| match value {
        Value::String(text) if is_cut => Some(Prompt::Cut(text.clone())),
        Value::String(text) => Some(Prompt::Text(text.clone())),
        Value::Array(ids) => {
            let ids = ids.iter().map(|id| u32::try_from(id.as_u64()?).ok());
            ids.collect::<Option<Vec<u32>>>().map(Prompt::Tokens)
        }
        _ => None,
    };
    let input = body.get("input").ok_or_else(|| bad("input", "is missing"))?;
    let texts = match one(input) {
        Some(one) => Some(vec![one]),
        None => input.as_array().and_then(|many| many.iter().map(one).collect()),
    };
    texts.ok_or_else(|| bad("input", "is missing"))
}

/// The format and the length that a checked request asks for; clients in Python ask for base64 unless told otherwise.
pub fn wanted(body: &Map<String, Value>) -> (Encoding, Option<u64>) {
    let encoding = match body.get("encoding_format").and_then(Value::as_str) {
        Some("base64") => Encoding::Base64,
        _ => Encoding::Float,
    };
    (encoding, body.get("dimensions").and_then(Value::as_u64))
}

/// A vector as JSON.
pub fn vector(numbers: &[f32], encoding: Encoding) -> Option<Box<RawValue>> {
    let raw = match encoding {
        Encoding::Float => to_raw_value(numbers),
        Encoding::Base64 => {
            let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            to_raw_value(&STANDARD.encode(bytes))
        }
    };
    raw.ok()
}

#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: Vec<Entry<'a>>,
    model: &'a str,
    usage: ReadUsage,
    glassgate: Glassgate<'a>,
}

#[derive(Serialize)]
struct Entry<'a> {
    object: &'static str,
    index: u32,
    embedding: &'a RawValue,
}

#[derive(Serialize)]
struct ReadUsage {
    prompt_tokens: u64,
    total_tokens: u64,
}

/// The answer as one document. `parts` are the vectors, in order.
pub(super) fn list(head: &Head<'_>, parts: &[Part], usage: &Usage, glassgate: Glassgate<'_>) -> Vec<u8> {
    let entry = |part: &Part| match &part.piece {
        Piece::Message(raw) | Piece::Delta(raw) => Some((part.index, raw.clone())),
        Piece::Text(_) => None,
    };
    let vectors: Vec<(u32, Box<RawValue>)> = parts.iter().filter_map(entry).collect();
    let list = List {
        object: "list",
        data: vectors.iter().map(|(index, raw)| Entry { object: "embedding", index: *index, embedding: raw }).collect(),
        model: head.model,
        usage: ReadUsage { prompt_tokens: usage.prompt(), total_tokens: usage.total() },
        glassgate,
    };
    // Strings and numbers into memory: this has no way to fail.
    serde_json::to_vec(&list).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::openai::request::{Op, Request};
    use serde_json::json;

    fn parse(more: Value) -> Result<Request, Refusal> {
        let mut body = json!({"model": "m", "input": "x"});
        more.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
        Request::parse(Op::Embeddings, body.to_string().as_bytes())
    }

    #[test]
    fn input_is_texts_or_tokens_one_or_several() {
        let texts = |input: Value| {
            parse(json!({"input": input})).and_then(|request| {
                let texts = request.prompts()?;
                assert_eq!(texts.len() as u32, request.prompt_count());
                Ok(texts)
            })
        };
        let text = |text: &str| Prompt::Text(text.into());
        assert_eq!(texts(json!("a")), Ok(vec![text("a")]));
        assert_eq!(texts(json!(["a", " "])), Ok(vec![text("a"), text(" ")]));
        assert_eq!(texts(json!([1, 2])), Ok(vec![Prompt::Tokens(vec![1, 2])]));
        assert_eq!(texts(json!([[1, 2], [3]])), Ok(vec![Prompt::Tokens(vec![1, 2]), Prompt::Tokens(vec![3])]));
        let cut = parse(json!({"truncate": true})).unwrap().prompts();
        assert_eq!(cut, Ok(vec![Prompt::Cut("x".into())]));
        for wrong in [
            json!(""),
            json!([]),
            json!([""]),
            json!([[]]),
            json!(7),
            json!({}),
            json!([-1]),
            json!(["a", 1]),
            json!(null),
        ] {
            assert_eq!(texts(wrong.clone()).expect_err("refused").param(), Some("input"), "{wrong}");
        }
        assert!(texts(json!(vec!["x"; TEXTS_MAX])).is_ok() && texts(json!(vec!["x"; TEXTS_MAX + 1])).is_err());
    }

    #[test]
    fn what_is_not_meant_is_refused_by_field() {
        for (more, param) in [
            (json!({"encoding_format": "int8"}), "encoding_format"),
            (json!({"dimensions": 0}), "dimensions"),
            (json!({"dimensions": "few"}), "dimensions"),
            (json!({"truncate": "END"}), "truncate"),
            (json!({"stream": true}), "stream"),
            (json!({"user": 7}), "user"),
            (json!({"model": null}), "model"),
        ] {
            assert_eq!(parse(more.clone()).expect_err("refused").param(), Some(param), "{more}");
        }
    }

    #[test]
    fn a_vector_is_the_same_in_both_formats() {
        let numbers = [0.1f32, -1.5, 3.0e-20, 7.0];
        let float: Vec<f32> = serde_json::from_str(vector(&numbers, Encoding::Float).unwrap().get()).unwrap();
        let base64: String = serde_json::from_str(vector(&numbers, Encoding::Base64).unwrap().get()).unwrap();
        let bytes = STANDARD.decode(base64).unwrap();
        let decoded: Vec<f32> =
            bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect();
        assert_eq!((float.as_slice(), decoded.as_slice()), (&numbers[..], &numbers[..]));
    }
}
