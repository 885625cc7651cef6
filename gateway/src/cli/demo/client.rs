//! The demo's client: OpenAI's dialect over HTTP/1.1, as any client has it, with a clock.

use std::error::Error;
use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};

use crate::accounting::core::NanoUsd;
use crate::api::sse::Decoder;

/// Everything that a request may take.
const PATIENCE: Duration = Duration::from_secs(60);
const CONNECT_MAX: Duration = Duration::from_secs(5);
const BODY_BYTES_MAX: usize = 1 << 20;
/// A server that restarts is back before so many have knocked in vain.
const IN_VAIN_MAX: u32 = 20;

pub struct Client {
    pool: Pool<HttpConnector, Full<Bytes>>,
    /// `http://host:port`
    base: String,
    /// Connections in a row that could not be made.
    in_vain: AtomicU32,
}

/// What an answer says of itself, and how fast it came.
pub struct Answer {
    pub response_id: String,
    pub text: String,
    pub variant: String,
    /// `hit` and `coalesced` are somebody else's answers.
    pub cache: String,
    pub cost: NanoUsd,
    pub stream: bool,
    pub first_token: Option<Duration>,
    /// Where the model runs in the gateway and made two tokens or more.
    pub tokens_per_s: Option<f64>,
}

/// What became of a request.
pub enum Told {
    Answer(Answer),
    Refused {
        status: u16,
        code: String,
    },
    /// We hung up, as we meant to.
    Left,
    /// What no client should see.
    Broken(String),
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Told::Answer(answer) => write!(f, "answered by {}", answer.variant),
            Told::Refused { status, code } => write!(f, "refused with {status} {code}"),
            Told::Left => f.write_str("left"),
            Told::Broken(why) => f.write_str(why),
        }
    }
}

/// Whether to read a stream to its end.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Stay {
    ToTheEnd,
    ForOneChunk,
}

impl Client {
    pub fn new(base: String) -> Client {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_MAX));
        Client { pool: Pool::builder(TokioExecutor::new()).build(connector), base, in_vain: AtomicU32::new(0) }
    }

    /// Whether nobody has been there for a while.
    pub fn is_alone(&self) -> bool {
        self.in_vain.load(Ordering::Relaxed) >= IN_VAIN_MAX
    }

    /// The status of a GET.
    ///
    /// # Errors
    /// When nobody answers there.
    pub async fn get(&self, path: &str, key: &str) -> Result<u16, String> {
        let request = Request::get(format!("{}{path}", self.base))
            .header(header::AUTHORIZATION, format!("Bearer {key}"))
            .body(Full::default())
            .map_err(|error| error.to_string())?;
        match tokio::time::timeout(PATIENCE, self.pool.request(request)).await {
            Ok(Ok(response)) => Ok(response.status().as_u16()),
            Ok(Err(error)) => Err(causes(&error)),
            Err(_) => Err(format!("no answer within {PATIENCE:?}")),
        }
    }

    /// A chat, by one who is in a session.
    pub async fn chat(&self, key: &str, session: &str, body: String, stay: Stay) -> Told {
        let asked = async {
            let began = Instant::now();
            let response = self.post("/v1/chat/completions", key, session, body).await?;
            if response.status() != 200 {
                return refused(response).await;
            }
            let header = |name: &str| {
                let value = response.headers().get(name).and_then(|value| value.to_str().ok());
                value.unwrap_or_default().to_owned()
            };
            let answer = Answer {
                response_id: String::new(),
                text: String::new(),
                variant: header("x-glassgate-variant"),
                cache: header("x-glassgate-cache"),
                cost: NanoUsd(0),
                stream: header("content-type") == "text/event-stream",
                first_token: None,
                tokens_per_s: None,
            };
            if answer.stream { stream(response, answer, began, stay).await } else { whole(response, answer).await }
        };
        match tokio::time::timeout(PATIENCE, asked).await {
            Ok(told) => told.unwrap_or_else(Told::Broken),
            Err(_) => Told::Broken(format!("no answer within {PATIENCE:?}")),
        }
    }

    /// Says whether an answer was right.
    ///
    /// # Errors
    /// What was said instead of 200.
    pub async fn judge(&self, key: &str, session: &str, response_id: &str, correct: bool) -> Result<(), String> {
        let body = json!({"response_id": response_id, "name": "correct", "value": correct}).to_string();
        let judged = async {
            let response = self.post("/v1/feedback", key, session, body).await?;
            if response.status() == 200 {
                return read(response).await.map(drop);
            }
            Err(format!("feedback: {}", refused(response).await?))
        };
        tokio::time::timeout(PATIENCE, judged).await.map_err(|_| format!("no answer within {PATIENCE:?}"))?
    }

    async fn post(&self, path: &str, key: &str, session: &str, body: String) -> Result<Response<Incoming>, String> {
        let request = Request::post(format!("{}{path}", self.base))
            .header(header::AUTHORIZATION, format!("Bearer {key}"))
            .header(header::CONTENT_TYPE, "application/json")
            .header("x-session-id", session)
            .body(Full::from(body))
            .map_err(|error| error.to_string())?;
        match self.pool.request(request).await {
            Ok(response) => {
                self.in_vain.store(0, Ordering::Relaxed);
                Ok(response)
            }
            Err(error) => {
                self.in_vain.fetch_add(u32::from(error.is_connect()), Ordering::Relaxed);
                Err(causes(&error))
            }
        }
    }
}

