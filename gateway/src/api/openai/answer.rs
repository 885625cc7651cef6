//! The answer as clients of both endpoints read it: one document, or chunks.

use serde::Serialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::request::Op;
use crate::accounting::core::Usage;
use crate::answer::{Finish, Part, Piece};
use crate::api::glassgate::Glassgate;

/// What every piece of one answer repeats.
pub struct Head<'a> {
    pub op: Op,
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
struct Whole<'a, C> {
    id: &'a str,
    object: &'static str,
    created: i64,
    model: &'a str,
    choices: Vec<C>,
    usage: WireUsage,
    glassgate: Glassgate<'a>,
}

#[derive(Serialize)]
struct ChatChoice<'a> {
    index: u32,
    message: Message<'a>,
    logprobs: Option<&'a RawValue>,
    finish_reason: Finish,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Message<'a> {
    Text { role: &'static str, content: &'a str, refusal: Option<()> },
    Raw(&'a RawValue),
}

/// A text completion's choice looks the same whole and in chunks.
#[derive(Serialize)]
struct TextChoice<'a> {
    index: u32,
    text: &'a str,
    logprobs: Option<&'a RawValue>,
    finish_reason: Option<Finish>,
}

/// The answer as one JSON document. `parts` are whole choices in order, each with its finish.
pub fn whole(head: &Head<'_>, parts: &[Part], finishes: &[Finish], usage: &Usage, glassgate: Glassgate<'_>) -> Vec<u8> {
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
                })
                .collect(),
            usage: usage.into(),
            glassgate,
        }),
        Op::TextCompletion => json(&Whole {
            id: head.response_id,
            object: "text_completion",
            created: head.created,
            model: head.model,
            choices: both.map(|(part, finish)| text_choice(part, Some(*finish))).collect(),
            usage: usage.into(),
            glassgate,
        }),
    }
}

fn text_choice(part: &Part, finish_reason: Option<Finish>) -> TextChoice<'_> {
    TextChoice { index: part.index, text: part.piece.text(), logprobs: part.logprobs.as_deref(), finish_reason }
}

#[derive(Serialize)]
struct Chunk<'a, C> {
    id: &'a str,
    object: &'static str,
    created: i64,
    model: &'a str,
    choices: &'a [C],
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

/// What one chunk of a stream says.
pub enum Event<'a> {
    /// The beginning of a choice. Chats only; a text completion has none.
    Role(u32),
    Part(&'a Part),
    Finish(u32, Finish, Option<Glassgate<'a>>),
    Usage(&'a Usage, Glassgate<'a>),
}

/// One chunk as JSON. `usage_asked` says whether every chunk carries a `usage` field.
pub fn chunk(head: &Head<'_>, event: Event<'_>, usage_asked: bool) -> Vec<u8> {
    let no_usage = usage_asked.then_some(None);
    match (head.op, event) {
        (_, Event::Usage(usage, glassgate)) => {
            json(&frame::<ChunkChoice<'_>>(head, &[], Some(Some(usage.into())), Some(glassgate)))
        }
        (Op::Chat, event) => {
            let (index, delta, logprobs, finish_reason, glassgate) = match event {
                Event::Role(index) => (index, Delta::Role { role: "assistant", content: "" }, None, None, None),
                Event::Part(part) => {
                    let delta = match &part.piece {
                        Piece::Text(text) => Delta::Text { content: text },
                        Piece::Delta(raw) => Delta::Raw(raw),
                        Piece::Message(raw) => Delta::Made(delta_of_message(raw)),
                    };
                    (part.index, delta, part.logprobs.as_deref(), None, None)
                }
                Event::Finish(index, finish, glassgate) => (index, Delta::Nothing {}, None, Some(finish), glassgate),
                Event::Usage(..) => (0, Delta::Nothing {}, None, None, None),
            };
            json(&frame(head, &[ChunkChoice { index, delta, logprobs, finish_reason }], no_usage, glassgate))
        }
        (Op::TextCompletion, event) => {
            let (choice, glassgate) = match event {
                Event::Part(part) => (text_choice(part, None), None),
                Event::Finish(index, finish, glassgate) => {
                    (TextChoice { index, text: "", logprobs: None, finish_reason: Some(finish) }, glassgate)
                }
                Event::Role(index) => (TextChoice { index, text: "", logprobs: None, finish_reason: None }, None),
                Event::Usage(..) => (TextChoice { index: 0, text: "", logprobs: None, finish_reason: None }, None),
            };
            json(&frame(head, &[choice], no_usage, glassgate))
        }
    }
}

fn frame<'a, C>(
    head: &Head<'a>,
    choices: &'a [C],
    usage: Option<Option<WireUsage>>,
    glassgate: Option<Glassgate<'a>>,
) -> Chunk<'a, C> {
    let object = match head.op {
        Op::Chat => "chat.completion.chunk",
        Op::TextCompletion => "text_completion",
    };
    Chunk { id: head.response_id, object, created: head.created, model: head.model, choices, usage, glassgate }
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
