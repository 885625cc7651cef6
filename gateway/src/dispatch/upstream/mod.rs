//! Remote servers that speak OpenAI's dialect, through pingora's connector: pooling, TLS and HTTP/2 are its business.

mod addresses;
mod conversation;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use pingora_core::connectors::ConnectorOptions;
use pingora_core::connectors::http::Connector;
use pingora_core::protocols::http::client::HttpSession;
use pingora_core::protocols::l4::ext::TcpKeepalive;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::{Error, ErrorType};

use crate::accounting::settlement::Running;
use crate::answer::{Answer, Prompts};
use crate::api::openai::upstream;
use crate::config::UpstreamConfig;
use crate::dispatch::{Call, NotStarted};
use crate::refusal::Refusal;
use crate::routing::{Leg, estimate};
use addresses::Addresses;
use conversation::{Ask, Stream};

/// Idle connections that are kept to one server.
const POOL_MAX: usize = 512;
/// An idle connection is closed after this; servers commonly close theirs after 60 s or more.
const IDLE: Duration = Duration::from_secs(50);
/// A server that takes none of our bytes for this long is gone.
const WRITE_STALL: Duration = Duration::from_secs(30);
/// Streams on one HTTP/2 connection.
const H2_STREAMS_MAX: usize = 100;
/// How often a connection that is waited on is asked whether it lives.
const H2_PING: Duration = Duration::from_secs(10);
/// How long a server is left alone at the most, whatever its `retry-after` says.
const COOL_DOWN_MAX: Duration = Duration::from_secs(60);

/// The servers of a configuration, by name.
pub type Servers = HashMap<String, Arc<Server>>;

/// Servers in use. They outlive reloads, so that connections stay open.
#[derive(Default)]
pub struct Upstreams(Mutex<Servers>);

impl Upstreams {
    /// The servers of a configuration, by name: those that it does not change, and new ones.
    ///
    /// # Errors
    /// In words for the operator, when certificates cannot be read.
    pub fn open(&self, configs: &BTreeMap<String, Arc<UpstreamConfig>>) -> Result<Servers, String> {
        let known = self.0.lock().clone();
        let servers = configs.iter().map(|(name, config)| match known.get(name) {
            Some(server) if server.config == *config => Ok((name.clone(), server.clone())),
            _ => Ok((name.clone(), Arc::new(Server::open(config.clone())?))),
        });
        servers.collect()
    }

    /// Forgets servers that no configuration names any more; calls that still run on them end in peace.
    pub fn retain(&self, servers: Servers) {
        *self.0.lock() = servers;
    }
}

/// One server: its connections, addresses, and whether it wants to be left alone.
pub struct Server {
    config: Arc<UpstreamConfig>,
    connector: Connector,
    addresses: Addresses,
    /// Until when, by model: providers limit each for itself.
    cooling: Mutex<HashMap<String, Instant>>,
}

impl Server {
    fn open(config: Arc<UpstreamConfig>) -> Result<Server, String> {
        let mut options = ConnectorOptions::new(POOL_MAX);
        options.ca_file = config.ca.as_ref().map(|ca| ca.display().to_string());
        // The connector has no other way to say that certificates cannot be read than to panic.
        let connector = catch_unwind(AssertUnwindSafe(|| Connector::new(Some(options)))).map_err(|_| {
            let from = config.ca.as_ref().map_or("the system".to_owned(), |ca| ca.display().to_string());
            format!("upstream `{}`: the certificates of {from} cannot be read", config.name)
        })?;
        let addresses = Addresses::new(&config.host, config.port);
        Ok(Server { config, connector, addresses, cooling: Mutex::default() })
    }

    /// How long the server still wants no requests for a model.
    fn cooling(&self, model: &str) -> Option<Duration> {
        let until = *self.cooling.lock().get(model)?;
        until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }

    fn cool_down(&self, model: &str, wait: Duration) {
        self.cooling.lock().insert(model.to_owned(), Instant::now() + wait.min(COOL_DOWN_MAX));
    }

    /// Connects, to the first of the server's addresses that can be reached in time.
    async fn connect(&self, is_fresh: bool) -> Result<Connection, Refusal> {
        let name = &self.config.name;
        let addresses = match self.addresses.in_turn(self.config.connect).await {
            Ok(addresses) => addresses,
            Err(error) => {
                tracing::warn!(upstream = name, %error, "an upstream's name cannot be resolved");
                return Err(Refusal::UpstreamUnreachable);
            }
        };
        let began = Instant::now();
        let mut refusal = Refusal::UpstreamUnreachable;
        let count = addresses.len() as u32;
        for (tried, address) in (0..).zip(addresses) {
            // One that swallows everything must leave time for the others.
            let left = self.config.connect.saturating_sub(began.elapsed()) / (count - tried);
            if left.is_zero() {
                break;
            }
            let peer = self.peer(address, left, is_fresh);
            match self.connector.get_http_session(&peer).await {
                Ok((session, is_reused)) => return Ok(Connection { session, peer, is_reused }),
                Err(error) => {
                    tracing::warn!(upstream = name, %address, %error, "an upstream cannot be reached");
                    self.addresses.avoid(address);
                    refusal = not_connected(&error, self.config.connect);
                }
            }
        }
        Err(refusal)
    }

