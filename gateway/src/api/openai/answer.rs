//! The answer as clients of both endpoints read it: one document, or chunks.

use serde::Serialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::embeddings;
use super::request::Op;
use crate::accounting::core::Usage;
use crate::answer::{Finish, Part, Piece, Prompts};
use crate::api::glassgate::Glassgate;

/// What every piece of one answer repeats.
pub struct Head<'a> {
    pub op: Op,
    pub response_id: &'a str,
    /// Unix seconds.
    pub created: i64,
    /// The name that the client asked for.
    pub model: &'a str,
    /// How an upstream says that it served it; known at the end.
    pub service_tier: Option<&'static str>,
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
struct Whole<'a, C> {
    id: &'a str,
    object: &'static str,
    created: i64,
    model: &'a str,
    choices: Vec<C>,
    /// Where vLLM has it: of a chat beside the choices, of a text completion in each.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    service_tier: Option<&'static str>,
    usage: WireUsage,
    glassgate: Glassgate<'a>,
}

#[derive(Serialize)]
struct ChatChoice<'a> {
    index: u32,
    message: Message<'a>,
    logprobs: Option<&'a RawValue>,
    finish_reason: Finish,
    #[serde(skip_serializing_if = "<[u32]>::is_empty")]
    token_ids: &'a [u32],
}

#[derive(Serialize)]
#[serde(untagged)]
enum Message<'a> {
    Text { role: &'static str, content: &'a str, refusal: Option<()> },
    Raw(&'a RawValue),
}

/// A text completion's choice looks the same whole and in chunks.
#[derive(Default, Serialize)]
struct TextChoice<'a> {
    index: u32,
    text: &'a str,
    logprobs: Option<&'a RawValue>,
    finish_reason: Option<Finish>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "<[u32]>::is_empty")]
    token_ids: &'a [u32],
}

/// The answer as one JSON document. `parts` are whole choices in order, each with its finish.
pub fn whole(
    head: &Head<'_>,
    prompts: &Prompts,
    parts: &[Part],
    finishes: &[Finish],
    usage: &Usage,
    glassgate: Glassgate<'_>,
) -> Vec<u8> {
    let both = parts.iter().zip(finishes);
    match head.op {
        Op::Chat => json(&Whole {
            id: head.response_id,
            object: "chat.completion",
            created: head.created,
            model: head.model,
            choices: both
                .map(|(part, finish)| ChatChoice {
                    index: part.index,
                    message: match &part.piece {
                        Piece::Text(text) => Message::Text { role: "assistant", content: text, refusal: None },
                        Piece::Delta(raw) | Piece::Message(raw) => Message::Raw(raw),
                    },
                    logprobs: part.logprobs.as_deref(),
                    finish_reason: *finish,
                    token_ids: &part.tokens,
                })
                .collect(),
            prompt_token_ids: prompts.of(0),
            service_tier: head.service_tier,
            usage: usage.into(),
            glassgate,
        }),
        Op::TextCompletion => json(&Whole {
            id: head.response_id,
            object: "text_completion",
            created: head.created,
            model: head.model,
            choices: both
                .map(|(part, finish)| TextChoice {
                    finish_reason: Some(*finish),
                    prompt_token_ids: prompts.of(part.index),
                    ..text_choice(part)
                })
                .collect(),
            prompt_token_ids: None,
            service_tier: head.service_tier,
            usage: usage.into(),
            glassgate,
        }),
        Op::Embeddings => embeddings::list(head, parts, usage, glassgate),
    }
}

fn text_choice(part: &Part) -> TextChoice<'_> {
    let (text, logprobs) = (part.piece.text(), part.logprobs.as_deref());
    TextChoice { index: part.index, text, logprobs, token_ids: &part.tokens, ..TextChoice::default() }
}

#[derive(Serialize)]
struct Chunk<'a, C> {
    id: &'a str,
    object: &'static str,
    created: i64,
    model: &'a str,
    choices: &'a [C],
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    service_tier: Option<&'static str>,
    /// `null` on every chunk but the last, if the client asked for usage; absent if it did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<WireUsage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    glassgate: Option<Glassgate<'a>>,
}

#[derive(Serialize)]
struct ChunkChoice<'a> {
    index: u32,
    delta: Delta<'a>,
    logprobs: Option<&'a RawValue>,
    finish_reason: Option<Finish>,
    #[serde(skip_serializing_if = "<[u32]>::is_empty")]
    token_ids: &'a [u32],
}

