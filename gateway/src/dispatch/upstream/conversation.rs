//! One call to an upstream, from the connection to the last event.
//!
//! The whole of it is one future, written down in the order in which it happens. It is polled by whoever wants the next
//! chunk, so nothing is read from the server faster than the client takes it.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use pingora_core::protocols::http::client::HttpSession;
use pingora_core::{Error, ErrorType, RetryType};
use pingora_http::{RequestHeader, ResponseHeader};
use serde_json::Value;

use super::Server;
use crate::accounting::core::Usage;
use crate::accounting::row::{Service, UsageSource};
use crate::answer::{Chunk, Chunks, End, Ended, Finish, Part, Piece};
use crate::api::openai::request::Op;
use crate::api::openai::upstream::{self, Said};
use crate::api::retry_after;
use crate::api::sse::Decoder;
use crate::dispatch::Urgency;
use crate::ports::Meter;
use crate::refusal::Refusal;
use crate::routing::estimate;

/// One event of a stream.
const EVENT_BYTES_MAX: usize = 1 << 20;
/// A whole answer in one document.
const DOCUMENT_BYTES_MAX: usize = 32 << 20;
/// What is read of an error's body.
const ERROR_BYTES_MAX: usize = 64 << 10;
/// An upstream's own words to a client are cut here.
const MESSAGE_CHARS_MAX: usize = 1_000;
/// After the answer's end, how long its connection may take to become free.
const RELEASE: Duration = Duration::from_secs(2);

/// What to ask.
pub struct Ask {
    /// What the model is called there.
    pub model: String,
    pub urgency: Urgency,
    pub op: Op,
    pub is_stream: bool,
    /// Not on a connection that was used before.
    pub is_fresh: bool,
    pub request_id: String,
    pub traceparent: String,
    pub choices: u32,
    /// The most that it may use: what an upstream reports beyond that is not believed.
    pub reservation: Usage,
    pub input_max: u64,
    /// How the client asks to be served.
    pub service: Option<Service>,
    pub body: Bytes,
}

/// An upstream's answer as chunks.
pub struct Stream {
    shared: Arc<Shared>,
    /// `None` once it has run to its end.
    work: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    has_ended: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<VecDeque<Chunk>>,
    is_cancelled: AtomicBool,
    /// Tokens of the answer so far, estimated.
    produced: AtomicU64,
}

impl Meter for Shared {
    fn produced(&self) -> u64 {
        self.produced.load(Ordering::Relaxed)
    }

    fn source(&self) -> UsageSource {
        UsageSource::Estimated
    }
}

impl Stream {
    pub fn begin(server: Arc<Server>, ask: Ask) -> Stream {
        let shared = Arc::new(Shared::default());
        let work = Box::pin(converse(server, ask, shared.clone()));
        Stream { shared, work: Some(work), has_ended: false }
    }

    pub fn meter(&self) -> Arc<dyn Meter> {
        self.shared.clone()
    }

    fn work(&mut self, context: &mut Context<'_>) {
        if self.work.as_mut().is_some_and(|work| work.as_mut().poll(context).is_ready()) {
            self.work = None;
        }
    }
}

impl Chunks for Stream {
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Chunk> {
        let mut next = self.shared.queue.lock().pop_front();
        if next.is_none() {
            self.work(context);
            next = self.shared.queue.lock().pop_front();
        }
        match next {
            Some(Chunk::End(end)) => {
                self.has_ended = true;
                // Most connections are free by now.
                self.work(context);
                Poll::Ready(Chunk::End(end))
            }
            Some(chunk) => Poll::Ready(chunk),
            None => Poll::Pending,
        }
    }

    fn cancel(&mut self) {
        self.shared.is_cancelled.store(true, Ordering::Relaxed);
    }
}

impl Drop for Stream {
    /// The answer is complete and its connection is not free yet: it may still be used again.
    fn drop(&mut self) {
        if let (true, Some(work), Ok(runtime)) =
            (self.has_ended, self.work.take(), tokio::runtime::Handle::try_current())
        {
            runtime.spawn(tokio::time::timeout(RELEASE, work));
        }
    }
}

