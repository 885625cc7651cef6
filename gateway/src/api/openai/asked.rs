//! What a request asks beyond its prompt, as embedded models read it: biases, log-probabilities, and the form that the
//! answer must have. An upstream reads these fields itself.

use serde_json::{Map, Value};

use super::fields::{bad, unsupported};
use super::request::{Op, Request};
use crate::ports::Form;
use crate::refusal::Refusal;

/// Checked. What is not asked for is empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Asked {
    /// Token → what is added to its logit.
    pub logit_bias: Vec<(u32, f32)>,
    /// Some: tell how likely each token was, and this many of the likeliest beside it.
    pub logprobs: Option<u32>,
    /// The form that answers must have, and the field that says so.
    pub form: Option<(&'static str, Form)>,
}

const BIASES_MAX: usize = 300;
/// OpenAI's bounds: of a chat, and of a text completion.
const TOP_LOGPROBS_MAX: u64 = 20;
const LOGPROBS_MAX: u64 = 5;

impl Request {
    /// # Errors
    /// `BadParam` and `Unsupported` with the name of the field.
    pub fn asked(&self) -> Result<Asked, Refusal> {
        let forms = [response_format(&self.body)?, structured_outputs(&self.body)?];
        let mut forms = forms.into_iter().flatten().chain(guided(&self.body)?);
        let form = forms.next();
        if let Some((second, _)) = forms.next() {
            return Err(bad(second, "asks for one form, and another field for another"));
        }
        Ok(Asked { logit_bias: logit_bias(&self.body)?, logprobs: logprobs(self.op, &self.body)?, form })
    }
}

fn get<'v>(body: &'v Map<String, Value>, name: &str) -> Option<&'v Value> {
    body.get(name).filter(|value| !value.is_null())
}

fn logit_bias(body: &Map<String, Value>) -> Result<Vec<(u32, f32)>, Refusal> {
    let wrong = || bad("logit_bias", format!("must map at most {BIASES_MAX} token ids to numbers from -100 to 100"));
    let biases = match get(body, "logit_bias") {
        None => return Ok(Vec::new()),
        Some(Value::Object(biases)) if biases.len() <= BIASES_MAX => biases,
        Some(_) => return Err(wrong()),
    };
    let one = |(token, bias): (&String, &Value)| {
        // Written in one way only, so that none comes twice.
        let id = token.parse::<u32>().ok().filter(|id| id.to_string() == *token)?;
        let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias))?;
        Some((id, bias as f32))
    };
    biases.iter().map(|pair| one(pair).ok_or_else(wrong)).collect()
}

/// A chat says whether and how many; a text completion says how many.
fn logprobs(op: Op, body: &Map<String, Value>) -> Result<Option<u32>, Refusal> {
    let top = match get(body, "top_logprobs") {
        None => 0,
        Some(value) => value
            .as_u64()
            .filter(|count| *count <= TOP_LOGPROBS_MAX)
            .ok_or_else(|| bad("top_logprobs", format!("must be a whole number from 0 to {TOP_LOGPROBS_MAX}")))?
            as u32,
    };
    match (op, get(body, "logprobs")) {
        (Op::Embeddings, _) => Ok(None),
        (Op::TextCompletion, _) if top > 0 => Err(bad("top_logprobs", "is for chats; say how many in `logprobs`")),
        (Op::Chat, Some(Value::Bool(true))) => Ok(Some(top)),
        (_, None | Some(Value::Bool(false))) if top > 0 => Err(bad("top_logprobs", "needs `logprobs: true`")),
        (_, None | Some(Value::Bool(false))) => Ok(None),
        (Op::Chat, Some(_)) => Err(bad("logprobs", "must be true or false")),
        (Op::TextCompletion, Some(value)) => match value.as_u64().filter(|count| *count <= LOGPROBS_MAX) {
            Some(count) => Ok(Some(count as u32)),
            None => Err(bad("logprobs", format!("must be a whole number from 0 to {LOGPROBS_MAX}"))),
        },
    }
}