#[derive(Serialize)]
#[serde(untagged)]
enum Delta<'a> {
    Role { role: &'static str, content: &'static str },
    Text { content: &'a str },
    Raw(&'a RawValue),
    Made(Value),
    Nothing {},
}

impl<'a> ChunkChoice<'a> {
    fn new(index: u32, delta: Delta<'a>) -> ChunkChoice<'a> {
        ChunkChoice { index, delta, logprobs: None, finish_reason: None, token_ids: &[] }
    }
}

/// What one chunk of a stream says.
pub enum Event<'a> {
    /// The beginning of a choice, with its prompt's token ids if they were asked for. A text completion has none without.
    Begin(u32, Option<&'a [u32]>),
    Part(&'a Part),
    Finish(u32, Finish, Option<Glassgate<'a>>),
    Usage(&'a Usage, Glassgate<'a>),
}

/// One chunk as JSON. `usage_asked` says whether every chunk carries a `usage` field.
pub fn chunk(head: &Head<'_>, event: Event<'_>, usage_asked: bool) -> Vec<u8> {
    let no_usage = usage_asked.then_some(None);
    match (head.op, event) {
        (_, Event::Usage(usage, glassgate)) => {
            let (usage, glassgate) = (Some(Some(usage.into())), Some(glassgate));
            json(&Chunk { usage, glassgate, ..frame::<ChunkChoice<'_>>(head, &[]) })
        }
        (Op::Chat, event) => {
            let (mut prompt_token_ids, mut glassgate) = (None, None);
            let choice = match event {
                Event::Begin(index, prompt) => {
                    prompt_token_ids = prompt;
                    ChunkChoice::new(index, Delta::Role { role: "assistant", content: "" })
                }
                Event::Part(part) => {
                    let delta = match &part.piece {
                        Piece::Text(text) => Delta::Text { content: text },
                        Piece::Delta(raw) => Delta::Raw(raw),
                        Piece::Message(raw) => Delta::Made(delta_of_message(raw)),
                    };
                    let (logprobs, token_ids) = (part.logprobs.as_deref(), part.tokens.as_slice());
                    ChunkChoice { logprobs, token_ids, ..ChunkChoice::new(part.index, delta) }
                }
                Event::Finish(index, finish, told) => {
                    glassgate = told;
                    ChunkChoice { finish_reason: Some(finish), ..ChunkChoice::new(index, Delta::Nothing {}) }
                }
                Event::Usage(..) => ChunkChoice::new(0, Delta::Nothing {}),
            };
            json(&Chunk { prompt_token_ids, usage: no_usage, glassgate, ..frame(head, &[choice]) })
        }
        // Embeddings are never streamed.
        (Op::TextCompletion | Op::Embeddings, event) => {
            let mut glassgate = None;
            let choice = match event {
                Event::Begin(index, prompt_token_ids) => {
                    TextChoice { index, prompt_token_ids, ..TextChoice::default() }
                }
                Event::Part(part) => text_choice(part),
                Event::Finish(index, finish, told) => {
                    glassgate = told;
                    TextChoice { index, finish_reason: Some(finish), ..TextChoice::default() }
                }
                Event::Usage(..) => TextChoice::default(),
            };
            json(&Chunk { usage: no_usage, glassgate, ..frame(head, &[choice]) })
        }
    }
}

fn frame<'a, C>(head: &Head<'a>, choices: &'a [C]) -> Chunk<'a, C> {
    Chunk {
        id: head.response_id,
        object: match head.op {
            Op::Chat => "chat.completion.chunk",
            Op::TextCompletion | Op::Embeddings => "text_completion",
        },
        created: head.created,
        model: head.model,
        choices,
        prompt_token_ids: None,
        service_tier: head.service_tier,
        usage: None,
        glassgate: None,
    }
}

/// A whole message as the one delta that makes it: in a delta, every tool call carries its index.
fn delta_of_message(message: &RawValue) -> Value {
    let mut delta: Value = serde_json::from_str(message.get()).unwrap_or_default();
    if let Some(calls) = delta.get_mut("tool_calls").and_then(Value::as_array_mut) {
        for (index, call) in calls.iter_mut().enumerate() {
            if let Some(call) = call.as_object_mut() {
                call.insert("index".into(), index.into());
            }
        }
    }
    delta
}

fn json(value: &impl Serialize) -> Vec<u8> {
    // Strings and numbers into memory: this has no way to fail.
    serde_json::to_vec(value).unwrap_or_default()
}
