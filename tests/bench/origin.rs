//! The server behind every proxy that is measured: it answers at once, with bytes that are made beforehand.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use memchr::memmem;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::load;

/// Events of text in one streamed answer.
pub const EVENTS: usize = 200;
/// Between two events of a paced answer: every relay has sent one before the next one comes.
const GAP: Duration = Duration::from_millis(2);

/// How it answers; the model's name in the request says which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// One JSON document.
    Whole,
    /// Events one by one, each written when its time has come.
    Paced,
    /// All events in one write.
    Burst,
    /// One event, and then nothing until the other side leaves.
    Idle,
}

impl Manner {
    pub const ALL: [Manner; 4] = [Manner::Whole, Manner::Paced, Manner::Burst, Manner::Idle];

    pub fn model(self) -> &'static str {
        match self {
            Manner::Whole => "whole",
            Manner::Paced => "paced",
            Manner::Burst => "burst",
            Manner::Idle => "idle",
        }
    }

    fn of(body: &[u8]) -> Manner {
        let named =
            |manner: &&Manner| memmem::find(body, format!(r#""model":"{}""#, manner.model()).as_bytes()).is_some();
        *Manner::ALL.iter().find(named).expect("a request names one of the models")
    }
}

/// Requests that it has answered.
static ANSWERED: AtomicUsize = AtomicUsize::new(0);

pub fn answered() -> usize {
    ANSWERED.load(Ordering::Relaxed)
}

struct Answers {
    whole: Vec<u8>,
    head: Vec<u8>,
    events: Vec<Vec<u8>>,
    end: Vec<u8>,
    /// All of a stream.
    burst: Vec<u8>,
    /// To whoever wants to know first what is served here.
    models: Vec<u8>,
}

impl Answers {
    fn make() -> Answers {
        let usage = json!({"prompt_tokens": 200, "completion_tokens": EVENTS, "total_tokens": 200 + EVENTS});
        let body = json!({"id": "chatcmpl-9f8e7d6c5b4a", "object": "chat.completion", "created": 1_760_000_000, "model": "origin",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "The quick brown fox jumps over it."},
                         "finish_reason": "stop"}], "usage": usage})
        .to_string();
        // The last line tells nginx that events must not wait for each other.
        let head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\nx-accel-buffering: no\r\n\r\n".to_vec();
        let events: Vec<_> = (0..EVENTS).map(|_| chunk(&event(json!({"content": " word"}), None))).collect();
        let mut last = event(json!({}), Some("stop"));
        last["usage"] = usage;
        let end = [chunk(&last), framed("data: [DONE]\n\n"), b"0\r\n\r\n".to_vec()].concat();
        let burst = [head.clone(), events.concat(), end.clone()].concat();
        let models = Manner::ALL.map(|manner| json!({"id": manner.model(), "object": "model"}));
        let models = json!({"object": "list", "data": models}).to_string();
        Answers { whole: document(&body), head, events, end, burst, models: document(&models) }
    }
}

fn event(delta: Value, finish: Option<&str>) -> Value {
    json!({"id": "chatcmpl-9f8e7d6c5b4a", "object": "chat.completion.chunk", "created": 1_760_000_000, "model": "origin",
           "system_fingerprint": "fp_0123456789", "usage": null,
           "choices": [{"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish}]})
}

fn document(json: &str) -> Vec<u8> {
    let length = json.len();
    format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{json}").into_bytes()
}

fn chunk(value: &Value) -> Vec<u8> {
    framed(&format!("data: {value}\n\n"))
}

fn framed(data: &str) -> Vec<u8> {
    format!("{:x}\r\n{data}\r\n", data.len()).into_bytes()
}

/// Serves for ever, on a thread of its own.
pub fn start() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let executor = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        executor.block_on(async { serve(TcpListener::from_std(listener).unwrap()).await });
    });
    address
}

async fn serve(listener: TcpListener) {
    let answers: &'static Answers = Box::leak(Box::new(Answers::make()));
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        // Whoever is measured may leave when it likes.
        tokio::spawn(async move {
            let _ = converse(stream, answers).await;
        });
    }
}

async fn converse(mut stream: TcpStream, answers: &Answers) -> std::io::Result<()> {
    let mut got = Vec::new();
    loop {
        let length = loop {
            if let Some(length) = whole_request(&got) {
                break length;
            }
            got.reserve(4 << 10);
            if stream.read_buf(&mut got).await? == 0 {
                return Ok(());
            }
        };
        if got.starts_with(b"GET ") {
            stream.write_all(&answers.models).await?;
            got.drain(..length);
            continue;
        }
        ANSWERED.fetch_add(1, Ordering::Relaxed);
        match Manner::of(&got[..length]) {
            Manner::Whole => stream.write_all(&answers.whole).await?,
            Manner::Burst => stream.write_all(&answers.burst).await?,
            Manner::Paced => {
                stream.write_all(&answers.head).await?;
                for event in &answers.events {
                    tokio::time::sleep(GAP).await;
                    stream.write_all(event).await?;
                }
                stream.write_all(&answers.end).await?;
            }
            Manner::Idle => {
                stream.write_all(&[&answers.head[..], &answers.events[0]].concat()).await?;
                // Nothing comes but the end of the connection.
                let _ = stream.read(&mut [0]).await?;
                return Ok(());
            }
        }
        got.drain(..length);
    }
}

/// The length of the first request, once all of it is there.
fn whole_request(got: &[u8]) -> Option<usize> {
    let head = memmem::find(got, b"\r\n\r\n")? + 4;
    let whole = head + load::content_length(&got[..head]).unwrap_or(0);
    (got.len() >= whole).then_some(whole)
}