/// What an answer has said so far.
struct Progress<'a> {
    ask: &'a Ask,
    shared: &'a Shared,
    finishes: BTreeMap<u32, Finish>,
    usage: Option<Value>,
    service: Option<Service>,
    parts: u64,
    text_tokens: u64,
    bytes: usize,
}

impl<'a> Progress<'a> {
    fn new(ask: &'a Ask, shared: &'a Shared) -> Self {
        let finishes = BTreeMap::new();
        Progress { ask, shared, finishes, usage: None, service: None, parts: 0, text_tokens: 0, bytes: 0 }
    }

    /// Takes in what was said; the error, if it was one.
    fn take(&mut self, said: Said) -> Result<(), Value> {
        if let Some(error) = said.error {
            return Err(error);
        }
        for part in said.parts {
            if part.index >= self.ask.choices {
                return Err("it answers a choice that nobody asked for".into());
            }
            self.parts += 1;
            self.bytes += part.bytes();
            // Who did not ask for a stream gathers all of it.
            if !self.ask.is_stream && self.bytes > DOCUMENT_BYTES_MAX {
                return Err("its answer is too long".into());
            }
            self.text_tokens += part_tokens(&part);
            // A token an event is the rule; where events are larger, their text says more.
            let produced = self.parts.max(self.text_tokens).min(self.ask.reservation.output);
            self.shared.produced.store(produced, Ordering::Relaxed);
            if !self.shared.is_cancelled.load(Ordering::Relaxed) {
                self.shared.queue.lock().push_back(Chunk::Part(part));
            }
        }
        for (index, finish) in said.finishes {
            if index >= self.ask.choices {
                return Err("it ends a choice that nobody asked for".into());
            }
            self.finishes.insert(index, finish);
        }
        if said.usage.as_ref().is_some_and(|usage| !usage.is_null()) {
            self.usage = said.usage;
        }
        self.service = said.service.or(self.service);
        Ok(())
    }

    fn has_finished(&self) -> bool {
        (0..self.ask.choices).all(|index| self.finishes.contains_key(&index))
    }

    fn end(self, how: Ended) -> End {
        let (reserved, input_max) = (self.ask.reservation, self.ask.input_max);
        let reported = self.usage.as_ref().and_then(|usage| upstream::credible(usage, input_max, reserved.output));
        if reported.is_none() && matches!(how, Ended::Finished(_)) {
            let is_missing = self.usage.is_none();
            tracing::warn!(is_missing, "an upstream reports no usage that can be true; it is estimated");
        }
        let (usage, source) = match reported {
            Some(usage) => (usage, UsageSource::Reported),
            None => (Usage::tokens(reserved.input, self.shared.produced()), UsageSource::Estimated),
        };
        let service = self.service.filter(|told| {
            let is_credible = told.is_within(self.ask.service);
            if !is_credible {
                let (told, asked) = (told.as_str(), self.ask.service.map(Service::as_str));
                tracing::warn!(
                    told,
                    asked,
                    "an upstream tells a service tier that was not asked for; it is priced as any other"
                );
            }
            is_credible
        });
        // A failure is one, whoever is still listening.
        let how = match how {
            Ended::Finished(_) if self.shared.is_cancelled.load(Ordering::Relaxed) => Ended::Cancelled,
            how => how,
        };
        End { how, usage, source, service, engine: None }
    }

    fn finished(&mut self) -> Ended {
        Ended::Finished(std::mem::take(&mut self.finishes).into_values().collect())
    }
}

fn part_tokens(part: &Part) -> u64 {
    match &part.piece {
        Piece::Text(text) => estimate::text_tokens(text),
        Piece::Delta(raw) | Piece::Message(raw) => estimate::text_tokens(raw.get()),
    }
}

