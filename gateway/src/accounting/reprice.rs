//! What a row of the ledger would cost by other prices. Rows are never edited: what differs is appended as an adjustment,
//! and a row counts as its last one says.
//!
//! Nothing here reads a store or a clock.

use std::collections::BTreeMap;

use super::core::NanoUsd;
use super::ledger::store::months::made_ns;
use super::price::{Price, Prices};
use super::row::{Cell, Outcome, Role, Row};

/// What a row counts as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    pub billed: NanoUsd,
    pub provider_cost: NanoUsd,
    pub price_version: String,
    pub unpriced: bool,
}

impl From<&Row> for Standing {
    fn from(row: &Row) -> Standing {
        let Row { billed, provider_cost, price_version, unpriced, .. } = row;
        Standing {
            billed: *billed,
            provider_cost: *provider_cost,
            price_version: price_version.clone(),
            unpriced: *unpriced,
        }
    }
}

/// A row as it was written, and what it counts as today.
#[derive(Clone, Debug, PartialEq)]
pub struct Booked {
    pub row: Row,
    pub standing: Standing,
    /// How often it was adjusted.
    pub adjustments: i64,
}

/// What is said of a row beside its own columns, with types as those.
pub const STANDING_COLUMNS: [(&str, &str); 3] = [
    ("billed_now_nano_usd", "INTEGER NOT NULL"),
    ("provider_cost_now_nano_usd", "INTEGER NOT NULL"),
    ("price_version_now", "TEXT NOT NULL"),
];

impl Booked {
    /// What stands in the row's columns, and in `STANDING_COLUMNS`.
    pub fn cells(&self) -> Vec<Cell<'_>> {
        let usd = |amount: NanoUsd| Cell::Integer(i64::try_from(amount.0).unwrap_or(i64::MAX));
        let Standing { billed, provider_cost, price_version, .. } = &self.standing;
        let standing = [usd(*billed), usd(*provider_cost), Cell::Text(price_version)];
        self.row.cells().into_iter().chain(standing).collect()
    }
}

/// Which rows are to be priced again.
#[derive(Clone, Debug, Default)]
pub struct Which {
    pub model: Option<String>,
    pub route: Option<String>,
    pub tenant: Option<String>,
    /// Only those that nobody has given a price yet.
    pub only_unpriced: bool,
}

impl Which {
    /// Whether it is about these, whatever their price.
    pub fn is_of(&self, model: &str, route: &str, tenant: &str) -> bool {
        let is = |wanted: &Option<String>, found: &str| wanted.as_ref().is_none_or(|wanted| wanted == found);
        is(&self.model, model) && is(&self.route, route) && is(&self.tenant, tenant)
    }
}

/// What rows of one model and price version come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    pub rows: u64,
    /// Billed, and what it cost us.
    pub before: [NanoUsd; 2],
    pub after: [NanoUsd; 2],
}

impl Sum {
    fn plus(&self, more: &Sum) -> Sum {
        let add = |a: [NanoUsd; 2], b: [NanoUsd; 2]| [0, 1].map(|at| NanoUsd(a[at].0.saturating_add(b[at].0)));
        Sum { rows: self.rows + more.rows, before: add(self.before, more.before), after: add(self.after, more.after) }
    }
}

/// What became of all rows that were looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Rows that were asked for, whether they change or not.
    pub seen: u64,
    /// Those that change, by model and the price version that they had.
    pub changed: BTreeMap<(String, String), Sum>,
    /// Rows of models that have no price today, by model. They stay as they are.
    pub priceless: BTreeMap<String, u64>,
    /// Rows that have this very price version and would cost something else: the file was changed and kept its version.
    pub same_version: u64,
    /// Changed rows whose cost to us is the time of a device, which rows do not hold.
    pub of_device: u64,
}

/// Prices rows again.
pub struct Repricer<'p> {
    pub which: Which,
    pub prices: &'p BTreeMap<String, Prices>,
    pub version: &'p str,
    pub report: Report,
}

impl Repricer<'_> {
    /// What the row is to count as, if that is something else, or priced at last.
    pub fn judge(&mut self, booked: &Booked) -> Option<Standing> {
        let Booked { row, standing, .. } = booked;
        let Which { only_unpriced, .. } = self.which;
        if !self.which.is_of(&row.model, &row.route, &row.tenant) || (only_unpriced && !standing.unpriced) {
            return None;
        }
        self.report.seen += 1;
        let Some(prices) = self.prices.get(&row.model) else {
            *self.report.priceless.entry(row.model.clone()).or_default() += 1;
            return None;
        };
        let (billed, provider_cost) = cost(row, prices.at(began_ns(row)));
        let after = Standing { billed, provider_cost, price_version: self.version.to_owned(), unpriced: false };
        let is_same = (after.billed, after.provider_cost) == (standing.billed, standing.provider_cost);
        if is_same && !standing.unpriced {
            return None;
        }
        if standing.price_version == self.version && !standing.unpriced {
            self.report.same_version += 1;
            return None;
        }
        let sum = self.report.changed.entry((row.model.clone(), standing.price_version.clone())).or_default();
        let amounts = |of: &Standing| [of.billed, of.provider_cost];
        *sum = sum.plus(&Sum { rows: 1, before: amounts(standing), after: amounts(&after) });
        self.report.of_device += u64::from(is_ours(row) && row.usage.total() > 0);
        Some(after)
    }
}

impl Report {
    pub fn total(&self) -> Sum {
        self.changed.values().fold(Sum::default(), |all, sum| all.plus(sum))
    }
}

/// When the request began, which says what its price is: later attempts begin later.
fn began_ns(row: &Row) -> i64 {
    let made_ns = made_ns(&row.request_id).filter(|_| row.attempt > 0);
    made_ns.unwrap_or(row.started_ns)
}

