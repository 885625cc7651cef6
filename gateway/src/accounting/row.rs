//! One line of the ledger. The columns are a contract: `tests/golden/ledger_columns.txt` holds them.

use serde::{Deserialize, Serialize};

use super::core::{NanoUsd, Usage};
use super::price::Extras;

/// What an attempt was for. Ledger rows are unique by (request id, attempt, role).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Primary,
    /// The same target again, on a fresh connection.
    Retry,
    /// The next target of the route's fallback order.
    Fallback,
    /// A copy for comparison, which nobody pays for.
    Shadow,
}

impl Role {
    pub const ALL: [Role; 4] = [Role::Primary, Role::Retry, Role::Fallback, Role::Shadow];

    /// By its word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.as_str() == word)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Role::Primary => "primary",
            Role::Retry => "retry",
            Role::Fallback => "fallback",
            Role::Shadow => "shadow",
        }
    }
}

/// How an admitted request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The whole answer was produced. (The client may still have left before its last byte.)
    Answered,
    /// Admitted, but nothing was started; costs nothing.
    Released,
    /// The client hung up.
    Aborted,
    /// One of the route's timeouts passed.
    TimedOut,
    /// We had to leave before it was done.
    Cut,
    /// The backend failed.
    Failed,
    /// The backend gave nothing and another attempt took over: every other outcome ends its request, this one does not.
    FailedOver,
    /// Our own code panicked.
    Panicked,
    /// The process died with the request in flight; written when the ledger recovers.
    Killed,
}

impl Outcome {
    pub const ALL: [Outcome; 9] = [
        Outcome::Answered,
        Outcome::Released,
        Outcome::Aborted,
        Outcome::TimedOut,
        Outcome::Cut,
        Outcome::Failed,
        Outcome::FailedOver,
        Outcome::Panicked,
        Outcome::Killed,
    ];

    /// By its word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.as_str() == word)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Answered => "answered",
            Outcome::Released => "released",
            Outcome::Aborted => "aborted",
            Outcome::TimedOut => "timed_out",
            Outcome::Cut => "cut",
            Outcome::Failed => "failed",
            Outcome::FailedOver => "failed_over",
            Outcome::Panicked => "panicked",
            Outcome::Killed => "killed",
        }
    }
}

/// Where a row's token counts come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UsageSource {
    /// Counted by the engine, token by token.
    Counted,
    /// As the upstream said.
    Reported,
    /// The upstream did not say, or not credibly: reckoned from the text.
    Estimated,
    /// Unknown, so the reservation stands: the most that the request could have used.
    Reserved,
}

impl UsageSource {
    pub const ALL: [UsageSource; 4] =
        [UsageSource::Counted, UsageSource::Reported, UsageSource::Estimated, UsageSource::Reserved];

    /// By its word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.as_str() == word)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            UsageSource::Counted => "counted",
            UsageSource::Reported => "reported",
            UsageSource::Estimated => "estimated",
            UsageSource::Reserved => "reserved",
        }
    }
}

/// How an upstream served a request, where it has several ways with prices of their own: OpenAI's `service_tier`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Service {
    Default,
    Flex,
    Priority,
    Scale,
    Batch,
    /// It has a name for it that we do not know.
    Other,
}

impl Service {
    pub const ALL: [Service; 6] =
        [Service::Default, Service::Flex, Service::Priority, Service::Scale, Service::Batch, Service::Other];
    /// Those that can have prices of their own.
    pub const PRICED: [Service; 4] = [Service::Flex, Service::Priority, Service::Scale, Service::Batch];

    /// By its word.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.as_str() == word)
    }

    /// What an upstream says that it was.
    pub fn told(word: &str) -> Self {
        match word {
            "standard" | "on_demand" => Service::Default,
            word => Self::parse(word).unwrap_or(Service::Other),
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Service::Default => "default",
            Service::Flex => "flex",
            Service::Priority => "priority",
            Service::Scale => "scale",
            Service::Batch => "batch",
            Service::Other => "other",
        }
    }

    /// Whether who asked for that can have got this: what was named, or less. Who named nothing can get anything.
    pub fn is_within(self, asked: Option<Service>) -> bool {
        matches!(self, Service::Default | Service::Other) || asked.is_none_or(|asked| asked == self)
    }
}

