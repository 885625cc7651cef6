//! `POST /v1/chat/completions`: the request as clients send it, the answer as they read it, whole or in chunks.

use serde::Serialize;
use serde_json::Value;

use super::fields::{Fields, bad, unsupported};
use crate::accounting::core::Usage;
use crate::answer::Finish;
use crate::api::glassgate::Glassgate;
use crate::ports::Turn;
use crate::refusal::Refusal;

/// A chat request in which every field is checked.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatRequest {
    pub model: String,
    pub turns: Vec<Turn>,
    pub stream: bool,
    pub include_usage: bool,
    pub max_tokens: Option<u64>,
    pub sampling: Sampling,
    pub stop: Vec<String>,
    /// vLLM's extension: go on to the bound past the model's own end, for measurements.
    pub ignore_eos: bool,
    pub user: Option<String>,
}

/// What the client said about sampling; what it did not say is the model's default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampling {
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<u64>,
    pub min_p: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub presence_penalty: Option<f64>,
    pub seed: Option<i64>,
}

/// Fields that would change what the answer means, and that we do not do. Silence would be a lie.
const UNSUPPORTED: &[(&str, &str)] = &[
    ("tools", "embedded models cannot call tools"),
    ("functions", "embedded models cannot call functions"),
    ("function_call", "embedded models cannot call functions"),
    ("logit_bias", "biasing single tokens is not available"),
    ("top_logprobs", "log probabilities are not available"),
    ("audio", "only text is available"),
    ("web_search_options", "the gateway does not search the web"),
    ("best_of", "one answer is made a request"),
    ("suffix", "text cannot be inserted before a suffix"),
    ("guided_json", "constrained output is not available"),
    ("guided_regex", "constrained output is not available"),
    ("guided_choice", "constrained output is not available"),
    ("guided_grammar", "constrained output is not available"),
    ("structured_outputs", "constrained output is not available"),
    ("bad_words", "banning words is not available"),
    ("allowed_token_ids", "restricting tokens is not available"),
    ("stop_token_ids", "stopping at tokens is not available; use `stop`"),
    ("min_tokens", "a least length is not available"),
    ("echo", "the prompt is not repeated"),
    ("continue_final_message", "the last message is not continued"),
    ("prompt_logprobs", "log probabilities are not available"),
    ("use_beam_search", "beam search is not available"),
    ("prediction", "predicted output is not available"),
    ("chat_template", "the model's own template is used"),
    ("chat_template_kwargs", "the model's own template is used"),
];

const TURNS_MAX: usize = 2048;
const STOPS_MAX: usize = 4;
const STOP_BYTES_MAX: usize = 256;
const USER_BYTES_MAX: usize = 256;

