//! One of each refusal.

use std::net::IpAddr;
use std::time::Duration;

use super::{Refusal, TokenFlaw};
use crate::api::limit::{Dimension, Of, Per, Reached};
use crate::api::openai::ratelimit::{Quota, Quotas};
use crate::ports::Scope;

impl Refusal {
    /// For the golden file and for metrics that show a zero before the first event.
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
            Refusal::DisabledTenant,
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
            Refusal::LimitsUnavailable { rule: "acme-month".into() },
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
            Refusal::KeysUnavailable,
            Refusal::ClientGone,
        ];
        every.extend(TokenFlaw::ALL.map(Refusal::BadToken));
        every
    }
}
