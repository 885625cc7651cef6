//! The way to the store that gateways share: one connection, kept up by a thread of its own, and a script there.
//!
//! A call waits as long as its deadline allows and no longer. After a few in a row that were not answered, or one that
//! broke, nobody is kept waiting: there is no store until a new connection has been answered in time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use redis::aio::MultiplexedConnection;
use redis::{Cmd, ConnectionAddr, RedisConnectionInfo, Value, cmd};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;

use super::script::{self, Reply, Settled, Want};
use crate::config::RedisConfig;
use crate::observe::metrics::Metrics;
use crate::outbound;
use crate::ports::Clock;

/// Calls in a row without an answer after which there is no store.
const MISSES_MAX: u32 = 3;
pub const CONNECT_MAX: Duration = Duration::from_secs(1);
const RETRY_AFTER: Duration = Duration::from_millis(250);
/// How long a gateway is believed to live without a sign of life. Then what it held is counted as used.
pub const LIFE: Duration = Duration::from_secs(10);
const SIGN_EVERY: Duration = Duration::from_secs(2);

/// There was no answer. What was asked may have been done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Away;

pub struct Store {
    server: Server,
    gateway: String,
    deadline: Duration,
    link: ArcSwapOption<Link>,
    /// In a row.
    misses: AtomicU32,
    /// Calls without an answer, ever.
    lost: AtomicU64,
    broken: Notify,
    mended: Notify,
    clock: Arc<dyn Clock>,
    metrics: Arc<Metrics>,
}

/// Where it is, and how it is spoken to.
struct Server {
    host: String,
    port: u16,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    hello: RedisConnectionInfo,
}

struct Link {
    connection: MultiplexedConnection,
    /// Later ones are larger. The script heeds no earlier one than the last that it saw.
    number: i64,
    /// The script's name there.
    script: String,
}

impl Store {
    /// # Errors
    /// What is wrong with the address, or that TLS has no certificates to trust.
    pub fn new(
        config: &RedisConfig,
        gateway: String,
        clock: Arc<dyn Clock>,
        metrics: Arc<Metrics>,
    ) -> Result<Store, String> {
        metrics.store_up("redis", false);
        Ok(Store {
            server: Server::new(config)?,
            gateway,
            deadline: config.deadline,
            link: ArcSwapOption::empty(),
            misses: AtomicU32::new(0),
            lost: AtomicU64::new(0),
            broken: Notify::new(),
            mended: Notify::new(),
            clock,
            metrics,
        })
    }

    /// Takes all that is wanted, or nothing.
    ///
    /// # Errors
    /// `Away`.
    pub async fn reserve(&self, grant: &str, wants: &[Want]) -> Result<Reply, Away> {
        let link = self.link()?;
        let mut command = self.command(&link, "reserve", wants.iter().map(|want| want.key.as_str()));
        command.arg(grant);
        wants.iter().for_each(|want| want.add_to(&mut command));
        let numbers = self.call(&link, &command).await?;
        script::reply(&numbers, wants).map_err(|why| self.break_off(&link, &why))
    }

