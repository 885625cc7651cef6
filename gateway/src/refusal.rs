//! Every way we say no. One table gives status, error type, code and retry advice; the golden file
//! `tests/golden/refusals.txt` shows the whole contract on one screen. Causes go to the log, never into a message.

mod message;
mod samples;

use std::net::IpAddr;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use crate::api::limit::{Of, Reached};
use crate::api::openai::ratelimit::Quotas;
use crate::ports::Scope;

/// What is wrong with a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenFlaw {
    Malformed,
    Algorithm,
    Issuer,
    UnknownKey,
    Signature,
    Audience,
    Expired,
    NotYet,
    Claims,
}

impl TokenFlaw {
    pub const ALL: [TokenFlaw; 9] = [
        TokenFlaw::Malformed,
        TokenFlaw::Algorithm,
        TokenFlaw::Issuer,
        TokenFlaw::UnknownKey,
        TokenFlaw::Signature,
        TokenFlaw::Audience,
        TokenFlaw::Expired,
        TokenFlaw::NotYet,
        TokenFlaw::Claims,
    ];

    /// Its code, and what the client reads.
    #[rustfmt::skip]
    fn describe(self) -> (&'static str, &'static str) {
        match self {
            TokenFlaw::Malformed  => ("jwt_malformed", "is not a signed JWT of the plain form: three parts in base64url, a header of `alg`, `typ` and `kid`, each once"),
            TokenFlaw::Algorithm  => ("jwt_algorithm", "is signed with an algorithm that its issuer may not use here"),
            TokenFlaw::Issuer     => ("jwt_issuer", "is of an issuer that is not trusted here"),
            TokenFlaw::UnknownKey => ("jwt_unknown_key", "is signed with a key that its issuer has not published, as far as is known here"),
            TokenFlaw::Signature  => ("jwt_signature", "is not signed with its issuer's key"),
            TokenFlaw::Audience   => ("jwt_audience", "is meant for somebody else"),
            TokenFlaw::Expired    => ("jwt_expired", "has expired. Get a new one"),
            TokenFlaw::NotYet     => ("jwt_not_yet", "does not count yet"),
            TokenFlaw::Claims     => ("jwt_claims", "lacks a claim that is needed here, or has one of another type: `iss`, `aud` and a number `exp`, and who its bearer is"),
        }
    }
}

impl From<TokenFlaw> for Refusal {
    fn from(flaw: TokenFlaw) -> Refusal {
        Refusal::BadToken(flaw)
    }
}

#[derive(Clone, Debug, PartialEq)]
pub enum Refusal {
    // Whether this is a request at all
    BadHead {
        why: &'static str,
    },
    BadFraming {
        why: &'static str,
    },
    BadAuthority {
        why: &'static str,
    },
    BadPath {
        why: &'static str,
    },
    HeadTooLarge,
    HeadTooSlow,
    TooManyConnections,
    // Who is asking, and for what
    UnknownPath {
        path: String,
    },
    WrongMethod {
        method: String,
        allowed: &'static str,
    },
    WrongContentType {
        found: String,
    },
    MissingKey,
    MalformedKey,
    UnknownKey,
    RevokedKey,
    AmbiguousCredentials,
    BadToken(TokenFlaw),
    /// Its issuer's keys are out of reach.
    TokenKeysUnavailable,
    /// The key store that gateways share has been out of reach since the start, and there is no copy of it.
    KeysUnavailable,
    ExpiredKey,
    DisabledKey,
    DisabledTenant,
    AddressNotAllowed {
        address: IpAddr,
    },
    ScopeMissing {
        scope: Scope,
    },
    TooManyFailures {
        /// Wrong credentials a minute.
        limit: u32,
        retry_after: Duration,
    },
    // What they sent
    BodyTooLarge {
        limit_bytes: usize,
    },
    BodyCut,
    BodyTooSlow,
    BadJson {
        line: usize,
        column: usize,
        why: String,
    },
    BadParam {
        param: String,
        why: String,
    },
    Unsupported {
        param: String,
        why: String,
    },
    UnknownModel {
        model: String,
        available: Vec<String>,
    },
    ContextExceeded {
        prompt_tokens: u64,
        output_tokens: Option<u64>,
        context_tokens: u64,
    },
    /// A text to embed that is longer than its model reads.
    TextTooLong {
        index: usize,
        tokens: u64,
        limit: u64,
    },
    // Whether they may, now
    Limited(Box<Reached>),
    /// There was no room for as long as the limit lets requests wait.
    WaitedTooLong {
        waited: Duration,
        reached: Box<Reached>,
    },
    /// It sends so much that is refused that even saying no is limited.
    Flooded {
        /// Requests a minute, also those that are refused.
        limit: u32,
        retry_after: Duration,
    },
    LedgerFull,
    /// The counters of a rule that refuses where they are out of reach are so.
    LimitsUnavailable {
        rule: String,
    },
    Draining,
    // Whether we can
    EngineBusy {
        retry_after: Duration,
    },
    /// It had a place in the queue and did not come to its turn.
    QueuedTooLong {
        limit: Duration,
        retry_after: Duration,
    },
    ModelUnavailable {
        model: String,
    },
    NoEmbeddingModel,
    TimedOut {
        what: &'static str,
        limit: Duration,
    },
    EngineFailed,
    // What an upstream did
    UpstreamUnreachable,
    UpstreamTls,
    /// It answered with an error, or with what is no answer.
    UpstreamFailed,
    /// It would not take our own key.
    UpstreamAuth,
    UpstreamLimited {
        retry_after: Option<Duration>,
    },
    /// It found fault with the request itself, in its own words.
    UpstreamRejected {
        status: u16,
        message: String,
        param: Option<String>,
    },
    Internal,
    // What they think of an answer
    UnknownAnswer {
        param: &'static str,
    },
    SeveralAnswers,
    TooManyNames,
    FeedbackLimited {
        /// Judgements a minute.
        limit: u32,
        retry_after: Duration,
    },
    FeedbackUnavailable,
    LookupsLimited {
        /// Lookups a minute.
        limit: u32,
        retry_after: Duration,
    },
    /// Nobody is left to hear it; only the record does.
    ClientGone,
}

