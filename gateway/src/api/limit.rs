//! The words that limits are written and told in: what is counted, in which time, for whom.

use std::time::Duration;

use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::openai::ratelimit::Quotas;
use crate::accounting::core::NanoUsd;

/// What a limit counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Of {
    Requests,
    /// Prompt and answer together.
    Tokens,
    InputTokens,
    OutputTokens,
    /// Requests at a time.
    Concurrency,
    /// Nano-dollars.
    Usd,
}

impl Of {
    pub const ALL: [Of; 6] = [Of::Requests, Of::Tokens, Of::InputTokens, Of::OutputTokens, Of::Concurrency, Of::Usd];

    pub fn as_str(self) -> &'static str {
        match self {
            Of::Requests => "requests",
            Of::Tokens => "tokens",
            Of::InputTokens => "input_tokens",
            Of::OutputTokens => "output_tokens",
            Of::Concurrency => "concurrency",
            Of::Usd => "usd",
        }
    }
}

/// The time in which a limit's amount may be used. Seconds and minutes refill evenly; days and months begin anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Per {
    Second,
    Minute,
    Day,
    Month,
}

impl Per {
    pub const ALL: [Per; 4] = [Per::Second, Per::Minute, Per::Day, Per::Month];

    pub fn as_str(self) -> &'static str {
        match self {
            Per::Second => "second",
            Per::Minute => "minute",
            Per::Day => "day",
            Per::Month => "month",
        }
    }

    /// Whether it follows a calendar.
    pub fn is_calendar(self) -> bool {
        matches!(self, Per::Day | Per::Month)
    }
}

/// By what those who share a limit are told from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dimension {
    Key,
    User,
    Tenant,
    Route,
    Model,
    Ip,
}

impl Dimension {
    pub const ALL: [Dimension; 6] =
        [Dimension::Key, Dimension::User, Dimension::Tenant, Dimension::Route, Dimension::Model, Dimension::Ip];

    pub fn as_str(self) -> &'static str {
        match self {
            Dimension::Key => "key",
            Dimension::User => "user",
            Dimension::Tenant => "tenant",
            Dimension::Route => "route",
            Dimension::Model => "model",
            Dimension::Ip => "ip",
        }
    }

    fn noun(self) -> &'static str {
        match self {
            Dimension::Ip => "address",
            other => other.as_str(),
        }
    }

    /// Whether it shows before the body is read.
    pub fn is_known_at_door(self) -> bool {
        !matches!(self, Dimension::Route | Dimension::Model)
    }

    /// Whether there are as many as clients, or tokens of an issuer, make up.
    pub fn is_clients_choice(self) -> bool {
        matches!(self, Dimension::User | Dimension::Tenant | Dimension::Ip)
    }
}

/// Whom a rule is about, where it is not about everybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Only {
    By(Dimension),
    /// One of those that a key or its tenant has.
    Tag,
    /// What the issuer of a token calls their plan.
    Tier,
}

impl Only {
    pub fn all() -> impl Iterator<Item = Only> {
        Dimension::ALL.into_iter().map(Only::By).chain([Only::Tag, Only::Tier])
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Only::By(dimension) => dimension.as_str(),
            Only::Tag => "tag",
            Only::Tier => "tier",
        }
    }

    /// Whether it shows before the body is read.
    pub fn is_known_at_door(self) -> bool {
        match self {
            Only::By(dimension) => dimension.is_known_at_door(),
            Only::Tag | Only::Tier => true,
        }
    }
}

/// A limit that said no, and how it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Reached {
    /// As it is called in the configuration.
    pub rule: String,
    pub by: Vec<Dimension>,
    pub of: Of,
    /// `None` for what is counted at a time.
    pub per: Option<Per>,
    /// In units of `of`, like the three that follow; nano-dollars of money.
    pub limit: u64,
    pub used: u64,
    /// Reserved for requests under way.
    pub held: u64,
    pub requested: u64,
    /// When all of it is there again, as Unix nanoseconds, and how far off that is.
    pub resets: Option<(i64, Duration)>,
    /// `None` if the limit itself is smaller: the request can never pass.
    pub retry_after: Option<Duration>,
    pub quotas: Quotas,
}

impl Reached {
    /// Who shares the limit: `key`, `tenant_model`, `everybody`.
    pub fn scope(&self) -> String {
        scope(&self.by)
    }

