//! pingora's phases, each one call. What is not in `endpoint` is a 404.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use http::Method;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::{Error, ErrorType, Result as PingoraResult};
use pingora_http::{RequestHeader, ResponseHeader};
use pingora_proxy::{FailToProxy, ProxyHttp, Session};
use serde_json::json;
use tokio::time::{Instant, timeout_at};

use crate::api::head;
use crate::api::openai::models;
use crate::api::openai::request::Op;
use crate::app::{App, Snapshot};
use crate::exchange::Exchange;
use crate::feedback;
use crate::invoke;
use crate::network;
use crate::ports::{Inbound, Scope};
use crate::refusal::Refusal;
use crate::relay::{self, Stop};

/// A body must be complete by then …
const BODY_DEADLINE: Duration = Duration::from_secs(120);
/// … and after a while it must have come at this rate, so that a few slow clients do not hold all connections.
const BODY_GRACE: Duration = Duration::from_secs(5);
const BODY_BYTES_PER_SECOND: u64 = 1 << 10;
/// What is left of a refused request must come by then.
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);
/// What is left of a refused request's body is read up to here, so that its connection can be used again.
const DRAIN_BYTES_MAX: u64 = 64 << 10;

pub struct Gateway {
    pub app: Arc<App>,
}

/// Everything that is served on the data listener: to callers who may do what it is for, or to everybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Served<'p> {
    To(Scope, Endpoint<'p>),
    Open(Page),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Endpoint<'p> {
    Answer(Op),
    Feedback,
    Models,
    Model(&'p str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Health,
    Root,
}

/// The table of paths.
fn endpoint(path: &str) -> Option<(&'static str, Served<'_>)> {
    use Served::{Open, To};
    Some(match path {
        "/v1/chat/completions" => ("POST", To(Scope::Inference, Endpoint::Answer(Op::Chat))),
        "/v1/completions" => ("POST", To(Scope::Inference, Endpoint::Answer(Op::TextCompletion))),
        "/v1/embeddings" => ("POST", To(Scope::Embeddings, Endpoint::Answer(Op::Embeddings))),
        "/v1/feedback" => ("POST", To(Scope::Feedback, Endpoint::Feedback)),
        "/v1/models" => ("GET", To(Scope::Models, Endpoint::Models)),
        "/health" => ("GET", Open(Page::Health)),
        "/" => ("GET", Open(Page::Root)),
        _ => {
            let id = path.strip_prefix("/v1/models/").filter(|id| !id.is_empty())?;
            ("GET", To(Scope::Models, Endpoint::Model(id)))
        }
    })
}

#[async_trait]
impl ProxyHttp for Gateway {
    type CTX = Exchange;

    fn new_ctx(&self) -> Exchange {
        Exchange::open(self.app.observe.clone(), self.app.clock.clone())
    }

    async fn request_filter(&self, session: &mut Session, exchange: &mut Exchange) -> PingoraResult<bool> {
        session.set_write_timeout(Some(relay::WRITE_STALL));
        session.set_total_drain_timeout(Some(DRAIN_DEADLINE));
        match self.serve(session, exchange).await {
            Ok(()) => Ok(true),
            Err(Stop::Refused(refusal)) => refuse(&self.app, session, exchange, refusal).await.map(|()| true),
            Err(Stop::Broken(error)) => Err(error),
        }
    }

    async fn upstream_peer(&self, _session: &mut Session, _exchange: &mut Exchange) -> PingoraResult<Box<HttpPeer>> {
        // `request_filter` answers everything; there is nothing behind it.
        Err(Error::new(ErrorType::InternalError))
    }

    async fn fail_to_proxy(&self, session: &mut Session, error: &Error, exchange: &mut Exchange) -> FailToProxy {
        use ErrorType::{ConnectionClosed, ReadError, ReadTimedout, WriteError, WriteTimedout};
        if session.response_written().is_none() {
            if matches!(error.etype(), ConnectionClosed | ReadError | ReadTimedout | WriteError | WriteTimedout) {
                exchange.refused(&Refusal::ClientGone);
            } else {
                tracing::error!(%error, "a request failed inside the gateway");
                // The connection may be broken too; then nobody is left to tell.
                let _ = refuse(&self.app, session, exchange, Refusal::Internal).await;
            }
        }
        FailToProxy { error_code: 0, can_reuse_downstream: false }
    }

    /// Hang-ups and broken answers are in the record; pingora's log lines would only repeat them.
    fn suppress_error_log(&self, _session: &Session, _exchange: &Exchange, _error: &Error) -> bool {
        true
    }

    async fn logging(&self, _session: &mut Session, _error: Option<&Error>, exchange: &mut Exchange) {
        invoke::close(exchange);
    }
}

impl Gateway {
    async fn serve(&self, session: &mut Session, exchange: &mut Exchange) -> Result<(), Stop> {
        let (method, path) = (session.req_header().method.clone(), session.req_header().uri.path().to_owned());
        exchange.note(|record| {
            record.method = method.as_str().chars().take(16).collect();
            record.path = path.chars().take(128).collect();
        });
        if session.is_http2() {
            check_http2(session.req_header())?;
        }
        let snapshot = self.app.snapshot.load_full();
        let peer = session.client_addr().and_then(|peer| peer.as_inet());
        let peer = peer.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), SocketAddr::ip);
        let trusted = &snapshot.config.gateway.auth.trusted_proxies;
        let client = network::client(peer, &session.req_header().headers, trusted);
        exchange.note(|record| record.client = Some(client));
        let Some((allowed, served)) = endpoint(&path) else {
            return Err(Refusal::UnknownPath { path: path.chars().take(128).collect() }.into());
        };
        if method.as_str() != allowed && !(allowed == "GET" && method == Method::HEAD) {
            return Err(Refusal::WrongMethod { method: method.as_str().chars().take(16).collect(), allowed }.into());
        }
        match served {
            Served::To(scope, endpoint) => {
                let inbound = PingoraInbound { app: &self.app, head: parts(session), client, scope, session };
                self.serve_caller(inbound, endpoint, &snapshot, exchange).await
            }
            Served::Open(page) => self.show(session, page, exchange).await,
        }
    }

    async fn serve_caller(
        &self,
        mut inbound: PingoraInbound<'_>,
        endpoint: Endpoint<'_>,
        snapshot: &Snapshot,
        exchange: &mut Exchange,
    ) -> Result<(), Stop> {
        match endpoint {
            Endpoint::Answer(op) => {
                exchange.note(|record| record.op = op.as_str());
                let reply = invoke::answer(&self.app, snapshot, op, &mut inbound, exchange).await?;
                relay::send(&self.app, inbound.session, exchange, reply).await
            }
            Endpoint::Feedback => {
                exchange.note(|record| record.op = "feedback");
                let body = feedback::take(&self.app, snapshot, &mut inbound, exchange).await?;
                answer(inbound.session, exchange, 200, body).await
            }
            Endpoint::Models | Endpoint::Model(_) => {
                exchange.note(|record| record.op = "models");
                let caller = invoke::enter(&self.app, snapshot, &mut inbound, exchange).await?;
                self.app.admission.knock_to_look(&caller, &snapshot.config.gateway.limits)?;
                let (routing, since) = (&snapshot.routing, snapshot.since);
                let body = match endpoint {
                    Endpoint::Model(id) => serde_json::to_vec(&models::model(routing.find(id, &caller)?, since)),
                    _ => serde_json::to_vec(&models::list(routing.names_for(&caller), since)),
                };
                answer(inbound.session, exchange, 200, body.map_err(|_| Refusal::Internal)?).await
            }
        }
    }

    /// What everybody may see.
    async fn show(&self, session: &mut Session, page: Page, exchange: &mut Exchange) -> Result<(), Stop> {
        match page {
            Page::Health => {
                exchange.note(|record| record.op = "health");
                let (status, body) = match self.app.unready() {
                    None => (200, json!({"status": "ok"})),
                    Some(why) => (503, json!({"status": "unavailable", "reason": why})),
                };
                answer(session, exchange, status, body.to_string().into_bytes()).await
            }
            Page::Root => {
                exchange.note(|record| record.op = "root");
                let body = json!({
                    "name": "Glassgate",
                    "version": env!("CARGO_PKG_VERSION"),
                    "endpoints": ["POST /v1/chat/completions", "POST /v1/completions", "POST /v1/embeddings", "POST /v1/feedback", "GET /v1/models", "GET /health"],
                });
                answer(session, exchange, 200, body.to_string().into_bytes()).await
            }
        }
    }
}

