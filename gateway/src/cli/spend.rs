//! `glassgate spend`: the ledger, summed.

use clap::Args;
use serde_json::Value;

use super::{Outcome, Place, ledger, text};
use crate::accounting::ledger::store::{By, Spend};
use crate::admin::spend::{head, name_keys, object, periods};
use crate::auth::store::KeyStore;
use crate::when;

#[derive(Args)]
pub struct Options {
    /// What to sum by; several with commas, such as `tenant,day`
    #[arg(long, value_enum, default_value = "key", value_delimiter = ',')]
    by: Vec<By>,
    /// Only the last so many hours
    #[arg(long, value_name = "HOURS", conflicts_with = "since")]
    hours: Option<u32>,
    #[command(flatten)]
    asked: when::Between,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn run(place: &Place, options: &Options) -> Outcome {
    let data_dir = place.data_dir()?;
    let books = ledger(&place.store(&data_dir)?)?;
    let hours = options.hours.map(|hours| format!("{hours}h"));
    let between = when::Between { since: options.asked.since.clone().or(hours), ..options.asked.clone() };
    let periods = periods(&options.by, &between, &*books)?;
    let mut spend = books.spend(&options.by, &periods).map_err(text)?;
    let store = KeyStore::open(&place.key_store(&data_dir)?).map_err(text)?;
    name_keys(&options.by, &mut spend, &store).map_err(text)?;
    let heads: Vec<String> = options.by.iter().copied().map(head).collect();
    if options.json {
        let lines: Vec<Value> = spend.iter().map(|line| object(&options.by, line)).collect();
        println!("{}", serde_json::to_string_pretty(&lines).map_err(text)?);
    } else {
        show(&heads, &spend);
    }
    Ok(())
}

fn show(heads: &[String], spend: &[Spend]) {
    let wide = |at: usize| spend.iter().map(|line| line.by[at].chars().count()).max().unwrap_or(0).max(12);
    let widths: Vec<usize> = (0..heads.len()).map(wide).collect();
    let groups = |texts: &[String]| -> String {
        texts.iter().zip(&widths).map(|(text, width)| format!("{text:width$}  ")).collect()
    };
    println!(
        "{}{:>9} {:>13} {:>13} {:>16} {:>16}",
        groups(heads),
        "requests",
        "input tokens",
        "output tokens",
        "billed USD",
        "our cost USD"
    );
    for line in spend {
        println!(
            "{}{:>9} {:>13} {:>13} {:>16} {:>16}",
            groups(&line.by),
            line.requests,
            line.input_tokens,
            line.output_tokens,
            line.billed.to_string(),
            line.provider_cost.to_string()
        );
    }
}
