//! What one request's record holds.

use std::net::IpAddr;
use std::time::Duration;

use opentelemetry::{SpanId, TraceId};
use serde::Serialize;

use crate::accounting::core::{NanoUsd, Usage};
use crate::accounting::settlement::Receipt;
use crate::answer::{EngineTimes, Finish};
use crate::api::openai::ratelimit::Quotas;
use crate::api::openai::request::Sampling;
use crate::ports::Priority;

/// The moments of a request, as time since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Marks {
    pub identified: Option<Duration>,
    /// Through the door: requests per minute, concurrency.
    pub knocked: Option<Duration>,
    pub body_read: Option<Duration>,
    pub routed: Option<Duration>,
    pub measured: Option<Duration>,
    pub admitted: Option<Duration>,
    /// The cache has said what it knows.
    pub looked_up: Option<Duration>,
    pub sent: Option<Duration>,
    pub first_token: Option<Duration>,
    pub last_token: Option<Duration>,
    /// The ledger was given the row, and …
    pub settling: Option<Duration>,
    /// … it is durable.
    pub settled: Option<Duration>,
    pub closed: Duration,
}

/// Who answers when the model runs in this process.
pub const EMBEDDED: &str = "glassgate";

/// One try to get an answer from a backend. Times count from the request's beginning.
#[derive(Clone, Debug, PartialEq)]
pub struct Attempt {
    /// Counted from 0, as in the ledger.
    pub number: u32,
    /// Why it was made, as in the ledger: primary, retry, fallback, …
    pub role: &'static str,
    pub model: String,
    pub variant: String,
    pub provider: String,
    /// Where it was sent; nowhere for a model in this process.
    pub server: Option<(String, u16)>,
    pub began: Duration,
    pub first_byte: Option<Duration>,
    pub ended: Duration,
    pub outcome: &'static str,
    /// Empty if it went well.
    pub error_type: &'static str,
    /// What the server said.
    pub status: Option<u16>,
}

/// The spans below the server span whose ids must be known before they are built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Child {
    Inference,
    /// The engine's phases, counted from 0.
    Phase(u8),
    /// By `Attempt::number`.
    Attempt(u32),
}

/// Everything that is known of one request.
#[derive(Clone, Debug)]
pub struct Record {
    /// A copy of a request, which nobody asked for: it has spans and a ledger row, and is no request.
    pub is_shadow: bool,
    pub request_id: String,
    pub response_id: Option<String>,
    pub trace_id: TraceId,
    pub span_id: SpanId,
    pub parent_span_id: Option<SpanId>,
    pub started_ns: i64,
    pub marks: Marks,
    /// Who asked: the peer, or whom a proxy of ours heard.
    pub client: Option<IpAddr>,
    pub method: String,
    pub path: String,
    pub op: &'static str,
    pub tenant: String,
    pub key_id: String,
    pub key_name: String,
    pub authenticated: bool,
    /// What the key had left once it had passed the door.
    pub quotas: Option<Quotas>,
    pub session: Option<String>,
    /// The end user, if the client said who that is.
    pub user: Option<String>,
    pub route: String,
    pub model: String,
    pub variant: String,
    /// Who made the answer: `EMBEDDED`, or the name of a provider.
    pub provider: String,
    pub stream: bool,
    pub priority: Priority,
    pub cache: &'static str,
    /// How long the cache had it wait for somebody else's answer.
    pub cache_waited: Duration,
    pub config_hash: String,
    pub price_version: String,
    /// The status that was sent, or 499 when nobody was left to send one to.
    pub status: u16,
    pub outcome: &'static str,
    pub error_type: &'static str,
    /// One a choice.
    pub finishes: Vec<Finish>,
    /// Present exactly if the request was admitted; then it equals the ledger's row.
    pub receipt: Option<Receipt>,
    pub engine: Option<EngineTimes>,
    /// In the order in which they began.
    pub attempts: Vec<Attempt>,
    pub max_tokens: Option<u64>,
    pub sampling: Sampling,
    pub stop: Vec<String>,
    pub bytes_in: u64,
    pub bytes_out: u64,
}

impl Record {
    pub fn usage(&self) -> Usage {
        self.receipt.map_or(Usage::default(), |receipt| receipt.usage)
    }

    pub fn billed(&self) -> NanoUsd {
        self.receipt.map_or(NanoUsd(0), |receipt| receipt.billed)
    }

    /// The class that counts: a stream that broke after its 200 is still an error. What an upstream had to say of the
    /// request is the client's, as it was told.
    pub fn status_counted(&self) -> u16 {
        match self.outcome {
            "aborted" => 499,
            "panicked" => 500,
            "failed" if self.status < 400 => 500,
            "timed_out" => 504,
            "cut" => 503,
            _ => self.status,
        }
    }

    /// Whether the client left before it had all of its answer.
    pub fn is_abandoned(&self) -> bool {
        self.outcome == "aborted" || (self.outcome == "released" && self.status == 499)
    }

    /// When the first token was there, where that can be seen: of a remote answer that comes whole there is only its end.
    pub fn first_token(&self) -> Option<Duration> {
        self.marks.first_token.filter(|_| self.stream || self.engine.is_some())
    }

    /// (last token − first token) / (output tokens − 1), where there are two or more; by the engine's clock if it is
    /// ours, because a relay that is behind sees several tokens at once.
    pub fn time_per_output_token(&self) -> Option<Duration> {
        let gaps = u32::try_from(self.usage().completion()).ok()?.checked_sub(1)?;
        let decode = self.engine.and_then(|engine| engine.decode);
        let seen = || Some(self.marks.last_token?.saturating_sub(self.first_token()?));
        decode.or_else(seen)?.checked_div(gaps)
    }

    /// A child's span id follows from the server span's, which is random: it can be told to an upstream before any span
    /// is built, and no more randomness is spent. Span ids of ours begin with a set bit, children's with a clear one.
    pub fn child_id(&self, child: Child) -> SpanId {
        let number = match child {
            Child::Inference => 1,
            Child::Phase(number) => 2 + u64::from(number),
            Child::Attempt(number) => (1 << 8) + u64::from(number),
        };
        let own = u64::from_be_bytes(self.span_id.to_bytes());
        SpanId::from_bytes((own ^ (1 << 63) ^ number).to_be_bytes())
    }

    /// The `traceparent` to send with an attempt, so that the upstream's spans hang below the attempt's own. The flag
    /// says sampled: whether a sink keeps this trace is known at its end, when it may have become an error.
    pub fn traceparent(&self, child: Child) -> String {
        format!("00-{}-{}-01", self.trace_id, self.child_id(child))
    }

    pub fn ended_ns(&self) -> i64 {
        self.at_ns(self.marks.closed)
    }

    /// A moment of this request as Unix nanoseconds.
    pub fn at_ns(&self, mark: Duration) -> i64 {
        self.started_ns.saturating_add(i64::try_from(mark.as_nanos()).unwrap_or(i64::MAX))
    }
}