impl ChatRequest {
    /// Parses and checks a body. Unknown fields that change nothing are let through.
    ///
    /// # Errors
    /// `BadJson` with its position; `BadParam` and `Unsupported` with the name of the field.
    pub fn parse(body: &[u8]) -> Result<ChatRequest, Refusal> {
        let fields = Fields::parse(body)?;
        for (name, why) in UNSUPPORTED {
            // What says "no" in its own words asks for nothing.
            let asks = |value: &Value| match value {
                Value::Array(items) => !items.is_empty(),
                Value::Object(map) => !map.is_empty(),
                Value::Bool(wanted) => *wanted,
                Value::Number(number) => number.as_u64() != Some(u64::from(*name == "best_of")),
                _ => true,
            };
            if fields.get(name).is_some_and(asks) {
                return Err(unsupported(*name, *why));
            }
        }
        if fields.get("tool_choice").is_some_and(|choice| choice != "none" && choice != "auto") {
            return Err(unsupported("tool_choice", "embedded models cannot call tools"));
        }
        if fields.boolean("logprobs")? == Some(true) {
            return Err(unsupported("logprobs", "log probabilities are not available"));
        }
        if let Some(format) = fields.get("response_format")
            && format.get("type").and_then(Value::as_str) != Some("text")
        {
            return Err(unsupported(
                "response_format",
                "only {\"type\":\"text\"} is available; ask for JSON in the prompt",
            ));
        }
        if let Some(modalities) = fields.get("modalities")
            && *modalities != serde_json::json!(["text"])
        {
            return Err(unsupported("modalities", "only [\"text\"] is available"));
        }
        if fields.integer("n", 1..=128)?.unwrap_or(1) > 1 {
            return Err(unsupported("n", "one answer is made a request; send the request several times"));
        }

        let model = fields.string("model")?.ok_or_else(|| bad("model", "is missing"))?.to_owned();
        let stream = fields.boolean("stream")?.unwrap_or(false);
        let max_tokens = match fields.integer("max_completion_tokens", 1..=i64::from(u32::MAX))? {
            Some(tokens) => Some(tokens),
            None => fields.integer("max_tokens", 1..=i64::from(u32::MAX))?,
        };
        let user = fields.string("user")?.map(str::to_owned);
        if user.as_ref().is_some_and(|user| user.len() > USER_BYTES_MAX) {
            return Err(bad("user", format!("must be at most {USER_BYTES_MAX} bytes")));
        }
        Ok(ChatRequest {
            model,
            turns: turns(&fields)?,
            stream,
            include_usage: include_usage(&fields, stream)?,
            max_tokens: max_tokens.map(|tokens| tokens as u64),
            sampling: Sampling {
                temperature: fields.number("temperature", 0.0..=2.0)?,
                top_p: fields.number("top_p", 0.0..=1.0)?,
                top_k: fields.integer("top_k", 0..=i64::from(u32::MAX))?.map(|k| k as u64),
                min_p: fields.number("min_p", 0.0..=1.0)?,
                repetition_penalty: fields.number("repetition_penalty", 0.1..=10.0)?,
                frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?,
                presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?,
                seed: fields.integer("seed", i64::MIN..=i64::MAX)?,
            },
            stop: stops(&fields)?,
            ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
            user,
        })
    }
}

fn include_usage(fields: &Fields, stream: bool) -> Result<bool, Refusal> {
    let Some(options) = fields.get("stream_options") else { return Ok(false) };
    if !stream {
        return Err(bad("stream_options", "may only be sent with `stream: true`"));
    }
    match options.get("include_usage") {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(wanted)) => Ok(*wanted),
        Some(_) => Err(bad("stream_options.include_usage", "must be true or false")),
    }
}

fn stops(fields: &Fields) -> Result<Vec<String>, Refusal> {
    let wrong = || {
        bad("stop", format!("must be a string or a list of at most {STOPS_MAX} strings of 1 to {STOP_BYTES_MAX} bytes"))
    };
    let stops: Vec<String> = match fields.get("stop") {
        None => Vec::new(),
        Some(Value::String(one)) => vec![one.clone()],
        Some(Value::Array(many)) => {
            many.iter().map(|stop| stop.as_str().map(str::to_owned).ok_or_else(wrong)).collect::<Result<_, _>>()?
        }
        Some(_) => return Err(wrong()),
    };
    let fine = stops.len() <= STOPS_MAX && stops.iter().all(|stop| (1..=STOP_BYTES_MAX).contains(&stop.len()));
    if fine { Ok(stops) } else { Err(wrong()) }
}

fn turns(fields: &Fields) -> Result<Vec<Turn>, Refusal> {
    let messages = fields.get("messages").ok_or_else(|| bad("messages", "is missing"))?;
    let messages = messages.as_array().ok_or_else(|| bad("messages", "must be a list"))?;
    if messages.is_empty() || messages.len() > TURNS_MAX {
        return Err(bad("messages", format!("must have 1 to {TURNS_MAX} messages")));
    }
    messages.iter().enumerate().map(|(i, message)| turn(i, message)).collect()
}

