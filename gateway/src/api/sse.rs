//! Server-sent events: framing only.

/// Appends one `data:` event. `json` must be a single line, which `serde_json` writes.
pub fn event(json: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(json);
    out.extend_from_slice(b"\n\n");
}

/// The event that ends a complete stream.
pub const DONE: &[u8] = b"data: [DONE]\n\n";