/// How a refusal looks on the wire.
#[derive(Debug, PartialEq, Eq)]
pub struct Described {
    pub status: u16,
    pub kind: &'static str,
    pub code: &'static str,
    /// `Some(false)` tells SDKs that a retry cannot help.
    pub should_retry: Option<bool>,
}

impl Refusal {
    /// The table.
    #[rustfmt::skip]
    pub fn describe(&self) -> Described {
        let (status, kind, code, should_retry) = match self {
            Refusal::BadHead { .. }          => (400, "invalid_request_error", "bad_head", Some(false)),
            Refusal::BadFraming { .. }       => (400, "invalid_request_error", "bad_framing", Some(false)),
            Refusal::BadAuthority { .. }     => (400, "invalid_request_error", "bad_authority", Some(false)),
            Refusal::BadPath { .. }          => (400, "invalid_request_error", "bad_path", Some(false)),
            Refusal::HeadTooLarge            => (431, "invalid_request_error", "head_too_large", Some(false)),
            Refusal::HeadTooSlow             => (408, "invalid_request_error", "head_too_slow", Some(false)),
            Refusal::TooManyConnections      => (503, "server_error",          "too_many_connections", Some(true)),
            Refusal::UnknownPath { .. }      => (404, "invalid_request_error", "unknown_path", None),
            Refusal::WrongMethod { .. }      => (405, "invalid_request_error", "method_not_allowed", None),
            Refusal::WrongContentType { .. } => (415, "invalid_request_error", "unsupported_media_type", None),
            Refusal::MissingKey              => (401, "authentication_error",  "missing_api_key", None),
            Refusal::MalformedKey            => (401, "authentication_error",  "invalid_api_key", None),
            Refusal::UnknownKey              => (401, "authentication_error",  "invalid_api_key", None),
            Refusal::RevokedKey              => (401, "authentication_error",  "revoked_api_key", None),
            Refusal::AmbiguousCredentials    => (400, "invalid_request_error", "ambiguous_credentials", Some(false)),
            Refusal::BadToken(flaw)          => (401, "authentication_error",  flaw.describe().0, Some(false)),
            Refusal::TokenKeysUnavailable    => (503, "server_error",          "jwt_keys_unavailable", Some(true)),
            Refusal::KeysUnavailable         => (503, "server_error",          "keys_unavailable", Some(true)),
            Refusal::ExpiredKey              => (401, "authentication_error",  "expired_api_key", None),
            Refusal::DisabledKey             => (401, "authentication_error",  "disabled_api_key", None),
            Refusal::DisabledTenant          => (403, "permission_error",      "disabled_tenant", Some(false)),
            Refusal::AddressNotAllowed { .. } => (403, "permission_error",     "address_not_allowed", Some(false)),
            Refusal::ScopeMissing { .. }     => (403, "permission_error",      "scope_missing", Some(false)),
            Refusal::TooManyFailures { .. }  => (429, "authentication_error",  "too_many_failures", Some(true)),
            Refusal::BodyTooLarge { .. }     => (413, "invalid_request_error", "request_too_large", None),
            Refusal::BodyCut                 => (400, "invalid_request_error", "body_incomplete", None),
            Refusal::BodyTooSlow             => (408, "invalid_request_error", "body_too_slow", Some(false)),
            Refusal::BadJson { .. }          => (400, "invalid_request_error", "invalid_json", None),
            Refusal::BadParam { .. }         => (400, "invalid_request_error", "invalid_parameter", None),
            Refusal::Unsupported { .. }      => (400, "invalid_request_error", "unsupported_parameter", None),
            Refusal::UnknownModel { .. }     => (404, "invalid_request_error", "model_not_found", None),
            Refusal::ContextExceeded { .. }  => (400, "invalid_request_error", "context_length_exceeded", None),
            Refusal::TextTooLong { .. }      => (400, "invalid_request_error", "context_length_exceeded", None),
            Refusal::Limited(reached)        => match reached.of {
                Of::Requests                 => (429, "rate_limit_error",      "rate_limit_exceeded", Some(reached.retry_after.is_some())),
                Of::Concurrency              => (429, "rate_limit_error",      "concurrency_limited", Some(true)),
                Of::Tokens | Of::InputTokens | Of::OutputTokens => (429, "rate_limit_error", "tokens_limited", Some(reached.retry_after.is_some())),
                Of::Usd                      => (429, "insufficient_quota",    "insufficient_quota", Some(reached.is_throttled())),
            },
            Refusal::WaitedTooLong { .. }    => (429, "rate_limit_error",      "waited_too_long", Some(true)),
            Refusal::Flooded { .. }          => (429, "rate_limit_error",      "too_many_refused", Some(true)),
            Refusal::LedgerFull              => (503, "server_error",          "ledger_full", Some(true)),
            Refusal::LimitsUnavailable { .. } => (503, "server_error",         "limits_unavailable", Some(true)),
            Refusal::Draining                => (503, "server_error",          "shutting_down", Some(true)),
            Refusal::EngineBusy { .. }       => (503, "server_error",          "engine_busy", Some(true)),
            Refusal::QueuedTooLong { .. }    => (503, "server_error",          "engine_busy", Some(true)),
            Refusal::ModelUnavailable { .. } => (503, "server_error",          "model_unavailable", Some(false)),
            Refusal::NoEmbeddingModel        => (503, "server_error",          "no_embedding_model", Some(false)),
            Refusal::TimedOut { .. }         => (504, "server_error",          "timeout", None),
            Refusal::EngineFailed            => (500, "server_error",          "engine_failed", None),
            Refusal::UpstreamUnreachable     => (502, "server_error",          "upstream_unreachable", None),
            Refusal::UpstreamTls             => (502, "server_error",          "upstream_tls", Some(false)),
            Refusal::UpstreamFailed          => (502, "server_error",          "upstream_failed", None),
            Refusal::UpstreamAuth            => (502, "server_error",          "upstream_auth", Some(false)),
            Refusal::UpstreamLimited { .. }  => (429, "rate_limit_error",      "upstream_rate_limited", Some(true)),
            Refusal::UpstreamRejected { status, .. } => (*status, "invalid_request_error", "upstream_rejected", Some(false)),
            Refusal::Internal                => (500, "server_error",          "internal_error", None),
            Refusal::UnknownAnswer { .. }    => (404, "invalid_request_error", "answer_not_found", None),
            Refusal::SeveralAnswers          => (409, "invalid_request_error", "trace_ambiguous", Some(false)),
            Refusal::TooManyNames            => (409, "invalid_request_error", "too_many_names", Some(false)),
            Refusal::FeedbackLimited { .. }  => (429, "rate_limit_error",      "feedback_limited", Some(true)),
            Refusal::FeedbackUnavailable     => (503, "server_error",          "feedback_unavailable", Some(true)),
            Refusal::LookupsLimited { .. }   => (429, "rate_limit_error",      "lookups_limited", Some(true)),
            Refusal::ClientGone              => (499, "client_closed",         "client_closed_request", None),
        };
        Described { status, kind, code, should_retry }
    }

