//! Usage × price → cost. Nothing here does I/O or knows a clock.
//!
//! A request's cost is summed in pico-dollars and rounded half-even *once* to nano-dollars, so splitting a request never
//! changes what its tokens cost.

use std::sync::Arc;
use std::time::Duration;

use super::core::{NanoUsd, PicoPerToken, Usage, divide_half_even};

/// What a token of each bucket costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    pub input: PicoPerToken,
    pub cache_read: PicoPerToken,
    pub cache_write: PicoPerToken,
    pub output: PicoPerToken,
    pub reasoning: PicoPerToken,
}

impl Rates {
    /// In pico-dollars.
    fn cost(&self, usage: &Usage) -> u128 {
        let per_token = [self.input, self.cache_read, self.cache_write, self.output, self.reasoning];
        // 2⁶⁴ tokens at the highest price stay far below 2¹²⁸.
        usage.kinds().iter().zip(per_token).map(|((_, tokens), rate)| u128::from(*tokens) * u128::from(rate.0)).sum()
    }

    /// In pico-dollars, whatever of the prompt turns out to be cached and of the answer to be reasoning.
    fn most(&self, usage: &Usage) -> u128 {
        let prompt = self.input.max(self.cache_read).max(self.cache_write);
        let completion = self.output.max(self.reasoning);
        u128::from(usage.prompt()) * u128::from(prompt.0) + u128::from(usage.completion()) * u128::from(completion.0)
    }
}

/// What long prompts cost: every token of a request, not only those beyond.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tier {
    /// Prompts of more tokens than this.
    pub above: u64,
    pub rates: Rates,
}

/// What one model costs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Price {
    pub rates: Rates,
    /// By rising `above`.
    pub tiers: Arc<[Tier]>,
    /// For each request that used anything.
    pub request: NanoUsd,
    /// What an hour of the device costs *us*; gives the provider cost of an embedded model.
    pub device_hour: NanoUsd,
    /// Nobody said what it costs: it is free, and counted as such.
    pub is_missing: bool,
}

impl Price {
    /// Of a model that nobody gave a price.
    pub fn missing() -> Self {
        Price { is_missing: true, ..Price::default() }
    }

    fn rates_of(&self, prompt: u64) -> &Rates {
        self.tiers.iter().rev().find(|tier| prompt > tier.above).map_or(&self.rates, |tier| &tier.rates)
    }

    /// What the caller pays for `usage`.
    pub fn cost(&self, usage: &Usage) -> NanoUsd {
        self.rounded(self.rates_of(usage.prompt()).cost(usage), usage)
    }

    /// The most that a request can cost which uses at most `reservation`.
    pub fn most(&self, reservation: &Usage) -> NanoUsd {
        let reached = self.tiers.iter().filter(|tier| reservation.prompt() > tier.above).map(|tier| &tier.rates);
        let pico = std::iter::once(&self.rates).chain(reached).map(|rates| rates.most(reservation)).max();
        self.rounded(pico.unwrap_or_default(), reservation)
    }

    fn rounded(&self, pico: u128, usage: &Usage) -> NanoUsd {
        let request = if usage.total() == 0 { 0 } else { u128::from(self.request.0) * 1_000 };
        NanoUsd(divide_half_even(pico.saturating_add(request), 1_000))
    }

    /// What `compute` on our own device cost us.
    pub fn device_cost(&self, compute: Duration) -> NanoUsd {
        const HOUR_NANOS: u128 = 3_600_000_000_000;
        NanoUsd(divide_half_even(u128::from(self.device_hour.0) * compute.as_nanos(), HOUR_NANOS))
    }
}

/// What one model costs, and from when on it costs something else.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prices {
    pub first: Price,
    /// Nanoseconds since the Unix epoch, rising, each with what holds from then on.
    pub changes: Vec<(i64, Price)>,
}

impl Prices {
    /// What holds for a request that began then.
    pub fn at(&self, started_ns: i64) -> &Price {
        self.changes.iter().rev().find(|(from, _)| *from <= started_ns).map_or(&self.first, |(_, price)| price)
    }

    /// Of a model that nobody gave a price.
    pub fn missing() -> Self {
        Prices { first: Price::missing(), changes: Vec::new() }
    }
}

