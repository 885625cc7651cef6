//! `prices.toml`: what it costs.

use std::collections::BTreeMap;

use super::problem::did_you_mean;
use super::reader::Section;
use super::{ModelConfig, NAME_CHARS_MAX};
use crate::accounting::core::{NanoUsd, PicoPerToken, Price};

#[derive(Clone, Debug, Default)]
pub struct PricesConfig {
    pub version: String,
    pub models: BTreeMap<String, Price>,
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
        let price = |key: &str| -> Option<PicoPerToken> {
            let usd = section.number(key)?;
            match PicoPerToken::from_usd_per_million(usd.value) {
                Ok(price) => Some(price),
                Err(why) => {
                    section.problem_at(usd.at, format!("`{}.{key}` {why}", section.name()));
                    None
                }
            }
        };
        let (input, output) = (price("input").unwrap_or_default(), price("output").unwrap_or_default());
        let device_hour = section.number("device_hour").map_or(NanoUsd(0), |usd| {
            NanoUsd::from_usd(usd.value).unwrap_or_else(|why| {
                section.problem_at(usd.at, format!("`{}.device_hour` {why}", section.name()));
                NanoUsd(0)
            })
        });
        let cache_read = price("cache_read").unwrap_or(input);
        // What a request may cost is reserved before anybody knows what is cached of it.
        if cache_read > input {
            let name = section.name();
            section.problem(format!(
                "`{name}.cache_read` is above `{name}.input`: a cached token costs as much at the most"
            ));
        }
        section.finish();
        prices.models.insert(
            name.value,
            Price { input, cache_read, cache_write: input, output, reasoning: output, device_hour },
        );
    }
    root.finish();
    prices
}
