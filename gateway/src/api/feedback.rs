//! `POST /v1/feedback`: what a client says of an answer, and what we say to that.

use serde::Serialize;

use super::openai::fields::{Fields, bad};
use crate::accounting::feedback::{Change, Of, Score};
use crate::refusal::Refusal;

const NAME_CHARS_MAX: usize = 64;
const LABEL_CHARS_MAX: usize = 64;
const COMMENT_CHARS_MAX: usize = 2_000;
/// Scores are of scales that people use: numbers that are larger would only spoil sums for everybody.
const NUMBER_MAX: f64 = 1e6;
/// More than this is no answer's id, whoever made it.
const ID_CHARS_MAX: usize = 128;

const FIELDS: [&str; 5] = ["response_id", "trace_id", "name", "value", "comment"];
/// Words that `/metrics` has for values that are no labels.
const RESERVED: [&str; 4] = ["true", "false", "number", "other"];

/// A body in which every field is checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Feedback {
    pub of: Of,
    pub name: String,
    pub score: Score,
    pub comment: Option<String>,
}

impl Feedback {
    /// # Errors
    /// `BadJson` with its position; `BadParam` with the name of the field, also of one that there is not: a judgement
    /// that says less than its sender meant would count for something else.
    pub fn parse(body: &[u8]) -> Result<Feedback, Refusal> {
        let fields = Fields::parse(body)?;
        if let Some(unknown) = fields.0.keys().find(|name| !FIELDS.contains(&name.as_str())) {
            let name: String = unknown.chars().take(64).collect();
            return Err(bad(name, format!("is not a field of feedback; there are {}", FIELDS.join(", "))));
        }
        let of = match (fields.string("response_id")?, fields.string("trace_id")?) {
            (Some(id), None) => Of::Response(response_id(id)?),
            (None, Some(id)) => Of::Trace(trace_id(id)?),
            (None, None) => {
                return Err(bad("response_id", "is missing; say which answer is meant, or send `trace_id`"));
            }
            (Some(_), Some(_)) => return Err(bad("trace_id", "may not be sent beside `response_id`; one says it all")),
        };
        let name =
            fields.string("name")?.ok_or_else(|| bad("name", "is missing; it says what is judged (`correct`)"))?;
        let is_word = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-');
        if name.is_empty() || name.len() > NAME_CHARS_MAX || !name.bytes().all(is_word) {
            return Err(bad(
                "name",
                format!("must be 1 to {NAME_CHARS_MAX} of the characters a-z, 0-9, `_`, `.` and `-`"),
            ));
        }
        let comment = fields.string("comment")?;
        if comment.is_some_and(|comment| comment.chars().count() > COMMENT_CHARS_MAX) {
            return Err(bad("comment", format!("must be at most {COMMENT_CHARS_MAX} characters")));
        }
        Ok(Feedback { of, name: name.to_owned(), score: score(&fields)?, comment: comment.map(str::to_owned) })
    }
}

fn response_id(id: &str) -> Result<String, Refusal> {
    if id.is_empty() || id.len() > ID_CHARS_MAX {
        return Err(bad("response_id", "must be the `id` of an answer, such as `chatcmpl-…`"));
    }
    Ok(id.to_owned())
}

fn trace_id(id: &str) -> Result<String, Refusal> {
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if id.len() != 32 || !id.bytes().all(is_digit) {
        return Err(bad(
            "trace_id",
            "must be 32 lower-case hexadecimal digits: the second part of an answer's `traceparent`",
        ));
    }
    Ok(id.to_owned())
}

