//! What can be set on a key, the same way when it is made and later, from the command line and through the API.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::Denied;
use crate::accounting::core::NanoUsd;
use crate::auth::store::KeyRow;
use crate::config::{CONCURRENCY_MAX, Config, REQUESTS_PER_MINUTE_MAX, TOKENS_PER_MINUTE_MAX};
use crate::network::Network;
use crate::ports::Scope;

/// What one key may have of each.
pub const TAGS_MAX: usize = 16;
pub const METADATA_MAX: usize = 16;
pub const MODELS_MAX: usize = 256;
pub const NETWORKS_MAX: usize = 64;

/// Left as it is, taken back, or set.
pub type Edit<T> = Option<Option<T>>;

/// Tagged by what the API calls each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyEdit {
    pub user: Edit<String>,
    pub tags: Edit<Vec<String>>,
    /// Unix nanoseconds.
    pub expires: Edit<i64>,
    pub scopes: Edit<BTreeSet<Scope>>,
    pub models: Edit<BTreeSet<String>>,
    pub from: Edit<Vec<Network>>,
    pub metadata: Edit<BTreeMap<String, String>>,
    pub requests_per_minute: Edit<u32>,
    pub tokens_per_minute: Edit<u32>,
    pub concurrency: Edit<u32>,
    pub usd_per_day: Edit<NanoUsd>,
}

/// What the API calls what can be set.
pub const FIELDS: [&str; 11] = [
    "user",
    "tags",
    "expires",
    "scopes",
    "models",
    "from",
    "metadata",
    "requests_per_minute",
    "tokens_per_minute",
    "concurrency",
    "usd_per_day",
];

impl KeyEdit {
    /// From the fields of an object: null takes back what was set, and what is missing stays.
    ///
    /// # Errors
    /// `Invalid`, with the path of the field.
    pub fn read(fields: &Map<String, Value>, now_ns: i64) -> Result<KeyEdit, Denied> {
        let moment = |path: &str, value: &Value| {
            when(text(path, value)?).map(|when| when.from(now_ns)).map_err(|why| invalid(path, why))
        };
        let scope = |path: &str, value: &Value| {
            let known = || format!("must be one of {}", Scope::ALL.map(Scope::as_str).join(", "));
            Scope::parse(text(path, value)?).ok_or_else(|| invalid(path, known()))
        };
        let network = |path: &str, value: &Value| text(path, value)?.parse().map_err(|why| invalid(path, why));
        let owned = |path: &str, value: &Value| text(path, value).map(str::to_owned);
        let edit = KeyEdit {
            user: field(fields, "user", owned)?,
            tags: field(fields, "tags", |path, value| items(path, value, owned))?,
            expires: field(fields, "expires", moment)?,
            scopes: field(fields, "scopes", |path, value| items(path, value, scope))?,
            models: field(fields, "models", |path, value| items(path, value, owned))?,
            from: field(fields, "from", |path, value| items(path, value, network))?,
            metadata: field(fields, "metadata", notes)?,
            requests_per_minute: field(fields, "requests_per_minute", upto(REQUESTS_PER_MINUTE_MAX))?,
            tokens_per_minute: field(fields, "tokens_per_minute", upto(TOKENS_PER_MINUTE_MAX))?,
            concurrency: field(fields, "concurrency", upto(CONCURRENCY_MAX))?,
            usd_per_day: field(fields, "usd_per_day", usd)?,
        };
        edit.check()?;
        Ok(edit)
    }

    /// # Errors
    /// What is too long, too much, or could not be shown in a list.
    pub fn check(&self) -> Result<(), Denied> {
        given(&self.user).into_iter().try_for_each(|user| word("user", user, 256))?;
        given(&self.tags).into_iter().try_for_each(|tags| words("tags", tags, TAGS_MAX, 64))?;
        let models: Vec<String> = given(&self.models).into_iter().flatten().cloned().collect();
        words("models", &models, MODELS_MAX, 64)?;
        if given(&self.from).is_some_and(|networks| networks.len() > NETWORKS_MAX) {
            return Err(invalid("from", format!("may have at most {NETWORKS_MAX} networks")));
        }
        let metadata = given(&self.metadata);
        if metadata.is_some_and(|notes| notes.len() > METADATA_MAX) {
            return Err(invalid("metadata", format!("may have at most {METADATA_MAX} notes")));
        }
        metadata.into_iter().flatten().try_for_each(|(name, value)| {
            word("metadata", name, 64)?;
            word(&format!("metadata.{name}"), value, 256)
        })
    }

    /// Sets what was given.
    pub fn apply(self, row: &mut KeyRow) {
        let who = Arc::make_mut(&mut row.who);
        set(&mut who.user, self.user);
        who.tags = self.tags.map_or_else(|| std::mem::take(&mut who.tags), Option::unwrap_or_default);
        set(&mut who.scopes, self.scopes);
        set(&mut who.models, self.models);
        set(&mut who.networks, self.from);
        let limits = &mut who.limits;
        set(&mut limits.requests_per_minute, self.requests_per_minute);
        set(&mut limits.tokens_per_minute, self.tokens_per_minute);
        set(&mut limits.concurrency, self.concurrency);
        set(&mut limits.per_day, self.usd_per_day);
        row.metadata = self.metadata.map_or_else(|| std::mem::take(&mut row.metadata), Option::unwrap_or_default);
        set(&mut row.expires_ns, self.expires);
    }

    /// A name that is misspelt allows nothing. It may also be one that the configuration is going to have, so it is no error.
    pub fn notes(&self, config: &Config) -> Vec<String> {
        let public = config.models.iter().filter(|(_, model)| model.public).map(|(name, _)| name);
        let known: Vec<&String> = config.routes.iter().map(|route| &route.name).chain(public).collect();
        let unknown = given(&self.models).into_iter().flatten().filter(|model| !known.contains(model));
        unknown.map(|model| format!("clients can ask for nothing called `{model}` at the moment")).collect()
    }
}