fn turn(i: usize, message: &Value) -> Result<Turn, Refusal> {
    let at = |field: &str| format!("messages[{i}].{field}");
    let role = message.get("role").and_then(Value::as_str).ok_or_else(|| bad(at("role"), "must be a string"))?;
    let role = match role {
        "system" | "user" | "assistant" => role,
        // OpenAI's newer name for the same thing; templates know the older one.
        "developer" => "system",
        "tool" | "function" => return Err(unsupported(at("role"), "embedded models cannot call tools")),
        _ => return Err(bad(at("role"), "must be \"system\", \"developer\", \"user\" or \"assistant\"")),
    };
    for field in ["tool_calls", "function_call", "audio"] {
        if message.get(field).is_some_and(|value| !value.is_null()) {
            return Err(unsupported(at(field), "only text is available"));
        }
    }
    let content = match message.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let mut text = String::new();
            for (part, value) in parts.iter().enumerate() {
                let at = |field: &str| at(&format!("content[{part}].{field}"));
                match value.get("type").and_then(Value::as_str) {
                    Some("text") => text.push_str(
                        value.get("text").and_then(Value::as_str).ok_or_else(|| bad(at("text"), "must be a string"))?,
                    ),
                    Some(_) => return Err(unsupported(at("type"), "only \"text\" parts are available")),
                    None => return Err(bad(at("type"), "must be a string")),
                }
            }
            text
        }
        _ => return Err(bad(at("content"), "must be a string or a list of text parts")),
    };
    Ok(Turn { role: role.to_owned(), content })
}

/// What every piece of one answer repeats.
pub struct Head<'a> {
    pub response_id: &'a str,
    /// Unix seconds.
    pub created: i64,
    /// The name that the client asked for.
    pub model: &'a str,
}

#[derive(Serialize)]
struct WireUsage {
    prompt_tokens: u64,
    completion_tokens: u64,
    total_tokens: u64,
    prompt_tokens_details: PromptDetails,
    completion_tokens_details: CompletionDetails,
}

#[derive(Serialize)]
struct PromptDetails {
    cached_tokens: u64,
}

#[derive(Serialize)]
struct CompletionDetails {
    reasoning_tokens: u64,
}

impl From<&Usage> for WireUsage {
    fn from(usage: &Usage) -> Self {
        WireUsage {
            prompt_tokens: usage.prompt(),
            completion_tokens: usage.completion(),
            total_tokens: usage.prompt() + usage.completion(),
            prompt_tokens_details: PromptDetails { cached_tokens: usage.cache_read },
            completion_tokens_details: CompletionDetails { reasoning_tokens: usage.reasoning },
        }
    }
}

#[derive(Serialize)]
struct Whole<'a> {
    id: &'a str,
    object: &'static str,
    created: i64,
    model: &'a str,
    choices: [WholeChoice<'a>; 1],
    usage: WireUsage,
    glassgate: Glassgate<'a>,
}

#[derive(Serialize)]
struct WholeChoice<'a> {
    index: u32,
    message: Message<'a>,
    logprobs: Option<()>,
    finish_reason: Finish,
}

#[derive(Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
    refusal: Option<()>,
}

/// The answer as one JSON document.
pub fn whole(head: &Head<'_>, text: &str, finish: Finish, usage: &Usage, glassgate: Glassgate<'_>) -> Vec<u8> {
    json(&Whole {
        id: head.response_id,
        object: "chat.completion",
        created: head.created,
        model: head.model,
        choices: [WholeChoice {
            index: 0,
            message: Message { role: "assistant", content: text, refusal: None },
            logprobs: None,
            finish_reason: finish,
        }],
        usage: usage.into(),
        glassgate,
    })
}

#[derive(Serialize)]
struct Part<'a> {
    id: &'a str,
    object: &'static str,
    created: i64,
    model: &'a str,
    choices: &'a [PartChoice<'a>],
    /// `null` on every chunk but the last, if the client asked for usage; absent if it did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<WireUsage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    glassgate: Option<Glassgate<'a>>,
}

#[derive(Serialize)]
struct PartChoice<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: Option<()>,
    finish_reason: Option<Finish>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
}

