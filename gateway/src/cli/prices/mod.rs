//! `glassgate prices`: what models cost, and public lists of it as lines for `prices.toml`. Each list is a file and a
//! line here.

mod litellm;
mod models_dev;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use clap::{Subcommand, ValueEnum};
use serde_json::{Map, Value};

use super::{Outcome, Place, text};
use crate::accounting::core::{NanoUsd, PicoPerToken};
use crate::accounting::price::{Price, Rates, Tariff};
use crate::config::{Config, ModelSource, did_you_mean};
use crate::ports::{Clock as _, SystemClock};

#[derive(Subcommand)]
pub enum PricesCommand {
    /// Show what every model costs now, and from when on it costs something else
    Show {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print prices from a public list as lines for prices.toml
    #[command(after_help = "\
The list is a file that you downloaded, or `-` for standard input:
  curl -sSfO https://raw.githubusercontent.com/BerriAI/litellm/main/model_prices_and_context_window.json
  glassgate prices import --from litellm model_prices_and_context_window.json --model smart=gpt-4o

Read what it prints, add it to prices.toml, and give that file a new version: it stands on every row of the ledger.")]
    Import {
        /// The format of the list
        #[arg(long, value_enum)]
        from: List,
        /// The list
        file: PathBuf,
        /// A model and what the list calls it; without any, every model of an upstream by the name that it has there
        #[arg(long = "model", value_name = "NAME=THEIRS")]
        models: Vec<String>,
    },
}

#[derive(Clone, Copy, ValueEnum)]
pub enum List {
    /// LiteLLM's model_prices_and_context_window.json
    Litellm,
    /// models.dev's api.json; models are called provider/model
    #[value(name = "models.dev")]
    ModelsDev,
}

/// What a list says of a model.
#[derive(Debug, Default, PartialEq)]
struct Listed {
    standard: Table,
    /// By our names of ways to be served.
    services: BTreeMap<&'static str, Table>,
    /// Prices that have no place in ours.
    skipped: Vec<String>,
}

/// In US dollars per million tokens by our names of the buckets.
#[derive(Debug, Default, PartialEq)]
struct Table {
    rates: BTreeMap<&'static str, f64>,
    /// By the tokens above which a prompt is dearer.
    tiers: BTreeMap<u64, BTreeMap<&'static str, f64>>,
    /// US dollars for one.
    image: Option<f64>,
}

pub fn run(place: &Place, command: PricesCommand) -> Outcome {
    match command {
        PricesCommand::Show { json } => show(&place.config()?, json),
        PricesCommand::Import { from, file, models } => {
            let wanted = if models.is_empty() { upstream_models(&place.config()?)? } else { named(&models)? };
            let (lines, skipped) = import(from, &read(&file)?, &wanted)?;
            print!("{lines}");
            for what in skipped {
                eprintln!("glassgate: {what}");
            }
            Ok(())
        }
    }
}

fn read(file: &Path) -> Result<Map<String, Value>, String> {
    let mut bytes = Vec::new();
    if file == Path::new("-") {
        std::io::stdin().read_to_end(&mut bytes).map_err(text)?;
    } else {
        bytes = std::fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?;
    }
    serde_json::from_slice(&bytes).map_err(|error| format!("{}: not a JSON object: {error}", file.display()))
}

fn named(models: &[String]) -> Result<Vec<(String, String)>, String> {
    let pair = |pair: &String| {
        let pair = pair.split_once('=').filter(|(ours, theirs)| !ours.is_empty() && !theirs.is_empty());
        pair.map(|(ours, theirs)| (ours.to_owned(), theirs.to_owned()))
    };
    models
        .iter()
        .map(|model| pair(model).ok_or_else(|| format!("`--model {model}` must be NAME=THEIRS, such as smart=gpt-4o")))
        .collect()
}

fn upstream_models(config: &Config) -> Result<Vec<(String, String)>, String> {
    let theirs = config.models.iter().filter_map(|(ours, model)| match &model.source {
        ModelSource::Upstream { name, .. } => Some((ours.clone(), name.clone())),
        ModelSource::Local(_) | ModelSource::Hub(_) => None,
    });
    let theirs: Vec<_> = theirs.collect();
    if theirs.is_empty() {
        return Err("no model of routes.toml is an upstream's: say --model NAME=THEIRS".to_owned());
    }
    Ok(theirs)
}

/// Lines for `prices.toml`, and what of the list has no place there.
fn import(from: List, list: &Map<String, Value>, wanted: &[(String, String)]) -> Result<(String, Vec<String>), String> {
    let (mut lines, mut skipped) = (String::new(), Vec::new());
    for (ours, theirs) in wanted {
        let (known, listed): (Vec<String>, _) = match from {
            List::Litellm => (litellm::names(list), litellm::listed(list, theirs)),
            List::ModelsDev => (models_dev::names(list), models_dev::listed(list, theirs)),
        };
        let listed = listed.ok_or_else(|| {
            let hint = did_you_mean(theirs, known.iter().map(String::as_str));
            format!("the list has no prices of a model `{theirs}`{hint}")
        })?;
        skipped.extend(listed.skipped.iter().map(|key| format!("{theirs}: {key} is not imported")));
        let key = if ours.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_') {
            ours.clone()
        } else {
            format!("{ours:?}")
        };
        let _ = writeln!(lines, "# {theirs}");
        write_table(&mut lines, theirs, &format!("models.{key}"), &listed.standard)?;
        for (service, table) in &listed.services {
            write_table(&mut lines, theirs, &format!("models.{key}.service.{service}"), table)?;
        }
        lines.push('\n');
    }
    Ok((lines, skipped))
}

