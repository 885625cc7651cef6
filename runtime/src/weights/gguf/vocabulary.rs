//! The tokenizer that a GGUF file brings, as data. What it means for text is not decided here.

use super::{metadata::Metadata, reader::Because};

/// A vocabulary with everything that belongs to it. `kinds` is as long as `tokens`, and every id is one of them.
#[derive(Debug)]
pub(crate) struct Vocabulary {
    pub model: VocabularyModel,
    pub tokens: Vec<String>,
    pub kinds: Vec<TokenKind>,
    /// `bos_token` and its like, for chat templates: (name, id).
    pub named: Vec<(&'static str, u32)>,
    pub template: Option<String>,
    /// White space after a control token belongs to it.
    pub control_eats_space: bool,
}

#[derive(Debug)]
pub(crate) enum VocabularyModel {
    /// Byte-level BPE; `pre` names the rule that cuts text into words.
    Bytes { pre: String, merges: Vec<String> },
    /// SentencePiece: the score of each token decides which pair is merged first.
    Scored { scores: Vec<f32>, space_before: bool },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenKind {
    Normal,
    Unknown,
    Control,
    /// Matched as a whole, and text all the same.
    UserDefined,
    Unused,
    Byte,
}

/// No token of a model we know of is longer than a few hundred bytes.
const TOKEN_BYTES_MAX: usize = 1 << 11;

pub(super) fn vocabulary(metadata: &Metadata, architecture: &str) -> Because<Vocabulary> {
    let missing = |key: &str| format!("`{key}` is missing: it brings no tokenizer");
    let tokens = metadata.texts("tokenizer.ggml.tokens")?.ok_or_else(|| missing("tokenizer.ggml.tokens"))?;
    if let Some(long) = tokens.iter().position(|token| token.len() > TOKEN_BYTES_MAX) {
        return Err(format!("token {long} has {} bytes (at most {TOKEN_BYTES_MAX})", tokens[long].len()));
    }
    let model = match metadata.text("tokenizer.ggml.model")?.ok_or_else(|| missing("tokenizer.ggml.model"))? {
        "gpt2" => VocabularyModel::Bytes {
            pre: metadata.text("tokenizer.ggml.pre")?.ok_or_else(|| missing("tokenizer.ggml.pre"))?.to_owned(),
            merges: metadata.texts("tokenizer.ggml.merges")?.ok_or_else(|| missing("tokenizer.ggml.merges"))?.to_vec(),
        },
        "llama" => VocabularyModel::Scored {
            scores: scores(metadata, tokens.len())?,
            space_before: metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true),
        },
        other => return Err(format!("has a tokenizer of the kind `{other}` (supported: gpt2, llama)")),
    };
    let mut named = Vec::new();
    for (name, key) in [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
    {
        let key = format!("tokenizer.ggml.{key}_token_id");
        if let Some(id) = metadata.count(&key)? {
            let id = u32::try_from(id).ok().filter(|&id| (id as usize) < tokens.len());
            named.push((name, id.ok_or_else(|| format!("`{key}` is not one of {} tokens", tokens.len()))?));
        }
    }
    let control_eats_space = architecture == "phi3" && matches!(model, VocabularyModel::Scored { .. });
    Ok(Vocabulary {
        model,
        kinds: kinds(metadata, tokens.len())?,
        tokens: tokens.to_vec(),
        named,
        template: metadata.text("tokenizer.chat_template")?.map(str::to_owned),
        control_eats_space,
    })
}

fn scores(metadata: &Metadata, tokens: usize) -> Because<Vec<f32>> {
    let key = "tokenizer.ggml.scores";
    let scores = metadata.numbers(key)?.ok_or_else(|| format!("`{key}` is missing"))?;
    if scores.len() != tokens || scores.iter().any(|score| !score.is_finite()) {
        return Err(format!("`{key}` must hold a finite number for each of {tokens} tokens, it has {}", scores.len()));
    }
    Ok(scores.iter().map(|&score| score as f32).collect())
}

fn kinds(metadata: &Metadata, tokens: usize) -> Because<Vec<TokenKind>> {
    let key = "tokenizer.ggml.token_type";
    let Some(numbers) = metadata.numbers(key)? else { return Ok(vec![TokenKind::Normal; tokens]) };
    if numbers.len() != tokens {
        return Err(format!("`{key}` has {} items for {tokens} tokens", numbers.len()));
    }
    let kind = |&number: &f64| {
        let kinds = [
            TokenKind::Normal,
            TokenKind::Unknown,
            TokenKind::Control,
            TokenKind::UserDefined,
            TokenKind::Unused,
            TokenKind::Byte,
        ];
        kinds
            .into_iter()
            .zip(1u8..)
            .find_map(|(kind, code)| (f64::from(code) == number).then_some(kind))
            .ok_or_else(|| format!("`{key}` holds the unknown type {number}"))
    };
    numbers.iter().map(kind).collect()
}
