//! Token ids back to text, one at a time: no character before all its bytes are there, and in the end exactly the text
//! that decoding all tokens at once would give.

/// The bytes that every token stands for. Control tokens stand for none.
pub(crate) struct TokenBytes {
    bytes: Vec<u8>,
    /// Token `id` is `bytes[ends[id - 1]..ends[id]]`.
    ends: Vec<u32>,
}

impl TokenBytes {
    pub fn new(tokens: impl Iterator<Item = Vec<u8>>) -> TokenBytes {
        let mut table = TokenBytes { bytes: Vec::new(), ends: Vec::new() };
        for token in tokens {
            table.bytes.extend(token);
            table.ends.push(table.bytes.len() as u32);
        }
        table
    }

    /// Nothing for an id beyond the table (models may have more rows than the tokenizer has tokens).
    pub fn of(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let start = id.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or(0);
        self.ends.get(id).map_or(&[], |&end| &self.bytes[start as usize..end as usize])
    }
}

/// One answer's unfinished character.
#[derive(Debug, Default)]
pub(crate) struct Detokenizer {
    /// At most three bytes between calls.
    open: Vec<u8>,
}

impl Detokenizer {
    /// Appends to `text` all characters that these bytes complete. What can never become one is replaced by U+FFFD.
    pub fn push(&mut self, bytes: &[u8], text: &mut String) {
        self.open.extend_from_slice(bytes);
        let mut rest = self.open.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(whole) => {
                    text.push_str(whole);
                    self.open.clear();
                    return;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    let Some(wrong) = error.error_len() else {
                        self.open = after.to_vec();
                        return;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &after[wrong..];
                }
            }
        }
    }

    /// The answer is over: a character that was left open is replaced too.
    pub fn finish(&mut self, text: &mut String) {
        text.push_str(&String::from_utf8_lossy(&std::mem::take(&mut self.open)));
    }
}

#[cfg(test)]
mod tests {
    use super::{Detokenizer, TokenBytes};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_give_the_text_of_the_whole(
            bytes in prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..40),
                ".{0,12}".prop_map(String::into_bytes),
                "[가-힣😀a]{0,8}".prop_map(|s| { let mut b = s.into_bytes(); b.pop(); b }),
            ],
            cuts in proptest::collection::vec(1usize..5, 40),
        ) {
            let mut text = String::new();
            let mut detokenizer = Detokenizer::default();
            let mut rest = bytes.as_slice();
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                detokenizer.push(piece, &mut text);
                prop_assert!(detokenizer.open.len() <= 3);
                rest = after;
            }
            detokenizer.push(rest, &mut text);
            detokenizer.finish(&mut text);
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }

    #[test]
    fn every_token_has_its_own_bytes_and_an_unknown_one_none() {
        let table = TokenBytes::new([b"ab".to_vec(), Vec::new(), b"c".to_vec()].into_iter());
        assert_eq!([0, 1, 2, 3, u32::MAX].map(|id| table.of(id)), [b"ab".as_slice(), b"", b"c", b"", b""]);
    }
}