    /// Whether there is room before all of it is there again: some are let in beyond, or what is used comes back bit by bit.
    pub fn is_throttled(&self) -> bool {
        self.retry_after.zip(self.resets).is_some_and(|(wait, (_, reset))| wait < reset)
    }

    /// What programs read. Amounts are in the unit of `of`; dollars with nine decimals at the most.
    pub fn body(&self) -> Value {
        let amount = |amount: u64| match self.of {
            Of::Usd => json!(amount as f64 / 1e9),
            _ => json!(amount),
        };
        json!({
            "rule": self.rule,
            "scope": self.scope(),
            "of": self.of.as_str(),
            "per": self.per.map(Per::as_str),
            "limit": amount(self.limit),
            "used": amount(self.used),
            "reserved": amount(self.held),
            "requested": amount(self.requested),
            "resets_at": self.resets.map(|(at_ns, _)| rfc3339(at_ns)),
            "retry_after_ms": self.retry_after.map(|wait| wait.as_nanos().div_ceil(1_000_000) as u64),
        })
    }

    /// What people read: which limit it was, how much of it is used, and what to do.
    pub fn message(&self) -> String {
        let who = match self.by.as_slice() {
            [] => "Everybody together".to_owned(),
            by => format!("This {}", by.iter().map(|one| one.noun()).collect::<Vec<_>>().join(" and ")),
        };
        let (limit, per) = (self.limit, self.per.map_or("time", Per::as_str));
        let gone = self.used.saturating_add(self.held);
        let wait = self.retry_after.map(|wait| format!("Try again in {:.3} s", wait.as_secs_f64()));
        match self.of {
            Of::Requests => format!(
                "{who} may make {limit} requests a {per} and has used them up. {}.",
                wait.as_deref().unwrap_or("It can never pass")
            ),
            Of::Concurrency => format!(
                "{who} may have {limit} requests under way at a time, and has as many. Try again when one of them has ended."
            ),
            Of::Tokens | Of::InputTokens | Of::OutputTokens => {
                let (kind, both) = match self.of {
                    Of::InputTokens => ("prompt tokens", ""),
                    Of::OutputTokens => ("answer tokens", ""),
                    _ => ("tokens", ", prompt and answer together"),
                };
                let requested = self.requested;
                match wait {
                    Some(wait) => format!(
                        "{who} may use {limit} {kind} a {per} and has used or reserved {gone}; this request could use {requested}{both}. {wait}, or lower `max_completion_tokens`."
                    ),
                    None => {
                        let (comma, who) =
                            (if both.is_empty() { "" } else { "," }, who[..1].to_lowercase() + &who[1..]);
                        format!(
                            "This request could use {requested} {kind}{both}{comma} and {who} may use {limit} a {per}, of which {gone} are used or reserved: it can never pass. Lower `max_completion_tokens` or shorten the messages."
                        )
                    }
                }
            }
            Of::Usd => {
                let [limit, used, held, requested] =
                    [self.limit, self.used, self.held, self.requested].map(|nano| NanoUsd(nano).to_string());
                let so_far = format!(
                    "{who} may spend {limit} USD a {per}; it has used {used} and reserved {held} for requests under way, and this request could cost {requested}."
                );
                match (wait, self.resets, self.per.is_some_and(Per::is_calendar) && !self.is_throttled()) {
                    (None, ..) => {
                        format!("{so_far} It can never pass. Lower `max_completion_tokens` or shorten the messages.")
                    }
                    (Some(_), Some((at_ns, reset)), true) => format!(
                        "{so_far} The budget resets at {}, in {} s.",
                        rfc3339(at_ns),
                        reset.as_nanos().div_ceil(1_000_000_000)
                    ),
                    (Some(wait), ..) => format!("{so_far} {wait}."),
                }
            }
        }
    }
}

/// Who shares a limit, as a label. There are as many of these as there are sets of dimensions.
pub fn scope(by: &[Dimension]) -> String {
    match by {
        [] => "everybody".to_owned(),
        by => by.iter().map(|dimension| dimension.as_str()).collect::<Vec<_>>().join("_"),
    }
}

fn rfc3339(unix_ns: i64) -> String {
    let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(unix_ns)).ok();
    at.and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_default()
}