    /// Ends grants. Those that have ended before stay as they are.
    ///
    /// # Errors
    /// `Away`; then they are to be settled again.
    pub async fn settle<'s>(&self, settled: impl Iterator<Item = &'s Settled>) -> Result<(), Away> {
        let link = self.link()?;
        let mut command = self.command(&link, "settle", [].into_iter());
        settled.for_each(|one| one.add_to(&mut command));
        self.call(&link, &command).await.map(|_| ())
    }

    /// How many calls had no answer: who sees it rise while waiting for another's call need not wait for their own.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    fn link(&self) -> Result<Arc<Link>, Away> {
        self.link.load_full().ok_or_else(|| {
            self.metrics.store_call("not_made");
            Away
        })
    }

    fn command<'k>(&self, link: &Link, doing: &str, keys: impl ExactSizeIterator<Item = &'k str>) -> Cmd {
        let mut command = cmd("EVALSHA");
        command.arg(&link.script).arg(keys.len());
        keys.for_each(|key| {
            command.arg(key);
        });
        command.arg(doing).arg(&self.gateway).arg(link.number).arg(LIFE.as_millis() as u64);
        command
    }

    async fn call(&self, link: &Arc<Link>, command: &Cmd) -> Result<Vec<i64>, Away> {
        let mut connection = link.connection.clone();
        let answer = timeout(self.deadline, connection.send_packed_command(command)).await;
        let (numbers, result) = match answer {
            Ok(Ok(value)) => {
                let numbers = value.extract_error().map_err(|error| error.to_string()).and_then(script::numbers);
                let result = if numbers.is_ok() { "answered" } else { "failed" };
                (numbers, result)
            }
            Ok(Err(error)) => (Err(error.to_string()), "failed"),
            Err(_) => (Err(format!("no answer in {:?}", self.deadline)), "late"),
        };
        self.metrics.store_call(result);
        if numbers.is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        match numbers {
            Ok(numbers) => {
                self.misses.store(0, Ordering::Relaxed);
                Ok(numbers)
            }
            Err(_) if result == "late" && self.misses.fetch_add(1, Ordering::Relaxed) + 1 < MISSES_MAX => Err(Away),
            Err(why) => Err(self.break_off(link, &why)),
        }
    }

    /// From now on there is no store, until the next connection.
    fn break_off(&self, link: &Arc<Link>, why: &str) -> Away {
        let current = self.link.load();
        if current.as_ref().is_some_and(|current| Arc::ptr_eq(current, link)) {
            let before = self.link.compare_and_swap(&current, None);
            if before.as_ref().is_some_and(|before| Arc::ptr_eq(before, link)) {
                self.metrics.store_up("redis", false);
                tracing::warn!(why, "the shared counters are out of reach; rules hold as their `down` says");
                self.broken.notify_one();
            }
        }
        Away
    }

    /// Ends when there is a connection.
    pub async fn back(&self) {
        loop {
            let mended = self.mended.notified();
            if self.link.load().is_some() {
                return;
            }
            mended.await;
        }
    }

    /// Keeps a connection up for ever. `tried` hears of the first try.
    pub async fn keep(&self, tried: std::sync::mpsc::Sender<()>) {
        let mut is_first = true;
        let mut said = String::new();
        loop {
            let connected = timeout(CONNECT_MAX, self.connect(is_first)).await;
            match connected.unwrap_or_else(|_| Err(format!("no answer in {CONNECT_MAX:?}"))) {
                Ok((link, driver)) => {
                    is_first = false;
                    said.clear();
                    tracing::info!(server = %self.server.host, "the shared counters are there");
                    self.misses.store(0, Ordering::Relaxed);
                    self.link.store(Some(link.clone()));
                    self.mended.notify_waiters();
                    self.metrics.store_up("redis", true);
                    // Nobody may be waiting any more.
                    let _ = tried.send(());
                    self.give_signs(&link).await;
                    driver.abort();
                }
                Err(why) => {
                    let _ = tried.send(());
                    if why != said {
                        tracing::warn!(%why, "the shared counters cannot be reached");
                        said = why;
                    }
                }
            }
            sleep(RETRY_AFTER).await;
        }
    }

    /// Until it breaks.
    async fn give_signs(&self, link: &Arc<Link>) {
        loop {
            if timeout(SIGN_EVERY, self.broken.notified()).await.is_ok() {
                return;
            }
            // It counts as any other call: one that is late breaks nothing.
            let _ = self.call(link, &self.command(link, "live", [].into_iter())).await;
        }
    }

    /// A connection on which a first sign of life was answered in time.
    async fn connect(&self, is_first: bool) -> Result<(Arc<Link>, tokio::task::JoinHandle<()>), String> {
        let stream = self.server.stream().await?;
        let text = |error: redis::RedisError| error.to_string();
        // Each call has a time of its own.
        let config = redis::AsyncConnectionConfig::new().set_response_timeout(None);
        let (mut connection, driver) =
            MultiplexedConnection::new_with_config(&self.server.hello, stream, config).await.map_err(text)?;
        let driver = tokio::spawn(driver);
        let loaded =
            connection.send_packed_command(cmd("SCRIPT").arg("LOAD").arg(script::SOURCE)).await.map_err(text)?;
        let script = match loaded {
            Value::BulkString(name) => String::from_utf8(name).map_err(|error| error.to_string())?,
            other => return Err(format!("it does not take the script: {other:?}")),
        };
        let link = Link { connection, number: self.clock.now_ns() / 1_000, script };
        // What the last life of this gateway held is in its ledger by now.
        while is_first && self.first(&link, "leave").await?.last() == Some(&0) {}
        self.first(&link, "live").await?;
        Ok((Arc::new(link), driver))
    }

    async fn first(&self, link: &Link, doing: &str) -> Result<Vec<i64>, String> {
        let (mut connection, command) = (link.connection.clone(), self.command(link, doing, [].into_iter()));
        let answer = timeout(self.deadline, connection.send_packed_command(&command)).await;
        let value = answer.map_err(|_| format!("no answer in {:?}", self.deadline))?;
        value.and_then(Value::extract_error).map_err(|error| error.to_string()).and_then(script::numbers)
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

impl Server {
    fn new(config: &RedisConfig) -> Result<Server, String> {
        let url = config.url.expose();
        let (is_tls, rest) = match (url.strip_prefix("redis://"), url.strip_prefix("rediss://")) {
            (Some(rest), _) => (false, rest),
            (_, Some(rest)) => (true, rest),
            _ => return Err("it does not begin with redis:// or rediss://".into()),
        };
        // Its TLS is ours: for the parser it is plain.
        let parsed: redis::ConnectionInfo = format!("redis://{rest}")
            .parse()
            .map_err(|_| "it does not read redis://[user:password@]host[:port][/number]")?;
        let ConnectionAddr::Tcp(host, port) = parsed.addr().clone() else {
            return Err("it names no host".into());
        };
        let tls = if is_tls {
            let name = ServerName::try_from(host.clone()).map_err(|_| "its host cannot be in a certificate")?;
            Some((TlsConnector::from(Arc::new(outbound::tls(outbound::roots()?)?)), name))
        } else {
            None
        };
        Ok(Server { host, port, tls, hello: parsed.redis_settings().clone() })
    }

    async fn stream(&self) -> Result<Box<dyn Stream>, String> {
        let text = |error: std::io::Error| error.to_string();
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await.map_err(text)?;
        stream.set_nodelay(true).map_err(text)?;
        Ok(match &self.tls {
            Some((connector, name)) => Box::new(connector.connect(name.clone(), stream).await.map_err(text)?),
            None => Box::new(stream),
        })
    }
}