/// What the guard holds HTTP/1 to, where there is no raw head to look at. Its framing is HTTP/2's own.
fn check_http2(header: &RequestHeader) -> Result<(), Refusal> {
    if header.headers.len() > head::FIELDS_MAX {
        return Err(Refusal::HeadTooLarge);
    }
    // pingora has refused requests with neither, and with two that differ.
    let host = header.headers.get(http::header::HOST).map(|host| host.as_bytes());
    let authority = header.uri.authority().map(|authority| authority.as_str().as_bytes());
    head::authority(authority.or(host).unwrap_or_default())?;
    head::path(header.uri.path_and_query().map_or("", |path| path.as_str()).as_bytes())
}

async fn answer(session: &mut Session, exchange: &mut Exchange, status: u16, body: Vec<u8>) -> Result<(), Stop> {
    let mut response = ResponseHeader::build_no_case(status, Some(8))?;
    response.insert_header("content-type", "application/json")?;
    response.insert_header("content-length", body.len())?;
    relay::common_headers(&mut response, exchange)?;
    exchange.mark(|record, now| {
        (record.status, record.marks.sent, record.bytes_out) = (status, Some(now), body.len() as u64)
    });
    send(session, response, body.into()).await?;
    Ok(())
}

async fn send(session: &mut Session, response: ResponseHeader, body: Bytes) -> PingoraResult<()> {
    let no_body = session.req_header().method == Method::HEAD;
    session.write_response_header(Box::new(response), no_body).await?;
    if !no_body {
        session.write_response_body(Some(body), true).await?;
    }
    Ok(())
}

