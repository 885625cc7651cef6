//! What stands between a socket and pingora: it decides who may connect, how long a head may take, and what a head is.
//!
//! pingora waits for a head byte by byte without an end, and reads it leniently. Here a connection has a slot, a head has
//! a deadline however its bytes drip, and only what `api::head` found unambiguous is handed on. Whatever is refused here
//! gets an answer in OpenAI's shape, a record, and a closed connection.

mod slots;
mod tls;
mod wire;

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use pingora_core::apps::{HttpServerApp as _, HttpServerOptions, ServerApp};
use pingora_core::protocols::http::ServerSession;
use pingora_core::protocols::http::date::get_cached_date;
use pingora_core::protocols::http::v2::server::default_h2_options;
use pingora_core::protocols::{GetSocketDigest, Stream};
use pingora_core::server::ShutdownWatch;
use pingora_core::server::configuration::ServerConf;
use pingora_proxy::{HttpProxy, http_proxy};
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout, timeout_at};

use crate::api::head;
use crate::app::App;
use crate::config::ListenConfig;
use crate::exchange::Exchange;
use crate::network::is_in;
use crate::proxy::Gateway;
use crate::refusal::Refusal;
use crate::relay::WRITE_STALL;
use slots::Slots;
use tls::{Inner, NoHandshake};
use wire::Wire;

/// An idle connection between two requests is closed after this.
const KEEPALIVE: Duration = Duration::from_secs(60);
/// Of the files that the process may open, as much may be connections: upstreams, the store and probes need the rest.
const FILES_SHARE: (usize, usize) = (45, 100);
/// Where the system does not say how many files there may be.
const FILES_UNKNOWN: u64 = 1024;
/// A refusal is written and its client heard out for so long, by so many at once; further ones are just closed.
const REFUSE: Duration = Duration::from_secs(1);
const REFUSING_MAX: usize = 64;
/// To close with unread bytes is a reset, which can overtake the answer: so much is read and thrown away.
const LINGER_BYTES_MAX: usize = 64 << 10;

/// What HTTP/2 may take: as many streams on one connection, heads as large as HTTP/1's, and little waiting in buffers.
const H2_STREAMS_MAX: u32 = 64;
const H2_STREAM_WINDOW: u32 = 256 << 10;
const H2_CONNECTION_WINDOW: u32 = 1 << 20;
const H2_SEND_BUFFER: usize = 64 << 10;
/// How an HTTP/2 connection begins (RFC 9113 3.4).
const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub struct Guard {
    app: Arc<App>,
    proxy: Arc<HttpProxy<Gateway>>,
    slots: Arc<Slots>,
    refusing: Semaphore,
    head_timeout: Duration,
    http2: bool,
    /// True once we are leaving: then pingora gives no connection back, and HTTP/2 says goodbye.
    leaving: ShutdownWatch,
}

/// What came first on a connection, or next.
enum Next {
    /// A head that was checked, with the framing of its body.
    Request(usize, head::Framing),
    Http2,
    Refused(Refusal),
    /// The client left, or has nothing to say.
    Quiet,
}

impl Guard {
    pub fn new(app: Arc<App>, conf: &Arc<ServerConf>, listen: &ListenConfig, leaving: ShutdownWatch) -> Guard {
        let mut proxy = http_proxy(conf, Gateway { app: app.clone() });
        let mut options = HttpServerOptions::default();
        // Connections are told apart here; what is handed over whole is HTTP/2.
        options.h2c = true;
        options.h2_idle_timeout = Some(KEEPALIVE);
        proxy.server_options = Some(options);
        let mut h2 = default_h2_options();
        h2.max_concurrent_streams(H2_STREAMS_MAX)
            .max_header_list_size(head::HEAD_BYTES_MAX as u32)
            .initial_window_size(H2_STREAM_WINDOW)
            .initial_connection_window_size(H2_CONNECTION_WINDOW)
            .max_send_buffer_size(H2_SEND_BUFFER);
        proxy.h2_options = Some(h2);

        let files = usize::try_from(open_files()).unwrap_or(usize::MAX);
        let total = listen.connections_max.unwrap_or((files.saturating_mul(FILES_SHARE.0) / FILES_SHARE.1).max(1));
        if total >= files {
            tracing::warn!(connections_max = total, files, "there can be more connections than files may be open");
        }
        let per_address = listen.connections_per_ip.unwrap_or(total.div_ceil(2));
        Guard {
            app,
            proxy: Arc::new(proxy),
            slots: Slots::new(total, per_address),
            refusing: Semaphore::new(REFUSING_MAX),
            head_timeout: listen.head_timeout,
            http2: listen.http2,
            leaving,
        }
    }

