//! Rows that are priced again: what both stores do for it. A page of rows is read and adjusted in one transaction, so that
//! whoever is killed between two pages has done the first ones for good, and of two who do it at once the second finds what
//! the first one did.

use std::collections::BTreeMap;

use super::super::super::reprice::{Booked, Standing};
use super::super::super::row::COLUMNS;
use super::super::wal::{Id, id};
use super::StoreError;
use super::hours::{GROUP, group, group_but_users, hour};

/// Rows that are read, and adjusted where they have to be, in one transaction.
pub const PAGE: usize = 1000;

/// How far it has come: the last row, by when it began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor {
    pub started_ns: i64,
    pub id: Option<Id>,
}

impl Cursor {
    /// Before all that began then or later.
    pub fn before(started_ns: i64) -> Cursor {
        Cursor { started_ns, id: None }
    }

    /// As the four columns that rows are ordered by.
    pub fn parts(&self) -> (i64, &str, i64, &'static str) {
        match &self.id {
            Some((request, attempt, role)) => (self.started_ns, request, i64::from(*attempt), role.as_str()),
            None => (self.started_ns, "", -1, ""),
        }
    }
}

/// What every adjustment of one run says.
pub struct Run<'r> {
    pub at_ns: i64,
    pub reason: &'r str,
    /// Only rows that began before this.
    pub past_ns: i64,
}

/// A store, open to adjust what it holds.
pub trait Adjuster {
    /// Adjusts the rows after `from`, a page of them, as `judge` has it; gives how far that was, or nothing at the end.
    ///
    /// # Errors
    /// When it cannot be read or written; then nothing of the page is.
    fn page(
        &mut self,
        from: &Cursor,
        run: &Run<'_>,
        judge: &mut dyn FnMut(&Booked) -> Option<Standing>,
    ) -> Result<Option<Cursor>, StoreError>;
}

/// One row's next adjustment.
pub struct Adjustment {
    pub id: Id,
    /// From 0.
    pub number: i64,
    pub before: Standing,
    pub after: Standing,
}

/// By how much sums of an hour change: billed, and what it cost us.
pub type Differences<'r> = BTreeMap<(i64, i64, [&'r str; GROUP.len()]), [i64; 2]>;

/// What one page comes to. `rows`: with the log of each.
pub fn decide<'r>(
    rows: &'r [(Booked, i64)],
    judge: &mut dyn FnMut(&Booked) -> Option<Standing>,
) -> (Vec<Adjustment>, Differences<'r>) {
    let (mut adjustments, mut differences) = (Vec::new(), Differences::new());
    for (booked, log) in rows {
        let Some(after) = judge(booked) else { continue };
        let Booked { row, standing, adjustments: number } = booked;
        let [billed, cost] =
            differences.entry((hour(row), *log, group(row, row.user_id.as_deref().unwrap_or_default()))).or_default();
        *billed = billed.saturating_add(signed(after.billed.0) - signed(standing.billed.0));
        *cost = cost.saturating_add(signed(after.provider_cost.0) - signed(standing.provider_cost.0));
        adjustments.push(Adjustment { id: id(row), number: *number, before: standing.clone(), after });
    }
    (adjustments, differences)
}

/// Stores' integers are signed.
pub fn signed(amount: u64) -> i64 {
    i64::try_from(amount).unwrap_or(i64::MAX)
}

/// The last row of a page, if there may be more.
pub fn next(rows: &[(Booked, i64)]) -> Option<Cursor> {
    let (Booked { row, .. }, _) = rows.get(PAGE - 1)?;
    Some(Cursor { started_ns: row.started_ns, id: Some(id(row)) })
}

/// Rows with what they count as: the columns after those of a row.
pub const STANDING: &str = "COALESCE(billed_after_nano_usd, billed_nano_usd),
    COALESCE(provider_cost_after_nano_usd, provider_cost_nano_usd), COALESCE(price_version_after, price_version),
    COALESCE(unpriced_after, unpriced), COALESCE(number + 1, 0)";

/// … where these stand in a result.
pub const STANDING_AT: usize = COLUMNS.len();

/// Each row's last adjustment, if it has one.
pub const ADJUSTED: &str = "LEFT JOIN adjustment ON adjustment.request_id = ledger.request_id
        AND adjustment.attempt = ledger.attempt AND adjustment.role = ledger.role
        AND NOT EXISTS (SELECT 1 FROM adjustment AS later WHERE later.request_id = adjustment.request_id
            AND later.attempt = adjustment.attempt AND later.role = adjustment.role
            AND later.number = adjustment.number + 1)";

/// The columns of an adjustment.
pub const COLUMNS_OF_ONE: [&str; 14] = [
    "request_id",
    "attempt",
    "role",
    "number",
    "adjusted_ns",
    "reason",
    "billed_before_nano_usd",
    "billed_after_nano_usd",
    "provider_cost_before_nano_usd",
    "provider_cost_after_nano_usd",
    "price_version_before",
    "price_version_after",
    "unpriced_before",
    "unpriced_after",
];

