//! What can be set on a key, the same way when it is made and later.

use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::accounting::core::NanoUsd;
use crate::auth::store::KeyRow;
use crate::config::{CONCURRENCY_MAX, REQUESTS_PER_MINUTE_MAX, TOKENS_PER_MINUTE_MAX};
use crate::network::Network;
use crate::ports::Scope;

/// What one key may have of each.
const TAGS_MAX: usize = 16;
const METADATA_MAX: usize = 16;
const MODELS_MAX: usize = 256;
const NETWORKS_MAX: usize = 64;

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
    pub fn models(&self) -> &[String] {
        &self.models
    }

    /// # Errors
    /// What is too long, too much, or could not be shown in a list.
    pub fn check(&self) -> Result<(), String> {
        self.user.iter().try_for_each(|user| word("user", user, 256))?;
        self.tags.iter().try_for_each(|tag| word("tag", tag, 64))?;
        self.models.iter().try_for_each(|model| word("model", model, 64))?;
        for (name, value) in &self.metadata {
            word("name of a note", name, 64)?;
            word("value of a note", value, 256)?;
        }
        for (what, count, most) in [
            ("tags", self.tags.len(), TAGS_MAX),
            ("models", self.models.len(), MODELS_MAX),
            ("networks", self.networks.len(), NETWORKS_MAX),
            ("notes", self.metadata.len(), METADATA_MAX),
        ] {
            if count > most {
                return Err(format!("a key has at most {most} {what}, not {count}"));
            }
        }
        Ok(())
    }

    /// Sets what was given.
    pub fn apply(self, row: &mut KeyRow, now_ns: i64) {
        let who = Arc::make_mut(&mut row.who);
        who.user = self.user.or(who.user.take());
        if !self.tags.is_empty() {
            who.tags = self.tags;
        }
        if !self.scopes.is_empty() {
            who.scopes = Some(self.scopes.into_iter().collect());
        }
        if !self.models.is_empty() {
            who.models = Some(self.models.into_iter().collect());
        }
        if !self.networks.is_empty() {
            who.networks = Some(self.networks);
        }
        let limits = &mut who.limits;
        limits.requests_per_minute = self.rpm.or(limits.requests_per_minute);
        limits.tokens_per_minute = self.tpm.or(limits.tokens_per_minute);
        limits.concurrency = self.concurrency.or(limits.concurrency);
        limits.per_day = self.usd_per_day.or(limits.per_day);
        if !self.metadata.is_empty() {
            row.metadata = self.metadata.into_iter().collect();
        }
        row.expires_ns = self.expires.map(|when| when.from(now_ns)).or(row.expires_ns);
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
    pub fn apply(self, row: &mut KeyRow) {
        let who = Arc::make_mut(&mut row.who);
        match self {
            Clear::User => who.user = None,
            Clear::Tag => who.tags.clear(),
            Clear::Expires => row.expires_ns = None,
            Clear::Scope => who.scopes = None,
            Clear::Model => who.models = None,
            Clear::From => who.networks = None,
            Clear::Meta => row.metadata.clear(),
            Clear::Rpm => who.limits.requests_per_minute = None,
            Clear::Tpm => who.limits.tokens_per_minute = None,
            Clear::Concurrency => who.limits.concurrency = None,
            Clear::UsdPerDay => who.limits.per_day = None,
        }
    }
}

/// A moment, as it was said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    In(Duration),
    /// Unix nanoseconds.
    At(i64),
}

impl When {
    /// As Unix nanoseconds.
    pub fn from(self, now_ns: i64) -> i64 {
        match self {
            When::In(wait) => now_ns.saturating_add(i64::try_from(wait.as_nanos()).unwrap_or(i64::MAX)),
            When::At(ns) => ns,
        }
    }
}

pub fn when(text: &str) -> Result<When, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let seconds = match &text[digits..] {
        "s" => Some(1),
        "m" => Some(60),
        "h" => Some(3_600),
        "d" => Some(86_400),
        _ => None,
    };
    if let Some(wait) = seconds.and_then(|unit: u64| text[..digits].parse::<u64>().ok()?.checked_mul(unit)) {
        return Ok(When::In(Duration::from_secs(wait)));
    }
    let moment = OffsetDateTime::parse(text, &Rfc3339)
        .or_else(|_| OffsetDateTime::parse(&format!("{text}T00:00:00Z"), &Rfc3339));
    let moment = moment.ok().and_then(|moment| i64::try_from(moment.unix_timestamp_nanos()).ok());
    moment.map(When::At).ok_or_else(|| {
        "must be a time such as \"90m\", \"12h\" or \"30d\", or a moment such as \"2027-01-31\" or \"2027-01-31T12:00:00Z\"".to_owned()
    })
}

fn scope(text: &str) -> Result<Scope, String> {
    Scope::parse(text).ok_or_else(|| format!("must be one of {}", Scope::ALL.map(Scope::as_str).join(", ")))
}

fn pair(text: &str) -> Result<(String, String), String> {
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

/// # Errors
/// If it is empty, longer than `most` bytes, or could not be shown in a list.
pub fn word(what: &str, word: &str, most: usize) -> Result<(), String> {
    if word.is_empty() || word.len() > most || word.chars().any(char::is_control) {
        return Err(format!("the {what} must have 1 to {most} bytes and no control characters"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_said_as_a_time_or_a_date() {
        assert_eq!(when("30d"), Ok(When::In(Duration::from_secs(30 * 86_400))));
        assert_eq!(when("0s").map(|when| when.from(7)), Ok(7));
        assert_eq!(when("2027-01-31"), when("2027-01-31T00:00:00Z"));
        assert_eq!(when("1970-01-01T01:00:01+01:00"), Ok(When::At(1_000_000_000)));
        for nonsense in
            ["", "d", "30", "-1d", "30 days", "tomorrow", "2027-13-01", "99999999999999999999d", "9999-12-31"]
        {
            assert!(when(nonsense).is_err(), "{nonsense}");
        }
    }
}