/// What one chunk of a stream says.
pub enum Piece<'a> {
    Role,
    Text(&'a str),
    Finish(Finish, Option<Glassgate<'a>>),
    Usage(&'a Usage, Glassgate<'a>),
}

/// One chunk as JSON. `usage_asked` says whether every chunk carries a `usage` field.
pub fn part(head: &Head<'_>, piece: Piece<'_>, usage_asked: bool) -> Vec<u8> {
    let mut delta = Delta::default();
    let (mut finish, mut usage, mut extra) = (None, usage_asked.then_some(None), None);
    let mut choices = true;
    match piece {
        Piece::Role => delta = Delta { role: Some("assistant"), content: Some("") },
        Piece::Text(text) => delta.content = Some(text),
        Piece::Finish(reason, glassgate) => (finish, extra) = (Some(reason), glassgate),
        Piece::Usage(tokens, glassgate) => {
            (usage, extra, choices) = (Some(Some(tokens.into())), Some(glassgate), false);
        }
    }
    let choice = [PartChoice { index: 0, delta, logprobs: None, finish_reason: finish }];
    json(&Part {
        id: head.response_id,
        object: "chat.completion.chunk",
        created: head.created,
        model: head.model,
        choices: if choices { &choice } else { &[] },
        usage,
        glassgate: extra,
    })
}

fn json(value: &impl Serialize) -> Vec<u8> {
    // Strings and numbers into memory: this has no way to fail.
    serde_json::to_vec(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn refusal(body: &str) -> Refusal {
        ChatRequest::parse(body.as_bytes()).expect_err(body)
    }

    fn with(extra: &str) -> String {
        format!(r#"{{"model":"assistant","messages":[{{"role":"user","content":"hi"}}]{extra}}}"#)
    }

    #[test]
    fn a_request_with_every_supported_field_is_read() {
        let body = with(
            r#","stream":true,"stream_options":{"include_usage":true},"max_completion_tokens":9,"temperature":0,"top_p":0.5,
            "top_k":3,"min_p":0.1,"repetition_penalty":1.1,"frequency_penalty":-1,"presence_penalty":1,"seed":-7,"stop":["a","b"],"user":"u","n":1,
            "response_format":{"type":"text"},"tools":[],"best_of":1,"top_logprobs":0,"echo":false,"metadata":{"x":"y"},"store":false,"service_tier":"auto""#,
        );
        let request = ChatRequest::parse(body.as_bytes()).unwrap();
        assert!(request.stream && request.include_usage);
        assert_eq!(request.max_tokens, Some(9));
        assert_eq!(request.sampling.seed, Some(-7));
        assert_eq!(request.stop, ["a", "b"]);
    }

    #[test]
    fn every_refusal_names_its_field() {
        for (extra, param) in [
            (r#","temperature":3"#, "temperature"),
            (r#","temperature":"hot""#, "temperature"),
            (r#","top_p":1.5"#, "top_p"),
            (r#","max_tokens":0"#, "max_tokens"),
            (r#","max_tokens":1.5"#, "max_tokens"),
            (r#","n":2"#, "n"),
            (r#","n":0"#, "n"),
            (r#","tools":[{"type":"function"}]"#, "tools"),
            (r#","tool_choice":"required""#, "tool_choice"),
            (r#","logprobs":true"#, "logprobs"),
            (r#","response_format":{"type":"json_object"}"#, "response_format"),
            (r#","stop":["a","b","c","d","e"]"#, "stop"),
            (r#","stop":[""]"#, "stop"),
            (r#","stop":7"#, "stop"),
            (r#","stream":"yes""#, "stream"),
            (r#","stream_options":{"include_usage":true}"#, "stream_options"),
            (r#","seed":1.5"#, "seed"),
            (r#","modalities":["audio"]"#, "modalities"),
            (r#","chat_template":"{{ x }}""#, "chat_template"),
            (r#","best_of":2"#, "best_of"),
            (r#","echo":true"#, "echo"),
            (r#","min_tokens":5"#, "min_tokens"),
        ] {
            assert_eq!(refusal(&with(extra)).param(), Some(param), "{extra}");
        }
        for (body, param) in [
            ("[]", "body"),
            (r#"{"messages":[{"role":"user","content":"x"}]}"#, "model"),
            (r#"{"model":"a"}"#, "messages"),
            (r#"{"model":"a","messages":[]}"#, "messages"),
            (r#"{"model":"a","messages":[{"role":"king","content":"x"}]}"#, "messages[0].role"),
            (r#"{"model":"a","messages":[{"role":"user"}]}"#, "messages[0].content"),
            (
                r#"{"model":"a","messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#,
                "messages[0].content[0].type",
            ),
        ] {
            assert_eq!(refusal(body).param(), Some(param), "{body}");
        }
    }

    #[test]
    fn broken_json_is_refused_with_its_position() {
        assert!(matches!(refusal("{\"model\": \"a\",\n  oops}"), Refusal::BadJson { line: 2, column: 3, .. }));
    }

    proptest! {
        #[test]
        fn any_body_is_read_or_refused_without_panic(body in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = ChatRequest::parse(&body);
        }
    }
}
