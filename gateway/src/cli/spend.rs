//! `glassgate spend`: the ledger, summed.

use std::collections::HashMap;

use clap::{Args, ValueEnum as _};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::{Outcome, Place, keys, ledger, text, when};
use crate::accounting::ledger::store::{Books, By, Period, Spend};

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
    let periods = periods(options, &*books)?;
    let mut spend = books.spend(&options.by, &periods).map_err(text)?;
    if let Some(at) = options.by.iter().position(|by| *by == By::Key) {
        let keys = keys::store(&data_dir)?.list().map_err(text)?;
        let names: HashMap<String, String> =
            keys.into_iter().map(|key| (key.who.key_id.clone(), key.who.key_name.clone())).collect();
        for Spend { by, .. } in &mut spend {
            if let Some(name) = names.get(&by[at]) {
                by[at] = format!("{name} ({})", by[at]);
            }
        }
    }
    let heads: Vec<String> =
        options.by.iter().filter_map(|by| Some(by.to_possible_value()?.get_name().to_owned())).collect();
    if options.json {
        let lines: Vec<Value> = spend.iter().map(|line| object(&heads, line)).collect();
        println!("{}", serde_json::to_string_pretty(&lines).map_err(text)?);
    } else {
        show(&heads, &spend);
    }
    Ok(())
}

/// The days that are asked for, or all of the time as one.
fn periods(options: &Options, books: &dyn Books) -> Result<Vec<Period>, String> {
    let now = Timestamp::now();
    let hours = options.hours.map(|hours| format!("{hours}h"));
    let asked = when::Between { since: options.asked.since.clone().or(hours), ..options.asked.clone() };
    let when::Times { since, until, zone } = asked.read(now)?;
    if options.by.contains(&By::Day) {
        let first = || Timestamp::from_second(books.first_hour().ok().flatten()?.checked_mul(3600)?).ok();
        return when::days(since.or_else(first).unwrap_or(now), until.unwrap_or(now), &zone);
    }
    let (first_ns, past_ns) = (since.map_or(0, when::nanoseconds), until.map_or(i64::MAX, when::nanoseconds));
    Ok(vec![Period { name: String::new(), first_ns, past_ns }])
}

/// A line as JSON: each group under its own word, all of them as `name`.
fn object(heads: &[String], line: &Spend) -> Value {
    let mut object: Map<String, Value> = heads.iter().cloned().zip(line.by.iter().cloned().map(Value::from)).collect();
    object.insert("name".into(), line.by.join(", ").into());
    let sums = json!({
        "requests": line.requests,
        "input_tokens": line.input_tokens,
        "output_tokens": line.output_tokens,
        "billed_nano_usd": line.billed.0,
        "provider_cost_nano_usd": line.provider_cost.0,
    });
    object.extend(sums.as_object().cloned().unwrap_or_default());
    Value::Object(object)
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
