//! Server-sent events: framing only, both ways.

/// Appends one `data:` event. `json` must be a single line, which `serde_json` writes.
pub fn event(json: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(json);
    out.extend_from_slice(b"\n\n");
}

/// The event that ends a complete stream.
pub const DONE: &[u8] = b"data: [DONE]\n\n";

/// An event that is longer than anybody's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event is longer than {limit} bytes")]
pub struct TooLong {
    pub limit: usize,
}

/// Reads events from bytes that may be split anywhere (WHATWG HTML, "Interpreting an event stream"). Lines end with LF,
/// CR LF or CR; only `data` fields matter to us.
pub struct Decoder {
    limit: usize,
    buffer: Vec<u8>,
    /// Where the line begins that is being read.
    line: usize,
    /// How far the line's end has been looked for.
    seen: usize,
    data: Vec<u8>,
    /// The data was handed out: it goes with the next call.
    is_taken: bool,
    /// The last line ended with CR: an LF right after it belongs to it.
    skip_lf: bool,
}

impl Decoder {
    /// `limit`: bytes that one event may have.
    pub fn new(limit: usize) -> Decoder {
        Decoder { limit, buffer: Vec::new(), line: 0, seen: 0, data: Vec::new(), is_taken: false, skip_lf: false }
    }

    pub fn feed(&mut self, bytes: &[u8]) {
        // What was read is let go of first: the buffer holds an unfinished line and what just came.
        self.buffer.drain(..self.line);
        self.seen -= self.line;
        self.line = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The data of the next complete event, in `data`, until the next call.
    ///
    /// # Errors
    /// `TooLong`; nothing that follows can be trusted to be an event.
    pub fn next_event(&mut self) -> Result<Option<&[u8]>, TooLong> {
        if std::mem::take(&mut self.is_taken) {
            self.data.clear();
        }
        loop {
            if self.skip_lf && self.seen < self.buffer.len() {
                self.skip_lf = false;
                if self.buffer[self.seen] == b'\n' {
                    self.seen += 1;
                    self.line = self.seen;
                }
            }
            let Some(length) = memchr::memchr2(b'\n', b'\r', &self.buffer[self.seen..]) else {
                self.seen = self.buffer.len();
                if self.seen - self.line + self.data.len() > self.limit {
                    return Err(TooLong { limit: self.limit });
                }
                return Ok(None);
            };
            let end = self.seen + length;
            let line = &self.buffer[self.line..end];
            self.skip_lf = self.buffer[end] == b'\r';
            if line.is_empty() {
                (self.line, self.seen) = (end + 1, end + 1);
                if !self.data.is_empty() {
                    self.is_taken = true;
                    // Every data line left a newline; the last one is not part of the data.
                    self.data.pop();
                    return Ok(Some(&self.data));
                }
                continue;
            }
            if let Some(data) = line.strip_prefix(b"data")
                && let Some(value) = data.strip_prefix(b":").or_else(|| data.is_empty().then_some(data))
            {
                self.data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
                self.data.push(b'\n');
                if self.data.len() > self.limit {
                    return Err(TooLong { limit: self.limit });
                }
            }
            (self.line, self.seen) = (end + 1, end + 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode(pieces: &[&[u8]]) -> Vec<String> {
        let mut decoder = Decoder::new(1 << 10);
        let mut events = Vec::new();
        for piece in pieces {
            decoder.feed(piece);
            while let Some(data) = decoder.next_event().unwrap() {
                events.push(String::from_utf8_lossy(data).into_owned());
            }
        }
        events
    }

    #[test]
    fn events_are_read_whatever_ends_their_lines() {
        let text =
            b": hello\n\ndata: a\n\ndata:b\r\n\r\nevent: x\rdata: c\r\rid: 1\ndata: d\ndata\ndata: e\n\ndata: cut";
        assert_eq!(decode(&[text]), ["a", "b", "c", "d\n\ne"]);
    }

    #[test]
    fn an_event_that_never_ends_is_refused() {
        let mut decoder = Decoder::new(100);
        decoder.feed(&[b'x'; 101]);
        assert_eq!(decoder.next_event().map(|_| ()), Err(TooLong { limit: 100 }));
        let mut decoder = Decoder::new(100);
        decoder.feed("data: xxxxxxxxx\n".repeat(20).as_bytes());
        assert_eq!(decoder.next_event().map(|_| ()), Err(TooLong { limit: 100 }));
    }

    proptest! {
        #[test]
        fn how_the_bytes_are_split_does_not_matter(
            events in proptest::collection::vec("[a-z가-힣 ]{1,12}", 1..6),
            ends in proptest::collection::vec(0usize..3, 6),
            cuts in proptest::collection::vec(0.0f64..1.0, 0..8),
        ) {
            let mut bytes = Vec::new();
            for (event, end) in events.iter().zip(&ends) {
                let end = ["\n", "\r\n", "\r"][*end];
                bytes.extend_from_slice(format!("data: {event}{end}{end}").as_bytes());
            }
            let mut at: Vec<usize> = cuts.iter().map(|cut| (cut * bytes.len() as f64) as usize).collect();
            at.extend([0, bytes.len()]);
            at.sort_unstable();
            let pieces: Vec<&[u8]> = at.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
            prop_assert_eq!(decode(&pieces), events.iter().map(|event| event.to_owned()).collect::<Vec<_>>());
        }
    }
}
