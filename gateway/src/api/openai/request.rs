//! `POST /v1/chat/completions`, `/v1/completions` and `/v1/embeddings`: the request as clients send it.
//!
//! Every field that we know is checked here, for every backend. What an embedded model cannot do is refused in
//! `Request::prompts` and `Request::asked`, where it is known that one is to answer; an upstream gets the client's own
//! fields, but for what we could not hand on of its answer: `Request::check_upstream`.

use serde_json::{Map, Value};

use super::embeddings;
use super::fields::{Fields, bad, unsupported};
use crate::accounting::row::Service;
use crate::ports::{Prompt, Turn};
use crate::refusal::Refusal;

/// What is asked for, in the words of OpenTelemetry's `gen_ai.operation.name`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    Chat,
    TextCompletion,
    Embeddings,
}

impl Op {
    pub fn as_str(self) -> &'static str {
        match self {
            Op::Chat => "chat",
            Op::TextCompletion => "text_completion",
            Op::Embeddings => "embeddings",
        }
    }

    /// The path below an upstream's base URL.
    pub fn path(self) -> &'static str {
        match self {
            Op::Chat => "/chat/completions",
            Op::TextCompletion => "/completions",
            Op::Embeddings => "/embeddings",
        }
    }

    /// How the ids of its answers begin.
    pub fn id_prefix(self) -> &'static str {
        match self {
            Op::Chat => "chatcmpl-",
            Op::TextCompletion => "cmpl-",
            Op::Embeddings => "embd-",
        }
    }

    /// The field of what there is to read.
    pub fn input_field(self) -> &'static str {
        match self {
            Op::Chat => "messages",
            Op::TextCompletion => "prompt",
            Op::Embeddings => "input",
        }
    }

    /// The field that bounds an answer.
    pub fn bound_field(self) -> &'static str {
        match self {
            Op::Chat => "max_completion_tokens",
            Op::TextCompletion | Op::Embeddings => "max_tokens",
        }
    }
}

/// A request in which every known field is checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    pub op: Op,
    pub model: String,
    pub stream: bool,
    pub include_usage: bool,
    pub max_tokens: Option<u64>,
    /// Independent answers to each prompt.
    pub n: u32,
    /// Answers that an upstream makes to choose `n` of.
    pub best_of: u32,
    pub sampling: Sampling,
    pub stop: Vec<String>,
    /// vLLM's extension: go on to the bound past the model's own end, for measurements.
    pub ignore_eos: bool,
    /// vLLM's extension: the ids of prompt and answer, as the model reads and writes them.
    pub return_token_ids: bool,
    pub user: Option<String>,
    /// How it is to be served, if the client names that; whoever leaves it open can get any.
    pub service: Option<Service>,
    /// Of the body as it came.
    pub bytes: usize,
    /// Everything as it was sent: what upstreams get, and what the cache tells requests apart by.
    pub body: Map<String, Value>,
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

/// Fields that would change what the answer means, and that embedded models do not do. Silence would be a lie.
const UNSUPPORTED: &[(&str, &str)] = &[
    ("tools", "embedded models cannot call tools"),
    ("functions", "embedded models cannot call functions"),
    ("function_call", "embedded models cannot call functions"),
    ("audio", "only text is available"),
    ("web_search_options", "the gateway does not search the web"),
    ("best_of", "every answer made is returned; use `n`"),
    ("suffix", "text cannot be inserted before a suffix"),
    ("bad_words", "banning words is not available"),
    ("allowed_token_ids", "restricting tokens is not available"),
    ("stop_token_ids", "stopping at tokens is not available; use `stop`"),
    ("min_tokens", "a least length is not available"),
    ("echo", "the prompt is not repeated"),
    ("continue_final_message", "the last message is not continued"),
    ("prompt_logprobs", "the prompt's log-probabilities are not told"),
    ("use_beam_search", "beam search is not available"),
    ("prediction", "predicted output is not available"),
    ("chat_template", "the model's own template is used"),
    ("chat_template_kwargs", "the model's own template is used"),
];

const TURNS_MAX: usize = 2048;
const STOPS_MAX: usize = 4;
const STOP_BYTES_MAX: usize = 256;
const USER_BYTES_MAX: usize = 256;
/// Independent answers to one prompt.
const N_MAX: i64 = 8;
const PROMPTS_MAX: usize = 16;

