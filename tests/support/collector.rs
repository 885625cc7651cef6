//! An OTLP collector of a test's own: HTTP/1.1 by hand, so that it can behave as badly as real ones.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;

/// What it does with a POST that it has read.
#[derive(Clone, Debug)]
pub enum Mood {
    Accept,
    /// Answers with this status and header lines.
    Answer(u16, &'static str),
    /// Takes the batch short of so many spans.
    Partial(i64),
    /// Answers once the gate is open.
    Wait,
    /// Never answers, and waits for the other side to go.
    Hang,
    /// Hangs up without a word.
    HangUp,
    /// Says 200 and never comes to an end.
    Endless,
}

/// A POST that arrived.
#[derive(Clone, Debug)]
pub struct Post {
    pub path: String,
    pub headers: BTreeMap<String, String>,
    pub spans: Vec<Span>,
    pub resource: BTreeMap<String, String>,
    pub at: Instant,
}

#[derive(Default)]
struct Shared {
    posts: Mutex<Vec<Post>>,
    /// One for each POST in turn; the last stays.
    moods: Mutex<VecDeque<Mood>>,
    gate: Mutex<bool>,
    opened: Condvar,
}

pub struct Collector {
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

impl Collector {
    pub fn start(moods: &[Mood]) -> Collector {
        Self::serve(moods, None)
    }

    /// The same behind TLS.
    pub fn start_tls(moods: &[Mood], tls: rustls::ServerConfig) -> Collector {
        Self::serve(moods, Some(Arc::new(tls)))
    }

    fn serve(moods: &[Mood], tls: Option<Arc<rustls::ServerConfig>>) -> Collector {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared { moods: Mutex::new(moods.iter().cloned().collect()), ..Shared::default() });
        let accepted = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, shared, tls) = (stream.unwrap(), accepted.clone(), tls.clone());
                std::thread::spawn(move || match tls {
                    None => talk(BufReader::new(stream), &shared),
                    Some(tls) => {
                        let session = rustls::ServerConnection::new(tls).unwrap();
                        talk(BufReader::new(rustls::StreamOwned::<_, TcpStream>::new(session, stream)), &shared);
                    }
                });
            }
        });
        Collector { address, shared }
    }

    pub fn posts(&self) -> Vec<Post> {
        self.shared.posts.lock().unwrap().clone()
    }

    pub fn spans(&self) -> Vec<Span> {
        self.posts().into_iter().flat_map(|post| post.spans).collect()
    }

    /// Lets everybody who waits have their answer.
    pub fn open_gate(&self) {
        *self.shared.gate.lock().unwrap() = true;
        self.shared.opened.notify_all();
    }
}

/// Reads POSTs from one connection until somebody hangs up.
fn talk<S: Read + Write>(mut connection: BufReader<S>, shared: &Shared) {
    while let Some(post) = read(&mut connection) {
        let mood = {
            let mut moods = shared.moods.lock().unwrap();
            let mood = moods.front().cloned().expect("a mood");
            if moods.len() > 1 {
                moods.pop_front();
            }
            mood
        };
        // After the mood was taken: whoever sees the post knows what becomes of it.
        shared.posts.lock().unwrap().push(post);
        let stream = connection.get_mut();
        let written = match mood {
            Mood::Accept => answer(stream, 200, "", &[]),
            Mood::Answer(status, headers) => answer(stream, status, headers, b"no"),
            Mood::Partial(rejected_spans) => {
                let partial = ExportTracePartialSuccess { rejected_spans, error_message: "too many".into() };
                let response = ExportTraceServiceResponse { partial_success: Some(partial) };
                answer(stream, 200, "", &response.encode_to_vec())
            }
            Mood::Wait => {
                let closed = shared.gate.lock().unwrap();
                drop(shared.opened.wait_while(closed, |open| !*open).unwrap());
                answer(stream, 200, "", &[])
            }
            Mood::Hang => {
                let _ = connection.read(&mut [0]);
                return;
            }
            Mood::HangUp => return,
            Mood::Endless => {
                let head = answer(stream, 200, "transfer-encoding: chunked\r\n", &[]);
                let mut written = head;
                while written.is_ok() {
                    written = stream.write_all(b"4\r\nlong\r\n");
                }
                written
            }
        };
        if written.is_err() {
            return;
        }
    }
}

fn answer(stream: &mut impl Write, status: u16, headers: &str, body: &[u8]) -> std::io::Result<()> {
    let length =
        if headers.contains("chunked") { String::new() } else { format!("content-length: {}\r\n", body.len()) };
    stream.write_all(format!("HTTP/1.1 {status} x\r\n{length}{headers}\r\n").as_bytes())?;
    stream.write_all(body)?;
    stream.flush()
}

/// One POST; `None` when the other side is gone.
fn read(connection: &mut impl BufRead) -> Option<Post> {
    let mut line = String::new();
    connection.read_line(&mut line).ok()?;
    let path = line.strip_prefix("POST ")?.split(' ').next()?.to_owned();
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        connection.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let mut body = vec![0; headers.get("content-length")?.parse().ok()?];
    connection.read_exact(&mut body).ok()?;
    let mut plain = Vec::new();
    flate2::read::GzDecoder::new(&body[..]).read_to_end(&mut plain).expect("the body is gzipped");
    let request = ExportTraceServiceRequest::decode(&plain[..]).expect("the body is an ExportTraceServiceRequest");
    let mut resource = BTreeMap::new();
    let mut spans = Vec::new();
    for group in request.resource_spans {
        resource.extend(attributes(&group.resource.unwrap_or_default().attributes));
        spans.extend(group.scope_spans.into_iter().flat_map(|scope| scope.spans));
    }
    Some(Post { path, headers, spans, resource, at: Instant::now() })
}

/// Attributes as text, whatever their type; lists are joined by commas.
pub fn attributes(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    fn text(value: &AnyValue) -> String {
        match value.value.as_ref() {
            Some(any_value::Value::StringValue(text)) => text.clone(),
            Some(any_value::Value::IntValue(number)) => number.to_string(),
            Some(any_value::Value::DoubleValue(number)) => number.to_string(),
            Some(any_value::Value::BoolValue(is)) => is.to_string(),
            Some(any_value::Value::ArrayValue(list)) => list.values.iter().map(text).collect::<Vec<_>>().join(","),
            other => panic!("an attribute of an unexpected type: {other:?}"),
        }
    }
    let pair = |attribute: &KeyValue| (attribute.key.clone(), attribute.value.as_ref().map(text).unwrap_or_default());
    let found: BTreeMap<_, _> = attributes.iter().map(pair).collect();
    assert_eq!(found.len(), attributes.len(), "an attribute is there twice: {attributes:?}");
    found
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