/// Says no, in OpenAI's shape, and keeps the connection if what the client still sends is small.
async fn refuse(app: &App, session: &mut Session, exchange: &mut Exchange, refusal: Refusal) -> PingoraResult<()> {
    exchange.refused(&refusal);
    if refusal == Refusal::ClientGone {
        return Err(Error::explain(ErrorType::ConnectionClosed, "the client hung up"));
    }
    if !is_reusable(session, &refusal) || session.as_downstream_mut().drain_request_body().await.is_err() {
        session.set_keepalive(None);
    }
    relay::part_ways(app, session);
    let body = refusal.body();
    let mut response = ResponseHeader::build_no_case(refusal.describe().status, Some(16))?;
    response.insert_header("content-type", "application/json")?;
    response.insert_header("content-length", body.len())?;
    let quotas = exchange.record().and_then(|record| record.quotas).filter(|_| refusal.quotas().is_none());
    for (name, value) in refusal.headers().into_iter().chain(quotas.into_iter().flat_map(|quotas| quotas.headers())) {
        response.insert_header(name, value)?;
    }
    relay::common_headers(&mut response, exchange)?;
    exchange.mark(|record, now| (record.marks.sent, record.bytes_out) = (Some(now), body.len() as u64));
    send(session, response, body.into()).await
}

