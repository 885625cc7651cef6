//! Texts → the ids that an encoder reads, as the Python side gives them: with the tokens that the tokenizer's own
//! template adds, without its padding and its truncation.

use super::TextError;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tokenizers::Tokenizer;

pub(crate) struct TextEncoder {
    inner: Tokenizer,
    lower: bool,
    /// Tokens that the template adds behind every text.
    behind: usize,
}

impl TextEncoder {
    /// `vocab`: how many ids the model knows; `lower`: texts are read in lower case. `Err` reads after the file's name.
    pub fn new(json: &str, vocab: usize, lower: bool) -> Result<TextEncoder, String> {
        // A hostile file may reach an assertion inside the library; that is no reason to die.
        let made = catch_unwind(AssertUnwindSafe(|| {
            let mut inner = Tokenizer::from_bytes(json).map_err(|error| error.to_string())?;
            inner.with_truncation(None).map_err(|error| error.to_string())?;
            inner.with_padding(None);
            let highest = inner.get_vocab(true).into_values().max().ok_or("it has no tokens")?;
            if highest as usize >= vocab {
                return Err(format!("it has token id {highest}, config.json says vocab_size {vocab}"));
            }
            let mut encoder = TextEncoder { inner, lower, behind: 0 };
            let (bare, whole) = (encoder.ids("probe", false)?, encoder.ids("probe", true)?);
            let before = whole.windows(bare.len().max(1)).position(|ids| ids == bare);
            let before = before.ok_or("its template does not keep the text")?;
            encoder.behind = whole.len() - before - bare.len();
            Ok(encoder)
        }));
        made.unwrap_or_else(|_| Err("it cannot encode a short text".to_owned()))
            .map_err(|why| format!("is not a valid tokenizer: {why}"))
    }

    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.ids(text, true).map_err(TextError)
    }

    /// The first `limit` of an encoded text's tokens, where those that the template adds behind stay.
    pub fn cut(&self, ids: &mut Vec<u32>, limit: usize) {
        if ids.len() > limit {
            let keep = limit.saturating_sub(self.behind);
            ids.drain(keep..ids.len() - self.behind.min(limit));
        }
    }

    fn ids(&self, text: &str, with_template: bool) -> Result<Vec<u32>, String> {
        let lower = self.lower.then(|| text.to_lowercase());
        let text = lower.as_deref().unwrap_or(text);
        let encoding = self.inner.encode_fast(text, with_template).map_err(|error| error.to_string())?;
        Ok(encoding.get_ids().to_vec())
    }
}
