//! Remote servers that speak OpenAI's dialect, through pingora's connector: pooling, TLS and HTTP/2 are its business.

mod addresses;
mod conversation;

use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use pingora_core::connectors::ConnectorOptions;
use pingora_core::connectors::http::Connector;
use pingora_core::protocols::l4::ext::TcpKeepalive;
use pingora_core::upstreams::peer::HttpPeer;

use crate::accounting::settlement::Running;
use crate::answer::Answer;
use crate::api::openai::upstream;
use crate::config::UpstreamConfig;
use crate::dispatch::{Call, NotStarted};
use crate::refusal::Refusal;
use crate::routing::Leg;
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
    cooling: Mutex<Option<Instant>>,
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

    /// How long the server still wants no requests.
    fn cooling(&self) -> Option<Duration> {
        let mut until = self.cooling.lock();
        let left = until.and_then(|until| until.checked_duration_since(Instant::now())).filter(|left| !left.is_zero());
        if left.is_none() {
            *until = None;
        }
        left
    }

    fn cool_down(&self, wait: Duration) {
        *self.cooling.lock() = Some(Instant::now() + wait.min(COOL_DOWN_MAX));
    }

    /// Where to connect, and how. A fresh connection has a pool of its own, so that none is found in it.
    async fn peer(&self, is_fresh: bool) -> std::io::Result<HttpPeer> {
        let address = self.addresses.pick().await?;
        let mut peer = HttpPeer::new(address, self.config.tls, self.config.host.clone());
        peer.group_key = u64::from(is_fresh);
        let options = &mut peer.options;
        options.connection_timeout = Some(self.config.connect);
        options.total_connection_timeout = Some(self.config.connect);
        options.write_timeout = Some(WRITE_STALL);
        options.idle_timeout = Some(IDLE);
        options.max_h2_streams = H2_STREAMS_MAX;
        options.tcp_keepalive = Some(TcpKeepalive {
            idle: Duration::from_secs(60),
            interval: Duration::from_secs(5),
            count: 5,
            #[cfg(target_os = "linux")]
            user_timeout: Duration::ZERO,
        });
        match (self.config.http2, self.config.tls) {
            (true, true) => options.set_http_version(2, 1),
            // There is nothing to negotiate with over plain TCP.
            (true, false) => options.set_http_version(2, 2),
            (false, _) => options.set_http_version(1, 1),
        }
        Ok(peer)
    }

    /// What upstreams say may end up in logs and answers; our key must not.
    fn redact(&self, text: &str) -> String {
        match &self.config.api_key {
            Some(key) => text.replace(key.expose(), "***"),
            None => text.to_owned(),
        }
    }
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
        if let Some(left) = self.server.cooling() {
            return Err(Box::new(NotStarted {
                running,
                refusal: Refusal::UpstreamLimited { retry_after: Some(left) },
            }));
        }
        let body: Bytes = upstream::ask(call.request, &self.name, leg.measure.output_max).into();
        let ask = Ask {
            op: call.request.op,
            is_stream: call.request.stream,
            is_fresh: call.is_fresh,
            request_id: call.request_id.to_owned(),
            traceparent: call.traceparent.clone(),
            choices: leg.measure.choices,
            reservation: leg.measure.reservation(),
            body,
        };
        let stream = Stream::begin(self.server.clone(), ask);
        Ok(Answer { running: Some(running.measured_by(stream.meter())), chunks: Box::new(stream) })
    }
}