impl Request {
    /// Parses and checks a body. Unknown fields that change nothing are let through.
    ///
    /// # Errors
    /// `BadJson` with its position; `BadParam` with the name of the field.
    pub fn parse(op: Op, body: &[u8]) -> Result<Request, Refusal> {
        let fields = Fields::parse(body)?;
        let model = fields.string("model")?.ok_or_else(|| bad("model", "is missing"))?.to_owned();
        let stream = fields.boolean("stream")?.unwrap_or(false);
        // The newer name exists for chats only; in a text completion it is an unknown field.
        let newer = match op {
            Op::Chat => fields.integer("max_completion_tokens", 1..=i64::from(u32::MAX))?,
            Op::TextCompletion | Op::Embeddings => None,
        };
        let max_tokens = match newer {
            Some(tokens) => Some(tokens),
            None => fields.integer("max_tokens", 1..=i64::from(u32::MAX))?,
        };
        let user = fields.string("user")?.map(str::to_owned);
        if user.as_ref().is_some_and(|user| user.len() > USER_BYTES_MAX) {
            return Err(bad("user", format!("must be at most {USER_BYTES_MAX} bytes")));
        }
        match op {
            Op::Chat => check_messages(&fields)?,
            Op::TextCompletion => check_prompt(&fields)?,
            Op::Embeddings => embeddings::check(&fields)?,
        }
        Ok(Request {
            op,
            model,
            stream,
            include_usage: include_usage(&fields, stream)?,
            max_tokens: max_tokens.map(|tokens| tokens as u64),
            n: fields.integer("n", 1..=N_MAX)?.unwrap_or(1) as u32,
            best_of: fields.integer("best_of", 1..=N_MAX)?.unwrap_or(1) as u32,
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
            return_token_ids: fields.boolean("return_token_ids")?.unwrap_or(false),
            user,
            // A word that we do not know may mean anything.
            service: fields
                .string("service_tier")?
                .and_then(Service::parse)
                .filter(|service| *service != Service::Other),
            bytes: body.len(),
            body: fields.0,
        })
    }

    /// What an embedded model has to read: one prompt, or several of a text completion.
    ///
    /// # Errors
    /// `Unsupported` with the field that asks for what embedded models do not do.
    pub fn prompts(&self) -> Result<Vec<Prompt>, Refusal> {
        let get = |name: &str| self.body.get(name).filter(|value| !value.is_null());
        if self.op == Op::Embeddings {
            return embeddings::texts(&self.body);
        }
        for (name, why) in UNSUPPORTED {
            // What says "no" in its own words asks for nothing.
            let asks = |value: &Value| match value {
                Value::Array(items) => !items.is_empty(),
                Value::Object(map) => !map.is_empty(),
                Value::Bool(wanted) => *wanted,
                Value::Number(number) => number.as_u64() != Some(u64::from(*name == "best_of")),
                _ => true,
            };
            if get(name).is_some_and(asks) {
                return Err(unsupported(*name, *why));
            }
        }
        if get("tool_choice").is_some_and(|choice| choice != "none" && choice != "auto") {
            return Err(unsupported("tool_choice", "embedded models cannot call tools"));
        }
        if let Some(modalities) = get("modalities")
            && *modalities != serde_json::json!(["text"])
        {
            return Err(unsupported("modalities", "only [\"text\"] is available"));
        }
        match self.op {
            Op::Chat => Ok(vec![Prompt::Turns(turns(get("messages"))?)]),
            _ => prompts(get("prompt")),
        }
    }

    /// Whether we can hand on all that is asked of an upstream.
    ///
    /// # Errors
    /// `Unsupported` with the field.
    pub fn check_upstream(&self) -> Result<(), Refusal> {
        match self.return_token_ids {
            true => Err(unsupported("return_token_ids", "only embedded models tell their token ids")),
            false => Ok(()),
        }
    }

    /// How many prompts an answer is made to, or texts to embed there are.
    pub fn prompt_count(&self) -> u32 {
        match self.body.get(self.op.input_field()).filter(|_| self.op != Op::Chat) {
            Some(Value::Array(items)) if !items.iter().all(Value::is_number) => items.len() as u32,
            _ => 1,
        }
    }