/// Any object of JSON.
fn object() -> Form {
    Form::JsonSchema(r#"{"type":"object"}"#.to_owned())
}

/// OpenAI's field.
fn response_format(body: &Map<String, Value>) -> Result<Option<(&'static str, Form)>, Refusal> {
    const FIELD: &str = "response_format";
    let Some(format) = get(body, FIELD) else { return Ok(None) };
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some((FIELD, object()))),
        Some("json_schema") => {
            let schema = format.get("json_schema").and_then(|named| named.get("schema"));
            let schema = schema.ok_or_else(|| bad(FIELD, "has no `json_schema.schema`"))?;
            Ok(Some((FIELD, Form::JsonSchema(schema.to_string()))))
        }
        _ => Err(unsupported(FIELD, "its type must be \"text\", \"json_object\" or \"json_schema\"")),
    }
}

/// vLLM's field.
fn structured_outputs(body: &Map<String, Value>) -> Result<Option<(&'static str, Form)>, Refusal> {
    const FIELD: &str = "structured_outputs";
    let fields = match get(body, FIELD) {
        None => return Ok(None),
        Some(Value::Object(fields)) => fields,
        Some(_) => return Err(bad(FIELD, "must be an object")),
    };
    let mut asked = fields.iter().filter(|(_, value)| !value.is_null() && **value != Value::Bool(false));
    let (Some((name, value)), None) = (asked.next(), asked.next()) else {
        return if fields.is_empty() { Ok(None) } else { Err(bad(FIELD, "must ask for one form")) };
    };
    form(FIELD, name, value).map(|form| Some((FIELD, form)))
}

/// vLLM's older fields.
fn guided(body: &Map<String, Value>) -> Result<Vec<(&'static str, Form)>, Refusal> {
    ["guided_json", "guided_regex", "guided_choice", "guided_grammar"]
        .into_iter()
        .filter_map(|field| get(body, field).map(|value| (field, value)))
        .map(|(field, value)| Ok((field, form(field, field.trim_start_matches("guided_"), value)?)))
        .collect()
}

