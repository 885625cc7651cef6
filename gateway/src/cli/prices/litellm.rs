//! LiteLLM's price map: an object of models, prices in US dollars a token under names that hold the tier.

use serde_json::{Map, Value};

use super::Listed;

/// Their names of our buckets.
const BUCKETS: [(&str, &str); 5] = [
    ("input_cost_per_token", "input"),
    ("cache_read_input_token_cost", "cache_read"),
    ("cache_creation_input_token_cost", "cache_write"),
    ("output_cost_per_token", "output"),
    ("output_cost_per_reasoning_token", "reasoning"),
];

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
        let (base, tier) = match key.split_once("_above_") {
            Some((base, tier)) => (base, tier.strip_suffix("k_tokens").and_then(|k| k.parse::<u64>().ok())),
            None => (key.as_str(), Some(0)),
        };
        let bucket = BUCKETS.iter().find(|(theirs, _)| *theirs == base).map(|(_, ours)| *ours);
        match (bucket, tier, value.as_f64()) {
            (Some(bucket), Some(thousands), Some(usd)) => {
                let rates =
                    if thousands == 0 { &mut listed.rates } else { listed.tiers.entry(thousands * 1_000).or_default() };
                rates.insert(bucket, usd * 1e6);
            }
            _ if value.as_f64() == Some(0.0) || value.is_null() => {}
            _ => listed.skipped.push(key.clone()),
        }
    }
    (!listed.rates.is_empty()).then_some(listed)
}