impl From<Price> for Prices {
    fn from(first: Price) -> Self {
        Prices { first, changes: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn usd(per_million: f64) -> PicoPerToken {
        PicoPerToken::from_usd_per_million(per_million).unwrap()
    }

    fn price(input: f64, output: f64) -> Price {
        let [input, output] = [input, output].map(usd);
        let rates = Rates { input, cache_read: input, cache_write: input, output, reasoning: output };
        Price { rates, ..Price::default() }
    }

    #[test]
    fn a_cost_is_exact_to_the_nano_dollar_and_rounds_half_to_even() {
        // 0.0375 USD per million = 37,500 pico a token.
        assert_eq!(price(0.0375, 0.0).cost(&Usage::tokens(1, 0)), NanoUsd(38)); // 37.5 → 38 (even)
        assert_eq!(price(0.0365, 0.0).cost(&Usage::tokens(1, 0)), NanoUsd(36)); // 36.5 → 36 (even)
        assert_eq!(price(0.15, 0.6).cost(&Usage::tokens(40, 40)), NanoUsd(30_000));
    }

    #[test]
    fn device_time_is_priced_by_the_hour() {
        let price = Price { device_hour: NanoUsd(100_000_000), ..Price::default() };
        assert_eq!(price.device_cost(Duration::from_secs(36)), NanoUsd(1_000_000));
    }

    /// The list prices of a provider that doubles them above 200,000 tokens of prompt.
    #[test]
    fn a_long_prompt_costs_its_tier_for_every_token() {
        let tier = Tier { above: 200_000, rates: price(2.5, 15.0).rates };
        let price = Price { tiers: [tier].into(), ..price(1.25, 10.0) };
        assert_eq!(price.cost(&Usage::tokens(200_000, 10)), NanoUsd(250_100_000));
        assert_eq!(price.cost(&Usage::tokens(200_001, 10)), NanoUsd(500_152_500));
        let cached = Usage { input: 1, cache_read: 200_000, output: 10, ..Usage::default() };
        assert_eq!(price.cost(&cached), NanoUsd(500_152_500), "cached tokens make a prompt as long as others");
    }

    #[test]
    fn a_request_costs_its_fee_once_and_only_if_it_used_anything() {
        let price = Price { request: NanoUsd(7), ..price(1.0, 1.0) };
        assert_eq!(price.cost(&Usage::tokens(1, 0)), NanoUsd(1_007));
        assert_eq!(price.cost(&Usage::default()), NanoUsd(0));
    }

    #[test]
    fn a_price_holds_until_the_next_one_begins() {
        let prices = Prices { first: price(1.0, 1.0), changes: vec![(10, price(2.0, 2.0)), (20, price(3.0, 3.0))] };
        let input = |at| prices.at(at).rates.input;
        assert_eq!([i64::MIN, 9, 10, 19, 20, i64::MAX].map(input), [1.0, 1.0, 2.0, 2.0, 3.0, 3.0].map(usd));
    }

    prop_compose! {
        fn rates()(all in proptest::array::uniform5(0u64..1 << 30)) -> Rates {
            let [input, cache_read, cache_write, output, reasoning] = all.map(PicoPerToken);
            Rates { input, cache_read, cache_write, output, reasoning }
        }
    }

    prop_compose! {
        fn usage(most: u64)(all in proptest::array::uniform5(0..most)) -> Usage {
            let [input, cache_read, cache_write, output, reasoning] = all;
            Usage { input, cache_read, cache_write, output, reasoning }
        }
    }

    prop_compose! {
        fn prices()(
            rates in rates(), tiers in proptest::collection::btree_map(0u64..1 << 22, rates(), 0..4), request in 0u64..1 << 30,
        ) -> Price {
            let tiers = tiers.into_iter().map(|(above, rates)| Tier { above, rates }).collect();
            Price { rates, tiers, request: NanoUsd(request), ..Price::default() }
        }
    }

    proptest! {
        #[test]
        fn tokens_cost_the_same_however_they_are_split_before_rounding(rates in rates(), a in usage(1 << 40), b in usage(1 << 40)) {
            let both = Usage {
                input: a.input + b.input,
                cache_read: a.cache_read + b.cache_read,
                cache_write: a.cache_write + b.cache_write,
                output: a.output + b.output,
                reasoning: a.reasoning + b.reasoning,
            };
            prop_assert_eq!(rates.cost(&both), rates.cost(&a) + rates.cost(&b));
        }

        #[test]
        fn cost_never_falls_when_tokens_are_added(rates in rates(), usage in usage(1 << 40), more in 0u64..1 << 20) {
            let price = Price { rates, ..Price::default() };
            let longer = [
                Usage { input: usage.input + more, ..usage },
                Usage { reasoning: usage.reasoning + more, ..usage },
            ];
            prop_assert!(longer.iter().all(|longer| price.cost(&usage) <= price.cost(longer)));
        }

        /// Whatever is cached or reasoning of it, and whichever tier it ends in.
        #[test]
        fn nothing_costs_more_than_what_was_reserved_for_it(
            price in prices(), reserved in usage(1 << 21), share in proptest::array::uniform4(0.0..=1.0f64),
        ) {
            let part = |of: u64, share: f64| (of as f64 * share) as u64;
            let prompt = part(reserved.prompt(), share[0]);
            let completion = part(reserved.completion(), share[1]);
            let (cache_read, reasoning) = (part(prompt, share[2]), part(completion, share[3]));
            let cache_write = part(prompt - cache_read, share[3]);
            let used = Usage {
                input: prompt - cache_read - cache_write, cache_read, cache_write, output: completion - reasoning, reasoning,
            };
            prop_assert!(price.cost(&used) <= price.most(&reserved));
        }
    }
}
