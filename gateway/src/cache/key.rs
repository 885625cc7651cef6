//! What makes two requests the same. A 256-bit hash over the tenant, the target with its exact weights or server, and the
//! request in a canonical form: names sorted, numbers by value, nulls as absent.

use http::HeaderMap;
use serde_json::{Map, Number, Value};

use crate::api::openai::request::Request;
use crate::auth::Caller;
use crate::routing::{Plan, Route};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key([u8; 32]);

/// What does not change the answer: how it is sent, for whom, and the name it was asked by.
const IGNORED: [&str; 7] =
    ["model", "stream", "stream_options", "user", "metadata", "safety_identifier", "prompt_cache_key"];

/// The key of a request that may be answered from the cache; `None` if it may not.
pub fn key(caller: &Caller, route: &Route, request: &Request, plan: &Plan, headers: &HeaderMap) -> Option<Key> {
    let rule = route.cache()?;
    if !(request.is_deterministic() || rule.sampled) || asks_for_no_cache(headers) {
        return None;
    }
    let mut hash = Canon::new();
    hash.text(caller.tenant());
    hash.text(request.op.as_str());
    hash.text(&plan.first.target.variant);
    hash.text(&plan.first.target.identity);
    // An answer nobody bounded is bounded by us.
    hash.number(&plan.first.measure.output_max.into());
    hash.request(&request.body);
    Some(hash.finish())
}

/// `cache-control: no-store` and `no-cache` (RFC 9111 §5.2.1): the answer must be made for this request.
fn asks_for_no_cache(headers: &HeaderMap) -> bool {
    let values = headers.get_all(http::header::CACHE_CONTROL).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|word| {
        let word = word.trim();
        word.eq_ignore_ascii_case("no-store") || word.eq_ignore_ascii_case("no-cache")
    })
}

/// Hashes values so that different ones never run together: each begins with its kind and its length.
struct Canon(blake3::Hasher);

impl Canon {
    fn new() -> Canon {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"glassgate response cache v1");
        Canon(hasher)
    }

    fn finish(self) -> Key {
        Key(*self.0.finalize().as_bytes())
    }

    fn tag(&mut self, kind: u8, length: usize) {
        self.0.update(&[kind]);
        self.0.update(&(length as u64).to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.tag(b's', text.len());
        self.0.update(text.as_bytes());
    }

    /// 1 and 1.0 are the same number.
    fn number(&mut self, number: &Number) {
        let whole = number.as_i64().map(i128::from).or_else(|| number.as_u64().map(i128::from));
        let float = number.as_f64().unwrap_or(f64::NAN);
        let is_whole = float.fract() == 0.0 && float.abs() < 9_007_199_254_740_992.0;
        match whole.or_else(|| is_whole.then_some(float as i128)) {
            Some(whole) => {
                self.tag(b'i', 0);
                self.0.update(&whole.to_le_bytes());
            }
            None => {
                self.tag(b'f', 0);
                self.0.update(&float.to_bits().to_le_bytes());
            }
        }
    }

    /// A request's own field that is null is as good as absent. Further down, null is a value.
    fn request(&mut self, body: &Map<String, Value>) {
        self.fields(body.iter().filter(|(name, value)| !value.is_null() && !IGNORED.contains(&name.as_str())));
    }

    fn fields<'v>(&mut self, fields: impl Iterator<Item = (&'v String, &'v Value)>) {
        let mut fields: Vec<_> = fields.collect();
        fields.sort_unstable_by_key(|(name, _)| *name);
        self.tag(b'o', fields.len());
        for (name, value) in fields {
            self.text(name);
            self.value(value);
        }
    }

    fn value(&mut self, value: &Value) {
        match value {
            Value::Null => self.tag(b'n', 0),
            Value::Bool(yes) => self.tag(b'b', usize::from(*yes)),
            Value::Number(number) => self.number(number),
            Value::String(text) => self.text(text),
            Value::Array(items) => {
                self.tag(b'a', items.len());
                items.iter().for_each(|item| self.value(item));
            }
            Value::Object(map) => self.fields(map.iter()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(body: &Value) -> Key {
        let mut hash = Canon::new();
        hash.request(body.as_object().unwrap());
        hash.finish()
    }

    fn parse(text: &str) -> Value {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn the_same_request_written_differently_has_one_key() {
        let one =
            parse(r#"{"model":"a","temperature":0,"messages":[{"role":"user","content":"x"}],"stop":null,"seed":1.0}"#);
        let other = parse(
            r#"{"stream":true,"user":"u","seed":1,"messages":[{"content":"x","role":"user"}],"temperature":0.0,"model":"b"}"#,
        );
        assert_eq!(of(&one), of(&other));
    }

    #[test]
    fn whatever_can_change_the_answer_changes_the_key() {
        let base = r#"{"temperature":0,"messages":[{"role":"user","content":"x"}]}"#;
        let mut keys = vec![of(&parse(base))];
        for changed in [
            r#"{"temperature":0.1,"messages":[{"role":"user","content":"x"}]}"#,
            r#"{"temperature":0,"messages":[{"role":"system","content":"x"}]}"#,
            r#"{"temperature":0,"messages":[{"role":"user","content":"x "}]}"#,
            r#"{"temperature":0,"messages":[{"role":"user","content":"x"},{"role":"user","content":""}]}"#,
            r#"{"temperature":0,"messages":[{"role":"user","content":"x"}],"seed":1}"#,
            r#"{"temperature":0,"messages":[{"role":"user","content":"x"}],"seed":"1"}"#,
            r#"{"temperature":0,"messages":[{"role":"user","content":"x"}],"unknown":[]}"#,
            r#"{"temperature":0,"messages":[{"role":"user","content":"x"}],"unknown":{}}"#,
            r#"{"temperature":0,"messages":[{"role":"user","content":"x"}],"unknown":{"const":null}}"#,
            r#"{"temperature":0,"messages":[{"role":"user","content":"x"}],"unknown":false}"#,
        ] {
            keys.push(of(&parse(changed)));
        }
        let distinct: std::collections::HashSet<Key> = keys.iter().copied().collect();
        assert_eq!(distinct.len(), keys.len());
    }

    proptest! {
        #[test]
        fn texts_never_run_together(a in "[a-c]{0,3}", b in "[a-c]{0,3}", c in "[a-c]{0,3}", d in "[a-c]{0,3}") {
            let of = |x: &str, y: &str| of(&serde_json::json!({"p": [x, y]}));
            prop_assert_eq!(of(&a, &b) == of(&c, &d), (a, b) == (c, d));
        }
    }
}
