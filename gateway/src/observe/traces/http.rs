//! The exporters' HTTP client: one POST, with a bound on everything, and the patience to try again.
//!
//! Tried again is what the specification allows: 429, 502, 503, 504, and a connection that could not be made or broke.
//! Not tried again is what the backend may have taken: after a head that says 2xx whatever happens to its body, and after
//! a timeout, because a backend that gets a span twice may count its cost twice.

use std::fmt::Display;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use http::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::Client as Pool;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use parking_lot::Mutex;
use prost::Message;

use crate::api::retry_after;
use crate::config::OtlpConfig;
use crate::outbound;

/// More of an answer is not read: it holds a count and a message.
const RESPONSE_BYTES_MAX: usize = 64 << 10;
/// A connection that takes longer than this to be made is tried again.
const CONNECT_MAX: Duration = Duration::from_secs(5);
const IDLE_MAX: Duration = Duration::from_secs(30);
/// Waits between tries double from here …
const BACKOFF_MIN: Duration = Duration::from_millis(250);
/// … to here.
const BACKOFF_MAX: Duration = Duration::from_secs(8);
/// A backend cannot silence us for longer.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(300);

/// What became of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The backend has it, short of the spans that it rejects for good.
    Accepted {
        rejected: u64,
        message: String,
    },
    Failed(String),
}

/// What became of one try.
enum Try {
    Done(Outcome),
    Again { why: String, after: Duration },
}

/// A handle: its clones are one client.
#[derive(Clone, Debug)]
pub struct Client {
    pool: Pool<outbound::Connector, Full<Bytes>>,
    headers: HeaderMap,
    timeout: Duration,
    retry_for: Duration,
    last: Arc<Mutex<Last>>,
}

/// What is remembered from one batch to the next.
#[derive(Debug, Default)]
struct Last {
    outcome: Option<Outcome>,
    not_before: Option<Instant>,
}

impl Client {
    /// # Errors
    /// When the endpoint needs TLS and this machine has no root certificates.
    pub fn new(to: &OtlpConfig) -> Result<Client, String> {
        let endpoint = to.endpoint.parse().map_err(text)?;
        let connector = outbound::connector(&endpoint, CONNECT_MAX.min(to.timeout))?;
        let pool = Pool::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_MAX)
            .pool_max_idle_per_host(1)
            .build(connector);
        let mut headers = HeaderMap::new();
        headers.insert(
            USER_AGENT,
            HeaderValue::from_static(concat!(env!("CARGO_PKG_NAME"), "/", env!("CARGO_PKG_VERSION"))),
        );
        for (name, value) in &to.headers {
            let name = HeaderName::from_bytes(name.as_bytes()).map_err(text)?;
            let mut value = HeaderValue::from_str(value.expose()).map_err(text)?;
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        Ok(Client { pool, headers, timeout: to.timeout, retry_for: to.retry_for, last: Arc::default() })
    }

    /// What became of the batch that was sent last; each is told once.
    pub fn outcome(&self) -> Option<Outcome> {
        self.last.lock().outcome.take()
    }