    /// Whether another target might answer what this one did not. A request that is wrong is wrong everywhere.
    pub fn may_fail_over(&self) -> bool {
        matches!(
            self,
            Refusal::UpstreamUnreachable
                | Refusal::UpstreamTls
                | Refusal::UpstreamFailed
                | Refusal::UpstreamAuth
                | Refusal::UpstreamLimited { .. }
                | Refusal::EngineBusy { .. }
                | Refusal::QueuedTooLong { .. }
                | Refusal::EngineFailed
                | Refusal::ModelUnavailable { .. }
                | Refusal::TimedOut { .. }
        )
    }

    /// Whether others are being served in its place.
    pub fn is_busy(&self) -> bool {
        matches!(self, Refusal::EngineBusy { .. } | Refusal::QueuedTooLong { .. } | Refusal::UpstreamLimited { .. })
    }

    /// Which request field is to blame.
    pub fn param(&self) -> Option<&str> {
        match self {
            Refusal::BadParam { param, .. } | Refusal::Unsupported { param, .. } => Some(param),
            Refusal::UnknownModel { .. } | Refusal::ModelUnavailable { .. } => Some("model"),
            Refusal::ContextExceeded { .. } => Some("messages"),
            Refusal::TextTooLong { .. } => Some("input"),
            Refusal::UnknownAnswer { param } => Some(param),
            Refusal::SeveralAnswers => Some("trace_id"),
            Refusal::TooManyNames => Some("name"),
            Refusal::UpstreamRejected { param, .. } => param.as_deref(),
            _ => None,
        }
    }

