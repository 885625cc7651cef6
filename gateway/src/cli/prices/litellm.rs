//! LiteLLM's price map: an object of models, prices in US dollars a token under names that hold the tier.

use serde_json::{Map, Value};

use super::{Listed, Table};

/// Their names of our buckets.
const BUCKETS: [(&str, &str); 5] = [
    ("input_cost_per_token", "input"),
    ("cache_read_input_token_cost", "cache_read"),
    ("cache_creation_input_token_cost", "cache_write"),
    ("output_cost_per_token", "output"),
    ("output_cost_per_reasoning_token", "reasoning"),
];

/// Their names of one image, and of ways to be served.
const IMAGE: &str = "input_cost_per_image";
const SERVICES: [(&str, &str); 3] = [("_flex", "flex"), ("_priority", "priority"), ("_batches", "batch")];

pub(super) fn names(list: &Map<String, Value>) -> Vec<String> {
    list.keys().cloned().collect()
}

/// `None` without a price of anything.
pub(super) fn listed(list: &Map<String, Value>, name: &str) -> Option<Listed> {
    let mut listed = Listed::default();
    for (key, value) in list.get(name)?.as_object()? {
        if !key.contains("cost") {
            continue;
        }
        let service = SERVICES.iter().find_map(|(theirs, ours)| Some((key.strip_suffix(theirs)?, *ours)));
        let (of_tier, service) = service.map_or((key.as_str(), None), |(key, service)| (key, Some(service)));
        let (base, tier) = match of_tier.split_once("_above_") {
            Some((base, tier)) => (base, tier.strip_suffix("k_tokens").and_then(|k| k.parse::<u64>().ok())),
            None => (of_tier, Some(0)),
        };
        let bucket = BUCKETS.iter().find(|(theirs, _)| *theirs == base).map(|(_, ours)| *ours);
        match (bucket, tier, value.as_f64()) {
            (Some(bucket), Some(thousands), Some(usd)) => {
                let table = table(&mut listed, service);
                let rates =
                    if thousands == 0 { &mut table.rates } else { table.tiers.entry(thousands * 1_000).or_default() };
                rates.insert(bucket, usd * 1e6);
            }
            (None, Some(0), Some(usd)) if base == IMAGE && usd != 0.0 => table(&mut listed, service).image = Some(usd),
            _ if value.as_f64() == Some(0.0) || value.is_null() => {}
            _ => listed.skipped.push(key.clone()),
        }
    }
    (!listed.standard.rates.is_empty()).then_some(listed)
}

fn table<'l>(listed: &'l mut Listed, service: Option<&'static str>) -> &'l mut Table {
    match service {
        Some(service) => listed.services.entry(service).or_default(),
        None => &mut listed.standard,
    }
}
