//! models.dev's `api.json`: providers with models, prices in US dollars per million tokens.

use serde_json::{Map, Value};

use super::Listed;

const BUCKETS: [&str; 5] = ["input", "cache_read", "cache_write", "output", "reasoning"];

/// Prompts of more tokens than this cost what the list says under this name.
const TIER: (&str, u64) = ("context_over_200k", 200_000);

fn models(provider: &Value) -> Option<&Map<String, Value>> {
    provider.get("models")?.as_object()
}

pub(super) fn names(list: &Map<String, Value>) -> Vec<String> {
    let of = |(provider, value): (&String, &Value)| -> Vec<String> {
        models(value).into_iter().flatten().map(|(model, _)| format!("{provider}/{model}")).collect()
    };
    list.iter().flat_map(of).collect()
}

/// `name` is `provider/model`; `None` without a price of anything.
pub(super) fn listed(list: &Map<String, Value>, name: &str) -> Option<Listed> {
    let (provider, model) = name.split_once('/')?;
    let mut listed = Listed::default();
    for (key, value) in models(list.get(provider)?)?.get(model)?.get("cost")?.as_object()? {
        match (bucket(key), value) {
            (Some(bucket), Value::Number(usd)) => {
                listed.standard.rates.extend(usd.as_f64().map(|usd| (bucket, usd)));
            }
            (None, Value::Object(tier)) if key == TIER.0 => {
                let rates = listed.standard.tiers.entry(TIER.1).or_default();
                for (within, usd) in tier {
                    match bucket(within).zip(usd.as_f64()) {
                        Some((bucket, usd)) => drop(rates.insert(bucket, usd)),
                        None => listed.skipped.push(format!("{key}.{within}")),
                    }
                }
            }
            _ => listed.skipped.push(key.clone()),
        }
    }
    (!listed.standard.rates.is_empty()).then_some(listed)
}

fn bucket(key: &str) -> Option<&'static str> {
    BUCKETS.into_iter().find(|bucket| *bucket == key)
}
