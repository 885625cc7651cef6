//! Adds to the sums by the hour.

use rusqlite::{Transaction, params_from_iter, types::Value};

use super::super::super::super::row::Row;
use super::super::hours::{GROUP, SUMMED, Users};

/// Adds rows that are new to the sums of their hours.
pub(super) fn add(transaction: &Transaction<'_>, users: &mut Users, rows: &[&Row]) -> rusqlite::Result<()> {
    let rows = || rows.iter().copied();
    for hour in users.unknown(rows()) {
        let mut query = transaction.prepare_cached("SELECT DISTINCT user_id FROM spend_hour WHERE hour = ?")?;
        let known = query.query_map([hour], |row| row.get(0))?.collect::<Result<_, _>>()?;
        users.learn(hour, known);
    }
    let mut add = transaction.prepare_cached(&upsert())?;
    for ((hour, group), sums) in users.group(rows()) {
        let group = group.map(|part| Value::Text(part.to_owned()));
        let values = [Value::Integer(hour)].into_iter().chain(group).chain(sums.columns().map(Value::Integer));
        add.execute(params_from_iter(values))?;
    }
    Ok(())
}

fn upsert() -> String {
    let places = vec!["?"; 1 + GROUP.len() + SUMMED.len()].join(", ");
    let more = SUMMED.map(|column| format!("{column} = {column} + excluded.{column}")).join(", ");
    let (group, summed) = (GROUP.join(", "), SUMMED.join(", "));
    format!(
        "INSERT INTO spend_hour (hour, {group}, {summed}) VALUES ({places})
         ON CONFLICT (hour, {group}) DO UPDATE SET {more}"
    )
}
