//! How likely tokens were, as clients of both endpoints read it.

use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value};

use super::request::Op;

/// One token, as text, with the natural logarithm of its probability.
pub struct Token {
    /// None for a control token, which is written in `name` and stands for no bytes.
    pub bytes: Option<Vec<u8>>,
    pub name: String,
    pub logprob: f32,
}

/// The token at one place of an answer, and the most likely ones there.
pub struct Place {
    pub chosen: Token,
    pub top: Vec<Token>,
}

/// What OpenAI says of a token that cannot be: JSON has no infinity.
const NEVER: f32 = -9999.0;

impl Token {
    /// Bytes that are no whole characters are spelled out.
    fn text(&self, before_bytes: &str) -> String {
        match &self.bytes {
            None => self.name.clone(),
            Some(bytes) => match std::str::from_utf8(bytes) {
                Ok(text) => text.to_owned(),
                Err(_) => {
                    let spelled: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
                    format!("{before_bytes}{spelled}")
                }
            },
        }
    }

    fn logprob(&self) -> f32 {
        if self.logprob.is_finite() { self.logprob } else { NEVER }
    }
}

/// The number that is written as this one is: JSON values hold doubles, and would show digits that a float never had.
fn shortest(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(f64::from(number))
}

#[derive(Serialize)]
struct Chat {
    content: Vec<ChatPlace>,
    refusal: Option<()>,
}

#[derive(Serialize)]
struct ChatPlace {
    #[serde(flatten)]
    chosen: ChatToken,
    top_logprobs: Vec<ChatToken>,
}

#[derive(Serialize)]
struct ChatToken {
    token: String,
    logprob: f32,
    bytes: Option<Vec<u8>>,
}

impl From<&Token> for ChatToken {
    fn from(token: &Token) -> ChatToken {
        ChatToken { token: token.text(""), logprob: token.logprob(), bytes: token.bytes.clone() }
    }
}

#[derive(Serialize)]
struct Text {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<Map<String, Value>>,
    text_offset: Vec<usize>,
}

/// The `logprobs` of a choice, or of a piece of one. `offset`: characters of the answer's tokens before this piece; a
/// text completion tells where each of its tokens begins.
pub fn render(op: Op, places: &[Place], offset: &mut usize) -> Option<Box<RawValue>> {
    // Strings and numbers into memory: this has no way to fail.
    match op {
        Op::Embeddings => None,
        Op::Chat => {
            let place = |place: &Place| ChatPlace {
                chosen: (&place.chosen).into(),
                top_logprobs: place.top.iter().map(ChatToken::from).collect(),
            };
            to_raw_value(&Chat { content: places.iter().map(place).collect(), refusal: None }).ok()
        }
        Op::TextCompletion => {
            let name = |token: &Token| token.text("bytes:");
            let mut text_offset = Vec::with_capacity(places.len());
            for place in places {
                text_offset.push(*offset);
                *offset += name(&place.chosen).chars().count();
            }
            // The chosen one is among them, also where it was none of the likeliest.
            let top = |place: &Place| {
                place
                    .top
                    .iter()
                    .chain([&place.chosen])
                    .map(|token| (name(token), shortest(token.logprob()).into()))
                    .collect()
            };
            let text = Text {
                tokens: places.iter().map(|place| name(&place.chosen)).collect(),
                token_logprobs: places.iter().map(|place| place.chosen.logprob()).collect(),
                top_logprobs: places.iter().map(top).collect(),
                text_offset,
            };
            to_raw_value(&text).ok()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn token(text: &[u8], logprob: f32) -> Token {
        Token { bytes: Some(text.to_vec()), name: String::new(), logprob }
    }

    fn places() -> Vec<Place> {
        let end = Token { bytes: None, name: "<|im_end|>".into(), logprob: -2.5 };
        vec![
            Place { chosen: token("가a".as_bytes(), -0.5), top: vec![token("가a".as_bytes(), -0.5), end] },
            Place { chosen: token(b"\xe2\x80", f32::NEG_INFINITY), top: vec![token(b" b", -0.25)] },
        ]
    }

    #[test]
    fn a_chat_tells_tokens_with_their_bytes() {
        let raw = render(Op::Chat, &places(), &mut 0).unwrap();
        let told: Value = serde_json::from_str(raw.get()).unwrap();
        assert_eq!(
            told,
            json!({"content": [
                {"token": "가a", "logprob": -0.5, "bytes": [234, 176, 128, 97], "top_logprobs": [
                    {"token": "가a", "logprob": -0.5, "bytes": [234, 176, 128, 97]},
                    {"token": "<|im_end|>", "logprob": -2.5, "bytes": null}]},
                {"token": "\\xe2\\x80", "logprob": -9999.0, "bytes": [226, 128], "top_logprobs": [
                    {"token": " b", "logprob": -0.25, "bytes": [32, 98]}]},
            ], "refusal": null})
        );
        assert_eq!(render(Op::Chat, &[], &mut 0).unwrap().get(), r#"{"content":[],"refusal":null}"#);
    }

    #[test]
    fn a_text_completion_tells_lists_and_where_tokens_begin() {
        let mut offset = 3;
        let raw = render(Op::TextCompletion, &places(), &mut offset).unwrap();
        let told: Value = serde_json::from_str(raw.get()).unwrap();
        assert_eq!(
            told,
            json!({"tokens": ["가a", "bytes:\\xe2\\x80"], "token_logprobs": [-0.5, -9999.0], "text_offset": [3, 5],
                   "top_logprobs": [{"가a": -0.5, "<|im_end|>": -2.5}, {" b": -0.25, "bytes:\\xe2\\x80": -9999.0}]})
        );
        assert_eq!(offset, 3 + 2 + 14);
    }
}
