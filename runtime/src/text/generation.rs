//! `{% generation %}…{% endgeneration %}`: how templates mark what the model is trained to say. The rendered text does not
//! show it, and our Jinja does not know it.

/// The template with `{% with %}` in their places, which is as scoped and as silent.
pub(super) fn without_marks(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(at) = rest.find('{') {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let len = match tag.as_bytes().get(1) {
            Some(b'#') => tag.find("#}").map(|end| end + 2),
            Some(b'{') => end_of(tag, "}}"),
            Some(b'%') => end_of(tag, "%}"),
            _ => Some(1),
        };
        // What does not end is for the parser to complain about.
        let (tag, after) = tag.split_at(len.unwrap_or(tag.len()));
        rest = after;
        match name(tag) {
            Some("generation") => out.push_str(&tag.replacen("generation", "with", 1)),
            Some("endgeneration") => out.push_str(&tag.replacen("endgeneration", "endwith", 1)),
            Some("raw") => {
                let (raw, after) = rest.split_at(end_of_raw(rest));
                out.extend([tag, raw]);
                rest = after;
            }
            _ => out.push_str(tag),
        }
    }
    out + rest
}

/// What stands in `{% … %}`.
fn name(tag: &str) -> Option<&str> {
    let inner = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    Some(inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+'))
}

/// Behind `close`, which does not count in a string.
fn end_of(tag: &str, close: &str) -> Option<usize> {
    let (mut quote, mut escaped) = (None, false);
    for (at, c) in tag.char_indices().skip(2) {
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(open) if c == open => quote = None,
            Some(_) => {}
            None if matches!(c, '"' | '\'') => quote = Some(c),
            None if tag[at..].starts_with(close) => return Some(at + close.len()),
            None => {}
        }
    }
    None
}

/// Where `{% endraw %}` begins.
fn end_of_raw(text: &str) -> usize {
    let mut tags = text.match_indices("{%").map(|(at, _)| at);
    let is_end = |at: &usize| end_of(&text[*at..], "%}").and_then(|len| name(&text[*at..*at + len])) == Some("endraw");
    tags.find(is_end).unwrap_or(text.len())
}