/// A page of rows after a place (`?1` to `?4`) that began before `?5`.
pub fn page(log: &str) -> String {
    let columns = super::sql::columns();
    format!(
        "SELECT {columns}, {STANDING}, {log} FROM ledger {ADJUSTED}
         WHERE started_ns >= ?1 AND started_ns < ?5
           AND (started_ns, ledger.request_id, ledger.attempt, ledger.role) > (?1, ?2, ?3, ?4)
         ORDER BY started_ns, ledger.request_id, ledger.attempt, ledger.role LIMIT {PAGE}"
    )
}

/// Changes the sums of one hour by `?1` and `?2`. The hour is `?3`, then come the columns of `GROUP`.
pub fn shift(of_log: &str) -> String {
    let group = GROUP.iter().zip(4..).map(|(column, place)| format!("{column} = ?{place}"));
    format!(
        "UPDATE spend_hour SET billed_adjusted_nano_usd = billed_adjusted_nano_usd + ?1,
             provider_cost_adjusted_nano_usd = provider_cost_adjusted_nano_usd + ?2
         WHERE hour = ?3 AND {} {of_log}",
        group.collect::<Vec<_>>().join(" AND ")
    )
}

/// Where the user of a group stands.
pub const USER_AT: usize = 2;

/// Rows must have the sums that they were added to.
pub fn without_sum(hour: i64) -> StoreError {
    StoreError(format!("hour {hour} has rows that its sums do not tell of; `glassgate ledger verify` says which"))
}

/// Adjustments that do not begin with what the row or the one before says, of rows that are kept.
pub fn unfounded(kept_from: &str, most: usize) -> String {
    let follows = |before: &str, after: &str| {
        ["billed", "provider_cost"]
            .map(|what| format!("one.{what}_before_nano_usd = {before}.{what}{after}_nano_usd"))
            .into_iter()
            .chain([format!("one.price_version_before = {before}.price_version{after}")])
            .collect::<Vec<_>>()
            .join(" AND ")
    };
    format!(
        "SELECT one.request_id, one.attempt, one.role, one.number FROM adjustment AS one
         LEFT JOIN ledger ON ledger.request_id = one.request_id AND ledger.attempt = one.attempt AND ledger.role = one.role
         LEFT JOIN adjustment AS previous ON previous.request_id = one.request_id AND previous.attempt = one.attempt
             AND previous.role = one.role AND previous.number = one.number - 1
         WHERE one.request_id >= '{kept_from}' AND NOT COALESCE(
             CASE WHEN one.number = 0 THEN {of_row} ELSE ledger.attempt IS NOT NULL AND {of_one} END, FALSE) LIMIT {most}",
        of_row = follows("ledger", ""),
        of_one = follows("previous", "_after"),
    )
}

/// As words.
pub fn unfounded_in_words(request: &str, attempt: i64, role: &str, number: i64) -> String {
    format!(
        "adjustment {number} of request {request} attempt {attempt} {role}: there is no row, or none before it, that says what it begins with"
    )
}

/// Groups of hours that are adjusted by something else than their rows, of hours after this one.
pub fn uneven(after: i64) -> String {
    let group = group_but_users();
    let of_row = group.split(", ").map(|column| format!("ledger.{column}")).collect::<Vec<_>>().join(", ");
    format!(
        "SELECT hour, {group}, {sums} FROM (
             SELECT hour, {group}, billed_adjusted_nano_usd AS billed, provider_cost_adjusted_nano_usd AS cost
             FROM spend_hour WHERE hour > {after}
             UNION ALL
             SELECT started_ns / {HOUR_NS}, {of_row}, billed_before_nano_usd - billed_after_nano_usd,
                    provider_cost_before_nano_usd - provider_cost_after_nano_usd
             FROM adjustment JOIN ledger ON ledger.request_id = adjustment.request_id
                 AND ledger.attempt = adjustment.attempt AND ledger.role = adjustment.role
             WHERE started_ns / {HOUR_NS} > {after}
         ) AS both_sides GROUP BY hour, {group} HAVING SUM(billed) <> 0 OR SUM(cost) <> 0",
        HOUR_NS = super::hours::HOUR_NS,
        sums = super::sql::sums(&["billed", "cost"])
    )
}

/// As words. `off`: by how much.
pub fn uneven_in_words(hour: i64, group: &[String], [billed, cost]: [i64; 2]) -> String {
    let group: Vec<&str> = group.iter().map(String::as_str).filter(|part| !part.is_empty()).collect();
    format!(
        "{} {}: it is adjusted by {billed:+} billed_nano_usd and {cost:+} provider_cost_nano_usd more than its rows are",
        super::hours::called(hour),
        group.join(" ")
    )
}
