//! `glassgate spend`: the ledger, summed.

use std::collections::HashMap;

use clap::Args;

use super::{Outcome, Place, keys, ledger, since, text};
use crate::accounting::core::NanoUsd;
use crate::accounting::ledger::sqlite::{self, GroupBy};

#[derive(Args)]
pub struct Options {
    /// What to sum by
    #[arg(long, value_enum, default_value = "key")]
    by: GroupBy,
    /// Only the last so many hours
    #[arg(long, value_name = "HOURS")]
    hours: Option<u32>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(place: &Place, options: &Options) -> Outcome {
    let data_dir = place.data_dir()?;
    let db = ledger(&data_dir)?;
    let since = since(options.hours);
    let mut spend = sqlite::spend(&db, options.by, since).map_err(text)?;
    if matches!(options.by, GroupBy::Key) {
        let names: HashMap<String, String> = keys::store(&data_dir)?
            .list()
            .map_err(text)?
            .into_iter()
            .map(|key| (key.who.key_id.clone(), key.who.key_name.clone()))
            .collect();
        for line in &mut spend {
            if let Some(name) = names.get(&line.name) {
                line.name = format!("{name} ({})", line.name);
            }
        }
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&spend).map_err(text)?);
        return Ok(());
    }
    println!(
        "{:36} {:>9} {:>13} {:>13} {:>16} {:>16}",
        format!("{:?}", options.by).to_lowercase(),
        "requests",
        "input tokens",
        "output tokens",
        "billed USD",
        "our cost USD"
    );
    for line in spend {
        println!(
            "{:36} {:>9} {:>13} {:>13} {:>16} {:>16}",
            line.name,
            line.requests,
            line.input_tokens,
            line.output_tokens,
            NanoUsd(line.billed_nano_usd).to_string(),
            NanoUsd(line.provider_cost_nano_usd).to_string()
        );
    }
    Ok(())
}