async fn converse(server: Arc<Server>, ask: Ask, shared: Arc<Shared>) {
    let say = |end: End| shared.queue.lock().push_back(Chunk::End(end));
    // Who never began to answer has used nothing.
    let failed = |how: Ended| {
        say(End { how, usage: Usage::default(), source: UsageSource::Estimated, service: None, engine: None });
    };
    let mut connection = match server.connect(ask.is_fresh).await {
        Ok(connection) => connection,
        Err(refusal) => return failed(Ended::Failed(refusal)),
    };
    let is_reused = connection.is_reused;
    let session = &mut connection.session;
    if let Err(error) = send(session, &server, &ask).await {
        return failed(not_answered(&server, &error, is_reused));
    }
    let head = match read_head(session).await {
        Ok(head) => head,
        Err(error) => return failed(not_answered(&server, &error, is_reused)),
    };
    let is_stream =
        head.headers.get("content-type").is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
    if head.status.as_u16() != 200 {
        let head = head.clone();
        let body = read_all(session, ERROR_BYTES_MAX).await.unwrap_or_default();
        failed(Ended::Failed(refused(&server, &ask, &head, &body)));
        return server.release(connection).await;
    }
    if !is_stream {
        let end = read_document(session, &server, &ask, &shared).await;
        server.release(connection).await;
        return say(end);
    }
    let end = read_stream(session, &server, &ask, &shared).await;
    let is_sound = matches!(end.how, Ended::Finished(_) | Ended::Cancelled);
    say(end);
    if is_sound {
        // The end of the framing is still to come; only after it another request may follow.
        while let Ok(Some(_)) = session.read_response_body().await {}
        server.release(connection).await;
    }
}

async fn send(session: &mut HttpSession, server: &Server, ask: &Ask) -> pingora_core::Result<()> {
    let config = &server.config;
    let path = format!("{}{}", config.base, ask.op.path());
    let mut request = RequestHeader::build_no_case("POST", path.as_bytes(), Some(10))?;
    let is_default_port = config.port == if config.tls { 443 } else { 80 };
    let host = if config.host.contains(':') { format!("[{}]", config.host) } else { config.host.clone() };
    let authority = if is_default_port { host } else { format!("{host}:{}", config.port) };
    if matches!(session, HttpSession::H2(_)) {
        let scheme = if config.tls { "https" } else { "http" };
        let uri = http::Uri::builder().scheme(scheme).authority(authority).path_and_query(path).build();
        request.set_uri(uri.map_err(|error| Error::because(ErrorType::InvalidHTTPHeader, "authority", error))?);
    } else {
        request.insert_header("host", authority)?;
    }
    if let Some(key) = &config.api_key {
        request.insert_header("authorization", format!("Bearer {}", key.expose()))?;
    }
    request.insert_header("content-type", "application/json")?;
    request.insert_header("content-length", ask.body.len())?;
    request.insert_header("accept", if ask.is_stream { "text/event-stream" } else { "application/json" })?;
    request.insert_header("user-agent", concat!("glassgate/", env!("CARGO_PKG_VERSION")))?;
    request.insert_header("x-request-id", &ask.request_id)?;
    request.insert_header("traceparent", &ask.traceparent)?;
    session.write_request_header(Box::new(request)).await?;
    session.write_request_body(ask.body.clone(), true).await?;
    session.finish_request_body().await
}

/// The head of the answer; what comes before it (1xx) is passed over.
async fn read_head(session: &mut HttpSession) -> pingora_core::Result<&ResponseHeader> {
    loop {
        session.read_response_header().await?;
        if !session.response_header().is_some_and(|head| head.status.is_informational()) {
            break;
        }
    }
    session.response_header().ok_or_else(|| Error::new(ErrorType::ReadError))
}

async fn read_all(session: &mut HttpSession, limit: usize) -> Result<Bytes, String> {
    let mut body = BytesMut::new();
    while let Some(bytes) = session.read_response_body().await.map_err(|error| error.to_string())? {
        if body.len() + bytes.len() > limit {
            return Err(format!("its body is longer than {limit} bytes"));
        }
        body.extend_from_slice(&bytes);
    }
    Ok(body.freeze())
}

async fn read_document(session: &mut HttpSession, server: &Server, ask: &Ask, shared: &Shared) -> End {
    let mut progress = Progress::new(ask, shared);
    let read = match read_all(session, DOCUMENT_BYTES_MAX).await {
        Ok(body) => upstream::read(&body),
        Err(why) => Err(why),
    };
    let taken = read.map(|said| progress.take(said));
    let how = match taken {
        Ok(Ok(())) if progress.has_finished() => progress.finished(),
        Ok(Ok(())) => broken(server, "its answer has no finish_reason"),
        Ok(Err(error)) => broken(server, &error.to_string()),
        Err(why) => broken(server, &why),
    };
    progress.end(how)
}

