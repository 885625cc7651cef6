//! Where a Postgres is, and one connection to it. Nothing waits for it longer than `PATIENCE`: a server that is frozen, or
//! behind a network that swallows everything, is as good as one that is down.

use std::collections::HashMap;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Config, Row, Statement};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::StoreError;
use crate::outbound;

/// How long one round trip may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long an answer to a command may take.
const LONG_PATIENCE: Duration = Duration::from_secs(600);
const CONNECT_MAX: Duration = Duration::from_secs(5);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(15);

/// A database and how it is spoken to.
#[derive(Clone)]
pub struct Target {
    config: Config,
    tls: rustls::ClientConfig,
    ca: Option<String>,
}

impl PartialEq for Target {
    fn eq(&self, other: &Target) -> bool {
        (&self.config, &self.ca) == (&other.config, &other.ca)
    }
}

impl Eq for Target {}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // It does not show the password.
        self.config.fmt(f)
    }
}

impl Target {
    /// From a URL; `ca`: who signs the server's certificate, in PEM, if not one whom the machine trusts. Over a network it is
    /// TLS unless the URL says `sslmode=disable`: what is merely preferred, whoever stands between can strip.
    ///
    /// # Errors
    /// What is wrong with it, without its text: that may hold a password.
    pub fn parse(url: &str, ca: Option<&str>) -> Result<Target, String> {
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            return Err("must be a URL such as postgres://user@host:5432/database".to_owned());
        }
        let mut config: Config = url.parse().map_err(|error| outbound::causes(&error))?;
        if config.get_hosts().is_empty() {
            return Err("has no host".to_owned());
        }
        if config.get_ssl_mode() == SslMode::Prefer {
            let is_here = config.get_hosts().iter().all(is_here);
            config.ssl_mode(if is_here { SslMode::Disable } else { SslMode::Require });
        }
        let has_tls = config.get_ssl_mode() == SslMode::Require;
        config.connect_timeout(CONNECT_MAX).tcp_user_timeout(PATIENCE);
        config.keepalives_idle(KEEPALIVE_EVERY).keepalives_interval(KEEPALIVE_EVERY).keepalives_retries(2);
        if config.get_application_name().is_none() {
            config.application_name("glassgate");
        }
        let roots = match ca {
            Some(pem) => {
                outbound::roots_in(pem).ok_or("the file of `storage.database_ca` holds no certificate in PEM")?
            }
            None if has_tls => outbound::roots()?,
            None => rustls::RootCertStore::empty(),
        };
        Ok(Target { config, tls: outbound::tls(roots)?, ca: ca.map(str::to_owned) })
    }

    pub fn has_password(&self) -> bool {
        self.config.get_password().is_some()
    }
}

fn is_here(host: &Host) -> bool {
    match host {
        Host::Tcp(name) => name == "localhost" || name.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback()),
        Host::Unix(_) => true,
    }
}

impl From<tokio_postgres::Error> for StoreError {
    fn from(error: tokio_postgres::Error) -> StoreError {
        StoreError(outbound::causes(&error))
    }
}

/// A connection and the runtime that it lives in: whoever uses it blocks. Dropped, it is closed.
pub struct Link {
    // Dropped before the runtime that moves its bytes.
    session: Session,
    runtime: Runtime,
}

/// What can be asked on a connection.
pub struct Session {
    client: Client,
    prepared: HashMap<String, Statement>,
}

impl Link {
    /// `statement_max`: after how long the server gives up on a statement.
    ///
    /// # Errors
    /// As all of these: when the database cannot be reached, does not answer in time, or says no.
    pub fn open(target: &Target, statement_max: Option<Duration>) -> Result<Link, StoreError> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let session = runtime.block_on(Session::open(target, statement_max))?;
        Ok(Link { session, runtime })
    }

    /// Waits for what is asked.
    pub fn run<T>(&mut self, work: impl AsyncFnOnce(&mut Session) -> Result<T, StoreError>) -> Result<T, StoreError> {
        self.runtime.block_on(work(&mut self.session))
    }

    pub fn is_open(&self) -> bool {
        !self.session.client.is_closed()
    }
}