fn given<T>(edit: &Edit<T>) -> Option<&T> {
    edit.as_ref().and_then(Option::as_ref)
}

fn set<T>(place: &mut Option<T>, edit: Edit<T>) {
    if let Some(to) = edit {
        *place = to;
    }
}

pub fn invalid(path: &str, why: impl Into<String>) -> Denied {
    Denied::Invalid { param: Some(path.to_owned()), why: format!("`{path}` {}", why.into()) }
}

/// # Errors
/// If there is a field that nobody reads.
pub fn known(fields: &Map<String, Value>, known: &[&str]) -> Result<(), Denied> {
    match fields.keys().find(|name| !known.contains(&name.as_str())) {
        Some(unknown) => {
            let name: String = unknown.chars().take(64).collect();
            Err(invalid(&name, format!("is not known here; there are {}", known.join(", "))))
        }
        None => Ok(()),
    }
}

fn field<T>(
    fields: &Map<String, Value>,
    name: &str,
    read: impl Fn(&str, &Value) -> Result<T, Denied>,
) -> Result<Edit<T>, Denied> {
    match fields.get(name) {
        None => Ok(None),
        Some(Value::Null) => Ok(Some(None)),
        Some(value) => read(name, value).map(|value| Some(Some(value))),
    }
}

pub fn text<'v>(path: &str, value: &'v Value) -> Result<&'v str, Denied> {
    value.as_str().ok_or_else(|| invalid(path, "must be a string"))
}

pub fn items<T, C: FromIterator<T>>(
    path: &str,
    value: &Value,
    read: impl Fn(&str, &Value) -> Result<T, Denied>,
) -> Result<C, Denied> {
    let items = value.as_array().ok_or_else(|| invalid(path, "must be a list"))?;
    items.iter().enumerate().map(|(at, item)| read(&format!("{path}[{at}]"), item)).collect()
}

fn notes(path: &str, value: &Value) -> Result<BTreeMap<String, String>, Denied> {
    let notes = value.as_object().ok_or_else(|| invalid(path, "must be an object of strings"))?;
    let note =
        |(name, value): (&String, &Value)| Ok((name.clone(), text(&format!("{path}.{name}"), value)?.to_owned()));
    notes.iter().map(note).collect()
}

fn upto(most: u32) -> impl Fn(&str, &Value) -> Result<u32, Denied> {
    move |path, value| {
        // To JSON, 5.0 is a whole number too.
        let number = value.as_f64().filter(|number| number.fract() == 0.0 && (1.0..=f64::from(most)).contains(number));
        number
            .map(|number| number as u32)
            .ok_or_else(|| invalid(path, format!("must be a whole number from 1 to {most}")))
    }
}

/// A number of dollars, or one as text, as it is shown.
fn usd(path: &str, value: &Value) -> Result<NanoUsd, Denied> {
    let number = value.as_f64().or_else(|| value.as_str()?.parse().ok());
    let usd = number.ok_or_else(|| invalid(path, "must be a number of US dollars such as 2.50"))?;
    NanoUsd::from_usd(usd).map_err(|why| invalid(path, why))
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

/// # Errors
/// What it must look like.
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

/// # Errors
/// If it is empty, longer than `most` characters, or could not be shown in a list.
pub fn word(path: &str, word: &str, most: usize) -> Result<(), Denied> {
    if word.is_empty() || word.chars().count() > most || word.chars().any(char::is_control) {
        return Err(invalid(path, format!("must have 1 to {most} characters and no control characters")));
    }
    Ok(())
}

/// # Errors
/// If there are more than `count`, or one is no word.
pub fn words(path: &str, all: &[String], count: usize, most: usize) -> Result<(), Denied> {
    if all.len() > count {
        return Err(invalid(path, format!("may have at most {count} {path}, not {}", all.len())));
    }
    all.iter().enumerate().try_for_each(|(at, one)| word(&format!("{path}[{at}]"), one, most))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

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

    #[test]
    fn what_is_wrong_with_an_edit_is_said_with_its_path() {
        let read = |value: Value| KeyEdit::read(value.as_object().unwrap(), 0);
        for (value, path) in [
            (json!({"user": 7}), "user"),
            (json!({"tags": ["a", 7]}), "tags[1]"),
            (json!({"tags": ["a", ""]}), "tags[1]"),
            (json!({"scopes": ["inference", "everything"]}), "scopes[1]"),
            (json!({"from": ["10.0.0.1/8"]}), "from[0]"),
            (json!({"metadata": {"owner": 7}}), "metadata.owner"),
            (json!({"metadata": []}), "metadata"),
            (json!({"requests_per_minute": 0}), "requests_per_minute"),
            (json!({"concurrency": 1.5}), "concurrency"),
            (json!({"concurrency": 1e300}), "concurrency"),
            (json!({"concurrency": -1}), "concurrency"),
            (json!({"usd_per_day": -1}), "usd_per_day"),
            (json!({"expires": "tomorrow"}), "expires"),
        ] {
            match read(value.clone()) {
                Err(Denied::Invalid { param, .. }) => assert_eq!(param.as_deref(), Some(path), "{value}"),
                other => panic!("{value}: {other:?}"),
            }
        }
        let edit = read(json!({"user": null, "tags": [], "usd_per_day": "0.500000000"})).unwrap();
        let expected = KeyEdit {
            user: Some(None),
            tags: Some(Some(vec![])),
            usd_per_day: Some(Some(NanoUsd(500_000_000))),
            ..KeyEdit::default()
        };
        assert_eq!(edit, expected, "null takes back, what is missing stays");
    }
}