    /// The limit that said no, where one did.
    pub fn reached(&self) -> Option<&Reached> {
        match self {
            Refusal::Limited(reached) | Refusal::WaitedTooLong { reached, .. } => Some(reached),
            _ => None,
        }
    }

    /// What the caller has left, where a limit was asked.
    pub fn quotas(&self) -> Option<Quotas> {
        self.reached().map(|reached| reached.quotas)
    }

    /// When to come back, where that is known.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Refusal::Flooded { retry_after, .. }
            | Refusal::FeedbackLimited { retry_after, .. }
            | Refusal::LookupsLimited { retry_after, .. }
            | Refusal::TooManyFailures { retry_after, .. }
            | Refusal::EngineBusy { retry_after }
            | Refusal::QueuedTooLong { retry_after, .. } => Some(*retry_after),
            Refusal::UpstreamLimited { retry_after } => *retry_after,
            Refusal::Limited(reached) | Refusal::WaitedTooLong { reached, .. } => reached.retry_after,
            Refusal::TooManyConnections
            | Refusal::LedgerFull
            | Refusal::LimitsUnavailable { .. }
            | Refusal::TokenKeysUnavailable
            | Refusal::FeedbackUnavailable
            | Refusal::Draining => Some(Duration::from_secs(1)),
            _ => None,
        }
    }

    /// The body, in OpenAI's error shape.
    pub fn body(&self) -> Vec<u8> {
        #[derive(Serialize)]
        struct Envelope<'a> {
            error: Error<'a>,
        }
        #[derive(Serialize)]
        struct Error<'a> {
            message: String,
            #[serde(rename = "type")]
            kind: &'a str,
            param: Option<&'a str>,
            code: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            limit: Option<Value>,
        }
        let described = self.describe();
        let envelope = Envelope {
            error: Error {
                message: self.message(),
                kind: described.kind,
                param: self.param(),
                code: described.code,
                limit: self.reached().map(Reached::body),
            },
        };
        // Texts and numbers: this has no way to fail.
        serde_json::to_vec(&envelope).unwrap_or_default()
    }

    /// Headers beyond the common ones. `retry-after` is whole seconds, rounded up, so that nobody comes back too early.
    pub fn headers(&self) -> Vec<(&'static str, String)> {
        let mut headers = Vec::new();
        if let Some(wait) = self.retry_after() {
            let millis = wait.as_nanos().div_ceil(1_000_000);
            headers.push(("retry-after", millis.div_ceil(1_000).to_string()));
            headers.push(("retry-after-ms", millis.to_string()));
        }
        if let Some(should) = self.describe().should_retry {
            headers.push(("x-should-retry", should.to_string()));
        }
        if let Some(quotas) = self.quotas() {
            headers.extend(quotas.headers());
        }
        if let Refusal::WrongMethod { allowed, .. } = self {
            headers.push(("allow", (*allowed).to_owned()));
        }
        headers
    }
}