    async fn deliver(&self, request: &Request<Bytes>) -> Outcome {
        // What an earlier answer asked for holds for every batch.
        let not_before = self.last.lock().not_before;
        if let Some(moment) = not_before {
            tokio::time::sleep_until(moment.into()).await;
        }
        let give_up = Instant::now() + self.retry_for;
        let mut backoff = BACKOFF_MIN;
        loop {
            let (why, after) = match self.post(request).await {
                Try::Done(outcome) => return outcome,
                Try::Again { why, after } => (why, after),
            };
            if !after.is_zero() {
                self.last.lock().not_before = Some(Instant::now() + after);
            }
            let next = Instant::now() + after.max(jittered(backoff));
            if next > give_up {
                return Outcome::Failed(why);
            }
            tokio::time::sleep_until(next.into()).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    async fn post(&self, request: &Request<Bytes>) -> Try {
        let deadline = tokio::time::Instant::now() + self.timeout;
        let mut post = Request::new(Full::new(request.body().clone()));
        (*post.method_mut(), *post.uri_mut()) = (request.method().clone(), request.uri().clone());
        // Only these: the exporter also adds what the environment holds for the one backend of other programs.
        for name in [CONTENT_TYPE, CONTENT_ENCODING] {
            if let Some(value) = request.headers().get(&name) {
                post.headers_mut().insert(name, value.clone());
            }
        }
        post.headers_mut().extend(self.headers.clone());
        let response = match tokio::time::timeout_at(deadline, self.pool.request(post)).await {
            Err(_) => return Try::Done(Outcome::Failed(format!("no answer within {:?}", self.timeout))),
            Ok(Err(error)) => return Try::Again { why: outbound::causes(&error), after: Duration::ZERO },
            Ok(Ok(response)) => response,
        };
        let (head, body) = response.into_parts();
        // Read whatever the status is: a body that is left unread costs the connection.
        let body = tokio::time::timeout_at(deadline, Limited::new(body, RESPONSE_BYTES_MAX).collect()).await;
        let body = body.ok().and_then(Result::ok).map(http_body_util::Collected::to_bytes).unwrap_or_default();
        let why = || format!("it answered {}", head.status);
        match head.status {
            status if status.is_success() => Try::Done(accepted(&body)),
            StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT => Try::Again { why: why(), after: retry_after(&head.headers) },
            _ => {
                // It may repeat what we sent, so it is not for everybody's log.
                tracing::debug!(status = %head.status, body = %String::from_utf8_lossy(&body), "a batch of spans was refused");
                Try::Done(Outcome::Failed(why()))
            }
        }
    }
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let outcome = self.deliver(&request).await;
        let answer = match &outcome {
            // Without its body: the exporter would read the same once more, to say it in a log that nobody has.
            Outcome::Accepted { .. } => Ok(Response::new(Bytes::new())),
            Outcome::Failed(why) => Err(why.clone().into()),
        };
        self.last.lock().outcome = Some(outcome);
        answer
    }
}

/// A body that is no `ExportTraceServiceResponse` rejects nothing: its head said that the batch was taken.
fn accepted(body: &[u8]) -> Outcome {
    let partial = ExportTraceServiceResponse::decode(body).unwrap_or_default().partial_success.unwrap_or_default();
    Outcome::Accepted {
        rejected: u64::try_from(partial.rejected_spans).unwrap_or(0),
        message: partial.error_message.chars().take(256).collect(),
    }
}

/// What was asked for, within reason.
fn retry_after(headers: &HeaderMap) -> Duration {
    retry_after::read(headers).unwrap_or_default().min(RETRY_AFTER_MAX)
}

/// Between half and the whole of it, so that replicas do not come back all at once.
fn jittered(wait: Duration) -> Duration {
    let (random, _) = uuid::Uuid::new_v4().as_u64_pair();
    wait.mul_f64(0.5 + (random >> 12) as f64 / (1_u64 << 53) as f64)
}

fn text(error: impl Display) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_may_ask_for_seconds_or_for_a_moment_but_not_for_ever() {
        let ask =
            |value: &str| retry_after(&HeaderMap::from_iter([(http::header::RETRY_AFTER, value.parse().unwrap())]));
        assert_eq!(ask("7"), Duration::from_secs(7));
        assert_eq!(ask("86400"), RETRY_AFTER_MAX);
        assert_eq!(ask("Fri, 31 Dec 2100 23:59:59 GMT"), RETRY_AFTER_MAX);
        for nothing in ["Wed, 21 Oct 2015 07:28:00 GMT", "soon", "-1", ""] {
            assert_eq!(ask(nothing), Duration::ZERO, "{nothing}");
        }
    }

    #[test]
    fn a_wait_is_at_least_half_and_at_most_the_whole() {
        for _ in 0..1000 {
            let wait = jittered(Duration::from_secs(2));
            assert!((Duration::from_secs(1)..=Duration::from_secs(2)).contains(&wait), "{wait:?}");
        }
    }

    #[test]
    fn a_body_that_is_no_answer_rejects_nothing() {
        assert_eq!(accepted(b"<html>"), Outcome::Accepted { rejected: 0, message: String::new() });
    }

    #[test]
    fn nothing_that_is_printed_shows_a_header() {
        let to = OtlpConfig {
            endpoint: "http://localhost/v1/traces".into(),
            headers: vec![("x-key".into(), crate::config::secret::Secret::new("hush"))],
            timeout: Duration::from_secs(1),
            retry_for: Duration::from_secs(1),
            queue_max: 1,
        };
        let client = Client::new(&to).unwrap();
        assert!(!format!("{to:?} {client:?}").contains("hush"));
    }
}