async fn read_stream(session: &mut HttpSession, server: &Server, ask: &Ask, shared: &Shared) -> End {
    let mut progress = Progress::new(ask, shared);
    let mut decoder = Decoder::new(EVENT_BYTES_MAX);
    let how = loop {
        let bytes = match session.read_response_body().await {
            Ok(Some(bytes)) => bytes,
            // Some servers end without `[DONE]`; what every choice has finished is complete all the same.
            Ok(None) if progress.has_finished() => break progress.finished(),
            Ok(None) => break broken(server, "its stream ended before the answer did"),
            Err(error) => break broken(server, &error.to_string()),
        };
        decoder.feed(&bytes);
        match read_events(&mut decoder, &mut progress) {
            Ok(false) => {}
            Ok(true) if progress.has_finished() => break progress.finished(),
            Ok(true) => break broken(server, "its stream ended before the answer did"),
            Err(why) => break broken(server, &why),
        }
    };
    progress.end(how)
}

/// Whether the stream has come to its end.
fn read_events(decoder: &mut Decoder, progress: &mut Progress<'_>) -> Result<bool, String> {
    while let Some(data) = decoder.next_event().map_err(|error| error.to_string())? {
        if data == b"[DONE]" {
            return Ok(true);
        }
        if data.is_empty() {
            continue;
        }
        progress.take(upstream::read(data)?).map_err(|error| error.to_string())?;
    }
    Ok(false)
}

/// What is no answer. The reason is for the operator; the client learns only that it failed.
fn broken(server: &Server, why: &str) -> Ended {
    let why: String = server.redact(why).chars().take(MESSAGE_CHARS_MAX).collect();
    tracing::warn!(upstream = server.config.name, why, "an upstream failed while answering");
    Ended::Failed(Refusal::UpstreamFailed)
}

/// The connection broke before the answer began. A pooled one may have been closed before it took the request.
fn not_answered(server: &Server, error: &Error, is_reused: bool) -> Ended {
    let why = match error.etype() {
        // pingora would show the bytes as they came, and there may be a key or a prompt among them.
        ErrorType::InvalidHTTPHeader => "its answer does not begin as HTTP does".to_owned(),
        _ => server.redact(&error.to_string()),
    };
    tracing::warn!(upstream = server.config.name, why, is_reused, "an upstream broke the connection off");
    let has_closed =
        matches!(error.etype(), ErrorType::ConnectionClosed | ErrorType::ReadError | ErrorType::WriteError);
    // HTTP/2 says so where it has not processed a request (REFUSED_STREAM, GOAWAY).
    let is_unprocessed = matches!(error.retry, RetryType::Decided(true));
    match is_unprocessed || (is_reused && has_closed) {
        true => Ended::Stale,
        false => Ended::Failed(Refusal::UpstreamFailed),
    }
}

fn refused(server: &Server, ask: &Ask, head: &ResponseHeader, body: &[u8]) -> Refusal {
    let status = head.status.as_u16();
    let (message, param, _) = upstream::error(body);
    let cut = |text: &str| server.redact(text).chars().take(MESSAGE_CHARS_MAX).collect::<String>();
    let (message, param) = (cut(&message.unwrap_or_default()), param.map(|param| cut(&param)));
    tracing::warn!(upstream = server.config.name, status, message, "an upstream said no");
    match status {
        401 | 403 => Refusal::UpstreamAuth,
        429 => {
            let retry_after = retry_after::read(&head.headers);
            // What a copy runs into is no reason to keep users away.
            if let Some(wait) = retry_after.filter(|_| ask.urgency != Urgency::Nobody) {
                server.cool_down(&ask.model, wait);
            }
            Refusal::UpstreamLimited { retry_after }
        }
        400 | 404 | 413 | 415 | 422 => {
            let message = if message.is_empty() { format!("status {status}") } else { message };
            Refusal::UpstreamRejected { status, message, param }
        }
        _ => Refusal::UpstreamFailed,
    }
}