/// Whether the connection may take another request after a refusal: what the client still sends must be small, and its
/// framing sound. After a broken body nobody knows where the next request begins.
fn is_reusable(session: &mut Session, refusal: &Refusal) -> bool {
    if matches!(refusal, Refusal::BadFraming { .. } | Refusal::BodyCut | Refusal::BodyTooSlow | Refusal::Draining) {
        return false;
    }
    let headers = &session.req_header().headers;
    let waiting = headers.contains_key(http::header::EXPECT);
    let announced = content_length(headers);
    let small = announced.is_some_and(|bytes| bytes <= DRAIN_BYTES_MAX) || session.as_downstream_mut().is_body_done();
    small && !waiting
}

fn content_length(headers: &http::HeaderMap) -> Option<u64> {
    headers.get(http::header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// pingora's session as the stages see it.
struct PingoraInbound<'s> {
    app: &'s App,
    head: http::request::Parts,
    client: IpAddr,
    scope: Scope,
    session: &'s mut Session,
}

fn parts(session: &Session) -> http::request::Parts {
    let header = session.req_header();
    let mut request = http::Request::new(());
    *request.method_mut() = header.method.clone();
    *request.uri_mut() = header.uri.clone();
    *request.headers_mut() = header.headers.clone();
    request.into_parts().0
}

impl Inbound for PingoraInbound<'_> {
    fn head(&self) -> &http::request::Parts {
        &self.head
    }

    fn client(&self) -> IpAddr {
        self.client
    }

    fn scope(&self) -> Scope {
        self.scope
    }

    async fn read_body(&mut self, limit: usize) -> Result<Bytes, Refusal> {
        let too_large = Refusal::BodyTooLarge { limit_bytes: limit };
        if content_length(&self.head.headers).is_some_and(|bytes| bytes > limit as u64) {
            return Err(too_large);
        }
        if self
            .head
            .headers
            .get(http::header::EXPECT)
            .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
        {
            self.session.as_downstream_mut().write_continue_response().await.map_err(|_| Refusal::ClientGone)?;
        }
        let mut cut = pin!(self.app.cut());
        let began = Instant::now();
        let mut body = BytesMut::new();
        loop {
            let earned = Duration::from_secs(body.len() as u64 / BODY_BYTES_PER_SECOND);
            let deadline = began + (BODY_GRACE + earned).min(BODY_DEADLINE);
            let read = tokio::select! {
                biased;
                read = timeout_at(deadline, self.session.read_request_body()) => read,
                () = &mut cut => return Err(Refusal::Draining),
            };
            let Some(bytes) = read.map_err(|_| Refusal::BodyTooSlow)?.map_err(|error| broken_body(&error))? else {
                return Ok(body.freeze());
            };
            if body.len() + bytes.len() > limit {
                return Err(too_large);
            }
            body.extend_from_slice(&bytes);
        }
    }

    async fn gone(&mut self) -> Refusal {
        tokio::select! {
            // Resolves only when the client hangs up or resets: the body is read, and the guard keeps what comes after it.
            _ = self.session.as_downstream_mut().read_body_or_idle(true) => Refusal::ClientGone,
            () = self.app.cut() => Refusal::Draining,
        }
    }
}

/// The guard says with `InvalidData` that it was not the client's absence but its framing.
fn broken_body(error: &Error) -> Refusal {
    match error.root_cause().downcast_ref::<io::Error>() {
        Some(error) if error.kind() == io::ErrorKind::InvalidData => {
            Refusal::BadFraming { why: "a chunk of the body is not framed by its size and CRLF" }
        }
        _ => Refusal::BodyCut,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_matched_whole() {
        let served = |path| endpoint(path).map(|(_, served)| served);
        let chat = Served::To(Scope::Inference, Endpoint::Answer(Op::Chat));
        assert_eq!(served("/v1/chat/completions"), Some(chat));
        let model = Served::To(Scope::Models, Endpoint::Model("assistant"));
        assert_eq!(served("/v1/models/assistant"), Some(model));
        for unknown in
            ["/v1/chat/completions/", "/v1//chat/completions", "/v1/models/", "/V1/models", "/metrics", "/admin/config"]
        {
            assert_eq!(endpoint(unknown), None, "{unknown}");
        }
    }
}