fn form(field: &'static str, kind: &str, value: &Value) -> Result<Form, Refusal> {
    let text = || value.as_str().map(str::to_owned).ok_or_else(|| bad(field, format!("`{kind}` must be a string")));
    match (kind, value) {
        ("json", Value::String(schema)) => Ok(Form::JsonSchema(schema.clone())),
        ("json", schema) => Ok(Form::JsonSchema(schema.to_string())),
        ("json_object", Value::Bool(true)) => Ok(object()),
        ("regex", _) => text().map(Form::Regex),
        ("grammar", _) => text().map(Form::Lark),
        ("choice", Value::Array(choices)) => {
            let choices = choices.iter().map(|choice| choice.as_str().map(str::to_owned));
            choices.collect::<Option<_>>().map(Form::Choice).ok_or_else(|| bad(field, "choices must be strings"))
        }
        _ => Err(unsupported(field, "only json, regex, choice and grammar are available")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(op: Op, extra: &str) -> Result<Asked, Refusal> {
        let body = match op {
            Op::Chat => format!(r#"{{"model":"a","messages":[{{"role":"user","content":"x"}}]{extra}}}"#),
            Op::TextCompletion => format!(r#"{{"model":"a","prompt":"x"{extra}}}"#),
            Op::Embeddings => format!(r#"{{"model":"a","input":"x"{extra}}}"#),
        };
        Request::parse(op, body.as_bytes()).expect("a request").asked()
    }

    #[test]
    fn what_asks_for_nothing_is_nothing() {
        for op in [Op::Chat, Op::TextCompletion, Op::Embeddings] {
            for extra in [
                "",
                r#","logprobs":false,"top_logprobs":0,"logit_bias":{},"response_format":{"type":"text"}"#,
                r#","logprobs":null,"logit_bias":null,"structured_outputs":{},"guided_json":null"#,
            ] {
                assert_eq!(asked(op, extra), Ok(Asked::default()), "{extra}");
            }
        }
    }

    #[test]
    fn log_probabilities_are_asked_for_as_each_endpoint_has_it() {
        let of = |op, extra: &str| asked(op, extra).map(|asked| asked.logprobs);
        assert_eq!(of(Op::Chat, r#","logprobs":true"#), Ok(Some(0)));
        assert_eq!(of(Op::Chat, r#","logprobs":true,"top_logprobs":20"#), Ok(Some(20)));
        assert_eq!(of(Op::TextCompletion, r#","logprobs":0"#), Ok(Some(0)));
        assert_eq!(of(Op::TextCompletion, r#","logprobs":5"#), Ok(Some(5)));
        for (op, extra, param) in [
            (Op::Chat, r#","top_logprobs":2"#, "top_logprobs"),
            (Op::Chat, r#","logprobs":true,"top_logprobs":21"#, "top_logprobs"),
            (Op::Chat, r#","logprobs":5"#, "logprobs"),
            (Op::TextCompletion, r#","logprobs":6"#, "logprobs"),
            (Op::TextCompletion, r#","logprobs":true"#, "logprobs"),
            (Op::TextCompletion, r#","logprobs":1,"top_logprobs":1"#, "top_logprobs"),
        ] {
            assert_eq!(of(op, extra).expect_err(extra).param(), Some(param), "{extra}");
        }
    }

    #[test]
    fn biases_are_read_or_refused() {
        let of = |biases: &str| asked(Op::Chat, &format!(r#","logit_bias":{biases}"#));
        assert_eq!(of(r#"{"5":-100,"7":1.5}"#).map(|asked| asked.logit_bias), Ok(vec![(5, -100.0), (7, 1.5)]));
        let many: Vec<String> = (0..301).map(|id| format!(r#""{id}":1"#)).collect();
        let many = format!("{{{}}}", many.join(","));
        for wrong in [r#"{"5":101}"#, r#"{"5":"1"}"#, r#"{"x":1}"#, r#"{"05":1}"#, r#"{"-1":1}"#, "[1]", "7", &many] {
            assert_eq!(of(wrong).expect_err(wrong).param(), Some("logit_bias"), "{wrong}");
        }
    }

    #[test]
    fn every_way_to_ask_for_a_form_is_understood() {
        let of = |extra: &str| asked(Op::Chat, extra).map(|asked| asked.form);
        let schema = Form::JsonSchema(r#"{"type":"null"}"#.into());
        let yes_no = Form::Choice(vec!["yes".into(), "no".into()]);
        for (extra, field, form) in [
            (r#","response_format":{"type":"json_object"}"#, "response_format", object()),
            (
                r#","response_format":{"type":"json_schema","json_schema":{"name":"n","strict":true,"schema":{"type":"null"}}}"#,
                "response_format",
                schema.clone(),
            ),
            (r#","structured_outputs":{"json":{"type":"null"},"regex":null}"#, "structured_outputs", schema.clone()),
            (r#","structured_outputs":{"json_object":true}"#, "structured_outputs", object()),
            (r#","structured_outputs":{"choice":["yes","no"]}"#, "structured_outputs", yes_no.clone()),
            (r#","guided_json":"{\"type\":\"null\"}""#, "guided_json", schema),
            (r#","guided_regex":"a+""#, "guided_regex", Form::Regex("a+".into())),
            (r#","guided_choice":["yes","no"]"#, "guided_choice", yes_no),
            (r#","guided_grammar":"start: \"a\"""#, "guided_grammar", Form::Lark("start: \"a\"".into())),
        ] {
            assert_eq!(of(extra), Ok(Some((field, form))), "{extra}");
        }
        for (extra, field) in [
            (r#","response_format":"json""#, "response_format"),
            (r#","response_format":{"type":"xml"}"#, "response_format"),
            (r#","response_format":{"type":"json_schema"}"#, "response_format"),
            (r#","structured_outputs":"json""#, "structured_outputs"),
            (r#","structured_outputs":{"regex":"a","choice":["b"]}"#, "structured_outputs"),
            (r#","structured_outputs":{"structural_tag":"x"}"#, "structured_outputs"),
            (r#","guided_regex":7"#, "guided_regex"),
            (r#","guided_choice":[1]"#, "guided_choice"),
            (r#","guided_choice":"a""#, "guided_choice"),
            (r#","response_format":{"type":"json_object"},"guided_regex":"a""#, "guided_regex"),
        ] {
            assert_eq!(of(extra).expect_err(extra).param(), Some(field), "{extra}");
        }
    }
}