/// Whether a device of ours did the work.
fn is_ours(row: &Row) -> bool {
    row.provider == "glassgate"
}

/// What is billed for a row at this price, and what it costs us, as a settlement has it.
pub fn cost(row: &Row, price: &Price) -> (NanoUsd, NanoUsd) {
    // Told again from a cache, it cost nobody anything.
    if !matches!(row.cache.as_str(), "none" | "miss") {
        return (row.billed, row.provider_cost);
    }
    let is_killed = row.outcome == Outcome::Killed;
    let cost = match is_killed {
        // Its intent stands: the most that it could come to.
        true => price.most(&row.usage, row.extras()),
        false => price.cost(&row.usage, row.extras()),
    };
    let provider_cost = if is_ours(row) || is_killed { row.provider_cost } else { cost };
    // A provider's answer that is billed below its cost was beyond what a strict budget had reserved: that stays the most.
    let is_capped = !is_ours(row) && !is_killed && row.billed < row.provider_cost;
    let billed = match row.role {
        Role::Shadow => NanoUsd(0),
        _ if is_capped => cost.min(row.billed),
        _ => cost,
    };
    (billed, provider_cost)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::core::{PicoPerToken, Usage};
    use super::super::ledger::wal::tests::row;
    use super::super::price::{Rates, Tariff};
    use super::super::row::Service;
    use super::*;

    fn tariff() -> impl Strategy<Value = Tariff> {
        (proptest::array::uniform5(0u64..1 << 30), 0u64..1 << 20, 0u64..1 << 20).prop_map(|(rates, image, request)| {
            let [input, cache_read, cache_write, output, reasoning] = rates.map(PicoPerToken);
            let rates = Rates { input, cache_read, cache_write, output, reasoning };
            Tariff { rates, image: NanoUsd(image), request: NanoUsd(request), ..Tariff::default() }
        })
    }

    prop_compose! {
        fn prices()(standard in tariff(), flex in tariff()) -> BTreeMap<String, Prices> {
            let price = Price { standard, services: [(Service::Flex, flex)].into(), ..Price::default() };
            [("glimmer-1".to_owned(), price.into())].into()
        }
    }

    prop_compose! {
        fn rows()(
            tokens in proptest::array::uniform5(0u64..1 << 20), amounts in (0u64..1 << 20, 0u64..1 << 20), images in 0u64..9,
            service_tier in proptest::option::of(proptest::sample::select(&Service::ALL[..])),
            outcome in proptest::sample::select(&Outcome::ALL[..]), role in proptest::sample::select(&Role::ALL[..]),
            provider in proptest::sample::select(vec!["glassgate", "mock"]),
            cache in proptest::sample::select(vec!["none", "miss", "hit"]), unpriced in any::<bool>(),
        ) -> Row {
            let [input, cache_read, cache_write, output, reasoning] = tokens;
            Row {
                usage: Usage { input, cache_read, cache_write, output, reasoning },
                billed: NanoUsd(amounts.0), provider_cost: NanoUsd(amounts.1), images, service_tier, outcome, role,
                provider: provider.into(), cache: cache.into(), unpriced, ..row("r")
            }
        }
    }

    proptest! {
        #[test]
        fn any_row_priced_there_and_back_counts_as_before_and_once_is_as_good_as_twice(
            row in rows(), first in prices(), second in prices(),
        ) {
            let mut booked = Booked { standing: Standing::from(&row), row, adjustments: 0 };
            let mut reprice = |prices: &BTreeMap<String, Prices>, version: &str| {
                let report = Report::default();
                let mut repricer = Repricer { which: Which::default(), prices, version, report };
                let after = repricer.judge(&booked);
                let sum = repricer.report.total();
                prop_assert_eq!(sum.rows, u64::from(after.is_some()));
                let before = booked.standing.clone();
                booked.standing = after.unwrap_or_else(|| before.clone());
                if sum.rows > 0 {
                    prop_assert_eq!(sum.before, [before.billed, before.provider_cost]);
                    prop_assert_eq!(sum.after, [booked.standing.billed, booked.standing.provider_cost]);
                }
                prop_assert!(repricer.judge(&booked).is_none(), "what is done is done");
                Ok([booked.standing.billed, booked.standing.provider_cost])
            };
            let there = reprice(&first, "first")?;
            reprice(&second, "second")?;
            prop_assert_eq!(reprice(&first, "first")?, there);
        }
    }

    #[test]
    fn a_later_attempt_is_priced_as_of_when_its_request_began() {
        let id = format!("{:012x}7abc8def0123456789ab", 5_000);
        let priced = |pico: u64| {
            let rates = Rates { input: PicoPerToken(pico), ..Rates::default() };
            Price { standard: Tariff { rates, ..Tariff::default() }, ..Price::default() }
        };
        // It changes between the two.
        let prices = Prices { first: priced(1_000), changes: vec![(6_000_000_000, priced(2_000))] };
        let prices = [("glimmer-1".to_owned(), prices)].into();
        let billed = |attempt, started_ns| {
            let row = Row { attempt, started_ns, outcome: Outcome::Answered, ..row(&id) };
            let report = Report::default();
            let mut repricer = Repricer { which: Which::default(), prices: &prices, version: "x", report };
            let booked = Booked { standing: Standing::from(&row), row, adjustments: 0 };
            repricer.judge(&booked).unwrap_or(booked.standing).billed.0
        };
        assert_eq!([billed(0, 5_000_000_000), billed(1, 7_000_000_000), billed(0, 7_000_000_000)], [7, 7, 14]);
    }
}
