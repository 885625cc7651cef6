//! What can be set on a key by options, the same way when it is made and later.

use clap::{Args, ValueEnum};

use crate::accounting::core::NanoUsd;
use crate::config::{CONCURRENCY_MAX, REQUESTS_PER_MINUTE_MAX, TOKENS_PER_MINUTE_MAX};
use crate::control::edit::{Edit, KeyEdit, When, when};
use crate::network::Network;
use crate::ports::Scope;

#[derive(Args)]
pub struct Settings {
    /// Whose requests these are; then what a request says of its user does not count
    #[arg(long)]
    user: Option<String>,
    /// A word to tell keys apart by (may be given several times)
    #[arg(long = "tag", value_name = "TAG")]
    tags: Vec<String>,
    /// When it ends: in "90m", "12h", "30d", or at "2027-01-31", "2027-01-31T12:00:00Z"
    #[arg(long, value_name = "WHEN", value_parser = when)]
    expires: Option<When>,
    /// What it may do: inference, embeddings, feedback, models; all by default (may be given several times)
    #[arg(long = "scope", value_name = "SCOPE", value_parser = scope)]
    scopes: Vec<Scope>,
    /// A name that it may ask for as `model`; all by default. Others do not exist for it (may be given several times)
    #[arg(long = "model", value_name = "MODEL")]
    models: Vec<String>,
    /// Where it may be used from, as "203.0.113.7" or "10.0.0.0/8"; anywhere by default (may be given several times)
    #[arg(long = "from", value_name = "NETWORK")]
    networks: Vec<Network>,
    /// A note for yourself (may be given several times)
    #[arg(long = "meta", value_name = "NAME=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// Requests a minute, instead of the configuration's `limits.requests_per_minute`
    #[arg(long, value_name = "N", value_parser = upto(REQUESTS_PER_MINUTE_MAX))]
    rpm: Option<u32>,
    /// Tokens a minute, prompt and answer together, instead of `limits.tokens_per_minute`
    #[arg(long, value_name = "N", value_parser = upto(TOKENS_PER_MINUTE_MAX))]
    tpm: Option<u32>,
    /// Requests at a time, instead of `limits.concurrency`
    #[arg(long, value_name = "N", value_parser = upto(CONCURRENCY_MAX))]
    concurrency: Option<u32>,
    /// US dollars on a UTC day, instead of `limits.usd_per_day`
    #[arg(long, value_name = "X", value_parser = usd)]
    usd_per_day: Option<NanoUsd>,
}

impl Settings {
    /// What was given is set, and what is to be cleared is taken back, unless it was given too.
    pub fn edit(self, clear: &[Clear], now_ns: i64) -> KeyEdit {
        let mut edit = KeyEdit::default();
        clear.iter().for_each(|setting| setting.take_back(&mut edit));
        let list = |items: Vec<String>| (!items.is_empty()).then_some(items);
        give(&mut edit.user, self.user);
        give(&mut edit.tags, list(self.tags));
        give(&mut edit.expires, self.expires.map(|when| when.from(now_ns)));
        give(&mut edit.scopes, (!self.scopes.is_empty()).then(|| self.scopes.into_iter().collect()));
        give(&mut edit.models, list(self.models).map(|models| models.into_iter().collect()));
        give(&mut edit.from, (!self.networks.is_empty()).then_some(self.networks));
        give(&mut edit.metadata, (!self.metadata.is_empty()).then(|| self.metadata.into_iter().collect()));
        give(&mut edit.requests_per_minute, self.rpm);
        give(&mut edit.tokens_per_minute, self.tpm);
        give(&mut edit.concurrency, self.concurrency);
        give(&mut edit.usd_per_day, self.usd_per_day);
        edit
    }
}

fn give<T>(edit: &mut Edit<T>, given: Option<T>) {
    if given.is_some() {
        *edit = Some(given);
    }
}

/// A setting by the name of its option.
#[derive(Clone, Copy, ValueEnum)]
pub enum Clear {
    User,
    Tag,
    Expires,
    Scope,
    Model,
    From,
    Meta,
    Rpm,
    Tpm,
    Concurrency,
    UsdPerDay,
}

impl Clear {
    fn take_back(self, edit: &mut KeyEdit) {
        match self {
            Clear::User => edit.user = Some(None),
            Clear::Tag => edit.tags = Some(None),
            Clear::Expires => edit.expires = Some(None),
            Clear::Scope => edit.scopes = Some(None),
            Clear::Model => edit.models = Some(None),
            Clear::From => edit.from = Some(None),
            Clear::Meta => edit.metadata = Some(None),
            Clear::Rpm => edit.requests_per_minute = Some(None),
            Clear::Tpm => edit.tokens_per_minute = Some(None),
            Clear::Concurrency => edit.concurrency = Some(None),
            Clear::UsdPerDay => edit.usd_per_day = Some(None),
        }
    }
}

fn scope(text: &str) -> Result<Scope, String> {
    Scope::parse(text).ok_or_else(|| format!("must be one of {}", Scope::ALL.map(Scope::as_str).join(", ")))
}

/// # Errors
/// If there is no `=`.
pub fn pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("must look like owner=alice")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn upto(max: u32) -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=i64::from(max))
}

fn usd(text: &str) -> Result<NanoUsd, String> {
    let usd = text.parse().map_err(|_| "must be a number of US dollars such as 2.50".to_owned())?;
    NanoUsd::from_usd(usd).map_err(str::to_owned)
}
