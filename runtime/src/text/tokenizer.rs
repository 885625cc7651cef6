//! A model's `tokenizer.json`: text → ids as the Python side gives them, and each id's bytes for the way back.

use super::{
    TextError,
    detokenize::TokenBytes,
    guard::{self, Segment},
};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};
use tokenizers::{AddedToken, DecoderWrapper, Tokenizer as Inner};

pub(crate) struct Tokenizer {
    /// Reads control tokens in the text as such.
    inner: Inner,
    /// Reads everything as text.
    plain: Inner,
    /// (text, id) of every control token, longest first: at one place the longest wins.
    control: Vec<(String, u32)>,
    control_texts: Vec<String>,
    bytes: Arc<TokenBytes>,
}

impl Tokenizer {
    /// `vocab`: how many ids the model knows. `Err` reads after the file's name.
    pub fn new(json: &str, vocab: usize) -> Result<Tokenizer, String> {
        // A hostile file may reach an assertion inside the library; that is no reason to die.
        let parsed = catch_unwind(AssertUnwindSafe(|| Inner::from_bytes(json)));
        let mut inner = match parsed {
            Ok(Ok(inner)) => inner,
            Ok(Err(error)) => return Err(format!("is not a valid tokenizer: {error}")),
            Err(_) => return Err("is not a valid tokenizer".to_owned()),
        };
        inner.with_truncation(None).map_err(|error| format!("has odd truncation: {error}"))?;
        inner.with_padding(None);
        let spelling = Spelling::of(inner.get_decoder())
            .ok_or("its decoder is not supported (supported: ByteLevel, ByteFallback)")?;
        let highest = inner.get_vocab(true).into_values().max();
        let Some(highest) = highest else { return Err("has no tokens".to_owned()) };
        if highest as usize >= vocab {
            return Err(format!("has token id {highest}, config.json says vocab_size {vocab}"));
        }

        let control: Vec<(String, u32)> = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special && !token.content.is_empty())
            .map(|(id, token)| (token.content, id))
            .collect();
        let is_control = |id| control.iter().any(|&(_, other)| other == id);
        let bytes = TokenBytes::new((0..=highest).map(|id| match inner.id_to_token(id) {
            Some(token) if !is_control(id) => spelling.bytes(&token),
            _ => Vec::new(),
        }));
        let mut plain = inner.clone();
        plain.set_encode_special_tokens(true);
        let mut tokenizer = Tokenizer { inner, plain, control, control_texts: Vec::new(), bytes: Arc::new(bytes) };
        tokenizer.order_control();