fn score(fields: &Fields) -> Result<Score, Refusal> {
    use serde_json::Value;
    let wrong = || {
        bad(
            "value",
            format!(
                "must be true, false, a number from -{NUMBER_MAX} to {NUMBER_MAX}, or a label of 1 to {LABEL_CHARS_MAX} characters"
            ),
        )
    };
    match fields.get("value") {
        None => Err(bad("value", "is missing")),
        Some(Value::Bool(is)) => Ok(Score::Boolean(*is)),
        Some(Value::Number(number)) => {
            number.as_f64().filter(|number| number.abs() <= NUMBER_MAX).map(Score::Number).ok_or_else(wrong)
        }
        Some(Value::String(label)) if RESERVED.contains(&label.as_str()) => {
            Err(bad("value", format!("must not be the label {label:?}; send true, false or a number without quotes")))
        }
        Some(Value::String(label)) => {
            let is_label =
                (1..=LABEL_CHARS_MAX).contains(&label.chars().count()) && !label.chars().any(char::is_control);
            if is_label { Ok(Score::Label(label.clone())) } else { Err(wrong()) }
        }
        Some(_) => Err(wrong()),
    }
}

/// The answer to one that was taken.
#[derive(Serialize)]
struct Taken<'a> {
    object: &'static str,
    id: &'a str,
    response_id: &'a str,
    name: &'a str,
    value: &'a Score,
    status: &'static str,
}

pub fn taken(id: &str, response_id: &str, name: &str, value: &Score, change: &Change) -> Vec<u8> {
    let taken = Taken { object: "feedback", id, response_id, name, value, status: change.as_str() };
    // Strings, booleans and finite numbers: this has no way to fail.
    serde_json::to_vec(&taken).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(more: &str) -> Result<Feedback, Refusal> {
        Feedback::parse(format!(r#"{{"response_id":"chatcmpl-1",{more}}}"#).as_bytes())
    }

    #[test]
    fn a_value_is_a_boolean_a_number_or_a_label() {
        let score = |value: &str| parse(&format!(r#""name":"correct","value":{value}"#)).map(|feedback| feedback.score);
        assert_eq!(score("true"), Ok(Score::Boolean(true)));
        assert_eq!(score("-2.5e3"), Ok(Score::Number(-2500.0)));
        assert_eq!(score("-1e6"), Ok(Score::Number(-1e6)));
        assert_eq!(score(r#""sehr gut 👍""#), Ok(Score::Label("sehr gut 👍".into())));
        let long = format!("{:?}", "x".repeat(65));
        for wrong in ["1e308", "-1000000.1", "null", "[]", "{}", r#""""#, r#""a\nb""#, r#""true""#, r#""other""#, &long]
        {
            assert_eq!(score(wrong).unwrap_err().param(), Some("value"), "{wrong}");
        }
        assert!(matches!(score("1e999"), Err(Refusal::BadJson { .. })));
    }

    #[test]
    fn every_other_field_is_checked_and_named() {
        for (body, param) in [
            ("[]", "body"),
            ("{}", "response_id"),
            (r#"{"response_id":"","name":"a","value":1}"#, "response_id"),
            (r#"{"response_id":7,"name":"a","value":1}"#, "response_id"),
            (r#"{"trace_id":"ABC","name":"a","value":1}"#, "trace_id"),
            (r#"{"response_id":"a","trace_id":"0123456789abcdef0123456789abcdef","name":"a","value":1}"#, "trace_id"),
            (r#"{"response_id":"a","value":1}"#, "name"),
            (r#"{"response_id":"a","name":"Correct","value":1}"#, "name"),
            (r#"{"response_id":"a","name":"a","value":1,"comment":7}"#, "comment"),
            (r#"{"response_id":"a","name":"a","value":1,"score":7}"#, "score"),
        ] {
            assert_eq!(Feedback::parse(body.as_bytes()).unwrap_err().param(), Some(param), "{body}");
        }
        let comment = |chars: usize| parse(&format!(r#""name":"a","value":1,"comment":{:?}"#, "é".repeat(chars)));
        assert_eq!(comment(2_001).unwrap_err().param(), Some("comment"));
        assert!(comment(2_000).is_ok());
        assert!(matches!(parse(r#""name":"a","name":"b","value":1"#), Err(Refusal::BadJson { .. })));
    }

    proptest! {
        #[test]
        fn any_body_is_read_or_refused_without_panic(body in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = Feedback::parse(&body);
        }
    }
}
