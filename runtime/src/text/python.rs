//! What Python and Rust see differently in a text. Templates were made with Python's methods, and models with what they gave.

use minijinja::{
    Error, State, Value,
    value::{StringInput, from_args},
};

/// Methods of Python's types, by which templates call them.
pub(super) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match (value.as_str(), name, args) {
        (Some(text), "strip", []) => Ok(strip(text).into()),
        (Some(text), "lstrip", []) => Ok(text.trim_start_matches(is_space).into()),
        (Some(text), "rstrip", []) => Ok(text.trim_end_matches(is_space).into()),
        (Some(text), "split", []) => Ok(text.split(is_space).filter(|word| !word.is_empty()).collect()),
        (Some(text), "title", []) => Ok(title(text).into()),
        (Some(text), "splitlines", _) => {
            let (keep_ends,): (Option<bool>,) = from_args(args)?;
            Ok(lines(text, keep_ends.unwrap_or(false)))
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// The filter `trim`.
pub(super) fn trim(text: StringInput<'_>, chars: Option<String>) -> String {
    match chars {
        Some(chars) => text.as_str().trim_matches(|c| chars.contains(c)).to_owned(),
        None => strip(text.as_str()).to_owned(),
    }
}

fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// `str.isspace`: four separators more than Unicode's white space.
fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\x1c'..='\x1f')
}

/// `str.title`: a letter that follows none begins a word.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut in_word = false;
    for c in text.chars() {
        if in_word {
            out.extend(c.to_lowercase())
        } else {
            out.extend(c.to_uppercase())
        }
        in_word = c.is_alphabetic();
    }
    out
}

/// `str.splitlines`.
fn lines(text: &str, keep_ends: bool) -> Value {
    let ends = |c| matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(ends) {
        let end = if rest[at..].starts_with("\r\n") { 2 } else { rest[at..].chars().next().map_or(0, char::len_utf8) };
        lines.push(&rest[..if keep_ends { at + end } else { at }]);
        rest = &rest[at + end..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines.into_iter().collect()
}
