//! Between text and token ids: chat template, tokenizer, incremental detokenizer. Names no tensor library.

pub(crate) mod detokenize;
pub(crate) mod encoder;
pub(crate) mod folder;
mod generation;
mod guard;
mod python;
mod strftime;
pub(crate) mod template;
pub(crate) mod tokenizer;
mod vocabulary;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Message {
    pub role: String,
    pub content: String,
}

/// The model's chat template refused the conversation or failed on it; the text is the template's own.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TemplateError(pub String);

/// The tokenizer failed on a text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TextError(pub String);
