//! Keeps what a caller says apart from what the template says. A caller who writes `<|im_end|>` into a message must
//! not end the turn with it.
//!
//! A suspicious message is wrapped in two characters that Unicode reserves for such private use (noncharacters). They
//! travel through the template inside the rendered text; [`segments`] finds them again, and the tokenizer reads what is
//! between them as plain text only. An ordinary message stays as it is, so its ids are those of any other
//! implementation.

use super::TextError;

const OPEN: char = '\u{FDD0}';
const CLOSE: char = '\u{FDD1}';
/// Stands before a digit in place of one of the three characters that the caller wrote.
const ESCAPE: char = '\u{FDD2}';
const MARKS: [char; 3] = [OPEN, CLOSE, ESCAPE];

/// A part of a rendered prompt.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Segment {
    /// Written by the template (or an unsuspicious message): control tokens in it count.
    Template(String),
    /// Written by a caller: everything in it is text.
    Plain(String),
}

/// Whether `text` contains a control token, or could become one together with its neighbours.
pub(crate) fn is_suspicious(text: &str, control: &[String]) -> bool {
    text.contains(MARKS) || control.iter().any(|token| text.contains(token.as_str()) || borders(text, token))
}

/// Ends with the beginning of the token, or begins with its end.
fn borders(text: &str, token: &str) -> bool {
    let cuts = token.char_indices().map(|(at, _)| at).skip(1);
    cuts.into_iter().any(|at| text.ends_with(&token[..at]) || text.starts_with(&token[at..]))
}

/// White space at the ends stays outside, so that a template that trims still can.
pub(crate) fn wrap(text: &str) -> String {
    let core = text.trim();
    let at = text.len() - text.trim_start().len();
    let mut wrapped = String::with_capacity(text.len() + 8);
    wrapped.push_str(&text[..at]);
    wrapped.push(OPEN);
    for c in core.chars() {
        match MARKS.iter().position(|&mark| mark == c) {
            None => wrapped.push(c),
            Some(number) => wrapped.extend([ESCAPE, char::from(b'0' + number as u8)]),
        }
    }
    wrapped.push(CLOSE);
    wrapped.push_str(&text[at + core.len()..]);
    wrapped
}

/// Takes a rendered prompt apart again. Fails if the template cut a wrapped message in two: reading half of it as the
/// template's own would undo the protection.
pub(crate) fn segments(rendered: &str) -> Result<Vec<Segment>, TextError> {
    if !rendered.contains(MARKS) {
        return Ok(vec![Segment::Template(rendered.to_owned())]);
    }
    let mut segments = Vec::new();
    let mut text = String::new();
    let mut inside = false;
    let mut chars = rendered.chars();
    while let Some(c) = chars.next() {
        match c {
            OPEN if !inside => segments.push(Segment::Template(std::mem::take(&mut text))),
            CLOSE if inside => segments.push(Segment::Plain(std::mem::take(&mut text))),
            ESCAPE if inside => {
                match chars.next().and_then(|digit| MARKS.get((digit as usize).wrapping_sub('0' as usize))) {
                    Some(&mark) => text.push(mark),
                    None => return Err(damaged()),
                }
            }
            OPEN | CLOSE | ESCAPE => return Err(damaged()),
            c => text.push(c),
        }
        inside = match c {
            OPEN => true,
            CLOSE => false,
            _ => inside,
        };
    }
    if inside {
        return Err(damaged());
    }
    segments.push(Segment::Template(text));
    Ok(segments)
}

fn damaged() -> TextError {
    TextError("the chat template takes apart a message that contains control tokens".to_owned())
}

#[cfg(test)]
mod tests {
    use super::{Segment, is_suspicious, segments, wrap};

    fn control() -> Vec<String> {
        vec!["<|im_end|>".to_owned(), "</s>".to_owned()]
    }

    #[test]
    fn whatever_a_caller_writes_comes_back_as_plain_text() {
        for text in ["<|im_end|>", " x<|im_end|>y \n", "\u{FDD0}", "a\u{FDD1}<|im_end|>\u{FDD2}2", "", "  "] {
            let rendered = format!("<|im_start|>user\n{}<|im_end|>", wrap(text));
            let parts = segments(&rendered).expect("balanced");
            assert_eq!(parts.len(), 3, "{text:?}");
            assert_eq!(parts[1], Segment::Plain(text.trim().to_owned()));
        }
    }

    #[test]
    fn ordinary_text_is_left_alone_and_borders_of_control_tokens_are_not() {
        for text in ["Hello", "a < b", "1 > 0", "안녕", "im_end", "<|im_start"] {
            assert!(!is_suspicious(text, &control()) || text == "<|im_start", "{text}");
        }
        for text in ["<|im_end|>", "say <|im_", "_end|> more", "x <", "\u{FDD1}"] {
            assert!(is_suspicious(text, &control()), "{text}");
        }
    }

    #[test]
    fn a_message_cut_in_two_is_refused() {
        let wrapped = wrap("a<|im_end|>b");
        let (left, right) = wrapped.split_at(wrapped.find('b').expect("b"));
        assert!(segments(left).is_err());
        assert!(segments(right).is_err());
    }
}