/// An error with what is behind it: hyper's own words say only where it happened.
fn causes(error: &dyn Error) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

async fn read(response: Response<Incoming>) -> Result<Value, String> {
    let body = Limited::new(response.into_body(), BODY_BYTES_MAX).collect().await.map_err(|error| error.to_string())?;
    serde_json::from_slice(&body.to_bytes()).map_err(|error| format!("an answer that is no JSON: {error}"))
}

async fn refused(response: Response<Incoming>) -> Result<Told, String> {
    let status = response.status().as_u16();
    let code = read(response).await?["error"]["code"].as_str().unwrap_or_default().to_owned();
    Ok(Told::Refused { status, code })
}

async fn whole(response: Response<Incoming>, mut answer: Answer) -> Result<Told, String> {
    let body = read(response).await?;
    answer.response_id = body["id"].as_str().unwrap_or_default().to_owned();
    answer.text = body["choices"][0]["message"]["content"].as_str().unwrap_or_default().to_owned();
    answer.cost = cost(&body);
    answer.tokens_per_s = speed(&body["glassgate"]);
    Ok(Told::Answer(answer))
}

async fn stream(response: Response<Incoming>, mut answer: Answer, began: Instant, stay: Stay) -> Result<Told, String> {
    let mut events = Decoder::new(BODY_BYTES_MAX);
    let mut body = response.into_body();
    let mut is_done = false;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| format!("the stream broke: {error}"))?;
        let Ok(bytes) = frame.into_data() else { continue };
        events.feed(&bytes);
        while let Some(event) = events.next_event().map_err(|error| error.to_string())? {
            if event == b"[DONE]" {
                is_done = true;
                continue;
            }
            let chunk: Value =
                serde_json::from_slice(event).map_err(|error| format!("an event that is no JSON: {error}"))?;
            if let Some(code) = chunk["error"]["code"].as_str() {
                return Err(format!("the stream broke off with {code}"));
            }
            if let Some(text) = chunk["choices"][0]["delta"]["content"].as_str().filter(|text| !text.is_empty()) {
                if stay == Stay::ForOneChunk {
                    // Dropping the body closes the connection: that is how clients leave.
                    return Ok(Told::Left);
                }
                answer.first_token.get_or_insert_with(|| began.elapsed());
                answer.text.push_str(text);
            }
            if chunk["glassgate"].is_object() {
                answer.cost = cost(&chunk);
                answer.tokens_per_s = speed(&chunk["glassgate"]);
                answer.response_id = chunk["id"].as_str().unwrap_or_default().to_owned();
            }
        }
    }
    if !is_done {
        return Err("the stream ended without [DONE]".to_owned());
    }
    Ok(Told::Answer(answer))
}

/// Tokens after the first, by the engine's clock: several at once may reach us in one read.
fn speed(told: &Value) -> Option<f64> {
    let (tokens, millis) = (told["usage"]["output"].as_f64()?, told["timing_ms"]["decode"].as_f64()?);
    (tokens > 1.0 && millis > 0.0).then(|| (tokens - 1.0) * 1e3 / millis)
}

fn cost(answer: &Value) -> NanoUsd {
    let usd = answer["glassgate"]["cost_usd"].as_str().and_then(|usd| usd.parse().ok());
    usd.and_then(|usd| NanoUsd::from_usd(usd).ok()).unwrap_or_default()
}
