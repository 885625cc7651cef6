//! `GET /admin/spend`: the ledger, summed.

use std::collections::HashMap;

use clap::ValueEnum;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::asked::Asked;
use super::reply::{Answer, Problem, Reply};
use crate::accounting::ledger::store::{self, Books, By, Period, Spend};
use crate::app::App;
use crate::auth::store::KeyStore;
use crate::when::{Between, Times, days, nanoseconds};

pub fn answer(app: &App, asked: &Asked) -> Answer {
    let by = asked.said("by").unwrap_or("key").split(',').map(|word| {
        By::from_str(word, false).map_err(|_| {
            let known: Vec<String> = By::value_variants().iter().map(|by| head(*by)).collect();
            Problem::invalid("by", &format!("`by` knows {}, not `{word}`", known.join(", ")))
        })
    });
    let by = by.collect::<Result<Vec<By>, Problem>>()?;
    let said = |name: &str| asked.said(name).map(str::to_owned);
    let between = Between { since: said("since"), until: said("until"), zone: said("zone").unwrap_or("UTC".into()) };
    let failed =
        |why: store::StoreError| Problem::new(http::StatusCode::INTERNAL_SERVER_ERROR, "store_failed", why.to_string());
    let books = app.snapshot.load().config.gateway.store().books().map_err(failed)?;
    let periods = periods(&by, &between, &*books).map_err(|why| Problem::invalid("since", &why))?;
    let mut spend = books.spend(&by, &periods).map_err(failed)?;
    name_keys(&by, &mut spend, &app.control.store()?)?;
    Ok(Reply::list(spend.iter().map(|line| object(&by, line)).collect(), None))
}

/// As it is said.
pub fn head(by: By) -> String {
    by.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// Keys by their names, where they have one.
///
/// # Errors
/// When the store cannot be read.
pub fn name_keys(by: &[By], spend: &mut [Spend], keys: &KeyStore) -> Result<(), store::StoreError> {
    let Some(at) = by.iter().position(|by| *by == By::Key) else { return Ok(()) };
    let keys = keys.list()?.into_iter().map(|key| (key.who.key_id.clone(), key.who.key_name.clone()));
    let names: HashMap<String, String> = keys.collect();
    for Spend { by, .. } in spend {
        if let Some(name) = names.get(&by[at]) {
            by[at] = format!("{name} ({})", by[at]);
        }
    }
    Ok(())
}

/// The days that are asked for, or all of the time as one.
///
/// # Errors
/// What is no time, in words for whoever asked.
pub fn periods(by: &[By], between: &Between, books: &dyn Books) -> Result<Vec<Period>, String> {
    let now = Timestamp::now();
    let Times { since, until, zone } = between.read(now)?;
    if by.contains(&By::Day) {
        let first = || Timestamp::from_second(books.first_hour().ok().flatten()?.checked_mul(3600)?).ok();
        return days(since.or_else(first).unwrap_or(now), until.unwrap_or(now), &zone);
    }
    let (first_ns, past_ns) = (since.map_or(0, nanoseconds), until.map_or(i64::MAX, nanoseconds));
    Ok(vec![Period { name: String::new(), first_ns, past_ns }])
}

/// A line as JSON: each group under its own word, all of them as `name`.
pub fn object(by: &[By], line: &Spend) -> Value {
    let groups = by.iter().map(|by| head(*by)).zip(line.by.iter().cloned().map(Value::from));
    let mut object: Map<String, Value> = groups.collect();
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