    /// Waits for the next head. Its time runs from its first byte, not from the last one.
    async fn next(&self, wire: &mut Wire, fresh: bool) -> Next {
        let patience = if fresh { self.head_timeout } else { KEEPALIVE };
        let quiet_until = Instant::now() + patience;
        // Old clients end a body with a line that does not count; it begins no head.
        let mut may_skip_line = true;
        let mut began = None;
        let mut scanned = 0;
        loop {
            let ahead = wire.ahead();
            if fresh && self.http2 && !ahead.is_empty() && H2_PREFACE.starts_with(&ahead[..ahead.len().min(24)]) {
                if ahead.len() >= H2_PREFACE.len() {
                    return Next::Http2;
                }
            } else if may_skip_line && ahead.starts_with(b"\r\n") {
                may_skip_line = false;
                wire.skip(2);
                continue;
            } else if !(may_skip_line && ahead == b"\r") {
                match head::end(ahead, &mut scanned) {
                    Ok(Some(end)) => {
                        return match head::check(&ahead[..end]) {
                            Ok(framing) => Next::Request(end, framing),
                            Err(refusal) => Next::Refused(refusal),
                        };
                    }
                    Ok(None) => {}
                    Err(refusal) => return Next::Refused(refusal),
                }
            }
            let deadline = if wire.ahead().is_empty() {
                quiet_until
            } else {
                *began.get_or_insert_with(|| Instant::now() + self.head_timeout)
            };
            match timeout_at(deadline, wire.read_ahead()).await {
                Ok(Ok(1..)) => {}
                Ok(Ok(0) | Err(_)) => return Next::Quiet,
                Err(_) if wire.ahead().is_empty() => {
                    if fresh {
                        // Nothing was asked, so there is nothing to answer; but an operator should see it.
                        self.app.metrics.rejection(Refusal::HeadTooSlow.describe().code);
                    }
                    return Next::Quiet;
                }
                Err(_) => return Next::Refused(Refusal::HeadTooSlow),
            }
        }
    }

    /// Serves one HTTP/1 request, and gives the connection back if another may follow.
    async fn serve(&self, mut wire: Box<Wire>, head: usize, mut framing: head::Framing) -> Option<Box<Wire>> {
        let body = match framing.take(&wire.ahead()[head..]) {
            Ok(body) => body,
            Err(refusal) => {
                self.refuse_head(wire, refusal).await;
                return None;
            }
        };
        let bytes = wire.begin(head, body, framing);
        let mut session = ServerSession::new_http1(wire);
        session.set_pipelined_prefix(bytes);
        let (stream, _) = self.proxy.process_new_http(session, &self.leaving).await?.consume();
        stream.into_any().downcast().ok()
    }

    /// Says no to what has arrived here, and notes what it seemed to be.
    async fn refuse_head(&self, mut wire: Box<Wire>, refusal: Refusal) {
        let mut exchange = self.open(address(&*wire));
        if let Some((method, path)) = head::guess(wire.ahead()) {
            exchange.note(|record| {
                record.method = method.chars().take(16).collect();
                record.path = path.chars().take(128).collect();
            });
        }
        wire.open();
        self.refuse(wire, exchange, refusal).await;
    }

    /// A record of somebody whose head says nothing that we believe: their address is the peer's.
    fn open(&self, peer: IpAddr) -> Exchange {
        let mut exchange = Exchange::open(self.app.observe.clone(), self.app.clock.clone());
        exchange.note(|record| record.client = Some(peer));
        exchange
    }

    /// Says no to whoever is on this connection, in one short answer, and closes it.
    async fn refuse(&self, mut stream: Stream, mut exchange: Exchange, refusal: Refusal) {
        exchange.refused(&refusal);
        let Ok(_turn) = self.refusing.try_acquire() else { return };
        let answer = answer(&exchange, &refusal);
        exchange.mark(|record, now| (record.marks.sent, record.bytes_out) = (Some(now), answer.len() as u64));
        exchange.close();
        let said = async {
            stream.write_all(&answer).await?;
            stream.flush().await?;
            AsyncWriteExt::shutdown(&mut stream).await?;
            linger(&mut stream).await
        };
        // If it takes longer than that, the client does not listen.
        let _ = timeout(REFUSE, said).await;
    }
}

