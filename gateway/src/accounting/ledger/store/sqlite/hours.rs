//! Sums by the hour: what spending is asked of. They stay when rows go.

use std::collections::{BTreeMap, HashSet};

use rusqlite::{Transaction, params};

use super::super::super::super::row::Row;
use super::super::super::totals::Sums;

pub(super) const HOUR_NS: i64 = 3_600_000_000_000;
/// Users of one hour with sums of their own; clients choose their names, so more share `other`.
pub(super) const USERS_MAX: usize = 10_000;
/// Hours whose users are remembered.
const HOURS_MAX: usize = 4;

const ADD: &str = "INSERT INTO spend_hour VALUES
    (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18)
    ON CONFLICT (hour, tenant, key_id, user_id, route, model, variant, role, outcome, price_version) DO UPDATE SET
        requests = requests + excluded.requests, input_tokens = input_tokens + excluded.input_tokens,
        cache_read_tokens = cache_read_tokens + excluded.cache_read_tokens,
        cache_write_tokens = cache_write_tokens + excluded.cache_write_tokens,
        output_tokens = output_tokens + excluded.output_tokens,
        reasoning_tokens = reasoning_tokens + excluded.reasoning_tokens,
        billed_nano_usd = billed_nano_usd + excluded.billed_nano_usd,
        provider_cost_nano_usd = provider_cost_nano_usd + excluded.provider_cost_nano_usd";

/// The users of the latest hours, as far as rows were added for them.
#[derive(Default)]
pub(super) struct Hours(BTreeMap<i64, HashSet<String>>);

impl Hours {
    /// Adds rows that are new to the sums of their hours.
    pub(super) fn add<'r>(
        &mut self,
        transaction: &Transaction<'_>,
        rows: impl Iterator<Item = &'r Row>,
    ) -> rusqlite::Result<()> {
        let mut groups: BTreeMap<_, Sums> = BTreeMap::new();
        for row in rows {
            let hour = row.started_ns.div_euclid(HOUR_NS);
            let user = self.user(transaction, hour, row.user_id.as_deref().unwrap_or_default())?;
            let what = (&row.route, &row.model, &row.variant, row.role.as_str(), row.outcome.as_str());
            groups.entry((hour, &row.tenant, &row.key_id, user, what, &row.price_version)).or_default().add(row);
        }
        let mut add = transaction.prepare_cached(ADD)?;
        for ((hour, tenant, key, user, (route, model, variant, role, outcome), price_version), sums) in groups {
            let [requests, input, read, write, output, reasoning, billed, cost] =
                sums.named().map(|(_, sum)| i64::try_from(sum).unwrap_or(i64::MAX));
            add.execute(params![
                hour,
                tenant,
                key,
                user,
                route,
                model,
                variant,
                role,
                outcome,
                price_version,
                requests,
                input,
                read,
                write,
                output,
                reasoning,
                billed,
                cost
            ])?;
        }
        Ok(())
    }

    /// What a user is called in an hour's sums.
    fn user<'u>(&mut self, transaction: &Transaction<'_>, hour: i64, user: &'u str) -> rusqlite::Result<&'u str> {
        if user.is_empty() {
            return Ok(user);
        }
        if !self.0.contains_key(&hour) {
            let mut query = transaction.prepare_cached("SELECT DISTINCT user_id FROM spend_hour WHERE hour = ?")?;
            let known = query.query_map([hour], |row| row.get(0))?.collect::<Result<_, _>>()?;
            if self.0.len() >= HOURS_MAX {
                self.0.pop_first();
            }
            self.0.insert(hour, known);
        }
        let users = self.0.entry(hour).or_default();
        if !users.contains(user) && users.len() >= USERS_MAX {
            return Ok("other");
        }
        users.insert(user.to_owned());
        Ok(user)
    }
}
