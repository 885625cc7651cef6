//! How many tokens a text has for a model whose tokenizer we do not have: an estimate that leans upwards, so that a
//! reservation seldom falls short. What the upstream reports is what is settled.

use serde_json::{Map, Value};

/// English has about four bytes a token with today's vocabularies, code and numbers about three.
const ASCII_BYTES_PER_TOKEN: u64 = 3;
/// What a template adds to a message.
const TOKENS_PER_MESSAGE: u64 = 8;
/// An image, or another part that is no text, at an ordinary resolution.
const TOKENS_PER_PART: u64 = 1_500;
/// Large images, files and recordings have been seen with tens of thousands.
const TOKENS_PER_PART_MAX: u64 = 1 << 17;
const TEMPLATE_TOKENS_MAX: u64 = 4_096;
/// What a request grows by on its way to an upstream: another name, a bound for its answer, options of its stream.
const REWRITTEN_BYTES_MAX: usize = 1 << 10;
/// The fields that become part of the prompt.
const READ: [&str; 6] = ["messages", "prompt", "input", "tools", "functions", "response_format"];

/// Tokens of everything in a request that its model will read.
pub fn prompt_tokens(body: &Map<String, Value>) -> u64 {
    let read: u64 = READ.iter().filter_map(|field| body.get(*field)).map(value).sum();
    let messages = body.get("messages").and_then(Value::as_array).map_or(1, Vec::len) as u64;
    read + messages * TOKENS_PER_MESSAGE
}

fn value(value: &Value) -> u64 {
    match value {
        Value::String(text) => text_tokens(text),
        Value::Array(items) => items.iter().map(self::value).sum(),
        // An address says nothing of an image's size.
        Value::Object(fields) if is_part(fields) => TOKENS_PER_PART,
        Value::Object(fields) => fields.iter().map(|(key, value)| text_tokens(key) + self::value(value)).sum(),
        // Token ids of a text completion are one each.
        _ => 1,
    }
}

/// The most tokens that an upstream can credibly have read: a byte is a token at the least, a template adds some, and an
/// image, a file or a recording has more to it than its address.
pub fn prompt_tokens_max(body: &Map<String, Value>, bytes: usize) -> u64 {
    let parts: u64 = READ.iter().filter_map(|field| body.get(*field)).map(parts).sum();
    (bytes as u64).saturating_add(TEMPLATE_TOKENS_MAX).saturating_add(parts.saturating_mul(TOKENS_PER_PART_MAX))
}

/// As `prompt_tokens_max`, for a request that is not yet written as its upstream will read it.
pub fn prompt_tokens_bound(body: &Map<String, Value>) -> u64 {
    // Texts and numbers: this has no way to fail.
    let bytes = serde_json::to_vec(body).map_or(0, |text| text.len());
    prompt_tokens_max(body, bytes.saturating_add(REWRITTEN_BYTES_MAX))
}

fn parts(value: &Value) -> u64 {
    match value {
        Value::Array(items) => items.iter().map(parts).sum(),
        Value::Object(fields) if is_part(fields) => 1,
        Value::Object(fields) => fields.values().map(parts).sum(),
        _ => 0,
    }
}

/// Images that a chat brings, whatever they show.
pub fn images(body: &Map<String, Value>) -> u64 {
    let messages = body.get("messages").and_then(Value::as_array).into_iter().flatten();
    let parts = messages.filter_map(|message| message.get("content")?.as_array()).flatten();
    parts.filter(|part| part.get("type").and_then(Value::as_str) == Some("image_url")).count() as u64
}

/// Whether it is a part of a message that is no text.
fn is_part(fields: &Map<String, Value>) -> bool {
    matches!(fields.get("type").and_then(Value::as_str), Some("image_url" | "input_audio" | "file" | "video_url"))
}

/// Tokens of one text.
pub fn text_tokens(text: &str) -> u64 {
    let ascii = text.bytes().filter(u8::is_ascii).count() as u64;
    // Other scripts take up to about a token a character.
    let others = text.chars().filter(|character| !character.is_ascii()).count() as u64;
    ascii.div_ceil(ASCII_BYTES_PER_TOKEN) + others
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_estimate_counts_everything_the_model_reads_and_nothing_else() {
        let of = |body: Value| prompt_tokens(body.as_object().unwrap());
        let hello = of(json!({"model": "m", "messages": [{"role": "user", "content": "Hello there"}]}));
        assert!((10..40).contains(&hello), "{hello}");
        assert_eq!(of(json!({"prompt": [1, 2, 3]})), 3 + TOKENS_PER_MESSAGE);
        let image = json!({"type": "image_url", "image_url": {"url": "data:".to_owned() + &"x".repeat(100_000)}});
        let image = of(json!({"messages": [{"role": "user", "content": [image]}]}));
        assert!((1_500..1_600).contains(&image), "{image}");
        assert_eq!(text_tokens("안녕하세요"), 5);
    }

    #[test]
    fn images_are_counted_wherever_a_chat_has_them_and_nothing_else_is() {
        let image = json!({"type": "image_url", "image_url": {"url": "https://example.org/a.png", "detail": "low"}});
        let text = json!({"type": "text", "text": "image_url"});
        let body = json!({"prompt": [image], "messages": [
            {"role": "system", "content": "image_url"},
            {"role": "user", "content": [text, image, {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]},
            {"role": "assistant", "content": null},
            {"role": "user", "content": [image, image]},
        ]});
        assert_eq!(images(body.as_object().unwrap()), 3);
    }
}
