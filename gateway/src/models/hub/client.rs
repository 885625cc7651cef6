//! GET with redirects, as the hub answers: files lie on other hosts, and what identifies us stays on the first.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, LOCATION, RANGE, RETRY_AFTER, USER_AGENT};
use http::{HeaderMap, Request, Response, StatusCode, Uri};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};

use crate::config::secret::Secret;

const REDIRECTS_MAX: usize = 8;
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// Why a request brought nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// Asking again may help, after this long.
    Passing {
        why: String,
        after: Duration,
    },
    Final(String),
}

impl From<String> for Failure {
    fn from(why: String) -> Failure {
        Failure::Final(why)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Passing { why, .. } | Failure::Final(why) => f.write_str(why),
        }
    }
}

pub(super) struct Client {
    pool: Pool<HttpsConnector<HttpConnector>, Empty<Bytes>>,
    token: Option<Secret>,
    /// From a request to its answer's head, and from one part of a body to the next.
    pub idle: Duration,
}

/// An answer, and the headers of the first redirect on the way to it: they speak of the file.
pub(super) struct Answer {
    pub response: Response<Incoming>,
    pub first: HeaderMap,
}

impl Client {
    pub fn new(token: Option<Secret>, idle: Duration) -> Result<Client, String> {
        let mut connector = HttpConnector::new();
        connector.enforce_http(false);
        connector.set_connect_timeout(Some(CONNECT_MAX));
        let mut roots = rustls::RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let https = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1();
        let pool =
            Pool::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).build(https.wrap_connector(connector));
        Ok(Client { pool, token, idle })
    }

    /// `from`: the first byte that is wanted.
    pub async fn get(&self, url: &Uri, from: u64) -> Result<Answer, Failure> {
        let mut at = url.clone();
        let mut first: Option<HeaderMap> = None;
        for _ in 0..=REDIRECTS_MAX {
            let response = self.once(&at, url, from).await?;
            if !response.status().is_redirection() {
                self.judge(&response, url, from)?;
                let first = first.unwrap_or_else(|| response.headers().clone());
                return Ok(Answer { response, first });
            }
            let location = response.headers().get(LOCATION).and_then(|location| location.to_str().ok());
            let next = location.and_then(|location| resolve(&at, location));
            at = next.ok_or_else(|| Failure::Final(format!("{at} redirects to nowhere")))?;
            first.get_or_insert_with(|| response.headers().clone());
        }
        Err(Failure::Final(format!("{url} redirects more than {REDIRECTS_MAX} times")))
    }

    async fn once(&self, at: &Uri, home: &Uri, from: u64) -> Result<Response<Incoming>, Failure> {
        let mut request = Request::get(at).header(USER_AGENT, concat!("glassgate/", env!("CARGO_PKG_VERSION")));
        if from > 0 {
            request = request.header(RANGE, format!("bytes={from}-"));
        }
        // The token is the hub's business, not that of whoever it sends us to.
        let is_home = (at.scheme(), at.authority()) == (home.scheme(), home.authority());
        if let Some(token) = self.token.as_ref().filter(|_| is_home) {
            request = request.header(AUTHORIZATION, format!("Bearer {}", token.expose()));
        }
        let request = request.body(Empty::new());
        let request = request.map_err(|error| Failure::Final(format!("{at} cannot be asked for: {error}")))?;
        match tokio::time::timeout(self.idle, self.pool.request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(self.passing(format!("{} does not answer: {error}", host(at)))),
            Err(_) => Err(self.passing(format!("{} has not answered for {:?}", host(at), self.idle))),
        }
    }

    /// A failure after which to wait for a small part of what the other side may be silent.
    pub fn passing(&self, why: String) -> Failure {
        Failure::Passing { why, after: self.idle / 30 }
    }

    /// `from`: where the range that was asked for begins.
    fn judge(&self, response: &Response<Incoming>, url: &Uri, from: u64) -> Result<(), Failure> {
        let status = response.status();
        let path = url.path();
        Err(match status {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => return Ok(()),
            StatusCode::RANGE_NOT_SATISFIABLE if from > 0 => return Ok(()),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Failure::Final(format!(
                "the hub refuses {path} ({status}): it is private, gated, or not there; set HF_TOKEN to a token that may read it"
            )),
            StatusCode::NOT_FOUND => Failure::Final(format!("the hub knows no {path}: check name, revision and file")),
            StatusCode::TOO_MANY_REQUESTS => {
                let after = response.headers().get(RETRY_AFTER).and_then(|after| after.to_str().ok()?.parse().ok());
                Failure::Passing {
                    why: format!("the hub has had too many requests ({status})"),
                    after: Duration::from_secs(after.unwrap_or(5)),
                }
            }
            status if status.is_server_error() => self.passing(format!("the hub answers {status} for {path}")),
            status => Failure::Final(format!("the hub answers {status} for {path}")),
        })
    }
}

fn host(at: &Uri) -> &str {
    at.authority().map_or("the hub", http::uri::Authority::as_str)
}

/// An absolute location, or one on the same host.
fn resolve(at: &Uri, location: &str) -> Option<Uri> {
    let target: Uri = location.parse().ok()?;
    if matches!(target.scheme_str(), Some("http" | "https")) && target.authority().is_some() {
        // From TLS to none would show the file's address to everybody on the way.
        return (at.scheme_str() != Some("https") || target.scheme_str() == Some("https")).then_some(target);
    }
    let mut parts = at.clone().into_parts();
    parts.path_and_query = Some(target.path_and_query()?.clone());
    location.starts_with('/').then(|| Uri::from_parts(parts).ok()).flatten()
}
