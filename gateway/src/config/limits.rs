//! `[limits]`: what callers may do.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::tz::TimeZone;
use serde_json::{Map, Value};

use super::problem::did_you_mean;
use super::reader::{At, Section, Source};
use super::{Config, ModelConfig, NAME_CHARS_MAX, RouteConfig};
use crate::accounting::core::NanoUsd;
use crate::admission::core::rule::{Down, Mode, Rule, Sharing};
use crate::admission::rules::DEFAULTS;
use crate::api::limit::{Dimension, Of, Only, Per};

/// What one key may do. A key may have limits of its own instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub requests_per_minute: u32,
    pub tokens_per_minute: u32,
    /// Requests at a time.
    pub concurrency: u32,
    /// What it may spend on a UTC day.
    pub per_day: NanoUsd,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            requests_per_minute: 600,
            tokens_per_minute: 200_000,
            concurrency: 64,
            per_day: NanoUsd(5_000_000_000),
        }
    }
}

/// No limit of a key is above these, in files and in the key store.
pub const REQUESTS_PER_MINUTE_MAX: u32 = 1_000_000;
pub const TOKENS_PER_MINUTE_MAX: u32 = 1_000_000_000;
pub const CONCURRENCY_MAX: u32 = 10_000;
/// No rule's limit is above this.
const AMOUNT_MAX: u64 = 1_000_000_000_000_000;
/// Nobody waits longer, so that clients do not give up first.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// A request asks every rule that binds it.
pub const RULES_MAX: usize = 64;
const REPLICAS_MAX: u64 = 1_000;
/// Shared counts of what refills are whole numbers of a sixty-thousandth each, of which the store can hold so many.
const SHARED_A_MINUTE_MAX: u64 = 75_000_000_000;

/// What gateways that share rules have in common.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Common {
    /// Whether there is something to share counters in.
    pub has_store: bool,
    pub replicas: Option<u64>,
}

/// A rule, and where the names stand that must exist elsewhere.
pub(super) struct Written {
    pub rule: Arc<Rule>,
    only: Vec<(Only, At<String>)>,
}

/// The limits of every key, how gateways share them, and the rules beside them. `common` learns how many gateways there are.
pub(super) fn limits(section: Section<'_, '_>, common: &mut Common) -> (Limits, Option<Sharing>, Vec<Written>) {
    let default = Limits::default();
    let number = |key, max: u32, default| section.integer(key, 1..=u64::from(max)).map_or(default, |n| n as u32);
    let limits = Limits {
        requests_per_minute: number("requests_per_minute", REQUESTS_PER_MINUTE_MAX, default.requests_per_minute),
        tokens_per_minute: number("tokens_per_minute", TOKENS_PER_MINUTE_MAX, default.tokens_per_minute),
        concurrency: number("concurrency", CONCURRENCY_MAX, default.concurrency),
        per_day: section.number("usd_per_day").map_or(default.per_day, |usd| {
            NanoUsd::from_usd(usd.value).unwrap_or_else(|why| {
                section.problem_at(usd.at, format!("`limits.usd_per_day` {why}"));
                default.per_day
            })
        }),
    };
    common.replicas = section.integer("replicas", 1..=REPLICAS_MAX);
    let shared = sharing(&section, Mode::Hard, *common);
    let sections = section.list("rules");
    if sections.len() > RULES_MAX {
        section.problem(format!("there are {} `[[limits.rules]]`, and there may be {RULES_MAX}", sections.len()));
    }
    let mut written: Vec<Written> = Vec::new();
    for section in sections {
        let name = section.string("name");
        if let Some(name) = &name {
            check_name(&section, name, &written);
        }
        written.extend(rule(&section, name, *common));
        section.finish();
    }
    section.finish();
    (limits, shared, written)
}

fn check_name(section: &Section<'_, '_>, name: &At<String>, written: &[Written]) {
    let fine = (1..=NAME_CHARS_MAX).contains(&name.value.len())
        && name.value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if !fine {
        let what = "cannot name a rule: use at most 64 letters, digits, '-', '_' or '.'";
        section.problem_at(name.at, format!("`{}` {what}", name.value));
    }
    if DEFAULTS.contains(&name.value.as_str()) {
        section.problem_at(name.at, format!("`{}` is what the limit of every key is called", name.value));
    }
    if written.iter().any(|other| other.rule.name == name.value) {
        section.problem_at(name.at, format!("there are two rules called `{}`", name.value));
    }
}