fn write_table(lines: &mut String, theirs: &str, name: &str, table: &Table) -> Result<(), String> {
    let _ = writeln!(lines, "[{name}]");
    write_rates(lines, theirs, &table.rates)?;
    if let Some(usd) = table.image {
        let usd = NanoUsd::from_usd(usd).map_err(|why| format!("{theirs}: `image` {why}"))?;
        let _ = writeln!(lines, "image = {usd}");
    }
    for (above, rates) in &table.tiers {
        let _ = writeln!(lines, "[[{name}.tier]]\nabove = {above}");
        write_rates(lines, theirs, rates)?;
    }
    Ok(())
}

fn write_rates(lines: &mut String, theirs: &str, rates: &BTreeMap<&'static str, f64>) -> Result<(), String> {
    for (bucket, usd) in rates {
        let rate = PicoPerToken::from_usd_per_million(*usd).map_err(|why| format!("{theirs}: `{bucket}` {why}"))?;
        let _ = writeln!(lines, "{bucket} = {}", decimal(rate));
    }
    Ok(())
}

/// US dollars per million tokens, exactly.
fn decimal(rate: PicoPerToken) -> String {
    let text = format!("{}.{:06}", rate.0 / 1_000_000, rate.0 % 1_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn show(config: &Config, json: bool) -> Outcome {
    let now = SystemClock.now_ns();
    let mut shown = Map::new();
    for name in config.models.keys() {
        let Some(prices) = config.prices.models.get(name) else {
            shown.insert(name.clone(), Value::Null);
            continue;
        };
        let later = prices.changes.iter().filter(|(from, _)| *from > now);
        let later: Vec<Value> = later.map(|(from, price)| object(price, [("from_ns", (*from).into())])).collect();
        shown.insert(name.clone(), object(prices.at(now), [("later", later.into())]));
    }
    let shown = serde_json::json!({"version": config.prices.version, "models": shown});
    if json {
        println!("{}", serde_json::to_string_pretty(&shown).map_err(text)?);
        return Ok(());
    }
    println!("prices {}, US dollars per million tokens", config.prices.version);
    println!(
        "{:28} {:>10} {:>11} {:>12} {:>10} {:>10}",
        "model", "input", "cache read", "cache write", "output", "reasoning"
    );
    for name in config.models.keys() {
        let Some(prices) = config.prices.models.get(name) else {
            println!("{name:28} no price: free, and counted as unpriced");
            continue;
        };
        let price = prices.at(now);
        lines(name, "  ", &price.standard);
        for (service, tariff) in price.services.iter() {
            lines(&format!("  {}", service.as_str()), "    ", tariff);
        }
        fee("  ", "an hour of the device, to us", price.device_hour);
        let changes = prices.changes.iter().filter(|(from, _)| *from > now).count();
        if changes > 0 {
            println!("  changes to come: {changes} (--json shows them)");
        }
    }
    Ok(())
}

fn lines(name: &str, indent: &str, tariff: &Tariff) {
    line(name, &tariff.rates);
    for tier in tariff.tiers.iter() {
        line(&format!("{indent}prompts above {}", tier.above), &tier.rates);
    }
    fee(indent, "an image", tariff.image);
    fee(indent, "a request", tariff.request);
}

fn fee(indent: &str, what: &str, usd: NanoUsd) {
    if usd > NanoUsd(0) {
        println!("{indent}{what}: {usd} USD");
    }
}

fn line(name: &str, rates: &Rates) {
    let Rates { input, cache_read, cache_write, output, reasoning } = rates;
    let [input, read, write, output, reasoning] =
        [input, cache_read, cache_write, output, reasoning].map(|rate| decimal(*rate));
    println!("{name:28} {input:>10} {read:>11} {write:>12} {output:>10} {reasoning:>10}");
}

fn object<const N: usize>(price: &Price, more: [(&str, Value); N]) -> Value {
    let mut object = fields(&price.standard);
    let services = price.services.iter();
    let services = services.map(|(service, tariff)| (service.as_str().to_owned(), fields(tariff).into()));
    object.insert("service".to_owned(), Value::Object(services.collect()));
    object.insert("device_hour".to_owned(), price.device_hour.to_string().into());
    object.extend(more.map(|(key, value)| (key.to_owned(), value)));
    Value::Object(object)
}

fn fields(tariff: &Tariff) -> Map<String, Value> {
    let rates = |rates: &Rates| {
        let Rates { input, cache_read, cache_write, output, reasoning } = rates;
        let all = [
            ("input", input),
            ("cache_read", cache_read),
            ("cache_write", cache_write),
            ("output", output),
            ("reasoning", reasoning),
        ];
        all.map(|(bucket, rate)| (bucket.to_owned(), Value::from(decimal(*rate)))).into_iter().collect::<Map<_, _>>()
    };
    let tier = |tier: &crate::accounting::price::Tier| {
        let mut object = rates(&tier.rates);
        object.insert("above".to_owned(), tier.above.into());
        Value::Object(object)
    };
    let mut object = rates(&tariff.rates);
    object.insert("tier".to_owned(), tariff.tiers.iter().map(tier).collect());
    object.insert("image".to_owned(), tariff.image.to_string().into());
    object.insert("request".to_owned(), tariff.request.to_string().into());
    object
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn lines(from: List, list: Value, wanted: &[(&str, &str)]) -> Result<(String, Vec<String>), String> {
        let wanted: Vec<_> = wanted.iter().map(|(ours, theirs)| ((*ours).to_owned(), (*theirs).to_owned())).collect();
        import(from, list.as_object().unwrap(), &wanted)
    }

    #[test]
    fn a_model_of_litellms_list_becomes_a_table_with_its_tiers_and_services() {
        let list = json!({
            "sample_spec": {"input_cost_per_token": 0.0},
            "gemini/gemini-2.5-pro": {
                "input_cost_per_token": 1.25e-06, "input_cost_per_token_above_200k_tokens": 2.5e-06,
                "output_cost_per_token": 1e-05, "output_cost_per_token_above_200k_tokens": 1.5e-05,
                "input_cost_per_image": 0.001_315, "input_cost_per_token_batches": 6.25e-07, "output_cost_per_token_batches": 5e-06,
                "cache_read_input_token_cost_above_200k_tokens_priority": 4.5e-07, "input_cost_per_token_priority": 2.25e-06,
                "cache_read_input_token_cost": 1.25e-07, "cache_read_input_token_cost_above_200k_tokens": 2.5e-07,
                "cache_creation_input_token_cost": 3.75e-6, "output_cost_per_reasoning_token": 2e-5,
                "input_cost_per_audio_token": 7e-07, "max_tokens": 65535, "litellm_provider": "gemini", "mode": "chat",
                "supports_vision": true, "search_context_cost_per_query": {"search_context_size_low": 0.035},
            },
        });
        let (lines, skipped) = lines(List::Litellm, list, &[("smart", "gemini/gemini-2.5-pro")]).unwrap();
        assert_eq!(
            lines,
            "# gemini/gemini-2.5-pro\n[models.smart]\ncache_read = 0.125\ncache_write = 3.75\ninput = 1.25\noutput = 10\n\
             reasoning = 20\nimage = 0.001315000\n[[models.smart.tier]]\nabove = 200000\ncache_read = 0.25\ninput = 2.5\noutput = 15\n\
             [models.smart.service.batch]\ninput = 0.625\noutput = 5\n\
             [models.smart.service.priority]\ninput = 2.25\n\
             [[models.smart.service.priority.tier]]\nabove = 200000\ncache_read = 0.45\n\n"
        );
        assert_eq!(
            skipped,
            ["input_cost_per_audio_token", "search_context_cost_per_query"]
                .map(|key| format!("gemini/gemini-2.5-pro: {key} is not imported"))
        );
    }

    #[test]
    fn a_model_of_models_dev_becomes_a_table_with_its_tier() {
        let list = json!({"google": {"id": "google", "models": {"gemini-2.5-pro": {
            "id": "gemini-2.5-pro",
            "cost": {
                "input": 1.25, "output": 10, "cache_read": 0.31, "input_audio": 1,
                "context_over_200k": {"input": 2.5, "output": 15, "cache_read": 0.625, "input_audio": 2},
            },
            "limit": {"context": 1_048_576},
        }}}});
        let (lines, skipped) = lines(List::ModelsDev, list, &[("a.b", "google/gemini-2.5-pro")]).unwrap();
        assert_eq!(
            lines,
            "# google/gemini-2.5-pro\n[models.\"a.b\"]\ncache_read = 0.31\ninput = 1.25\noutput = 10\n\
             [[models.\"a.b\".tier]]\nabove = 200000\ncache_read = 0.625\ninput = 2.5\noutput = 15\n\n"
        );
        let not = |key| format!("google/gemini-2.5-pro: {key} is not imported");
        assert_eq!(skipped, [not("input_audio"), not("context_over_200k.input_audio")]);
    }

    #[test]
    fn what_a_list_cannot_mean_is_an_error_that_names_the_model() {
        let list = json!({
            "gpt-4o": {"input_cost_per_token": 2.5e-06, "output_cost_per_token": 1e-05},
            "cheap": {"input_cost_per_token": 2.5e-13},
            "words": {"input_cost_per_token": "free"},
            "nothing": {"mode": "chat"},
        });
        for (theirs, said) in [
            ("gpt-4", "Did you mean `gpt-4o`?"),
            ("cheap", "cheap: `input` is finer than"),
            ("words", "no prices of a model `words`"),
            ("nothing", "no prices of a model `nothing`"),
        ] {
            let error = lines(List::Litellm, list.clone(), &[("x", theirs)]).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }
}