#[async_trait]
impl ServerApp for Guard {
    async fn process_new(self: &Arc<Self>, stream: Stream, _shutdown: &ShutdownWatch) -> Option<Stream> {
        let peer = address(&*stream);
        let (counted, tls) = {
            let gateway = &self.app.snapshot.load().config.gateway;
            ((!is_in(peer, &gateway.auth.trusted_proxies)).then_some(peer), gateway.tls.clone())
        };
        let Some(slot) = self.slots.take(counted) else {
            if tls.is_some() {
                // An answer in the clear would be noise to who speaks TLS.
                self.open(peer).refused(&Refusal::TooManyConnections);
            } else {
                self.refuse(stream, self.open(peer), Refusal::TooManyConnections).await;
            }
            return None;
        };
        let inner = match tls {
            None => Inner::Plain(stream),
            Some(tls) => {
                let shaken = Inner::accept(stream, tls).await;
                self.app.metrics.tls_handshake(match &shaken {
                    Ok(_) => "accepted",
                    Err(NoHandshake::Failed) => "failed",
                    Err(NoHandshake::TooSlow) => "too_slow",
                });
                shaken.ok()?
            }
        };
        let mut wire = Box::new(Wire::new(inner, slot, WRITE_STALL));
        let mut fresh = true;
        loop {
            match self.next(&mut wire, fresh).await {
                Next::Request(head, framing) => wire = self.serve(wire, head, framing).await?,
                Next::Http2 => {
                    wire.open();
                    // Connections from before are said goodbye to when we leave; one that is made later is served.
                    let mut leaving = self.leaving.clone();
                    leaving.borrow_and_update();
                    return self.proxy.process_new(wire, &leaving).await;
                }
                Next::Refused(refusal) => {
                    self.refuse_head(wire, refusal).await;
                    return None;
                }
                Next::Quiet => return None,
            }
            fresh = false;
        }
    }

    async fn cleanup(&self) {
        self.proxy.http_cleanup().await;
    }
}

/// Who is on the other side. A socket that cannot tell counts as one and the same stranger.
fn address(socket: &(impl GetSocketDigest + ?Sized)) -> IpAddr {
    let digest = socket.get_socket_digest();
    let peer = digest.as_ref().and_then(|digest| digest.peer_addr()?.as_inet());
    peer.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |peer| peer.ip().to_canonical())
}

/// A refusal as it goes onto the wire, with what every response of ours carries.
fn answer(exchange: &Exchange, refusal: &Refusal) -> Vec<u8> {
    use std::io::Write;
    let body = refusal.body();
    let status = http::StatusCode::from_u16(refusal.describe().status).unwrap_or(http::StatusCode::BAD_REQUEST);
    let mut out = Vec::with_capacity(512 + body.len());
    // Writing into a vector has no way to fail.
    let _ = write!(
        out,
        "HTTP/1.1 {} {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\ndate: {}\r\n",
        status.as_str(),
        status.canonical_reason().unwrap_or_default(),
        body.len(),
        get_cached_date().to_str().unwrap_or_default(),
    );
    for (name, value) in refusal.headers() {
        let _ = write!(out, "{name}: {value}\r\n");
    }
    if let Some(record) = exchange.record() {
        let _ = write!(
            out,
            "x-request-id: {}\r\ntraceparent: 00-{}-{}-01\r\n",
            record.request_id, record.trace_id, record.span_id
        );
    }
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(&body);
    out
}

/// Reads what a refused client still sends, so that closing does not take back what it was told.
async fn linger(stream: &mut Stream) -> io::Result<()> {
    use tokio::io::AsyncReadExt;
    let mut read = 0;
    let mut sink = [0; 1024];
    while read < LINGER_BYTES_MAX {
        match stream.read(&mut sink).await? {
            0 => break,
            more => read += more,
        }
    }
    Ok(())
}

/// How many files this process may open. The soft limit is a default of long ago, for programs that use `select`: it is
/// raised to what the administrator allows.
fn open_files() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let now = if setrlimit(Resource::Nofile, raised).is_ok() { limit.maximum } else { limit.current };
    now.unwrap_or(FILES_UNKNOWN)
}