/// Everything the ledger keeps of one attempt. Times are nanoseconds since the Unix epoch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub request_id: String,
    pub attempt: u32,
    pub role: Role,
    pub response_id: String,
    pub trace_id: String,
    pub started_ns: i64,
    pub ended_ns: i64,
    pub tenant: String,
    pub key_id: String,
    pub route: String,
    pub model: String,
    pub variant: String,
    pub provider: String,
    pub op: String,
    pub stream: bool,
    pub cache: String,
    pub outcome: Outcome,
    pub usage: Usage,
    pub usage_source: UsageSource,
    /// What the caller pays.
    pub billed: NanoUsd,
    /// What it cost us.
    pub provider_cost: NanoUsd,
    pub price_version: String,
    pub config_hash: String,
    // Every field from here on is one that older logs do not have: `#[serde(default)]`.
    /// Whom the key asked for, as its identity says.
    #[serde(default)]
    pub user_id: Option<String>,
    /// It used tokens of a model that nobody gave a price: what is billed says nothing.
    #[serde(default)]
    pub unpriced: bool,
    /// How it was served, as far as that was said; of a request that was killed: what was asked for.
    #[serde(default)]
    pub service_tier: Option<Service>,
    /// Images that the request brought.
    #[serde(default)]
    pub images: u64,
}

/// What limits have counted of the rows of one key, user, route and model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    pub tenant: String,
    pub key_id: String,
    pub user: Option<String>,
    pub route: String,
    pub model: String,
    pub requests: u64,
    pub input_tokens: u64,
    pub output_tokens: u64,
    pub billed: NanoUsd,
}

/// The columns in the order of the table, with their SQLite types.
pub const COLUMNS: [(&str, &str); 31] = [
    ("request_id", "TEXT NOT NULL"),
    ("attempt", "INTEGER NOT NULL"),
    ("role", "TEXT NOT NULL"),
    ("response_id", "TEXT NOT NULL"),
    ("trace_id", "TEXT NOT NULL"),
    ("started_ns", "INTEGER NOT NULL"),
    ("ended_ns", "INTEGER NOT NULL"),
    ("tenant", "TEXT NOT NULL"),
    ("key_id", "TEXT NOT NULL"),
    ("route", "TEXT NOT NULL"),
    ("model", "TEXT NOT NULL"),
    ("variant", "TEXT NOT NULL"),
    ("provider", "TEXT NOT NULL"),
    ("op", "TEXT NOT NULL"),
    ("stream", "INTEGER NOT NULL"),
    ("cache", "TEXT NOT NULL"),
    ("outcome", "TEXT NOT NULL"),
    ("input_tokens", "INTEGER NOT NULL"),
    ("cache_read_tokens", "INTEGER NOT NULL"),
    ("cache_write_tokens", "INTEGER NOT NULL"),
    ("output_tokens", "INTEGER NOT NULL"),
    ("reasoning_tokens", "INTEGER NOT NULL"),
    ("usage_source", "TEXT NOT NULL"),
    ("billed_nano_usd", "INTEGER NOT NULL"),
    ("provider_cost_nano_usd", "INTEGER NOT NULL"),
    ("price_version", "TEXT NOT NULL"),
    ("config_hash", "TEXT NOT NULL"),
    ("user_id", "TEXT"),
    ("unpriced", "INTEGER NOT NULL"),
    ("service_tier", "TEXT"),
    ("images", "INTEGER NOT NULL"),
];

/// What stands in one column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell<'r> {
    Text(&'r str),
    Integer(i64),
    Null,
}

impl std::fmt::Display for Cell<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Cell::Text(text) => f.write_str(text),
            Cell::Integer(number) => write!(f, "{number}"),
            Cell::Null => Ok(()),
        }
    }
}

impl Row {
    /// What its price depends on beside its tokens.
    pub fn extras(&self) -> Extras {
        Extras { images: self.images, service: self.service_tier }
    }

    /// What stands in each of `COLUMNS`.
    pub fn cells(&self) -> [Cell<'_>; COLUMNS.len()] {
        // The store's integers are signed. Nine quintillion nano-dollars are more than there is.
        let number = |value: u64| Cell::Integer(i64::try_from(value).unwrap_or(i64::MAX));
        [
            Cell::Text(&self.request_id),
            Cell::Integer(self.attempt.into()),
            Cell::Text(self.role.as_str()),
            Cell::Text(&self.response_id),
            Cell::Text(&self.trace_id),
            Cell::Integer(self.started_ns),
            Cell::Integer(self.ended_ns),
            Cell::Text(&self.tenant),
            Cell::Text(&self.key_id),
            Cell::Text(&self.route),
            Cell::Text(&self.model),
            Cell::Text(&self.variant),
            Cell::Text(&self.provider),
            Cell::Text(&self.op),
            Cell::Integer(self.stream.into()),
            Cell::Text(&self.cache),
            Cell::Text(self.outcome.as_str()),
            number(self.usage.input),
            number(self.usage.cache_read),
            number(self.usage.cache_write),
            number(self.usage.output),
            number(self.usage.reasoning),
            Cell::Text(self.usage_source.as_str()),
            number(self.billed.0),
            number(self.provider_cost.0),
            Cell::Text(&self.price_version),
            Cell::Text(&self.config_hash),
            self.user_id.as_deref().map_or(Cell::Null, Cell::Text),
            Cell::Integer(self.unpriced.into()),
            self.service_tier.map_or(Cell::Null, |service| Cell::Text(service.as_str())),
            number(self.images),
        ]
    }
}