impl Session {
    async fn open(target: &Target, statement_max: Option<Duration>) -> Result<Session, StoreError> {
        let tls = MakeRustlsConnect::new(target.tls.clone());
        let (client, connection) = within(PATIENCE, target.config.connect(tls)).await?;
        tokio::spawn(async move {
            // Whoever asks next is told.
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the connection to the database ended");
            }
        });
        let session = Session { client, prepared: HashMap::new() };
        let milliseconds = statement_max.map_or(0, |most| most.as_millis());
        // What is committed must be there after a crash, whatever the server's default is; a stricter one stays. A
        // transaction that we left in the middle, behind a network that is cut, must not hold its locks for ever.
        session
            .batch(&format!(
                "SET statement_timeout = {milliseconds}; SET idle_in_transaction_session_timeout = {idle};
                 SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'",
                idle = if statement_max.is_some() { 2 * PATIENCE.as_millis() } else { 0 },
            ))
            .await?;
        Ok(session)
    }

    /// Statements without places; of several, all of them.
    pub async fn batch(&self, sql: &str) -> Result<(), StoreError> {
        within(PATIENCE, self.client.batch_execute(sql)).await
    }

    pub async fn query(&mut self, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, StoreError> {
        let statement = self.prepare(sql).await?;
        within(PATIENCE, self.client.query(&statement, values)).await
    }

    /// As `query`, for whoever has time.
    pub async fn query_long(&self, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, StoreError> {
        within(LONG_PATIENCE, self.client.query(sql, values)).await
    }

    /// Gives how many rows changed.
    pub async fn execute(&mut self, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<u64, StoreError> {
        let statement = self.prepare(sql).await?;
        within(PATIENCE, self.client.execute(&statement, values)).await
    }

    /// Begins a transaction with a statement, in one round trip. Gives how many rows changed.
    pub async fn begin(&mut self, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<u64, StoreError> {
        let statement = self.prepare(sql).await?;
        let begin = within(PATIENCE, self.client.batch_execute("BEGIN"));
        let (_, rows) = tokio::try_join!(begin, within(PATIENCE, self.client.execute(&statement, values)))?;
        Ok(rows)
    }

    /// Ends one with a statement, in one round trip. (If that fails, nothing is committed.)
    pub async fn commit(&mut self, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<(), StoreError> {
        let statement = self.prepare(sql).await?;
        let last = within(PATIENCE, self.client.execute(&statement, values));
        tokio::try_join!(last, within(PATIENCE, self.client.batch_execute("COMMIT"))).map(drop)
    }

    async fn prepare(&mut self, sql: &str) -> Result<Statement, StoreError> {
        if let Some(statement) = self.prepared.get(sql) {
            return Ok(statement.clone());
        }
        let statement = within(PATIENCE, self.client.prepare(sql)).await?;
        self.prepared.insert(sql.to_owned(), statement.clone());
        Ok(statement)
    }
}

/// How long a statement may take that somebody waits for.
pub const STATEMENT_MAX: Option<Duration> = Some(PATIENCE);

async fn within<T>(
    most: Duration,
    what: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, StoreError> {
    match tokio::time::timeout(most, what).await {
        Ok(outcome) => Ok(outcome?),
        Err(_) => Err(StoreError(format!("the database has not answered within {most:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_never_leaves_the_machine_is_said_in_the_clear_unless_asked_for() {
        for (url, mode) in [
            ("postgres://u:p@127.0.0.1/d", SslMode::Disable),
            ("postgres://u@localhost:5433/d", SslMode::Disable),
            ("postgresql://u@db.example/d", SslMode::Require),
            ("postgres://u@10.0.0.7/d", SslMode::Require),
            ("postgres://u@10.0.0.7,127.0.0.1/d", SslMode::Require),
            ("postgres://u@db.example/d?sslmode=disable", SslMode::Disable),
            ("postgres://u@127.0.0.1/d?sslmode=require", SslMode::Require),
        ] {
            assert_eq!(Target::parse(url, None).unwrap().config.get_ssl_mode(), mode, "{url}");
        }
        for (bad, why) in [
            ("mysql://u@h/d", "postgres://user@host"),
            ("postgres:///d", "no host"),
            ("postgres://u:secret@h/d?sslmode=maybe", "sslmode"),
            ("postgres://u:secret@h:port/d", "port"),
        ] {
            let said = Target::parse(bad, None).unwrap_err();
            assert!(said.contains(why) && !said.contains("secret"), "{bad}: {said}");
        }
        let target = Target::parse("postgres://u:secret@127.0.0.1/d", None).unwrap();
        assert!(target.has_password() && !format!("{target:?}").contains("secret"));
        assert!(Target::parse("postgres://u@h/d", Some("no PEM")).unwrap_err().contains("database_ca"));
    }
}
