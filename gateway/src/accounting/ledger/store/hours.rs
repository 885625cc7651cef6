//! Sums by the hour: what spending is asked of. They stay when rows go. Both stores add them in the transaction that brings
//! the rows.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::super::super::row::{Outcome, Row};
use super::super::totals::Sums;
use super::Period;
use super::months::whole_from_ns;

pub const HOUR_NS: i64 = 3_600_000_000_000;
/// Users of one hour with sums of their own; clients choose their names, so more share `other`.
pub const USERS_MAX: usize = 10_000;
/// Hours whose users are remembered.
const HOURS_MAX: usize = 4;

/// The columns that tell sums of one hour apart.
pub const GROUP: [&str; 9] =
    ["tenant", "key_id", "user_id", "route", "model", "variant", "role", "outcome", "price_version"];

/// The columns that are summed; the first counts rows, the last three are what limits have counted.
pub const SUMMED: [&str; 11] = [
    "requests",
    "input_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "output_tokens",
    "reasoning_tokens",
    "billed_nano_usd",
    "provider_cost_nano_usd",
    "begun",
    "made_input_tokens",
    "made_output_tokens",
];

/// What each of them is of one row, in SQL that both stores understand.
pub const OF_A_ROW: [&str; 11] = [
    "1",
    "input_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "output_tokens",
    "reasoning_tokens",
    "billed_nano_usd",
    "provider_cost_nano_usd",
    "CASE WHEN attempt = 0 AND outcome <> 'released' THEN 1 ELSE 0 END",
    "CASE WHEN cache IN ('none', 'miss') THEN input_tokens + cache_read_tokens + cache_write_tokens ELSE 0 END",
    "CASE WHEN cache IN ('none', 'miss') THEN output_tokens + reasoning_tokens ELSE 0 END",
];

/// The hour of some rows, and what tells them from others of it, as in `GROUP`.
pub type Group<'r> = (i64, [&'r str; GROUP.len()]);

/// What rows of one group sum up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hour {
    sums: Sums,
    /// Requests that began: no later attempt is one, and none that was released.
    begun: u64,
    /// Tokens that were made for somebody, and not told again from a cache.
    made_input: u64,
    made_output: u64,
}

impl Hour {
    fn add(&mut self, row: &Row) {
        self.sums.add(row);
        self.begun += u64::from(row.attempt == 0 && row.outcome != Outcome::Released);
        if matches!(row.cache.as_str(), "none" | "miss") {
            self.made_input = self.made_input.saturating_add(row.usage.prompt());
            self.made_output = self.made_output.saturating_add(row.usage.completion());
        }
    }

    /// In the order of `SUMMED`.
    pub fn columns(&self) -> [i64; SUMMED.len()] {
        let [rows, input, read, write, output, reasoning, billed, cost] = self.sums.named().map(|(_, sum)| sum);
        let Hour { begun, made_input, made_output, .. } = *self;
        [rows, input, read, write, output, reasoning, billed, cost, begun, made_input, made_output]
            .map(|sum| i64::try_from(sum).unwrap_or(i64::MAX))
    }
}

pub fn hour(row: &Row) -> i64 {
    row.started_ns.div_euclid(HOUR_NS)
}

/// What a row is summed by, in the order of `GROUP`. `user`: what its user is called in the hour's sums.
pub fn group<'r>(row: &'r Row, user: &'r str) -> [&'r str; GROUP.len()] {
    [
        &row.tenant,
        &row.key_id,
        user,
        &row.route,
        &row.model,
        &row.variant,
        row.role.as_str(),
        row.outcome.as_str(),
        &row.price_version,
    ]
}

/// The users of the latest hours, as far as rows were added for them.
#[derive(Default)]
pub struct Users(BTreeMap<i64, HashSet<String>>);

impl Users {
    /// Hours whose users it has to be told before their rows can be grouped.
    pub fn unknown<'r>(&self, rows: impl Iterator<Item = &'r Row>) -> BTreeSet<i64> {
        let hours = rows.filter(|row| row.user_id.is_some()).map(hour);
        hours.filter(|hour| !self.0.contains_key(hour)).collect()
    }

    /// Users that have sums of their own in an hour.
    pub fn learn(&mut self, hour: i64, users: HashSet<String>) {
        self.0.insert(hour, users);
    }

    /// Rows by what they are summed by.
    pub fn group<'r>(&mut self, rows: impl Iterator<Item = &'r Row>) -> BTreeMap<Group<'r>, Hour> {
        let mut groups: BTreeMap<_, Hour> = BTreeMap::new();
        for row in rows {
            let hour = hour(row);
            let user = self.name(hour, row.user_id.as_deref().unwrap_or_default());
            groups.entry((hour, group(row, user))).or_default().add(row);
        }
        while self.0.len() > HOURS_MAX {
            self.0.pop_first();
        }
        groups
    }

    /// What a user is called in an hour's sums.
    fn name<'u>(&mut self, hour: i64, user: &'u str) -> &'u str {
        if user.is_empty() {
            return user;
        }
        let users = self.0.entry(hour).or_default();
        if !users.contains(user) && users.len() >= USERS_MAX {
            return "other";
        }
        users.insert(user.to_owned());
        user
    }
}

/// A named span of hours, or of nanoseconds, without its end.
pub type Span<'p> = (&'p str, i64, i64);

/// Whole hours of some periods, and what is left at their ends, in nanoseconds: the first are read from sums, the others
/// from rows.
pub fn cut(periods: &[Period]) -> (Vec<Span<'_>>, Vec<Span<'_>>) {
    let (mut hours, mut edges) = (Vec::new(), Vec::new());
    for Period { name, first_ns, past_ns } in periods {
        let first = first_ns.div_euclid(HOUR_NS) + i64::from(first_ns.rem_euclid(HOUR_NS) > 0);
        let past = past_ns.div_euclid(HOUR_NS);
        if first >= past {
            edges.push((name.as_str(), *first_ns, *past_ns));
            continue;
        }
        hours.push((name.as_str(), first, past));
        edges.push((name, *first_ns, first.saturating_mul(HOUR_NS)));
        edges.push((name, past.saturating_mul(HOUR_NS), *past_ns));
    }
    edges.retain(|(_, first, past)| first < past);
    (hours, edges)
}

/// The last hour some of whose rows may not be kept, where ids begin with this.
pub fn partial(first_id: &str) -> i64 {
    whole_from_ns(first_id).div_euclid(HOUR_NS)
}

/// A copy for comparison is nobody's spending.
pub const IS_SPENT: &str = "role <> 'shadow'";

/// An hour, for people.
pub fn called(hour: i64) -> String {
    let time = time::OffsetDateTime::from_unix_timestamp(hour.saturating_mul(3600));
    time.map_or_else(|_| hour.to_string(), |time| format!("{} {:02}:00 UTC", time.date(), time.hour()))
}

/// A group of an hour whose sums are not those of its rows, in words. `off`: by how much each of `SUMMED` is.
pub fn uneven(hour: i64, group: &[String], off: &[i64]) -> String {
    let off = SUMMED.iter().zip(off).filter(|(_, off)| **off != 0).map(|(name, off)| format!("{off:+} {name}"));
    let group: Vec<&str> = group.iter().map(String::as_str).filter(|part| !part.is_empty()).collect();
    format!("{} {}: its sum is off its rows by {}", called(hour), group.join(" "), off.collect::<Vec<_>>().join(", "))
}

/// The columns of `GROUP` but for users, of whom some share a sum, as SQL.
pub fn group_but_users() -> String {
    GROUP.into_iter().filter(|column| *column != "user_id").collect::<Vec<_>>().join(", ")
}
