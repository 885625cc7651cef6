//! Clients on kept-alive connections, all of them tasks of one thread, each asking again once it was answered.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use memchr::memmem;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::origin::Manner;

const GOOD: &[u8] = b"HTTP/1.1 200 ";
const UNKNOWN: &[u8] = b"HTTP/1.1 401 ";
/// What every event with text has.
const TEXT: &[u8] = b"\"delta\":{\"content\":\"";
/// As large as a short conversation.
const BODY_BYTES: usize = 1 << 10;

/// Stands in a request where each one gets a number of its own, of as many digits.
pub const NUMBER: &str = "########";

/// No two requests of this process have the same.
static NUMBERS: AtomicUsize = AtomicUsize::new(0);

/// A request as bytes. No two are the same if it has a place for a number.
pub struct Request {
    bytes: Vec<u8>,
    number_at: Option<usize>,
    /// How what is answered must begin.
    answer: &'static [u8],
}

impl Request {
    /// The same for another path than that of chats.
    pub fn to_path(&self, path: &str) -> Request {
        let text = String::from_utf8(self.bytes.clone()).unwrap().replacen("/v1/chat/completions", path, 1);
        Request { number_at: memmem::find(text.as_bytes(), NUMBER.as_bytes()), bytes: text.into_bytes(), ..*self }
    }

    /// The same, to be refused for its key.
    pub fn unknown(self) -> Request {
        Request { answer: UNKNOWN, ..self }
    }

    pub fn next(&self) -> Cow<'_, [u8]> {
        let Some(at) = self.number_at else { return Cow::Borrowed(&self.bytes) };
        let mut bytes = self.bytes.clone();
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        bytes[at..at + NUMBER.len()].copy_from_slice(format!("{number:0width$}", width = NUMBER.len()).as_bytes());
        Cow::Owned(bytes)
    }
}

/// A chat request of 1 KiB for a model that answers in this manner.
pub fn request(manner: Manner, key: &str) -> Request {
    to(manner.model(), manner != Manner::Whole, false, key)
}

/// A chat request of 1 KiB; a numbered one is like no other.
pub fn to(model: &str, stream: bool, is_numbered: bool, key: &str) -> Request {
    let body = |content: &str| {
        let mut body = json!({"model": model, "stream": stream, "temperature": 0, "max_tokens": 1000,
                              "messages": [{"role": "user", "content": content}]});
        if stream {
            body["stream_options"] = json!({"include_usage": true});
        }
        body.to_string()
    };
    let words =
        if is_numbered { NUMBER } else { "" }.to_owned() + &"lorem ipsum dolor sit amet ".repeat(BODY_BYTES / 27 + 1);
    post(&body(&words[..BODY_BYTES - body("").len()]), key)
}

/// A chat request with this body.
pub fn post(body: &str, key: &str) -> Request {
    let bytes = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\nuser-agent: bench\r\naccept: */*\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes();
    Request { number_at: memmem::find(&bytes, NUMBER.as_bytes()), bytes, answer: GOOD }
}

/// So many answers for so many clients at once. Says how often something arrived.
pub async fn ask(address: SocketAddr, request: &Arc<Request>, clients: usize, answers: usize) -> usize {
    let left = Arc::new(AtomicUsize::new(answers));
    let clients: Vec<_> = (0..clients)
        .map(|_| {
            let (request, left) = (request.clone(), left.clone());
            tokio::spawn(async move {
                let mut client = Client::connect(address).await;
                let mut reads = 0;
                while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
                    reads += client.ask(&request).await;
                }
                reads
            })
        })
        .collect();
    let mut reads = 0;
    for client in clients {
        reads += client.await.unwrap();
    }
    reads
}

pub struct Client {
    stream: TcpStream,
    got: Vec<u8>,
}

impl Client {
    pub async fn connect(address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Client { stream, got: Vec::with_capacity(16 << 10) }
    }

    /// Sends a request and reads its answer to the end.
    pub async fn ask(&mut self, request: &Request) -> usize {
        self.got.clear();
        self.stream.write_all(&request.next()).await.unwrap();
        let mut reads = 0;
        let (mut head, mut length) = (0, None);
        loop {
            self.read().await;
            reads += 1;
            if head == 0 {
                let Some(end) = memmem::find(&self.got, b"\r\n\r\n") else { continue };
                head = end + 4;
                self.check(request.answer);
                length = content_length(&self.got[..head]);
            }
            let is_whole = match length {
                Some(length) => self.got.len() >= head + length,
                None => self.got.ends_with(b"\r\n0\r\n\r\n"),
            };
            if is_whole {
                return reads;
            }
        }
    }

    /// Sends a request and reads its streamed answer. Says when each event with text came.
    pub async fn stream(&mut self, request: &Request) -> Vec<Instant> {
        self.got.clear();
        self.stream.write_all(&request.next()).await.unwrap();
        let (mut events, mut seen) = (Vec::new(), 0);
        while !self.got.ends_with(b"\r\n0\r\n\r\n") {
            self.read().await;
            self.check(GOOD);
            let now = Instant::now();
            // One that is cut in two counts once all of its name is there.
            let new = memmem::find_iter(&self.got[seen..], TEXT).count();
            events.resize(events.len() + new, now);
            if let Some(last) = memmem::rfind(&self.got[seen..], TEXT) {
                seen += last + TEXT.len();
            }
        }
        events
    }

    /// Sends a request and waits for the first event of its answer.
    pub async fn begin(&mut self, request: &Request) {
        self.stream.write_all(&request.next()).await.unwrap();
        while memmem::find(&self.got, b"data: ").is_none() {
            self.read().await;
            self.check(GOOD);
        }
    }

    /// Who is refused would wait for ever for an answer.
    fn check(&self, answer: &[u8]) {
        let is_good = self.got.starts_with(answer) || answer.starts_with(&self.got);
        assert!(is_good, "an answer that was not asked for: {}", String::from_utf8_lossy(&self.got));
    }

    async fn read(&mut self) {
        if self.stream.read_buf(&mut self.got).await.unwrap() == 0 {
            panic!("the connection ended in the middle of an answer: {}", String::from_utf8_lossy(&self.got));
        }
    }
}

/// Looks through a head; the names that differ by case are those that there are.
pub fn content_length(head: &[u8]) -> Option<usize> {
    let at = memmem::find(head, b"ontent-length: ").or_else(|| memmem::find(head, b"ontent-Length: "))? + 15;
    let digits = head[at..].iter().take_while(|byte| byte.is_ascii_digit());
    Some(digits.fold(0, |sum, digit| sum * 10 + usize::from(digit - b'0')))
}
