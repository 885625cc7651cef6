//! `prices.toml`: what it costs.

use std::collections::BTreeMap;

use time::format_description::well_known::Rfc3339;
use time::macros::format_description;
use time::{Date, OffsetDateTime};

use super::problem::did_you_mean;
use super::reader::Section;
use super::{ModelConfig, NAME_CHARS_MAX};
use crate::accounting::core::{NanoUsd, PicoPerToken};
use crate::accounting::price::{Price, Prices, Rates, Tariff, Tier};
use crate::accounting::row::Service;

/// Longer prompts than any model reads.
const TIER_MAX: u64 = 1 << 30;

#[derive(Clone, Debug, Default)]
pub struct PricesConfig {
    pub version: String,
    pub models: BTreeMap<String, Prices>,
}

pub(super) fn prices(root: Section<'_, '_>, models: &BTreeMap<String, ModelConfig>) -> PricesConfig {
    let version = root.string("version");
    if version.as_ref().is_none_or(|version| version.value.is_empty() || version.value.len() > NAME_CHARS_MAX) {
        root.problem("`version` is missing or too long: it goes onto every ledger row, so give prices a date such as \"2026-11-01\"");
    }
    let mut prices =
        PricesConfig { version: version.map_or(String::new(), |version| version.value), models: BTreeMap::new() };
    for (name, section) in root.sections("models") {
        if !models.contains_key(&name.value) {
            let hint = did_you_mean(&name.value, models.keys().map(String::as_str));
            section.problem_at(name.at, format!("there is no model `{}` in the routes file{hint}", name.value));
        }
        let device_hour = usd(&section, "device_hour");
        let first = price(&section, device_hour);
        let changes = changes(&section, device_hour);
        section.finish();
        prices.models.insert(name.value, Prices { first, changes });
    }
    root.finish();
    prices
}

/// Prices that hold from a day on, each complete in itself.
fn changes(section: &Section<'_, '_>, device_hour: NanoUsd) -> Vec<(i64, Price)> {
    let mut changes: Vec<(i64, Price)> = Vec::new();
    for change in section.list("change") {
        let (from, price) = (change.string("from"), price(&change, device_hour));
        for bucket in ["input", "output"] {
            if section.has(bucket) && !change.has(bucket) {
                change.problem(format!(
                    "`{}.{bucket}` is missing: a change is complete in itself (0 for free)",
                    change.name()
                ));
            }
        }
        match from.and_then(|from| instant(&from.value)) {
            None => change.problem(format!(
                "`{}.from` must say since when these prices hold: \"2026-12-01\" (0:00 UTC) or \"2026-12-01T09:00:00+01:00\"",
                change.name()
            )),
            Some(from) if changes.last().is_some_and(|(before, _)| *before >= from) => {
                change.problem(format!("`{}.from` is not later than that of the change before it", change.name()));
            }
            Some(from) => changes.push((from, price)),
        }
        change.finish();
    }
    changes
}

/// Nanoseconds since the Unix epoch.
fn instant(text: &str) -> Option<i64> {
    let day = || Some(Date::parse(text, format_description!("[year]-[month]-[day]")).ok()?.midnight().assume_utc());
    let at = OffsetDateTime::parse(text, &Rfc3339).ok().or_else(day)?;
    i64::try_from(at.unix_timestamp_nanos()).ok()
}

fn price(section: &Section<'_, '_>, device_hour: NanoUsd) -> Price {
    let (standard, named) = tariff(section, None);
    let mut services = Vec::new();
    for (name, service) in section.sections("service") {
        let known = Service::parse(&name.value).filter(|service| Service::PRICED.contains(service));
        if known.is_none() {
            let words = Service::PRICED.map(Service::as_str);
            section.problem_at(
                name.at,
                format!(
                    "`{}.service` has no `{}`{}; there are {}, and what has none of them costs what stands above",
                    section.name(),
                    name.value,
                    did_you_mean(&name.value, words.into_iter()),
                    words.join(", ")
                ),
            );
        }
        services.extend(known.zip(Some(tariff(&service, Some((&standard, &named))).0)));
        service.finish();
    }
    Price { standard, services: services.into(), device_hour, is_missing: false }
}

/// What one way to be served costs. What it does not name is as in what it is said beside.
fn tariff(section: &Section<'_, '_>, beside: Option<(&Tariff, &Named)>) -> (Tariff, Named) {
    let mut named = Named::read(section);
    if let Some((_, others)) = beside {
        named = named.or(others);
    }
    let mut tiers: Vec<Tier> = Vec::new();
    for tier in section.list("tier") {
        let (above, rates) = (tier.integer("above", 1..=TIER_MAX), Named::read(&tier).or(&named).rates());
        match above {
            None => tier.problem(format!(
                "`{}.above` must say which prompts are dearer: those of more tokens than this",
                tier.name()
            )),
            Some(above) if tiers.last().is_some_and(|last| last.above >= above) => {
                tier.problem(format!("`{}.above` is not higher than that of the tier before it", tier.name()));
            }
            Some(above) => tiers.push(Tier { above, rates }),
        }
        tier.finish();
    }
    let other = |of: fn(&Tariff) -> NanoUsd| beside.map_or(NanoUsd(0), |(tariff, _)| of(tariff));
    let fee = |key: &str, other: NanoUsd| {
        let said = usd(section, key);
        if section.has(key) { said } else { other }
    };
    let tariff = Tariff {
        rates: named.rates(),
        tiers: match beside {
            Some((others, _)) if !section.has("tier") => others.tiers.clone(),
            _ => tiers.into(),
        },
        image: fee("image", other(|tariff| tariff.image)),
        request: fee("request", other(|tariff| tariff.request)),
    };
    (tariff, named)
}

/// The rates that a table names.
struct Named {
    input: Option<PicoPerToken>,
    cache_read: Option<PicoPerToken>,
    cache_write: Option<PicoPerToken>,
    output: Option<PicoPerToken>,
    reasoning: Option<PicoPerToken>,
}

impl Named {
    fn read(section: &Section<'_, '_>) -> Named {
        let rate = |key: &str| {
            let usd = section.number(key)?;
            PicoPerToken::from_usd_per_million(usd.value)
                .map_err(|why| section.problem_at(usd.at, format!("`{}.{key}` {why}", section.name())))
                .ok()
        };
        Named {
            input: rate("input"),
            cache_read: rate("cache_read"),
            cache_write: rate("cache_write"),
            output: rate("output"),
            reasoning: rate("reasoning"),
        }
    }

    fn or(self, other: &Named) -> Named {
        Named {
            input: self.input.or(other.input),
            cache_read: self.cache_read.or(other.cache_read),
            cache_write: self.cache_write.or(other.cache_write),
            output: self.output.or(other.output),
            reasoning: self.reasoning.or(other.reasoning),
        }
    }

    /// Tokens that are not priced apart cost what others of the prompt, or of the answer, do.
    fn rates(&self) -> Rates {
        let (input, output) = (self.input.unwrap_or_default(), self.output.unwrap_or_default());
        Rates {
            input,
            cache_read: self.cache_read.unwrap_or(input),
            cache_write: self.cache_write.unwrap_or(input),
            output,
            reasoning: self.reasoning.unwrap_or(output),
        }
    }
}

fn usd(section: &Section<'_, '_>, key: &str) -> NanoUsd {
    section.number(key).map_or(NanoUsd(0), |usd| {
        NanoUsd::from_usd(usd.value).unwrap_or_else(|why| {
            section.problem_at(usd.at, format!("`{}.{key}` {why}", section.name()));
            NanoUsd(0)
        })
    })
}