        let probe = catch_unwind(AssertUnwindSafe(|| tokenizer.encode("Probe 1 가 <|x|>\n")));
        match probe {
            Ok(Ok(_)) => Ok(tokenizer),
            Ok(Err(error)) => Err(format!("cannot encode a short text: {error}")),
            Err(_) => Err("cannot encode a short text".to_owned()),
        }
    }

    /// Takes added tokens that are not declared special, but that the chat template writes, for control tokens in what a
    /// caller says. Those of a letter or none say nothing about turns. A model may still say them: they have their text.
    pub fn guard_markers_in(&mut self, template: &str) -> Result<(), String> {
        let added = self.inner.get_added_tokens_decoder();
        let markers = added.into_iter().filter(|(_, token)| {
            !token.special && token.content.trim().chars().count() > 1 && template.contains(token.content.as_str())
        });
        for (id, token) in markers {
            let special = AddedToken { special: true, ..token.clone() };
            self.plain.add_special_tokens([special]).map_err(|error| format!("cannot guard a marker: {error}"))?;
            self.control.push((token.content, id));
        }
        self.order_control();
        Ok(())
    }

    /// Longest first; of equal length by text, so that the order does not depend on a map's.
    fn order_control(&mut self) {
        self.control.sort_unstable_by(|a, b| b.0.len().cmp(&a.0.len()).then_with(|| a.cmp(b)));
        self.control_texts = self.control.iter().map(|(text, _)| text.clone()).collect();
    }

    /// What every token stands for, for the engine.
    pub fn bytes(&self) -> Arc<TokenBytes> {
        Arc::clone(&self.bytes)
    }

    pub fn bytes_of(&self, id: u32) -> &[u8] {
        self.bytes.of(id)
    }

    /// How a control token is written; None for any other.
    pub fn control_text(&self, id: u32) -> Option<&str> {
        self.control.iter().find(|(_, other)| *other == id).map(|(text, _)| text.as_str())
    }

    /// A caller's text, made safe to put into a template: see `guard`.
    pub fn guarded(&self, text: &str) -> Option<String> {
        let hidden = || {
            // A normalizer may turn look-alikes into a control token; only the tokenizer itself can tell.
            self.inner.get_normalizer().is_some()
                && self.encode_with(&self.inner, text).is_ok_and(|ids| self.has_control(&ids))
        };
        (guard::is_suspicious(text.trim(), &self.control_texts) || hidden()).then(|| guard::wrap(text))
    }

    /// Ids of a rendered prompt. Nothing is added in front or behind; control tokens that the template wrote are read as
    /// such, those that a caller wrote are not.
    pub fn encode(&self, rendered: &str) -> Result<Vec<u32>, TextError> {
        let segments = guard::segments(rendered)?;
        if let [Segment::Template(text)] = segments.as_slice() {
            return self.encode_with(&self.inner, text);
        }
        let mut ids = Vec::new();
        // Plain text next to a wrapped message is encoded together with it: tokens may reach over the border.
        let mut text = String::new();
        for segment in &segments {
            match segment {
                Segment::Plain(plain) => text.push_str(plain),
                Segment::Template(template) => {
                    let mut rest = template.as_str();
                    while let Some((at, token, id)) = self.first_control(rest) {
                        text.push_str(&rest[..at]);
                        self.flush(&mut text, &mut ids)?;
                        ids.push(id);
                        rest = &rest[at + token.len()..];
                    }
                    text.push_str(rest);
                }
            }
        }
        self.flush(&mut text, &mut ids)?;
        Ok(ids)
    }

    /// Where the first control token begins, which it is, and its id. One pass: a long conversation has many of them.
    fn first_control(&self, text: &str) -> Option<(usize, &str, u32)> {
        text.char_indices().find_map(|(at, _)| {
            let hit = self.control.iter().find(|(token, _)| text[at..].starts_with(token.as_str()));
            hit.map(|(token, id)| (at, token.as_str(), *id))
        })
    }

    fn flush(&self, text: &mut String, ids: &mut Vec<u32>) -> Result<(), TextError> {
        let plain = self.encode_with(&self.plain, text)?;
        if self.has_control(&plain) {
            return Err(TextError("a message cannot be read without its control tokens".to_owned()));
        }
        ids.extend(plain);
        text.clear();
        Ok(())
    }

    fn has_control(&self, ids: &[u32]) -> bool {
        ids.iter().any(|id| self.control.iter().any(|(_, control)| control == id))
    }

    fn encode_with(&self, tokenizer: &Inner, text: &str) -> Result<Vec<u32>, TextError> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let encoding = tokenizer.encode_fast(text, false).map_err(|error| TextError(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }
}

/// How tokens are written down.
#[derive(Clone, Copy)]
enum Spelling {
    /// A character for each byte.
    ByteLevel,
    /// As text with ▁ for a space; what has no token of its own as bytes `<0x00>` to `<0xFF>`.
    ByteFallback,
}

impl Spelling {
    fn of(decoder: Option<&DecoderWrapper>) -> Option<Spelling> {
        match decoder? {
            DecoderWrapper::ByteLevel(_) => Some(Spelling::ByteLevel),
            DecoderWrapper::Sequence(steps) => {
                let steps = steps.get_decoders();
                // What else it may do, such as dropping the first space of a text, is for whole texts, not for streams.
                steps
                    .iter()
                    .any(|step| matches!(step, DecoderWrapper::ByteFallback(_)))
                    .then_some(Spelling::ByteFallback)
            }
            _ => None,
        }
    }

    fn bytes(self, token: &str) -> Vec<u8> {
        match self {
            Spelling::ByteLevel => byte_level(token),
            Spelling::ByteFallback => match token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')) {
                Some(digits) if digits.len() == 2 => {
                    u8::from_str_radix(digits, 16).map_or_else(|_| token.as_bytes().to_vec(), |byte| vec![byte])
                }
                _ => token.replace('\u{2581}', " ").into_bytes(),
            },
        }
    }
}

/// The bytes behind a byte-level token: every character of it stands for one byte. A token with any other character
/// was added by hand and stands for itself.
fn byte_level(token: &str) -> Vec<u8> {
    token.chars().map(byte_of).collect::<Option<_>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

/// Printable Latin-1 stands for itself; the 68 other bytes, in order, for U+0100 and on.
fn byte_of(c: char) -> Option<u8> {
    let stands_for_itself = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(c) {
        code @ 0..=0xFF => u8::try_from(code).ok().filter(|&byte| stands_for_itself(byte)),
        code => (0..=0xFF).filter(|&byte| !stands_for_itself(byte)).nth(code as usize - 0x100),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn byte_level_characters_cover_every_byte_once() {
        let mut seen: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(super::byte_of).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..=255).collect::<Vec<u8>>());
        assert_eq!(super::byte_level("Ġa"), b" a");
        assert_eq!(super::byte_level("Ċ"), b"\n");
        assert_eq!(super::byte_level("two words"), b"two words");
    }
}