    /// Whether sending it again must give the same answer.
    pub fn is_deterministic(&self) -> bool {
        self.op == Op::Embeddings || self.sampling.temperature == Some(0.0) || self.sampling.seed.is_some()
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

/// The shape that every backend needs; what is in the messages is the backend's business.
fn check_messages(fields: &Fields) -> Result<(), Refusal> {
    let messages = fields.get("messages").ok_or_else(|| bad("messages", "is missing"))?;
    let messages = messages.as_array().ok_or_else(|| bad("messages", "must be a list"))?;
    if messages.is_empty() || messages.len() > TURNS_MAX {
        return Err(bad("messages", format!("must have 1 to {TURNS_MAX} messages")));
    }
    for (i, message) in messages.iter().enumerate() {
        let at = |field: &str| format!("messages[{i}].{field}");
        match message.get("role").and_then(Value::as_str) {
            Some("system" | "developer" | "user" | "assistant" | "tool" | "function") => {}
            Some(_) => {
                return Err(bad(
                    at("role"),
                    "must be \"system\", \"developer\", \"user\", \"assistant\", \"tool\" or \"function\"",
                ));
            }
            None => return Err(bad(at("role"), "must be a string")),
        }
    }
    Ok(())
}

fn check_prompt(fields: &Fields) -> Result<(), Refusal> {
    let wrong =
        || bad("prompt", format!("must be a string, a list of token ids, or a list of 1 to {PROMPTS_MAX} of either"));
    let is_one = |value: &Value| match value {
        Value::String(text) => !text.is_empty(),
        Value::Array(ids) => !ids.is_empty() && ids.iter().all(is_token),
        _ => false,
    };
    let prompt = fields.get("prompt").ok_or_else(|| bad("prompt", "is missing"))?;
    let fine = is_one(prompt)
        || prompt.as_array().is_some_and(|many| (1..=PROMPTS_MAX).contains(&many.len()) && many.iter().all(is_one));
    if fine { Ok(()) } else { Err(wrong()) }
}

pub(super) fn is_token(value: &Value) -> bool {
    value.as_u64().is_some_and(|id| u32::try_from(id).is_ok())
}

fn prompts(prompt: Option<&Value>) -> Result<Vec<Prompt>, Refusal> {
    let one = |value: &Value| match value {
        Value::String(text) => Some(Prompt::Text(text.clone())),
        Value::Array(ids) => {
            let ids = ids.iter().map(|id| u32::try_from(id.as_u64()?).ok());
            ids.collect::<Option<Vec<u32>>>().map(Prompt::Tokens)
        }
        _ => None,
    };
    let wrong = || bad("prompt", "is missing");
    let prompt = prompt.ok_or_else(wrong)?;
    if let Some(one) = one(prompt) {
        return Ok(vec![one]);
    }
    prompt.as_array().and_then(|many| many.iter().map(one).collect()).ok_or_else(wrong)
}

fn turns(messages: Option<&Value>) -> Result<Vec<Turn>, Refusal> {
    let messages = messages.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    messages.iter().enumerate().map(|(i, message)| turn(i, message)).collect()
}

fn turn(i: usize, message: &Value) -> Result<Turn, Refusal> {
    let at = |field: &str| format!("messages[{i}].{field}");
    let role = match message.get("role").and_then(Value::as_str).unwrap_or_default() {
        // OpenAI's newer name for the same thing; templates know the older one.
        "developer" => "system",
        "tool" | "function" => return Err(unsupported(at("role"), "embedded models cannot call tools")),
        role => role,
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn refusal(body: &str) -> Refusal {
        let read = |request: Request| request.asked().and_then(|_| request.prompts());
        Request::parse(Op::Chat, body.as_bytes()).and_then(read).expect_err(body)
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
        let request = Request::parse(Op::Chat, body.as_bytes()).unwrap();
        request.prompts().unwrap();
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
            (r#","n":9"#, "n"),
            (r#","n":0"#, "n"),
            (r#","tools":[{"type":"function"}]"#, "tools"),
            (r#","tool_choice":"required""#, "tool_choice"),
            (r#","logprobs":3"#, "logprobs"),
            (r#","response_format":{"type":"xml"}"#, "response_format"),
            (r#","stop":["a","b","c","d","e"]"#, "stop"),
            (r#","stop":[""]"#, "stop"),
            (r#","stop":7"#, "stop"),
            (r#","stream":"yes""#, "stream"),
            (r#","return_token_ids":1"#, "return_token_ids"),
            (r#","stream_options":{"include_usage":true}"#, "stream_options"),
            (r#","seed":1.5"#, "seed"),
            (r#","service_tier":1"#, "service_tier"),
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
    fn a_text_completion_takes_text_and_tokens_one_or_several() {
        let prompts = |prompt: &str| {
            let body = format!(r#"{{"model":"a","n":2,"prompt":{prompt}}}"#);
            let request = Request::parse(Op::TextCompletion, body.as_bytes())?;
            assert_eq!(request.prompts()?.len() as u32, request.prompt_count());
            request.prompts()
        };
        let text = |text: &str| Prompt::Text(text.into());
        assert_eq!(prompts(r#""a""#), Ok(vec![text("a")]));
        assert_eq!(prompts(r#"["a","b"]"#), Ok(vec![text("a"), text("b")]));
        assert_eq!(prompts("[1,2]"), Ok(vec![Prompt::Tokens(vec![1, 2])]));
        assert_eq!(prompts(r#"[[1,2],"b"]"#), Ok(vec![Prompt::Tokens(vec![1, 2]), text("b")]));
        for wrong in [r#""""#, "[]", "[[]]", "7", "[-1]", "[1.5]", "[4294967296]", r#"["a",1]"#] {
            assert_eq!(prompts(wrong).expect_err(wrong).param(), Some("prompt"), "{wrong}");
        }
    }

    #[test]
    fn broken_json_is_refused_with_its_position() {
        assert!(matches!(refusal("{\"model\": \"a\",\n  oops}"), Refusal::BadJson { line: 2, column: 3, .. }));
        for twice in [r#"{"model":"a","model":"b"}"#, r#"{"a":[{"x":1,"x":1}]}"#, r#"{"model":"a","\u006dodel":"b"}"#] {
            assert!(matches!(refusal(twice), Refusal::BadJson { why, .. } if why.contains("comes twice")), "{twice}");
        }
        assert!(matches!(refusal("{} {}"), Refusal::BadJson { .. }));
    }

    proptest! {
        #[test]
        fn any_body_is_read_or_refused_without_panic(body in proptest::collection::vec(any::<u8>(), 0..256)) {
            for op in [Op::Chat, Op::TextCompletion, Op::Embeddings] {
                let _ = Request::parse(op, &body).and_then(|request| request.asked().and_then(|_| request.prompts()));
            }
        }
    }
}
