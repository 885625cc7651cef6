//! What both stores are asked in the same words.

use super::By;
use super::adjust::{ADJUSTED, STANDING};
use super::hours::{HOUR_NS, IS_SPENT, OF_A_ROW, SUMMED, group_but_users};
use crate::accounting::row::COLUMNS;

/// The columns of a row, in their order.
pub fn columns() -> String {
    COLUMNS.map(|(name, _)| format!("ledger.{name}")).join(", ")
}

/// Rows with what they count as, by when they began: from one nanosecond to another, both as SQL.
pub fn booked(first: &str, past: &str) -> String {
    let columns = columns();
    format!(
        "SELECT {columns}, {STANDING} FROM ledger {ADJUSTED} WHERE started_ns >= {first} AND started_ns < {past} ORDER BY started_ns"
    )
}

/// Sums of columns, or of what stands for them. (`SUM` alone is a decimal number in Postgres.)
pub fn sums(columns: &[&str]) -> String {
    columns.iter().map(|column| format!("CAST(COALESCE(SUM({column}), 0) AS BIGINT)")).collect::<Vec<_>>().join(", ")
}

/// Where a question about spans of time reads: whole hours from their sums, what is left from rows. `spans`: tables
/// `hours` and `edges` with columns `period`, `first` and `past`. `join`: how to join so that those come first.
pub struct Source<'s> {
    pub spans: &'s str,
    pub join: &'s str,
}

/// Spending in each period, the dearest first; where days are asked for, by them.
pub fn spend(by: &[By], Source { spans, join }: &Source<'_>) -> String {
    let names = by.iter().map(|by| by.column()).collect::<Vec<_>>().join(", ");
    let groups = (1..=by.len()).map(|at| at.to_string()).collect::<Vec<_>>().join(", ");
    let order = if by.contains(&By::Day) { "period, 4 DESC" } else { "4 DESC" };
    let order = order.replace('4', &(by.len() + 4).to_string());
    let sums = sums(&["requests", "input", "output", "billed", "cost"]);
    let tokens =
        "input_tokens + cache_read_tokens + cache_write_tokens AS input, output_tokens + reasoning_tokens AS output";
    format!(
        "WITH {spans} SELECT {names}, {sums} FROM (
             SELECT period, tenant, key_id, user_id, route, model, variant, outcome, requests, {tokens},
                    billed_nano_usd + billed_adjusted_nano_usd AS billed,
                    provider_cost_nano_usd + provider_cost_adjusted_nano_usd AS cost
             FROM hours {join} spend_hour ON hour >= first AND hour < past
             UNION ALL
             SELECT period, tenant, key_id, COALESCE(user_id, ''), route, model, variant, outcome, 1, {tokens},
                    COALESCE(billed_after_nano_usd, billed_nano_usd),
                    COALESCE(provider_cost_after_nano_usd, provider_cost_nano_usd)
             FROM edges {join} ledger ON started_ns >= first AND started_ns < past {ADJUSTED}
         ) AS spent GROUP BY {groups} ORDER BY {order}, {groups}"
    )
}

/// What limits have counted, of all logs or of one: what was billed then, whatever it was adjusted to since.
pub fn spent(Source { spans, join }: &Source<'_>, log: Option<i64>) -> String {
    let of_log = log.map_or(String::new(), |log| format!("AND log = {log}"));
    let [.., billed, _, begun, made_input, made_output] = OF_A_ROW;
    let sums = sums(&["begun", "made_input_tokens", "made_output_tokens", "billed_nano_usd"]);
    format!(
        "WITH {spans} SELECT tenant, key_id, user_id, route, model, {sums} FROM (
             SELECT tenant, key_id, user_id, route, model, begun, made_input_tokens, made_output_tokens, billed_nano_usd
             FROM hours {join} spend_hour ON hour >= first AND hour < past WHERE {IS_SPENT} {of_log}
             UNION ALL
             SELECT tenant, key_id, COALESCE(user_id, ''), route, model, {begun}, {made_input}, {made_output}, {billed}
             FROM edges {join} ledger ON started_ns >= first AND started_ns < past WHERE {IS_SPENT} {of_log}
         ) AS spent GROUP BY 1, 2, 3, 4, 5"
    )
}

/// Groups of hours whose sums are not their rows', of hours after this one. Of users some share a sum, so they are taken
/// together.
pub fn uneven(after: i64, most: usize) -> String {
    let group = group_but_users();
    let summed = SUMMED.join(", ");
    let rows = OF_A_ROW.map(|of| format!("-({of})")).join(", ");
    let off = SUMMED.map(|column| format!("SUM({column}) <> 0")).join(" OR ");
    format!(
        "SELECT hour, {group}, {sums} FROM (
             SELECT hour, {group}, {summed} FROM spend_hour WHERE hour > {after}
             UNION ALL SELECT started_ns / {HOUR_NS}, {group}, {rows} FROM ledger WHERE started_ns / {HOUR_NS} > {after}
         ) AS both_sides GROUP BY hour, {group} HAVING {off} LIMIT {most}",
        sums = sums(&SUMMED)
    )
}

/// Where ids of rows that are kept begin, or nothing.
pub const KEPT_FROM: &str = "SELECT MAX(first_id) FROM ledger_kept";
/// Sets that to `?1`, in this order; what is gone stays gone.
pub const KEEP_FROM: [&str; 2] = [
    "DELETE FROM ledger_kept WHERE first_id < ?1",
    "INSERT INTO ledger_kept SELECT CAST(?1 AS TEXT) WHERE NOT EXISTS (SELECT 1 FROM ledger_kept)",
];

/// Requests that do not have exactly one row that ends them, and how many they have.
pub fn ends(most: usize) -> String {
    let ends = "SUM(CASE WHEN outcome <> 'failed_over' THEN 1 ELSE 0 END)";
    format!(
        "SELECT request_id, CAST({ends} AS BIGINT) FROM ledger WHERE role <> 'shadow'
         GROUP BY request_id HAVING {ends} <> 1 LIMIT {most}"
    )
}