    /// How to connect. A fresh connection has a pool of its own, so that none is found in it.
    fn peer(&self, address: SocketAddr, within: Duration, is_fresh: bool) -> HttpPeer {
        static FRESH: AtomicU64 = AtomicU64::new(1);
        let mut peer = HttpPeer::new(address, self.config.tls, self.config.host.clone());
        peer.group_key = if is_fresh { FRESH.fetch_add(1, Ordering::Relaxed) } else { 0 };
        let options = &mut peer.options;
        options.connection_timeout = Some(within);
        options.total_connection_timeout = Some(within);
        options.write_timeout = Some(WRITE_STALL);
        options.idle_timeout = Some(IDLE);
        options.max_h2_streams = H2_STREAMS_MAX;
        // Many streams share a connection: that it is dead must be found out by somebody other than each of them.
        options.h2_ping_interval = Some(H2_PING);
        options.tcp_keepalive = Some(TcpKeepalive {
            idle: Duration::from_secs(60),
            interval: Duration::from_secs(5),
            count: 5,
            #[cfg(target_os = "linux")]
            user_timeout: WRITE_STALL,
        });
        match (self.config.http2, self.config.tls) {
            (true, true) => options.set_http_version(2, 1),
            // There is nothing to negotiate with over plain TCP.
            (true, false) => options.set_http_version(2, 2),
            (false, _) => options.set_http_version(1, 1),
        }
        peer
    }

    /// Keeps a connection for the next request, if it may carry one.
    async fn release(&self, connection: Connection) {
        let Connection { mut session, mut peer, .. } = connection;
        if session.response_done() {
            if matches!(session, HttpSession::H1(_)) {
                // It was fresh; now it is one of them.
                peer.group_key = 0;
            }
            self.connector.release_http_session(session, &peer, Some(IDLE)).await;
        }
    }

    /// What upstreams say may end up in logs and answers; our key must not.
    fn redact(&self, text: &str) -> String {
        match &self.config.api_key {
            Some(key) => text.replace(key.expose(), "***"),
            None => text.to_owned(),
        }
    }
}

fn not_connected(error: &Error, limit: Duration) -> Refusal {
    match error.etype() {
        ErrorType::ConnectTimedout | ErrorType::TLSHandshakeTimedout => Refusal::TimedOut { what: "connection", limit },
        ErrorType::TLSHandshakeFailure | ErrorType::InvalidCert | ErrorType::HandshakeError => Refusal::UpstreamTls,
        _ => Refusal::UpstreamUnreachable,
    }
}

/// A connection that one request has.
struct Connection {
    session: HttpSession,
    peer: HttpPeer,
    is_reused: bool,
}

/// A model on a server.
pub struct UpstreamModel {
    server: Arc<Server>,
    /// What it is called there.
    name: String,
}

impl UpstreamModel {
    pub fn new(server: Arc<Server>, name: String) -> Self {
        UpstreamModel { server, name }
    }

    pub fn start(&self, running: Running, leg: &Leg, call: &Call<'_>) -> Result<Answer, Box<NotStarted>> {
        if let Some(left) = self.server.cooling(&self.name) {
            return Err(Box::new(NotStarted {
                running,
                refusal: Refusal::UpstreamLimited { retry_after: Some(left) },
            }));
        }
        let body: Bytes = upstream::ask(call.request, &self.name, leg.measure.output_max).into();
        let ask = Ask {
            model: self.name.clone(),
            urgency: call.urgency,
            op: call.request.op,
            is_stream: call.request.stream,
            is_fresh: call.is_fresh,
            request_id: call.request_id.to_owned(),
            traceparent: call.traceparent.clone(),
            choices: leg.measure.choices,
            input_max: estimate::prompt_tokens_max(&call.request.body, body.len()),
            reservation: leg.measure.reservation(),
            service: leg.measure.extras.service,
            body,
        };
        let stream = Stream::begin(self.server.clone(), ask);
        let running = Some(running.measured_by(stream.meter()));
        Ok(Answer { running, chunks: Box::new(stream), prompts: Prompts::default() })
    }
}