fn rule(section: &Section<'_, '_>, name: Option<At<String>>, common: Common) -> Option<Written> {
    let words = |all: &[&'static str], key| section.word(key, all).map(str::to_owned);
    let of = words(&Of::ALL.map(Of::as_str), "of").and_then(|word| Of::ALL.into_iter().find(|of| of.as_str() == word));
    let per = words(&Per::ALL.map(Per::as_str), "per");
    let per = per.and_then(|word| Per::ALL.into_iter().find(|per| per.as_str() == word));
    let amount = section.number("limit");
    let mut by = by(section);
    by.sort_unstable();
    by.dedup();
    let only = only(section);
    let zone = section.string("zone");
    let (word, mode) = mode(section);
    let shared = sharing(section, mode, common);
    let exact = section.boolean("exact").unwrap_or(false);
    let strict = section.boolean("strict").unwrap_or(false);
    let wait = section.duration_or_none("wait").filter(|wait| !wait.is_zero());
    let (Some(name), Some(of), Some(amount)) = (name, of, amount) else {
        section.problem("a rule needs a `name`, a `limit`, what it is a limit `of`, and `per` which time");
        return None;
    };
    let means_nothing = |key: &str, where_it_does: &str| {
        section.problem(format!("`{key}` means something {where_it_does}, and `{}` is none of that", name.value));
    };
    match (of, per) {
        (Of::Concurrency, Some(_)) => means_nothing("per", "for what is used up, not for requests at a time"),
        (Of::Concurrency, None) | (_, Some(_)) => {}
        (_, None) => section.problem(format!("`{}` needs `per`: second, minute, day or month", name.value)),
    }
    let is_calendar = per.is_some_and(Per::is_calendar);
    if zone.is_some() && !is_calendar {
        means_nothing("zone", "for days and months");
    }
    if mode != Mode::Hard && !is_calendar {
        means_nothing("mode", "for days and months");
    }
    if exact && (is_calendar || per.is_none()) {
        means_nothing("exact", "for seconds and minutes");
    }
    if wait.is_some() && (is_calendar || of == Of::Usd) {
        means_nothing("wait", "for requests and tokens, a second, a minute or at a time");
    }
    if wait.is_some_and(|wait| wait > WAIT_MAX) {
        section.problem(format!("`{}.wait` must be at most \"60s\"", section.name()));
    }
    if strict && !matches!(of, Of::Tokens | Of::InputTokens | Of::Usd) {
        means_nothing("strict", "for tokens, input_tokens and usd");
    }
    if strict && mode != Mode::Hard {
        section.problem(format!(
            "`{}` is `strict` and `{word}`, which lets in beyond; leave out one of the two",
            name.value
        ));
    }
    let limit = limit(section, of, &amount);
    if shared.is_some() && !is_calendar && per.is_some() && limit > SHARED_A_MINUTE_MAX {
        section.problem_at(
            amount.at,
            format!(
                "`{}` is `shared` and refills, and then may be {SHARED_A_MINUTE_MAX} (75 usd) at the most",
                name.value
            ),
        );
    }
    let rule = Rule {
        limit,
        of,
        per,
        by,
        only: only.iter().map(|(only, name)| (*only, name.value.clone())).collect(),
        zone: zone.map_or(TimeZone::UTC, |zone| time_zone(section, &zone)),
        mode,
        exact,
        strict,
        wait: wait.unwrap_or_default(),
        shared,
        name: name.value,
    };
    Some(Written { rule: Arc::new(rule), only })
}

fn sharing(section: &Section<'_, '_>, mode: Mode, common: Common) -> Option<Sharing> {
    let shared = section.string("shared");
    let down = section.word("down", &Down::ALL.map(Down::as_str));
    let Some(shared) = shared.filter(|shared| shared.value != "no") else {
        if down.is_some() {
            section.problem("`down` means something for what is `shared`");
        }
        return None;
    };
    if !common.has_store {
        section.problem_at(shared.at, "`shared` needs somewhere to count together: set `redis` in `[storage]`");
    }
    if matches!(mode, Mode::Throttle { .. }) {
        section.problem_at(shared.at, "what is `shared` cannot throttle; use `mode = \"hard\"` or \"soft\"");
    }
    let down = Down::ALL.into_iter().find(|known| down == Some(known.as_str())).unwrap_or(Down::Local);
    if down == Down::Local && common.replicas.is_none() {
        section.problem_at(
            shared.at,
            "where the store is out of reach, each gateway holds to its part: say how many there are with `limits.replicas`, or `down = \"open\"` or \"closed\"",
        );
    }
    let lease = match shared.value.as_str() {
        "strict" => None,
        share => Some(share_of(share).unwrap_or_else(|| {
            let what =
                format!("`shared` must be \"no\", \"strict\" or a part from \"0.1%\" to \"50%\", not \"{share}\"");
            section.problem_at(shared.at, what);
            1
        })),
    };
    Some(Sharing { lease, down, replicas: common.replicas.unwrap_or(1) })
}

/// In ten-thousandths.
fn share_of(text: &str) -> Option<u64> {
    let percent: f64 = text.strip_suffix('%')?.trim().parse().ok()?;
    (0.1..=50.0).contains(&percent).then(|| (percent * 100.0).round() as u64)
}

/// As it is written, and what it means.
fn mode(section: &Section<'_, '_>) -> (&'static str, Mode) {
    let word = section.word("mode", &["hard", "soft", "throttle"]).unwrap_or("hard");
    let pace = section.string("throttle");
    let mode = match (word, &pace) {
        ("soft", None) => Mode::Soft,
        ("throttle", Some(pace)) => throttle(section, pace),
        ("throttle", None) => {
            section.problem("`mode = \"throttle\"` needs to know how many: `throttle = \"10/minute\"`");
            Mode::Hard
        }
        (_, None) => Mode::Hard,
        (_, Some(pace)) => {
            section.problem_at(pace.at, "`throttle` means something where `mode = \"throttle\"`");
            Mode::Hard
        }
    };
    (word, mode)
}

fn throttle(section: &Section<'_, '_>, pace: &At<String>) -> Mode {
    let parsed = pace.value.split_once('/').and_then(|(requests, per)| {
        let requests = requests
            .trim()
            .parse()
            .ok()
            .filter(|requests| (1..=u64::from(REQUESTS_PER_MINUTE_MAX)).contains(requests))?;
        let per = [Per::Second, Per::Minute].into_iter().find(|one| one.as_str() == per.trim())?;
        Some(Mode::Throttle { requests, per })
    });
    parsed.unwrap_or_else(|| {
        let what =
            format!("`throttle` must be requests a second or a minute such as \"10/minute\", not \"{}\"", pace.value);
        section.problem_at(pace.at, what);
        Mode::Hard
    })
}

fn limit(section: &Section<'_, '_>, of: Of, amount: &At<f64>) -> u64 {
    if of == Of::Usd {
        return NanoUsd::from_usd(amount.value).map_or_else(
            |why| {
                section.problem_at(amount.at, format!("`{}.limit` {why}", section.name()));
                0
            },
            |usd| usd.0,
        );
    }
    if amount.value.fract() != 0.0 || !(1.0..=AMOUNT_MAX as f64).contains(&amount.value) {
        let what = format!("`{}.limit` must be a whole number from 1 to {AMOUNT_MAX}", section.name());
        section.problem_at(amount.at, what);
        return 1;
    }
    // Below 2⁵³: every whole number has a float of its own.
    amount.value as u64
}

fn by(section: &Section<'_, '_>) -> Vec<Dimension> {
    let names = section.strings("by").unwrap_or_default();
    let known = Dimension::ALL.map(|dimension| (dimension.as_str(), dimension));
    names.iter().filter_map(|name| one_of(section, name, &known)).collect()
}

fn only(section: &Section<'_, '_>) -> Vec<(Only, At<String>)> {
    let known: Vec<(&str, Only)> = Only::all().map(|only| (only.as_str(), only)).collect();
    let only = section.texts("only").unwrap_or_default();
    only.into_iter().filter_map(|(name, value)| Some((one_of(section, &name, &known)?, value))).collect()
}

fn one_of<T: Copy>(section: &Section<'_, '_>, name: &At<String>, known: &[(&'static str, T)]) -> Option<T> {
    let found = known.iter().find(|(word, _)| *word == name.value).map(|(_, meant)| *meant);
    if found.is_none() {
        let words: Vec<&str> = known.iter().map(|(word, _)| *word).collect();
        let hint = did_you_mean(&name.value, words.iter().copied());
        let what = format!("`{}` is none of {}{hint}", name.value, words.join(", "));
        section.problem_at(name.at, what);
    }
    found
}

fn time_zone(section: &Section<'_, '_>, zone: &At<String>) -> TimeZone {
    TimeZone::get(&zone.value).unwrap_or_else(|_| {
        let what = format!("there is no time zone `{}`; use a name such as \"Europe/Berlin\"", zone.value);
        section.problem_at(zone.at, what);
        TimeZone::UTC
    })
}

/// A rule as the key store keeps it: its name, and the words of a `[[limits.rules]]`, as JSON.
///
/// # Errors
/// Every problem, in the words that the file's would have.
pub fn stored_rule(name: &str, words: &Map<String, Value>, common: Common) -> Result<Arc<Rule>, String> {
    read_stored(name, words, common).map(|written| written.rule)
}

/// As `stored_rule`, and what the rule is about must be there now.
///
/// # Errors
/// Likewise.
pub fn check_rule(name: &str, words: &Map<String, Value>, config: &Config) -> Result<Arc<Rule>, String> {
    let written = [read_stored(name, words, config.gateway.common)?];
    let mut problems = Vec::new();
    check(&written, &config.routes, &config.models, |_, what| problems.push(what));
    let [written] = written;
    if problems.is_empty() { Ok(written.rule) } else { Err(problems.join("; ")) }
}

fn read_stored(name: &str, words: &Map<String, Value>, common: Common) -> Result<Written, String> {
    if words.contains_key("name") {
        return Err("unknown key `rule.name`: a rule is called what it is put as".to_owned());
    }
    // The file's reader reads it: one set of rules for what a rule may say.
    let words = Value::from_iter([("name".to_owned(), Value::from(name))].into_iter().chain(words.clone()));
    let text = toml::to_string(&Value::from_iter([("rule".to_owned(), words)]))
        .map_err(|error| format!("the rule cannot be read: {error}"))?;
    let source = Source::new(Path::new("rule"), &text);
    let table = source.parse();
    let root = source.root(&table);
    let written = root.section("rule").and_then(|section| {
        let name = section.string("name")?;
        check_name(&section, &name, &[]);
        let written = rule(&section, Some(name), common);
        section.finish();
        written
    });
    let problems: Vec<String> = source.into_parts().0.0.into_iter().map(|problem| problem.what).collect();
    written.filter(|_| problems.is_empty()).ok_or_else(|| problems.join("; "))
}

/// What rules are about must be there. (Keys and tenants may yet come.)
pub(super) fn check(
    written: &[Written],
    routes: &[RouteConfig],
    models: &std::collections::BTreeMap<String, ModelConfig>,
    mut problem: impl FnMut(usize, String),
) {
    let public = || models.iter().filter(|(_, model)| model.public).map(|(name, _)| name.as_str());
    let routes: Vec<&str> = routes.iter().map(|route| route.name.as_str()).chain(public()).collect();
    let models: Vec<&str> = models.keys().map(String::as_str).collect();
    for (only, name) in written.iter().flat_map(|written| &written.only) {
        let known = match only {
            Only::By(Dimension::Route) => &routes,
            Only::By(Dimension::Model) => &models,
            _ => continue,
        };
        if !known.contains(&name.value.as_str()) {
            let hint = did_you_mean(&name.value, known.iter().copied());
            problem(name.at, format!("there is no {} `{}`{hint}", only.as_str(), name.value));
        }
    }
}
