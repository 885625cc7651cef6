//! Usage × price → cost. Nothing here does I/O or knows a clock.
//!
//! A request's cost is summed in pico-dollars and rounded half-even *once* to nano-dollars, so splitting a request never
//! changes what its tokens cost.

use std::sync::Arc;
use std::time::Duration;

use super::core::{NanoUsd, PicoPerToken, Usage, divide_half_even};
use super::row::Service;

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

/// What a request costs that is served in one way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tariff {
    pub rates: Rates,
    /// By rising `above`.
    pub tiers: Arc<[Tier]>,
    /// For each image of a request that used anything.
    pub image: NanoUsd,
    /// For each request that used anything.
    pub request: NanoUsd,
}

/// What a price depends on beside tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extras {
    /// Images that the request brings.
    pub images: u64,
    /// How it was served; before that is known, what was asked for.
    pub service: Option<Service>,
}

impl Tariff {
    fn rates_of(&self, prompt: u64) -> &Rates {
        self.tiers.iter().rev().find(|tier| prompt > tier.above).map_or(&self.rates, |tier| &tier.rates)
    }

    fn cost(&self, usage: &Usage, images: u64) -> NanoUsd {
        self.rounded(self.rates_of(usage.prompt()).cost(usage), usage, images)
    }

    fn most(&self, reservation: &Usage, images: u64) -> NanoUsd {
        let reached = self.tiers.iter().filter(|tier| reservation.prompt() > tier.above).map(|tier| &tier.rates);
        let pico = std::iter::once(&self.rates).chain(reached).map(|rates| rates.most(reservation)).max();
        self.rounded(pico.unwrap_or_default(), reservation, images)
    }

    fn rounded(&self, pico: u128, usage: &Usage, images: u64) -> NanoUsd {
        let fees = match usage.total() {
            0 => 0,
            _ => (u128::from(self.request.0) + u128::from(self.image.0) * u128::from(images)).saturating_mul(1_000),
        };
        NanoUsd(divide_half_even(pico.saturating_add(fees), 1_000))
    }
}

/// What one model costs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Price {
    pub standard: Tariff,
    /// Ways to be served that cost something else.
    pub services: Arc<[(Service, Tariff)]>,
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

    /// What the caller pays for `usage`. What was served in a way that has no price of its own costs what others do.
    pub fn cost(&self, usage: &Usage, extras: Extras) -> NanoUsd {
        let own = self.services.iter().find(|(service, _)| Some(*service) == extras.service);
        own.map_or(&self.standard, |(_, tariff)| tariff).cost(usage, extras.images)
    }

    /// The most that a request can cost which uses at most `reservation`, in whichever way it may come to be served.
    pub fn most(&self, reservation: &Usage, asked: Extras) -> NanoUsd {
        let others = self.services.iter().filter(|(service, _)| service.is_within(asked.service));
        let tariffs = std::iter::once(&self.standard).chain(others.map(|(_, tariff)| tariff));
        tariffs.map(|tariff| tariff.most(reservation, asked.images)).max().unwrap_or_default()
    }

    /// Whether what was served so costs the same as others only because nobody gave it a price.
    pub fn lacks(&self, service: Option<Service>) -> bool {
        let has = |wanted: Service| self.services.iter().any(|(service, _)| *service == wanted);
        service.is_some_and(|service| service != Service::Default && !has(service))
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
        of(Tariff { rates, ..Tariff::default() })
    }

    fn of(standard: Tariff) -> Price {
        Price { standard, ..Price::default() }
    }

    const PLAIN: Extras = Extras { images: 0, service: None };

    #[test]
    fn a_cost_is_exact_to_the_nano_dollar_and_rounds_half_to_even() {
        // 0.0375 USD per million = 37,500 pico a token.
        assert_eq!(price(0.0375, 0.0).cost(&Usage::tokens(1, 0), PLAIN), NanoUsd(38)); // 37.5 → 38 (even)
        assert_eq!(price(0.0365, 0.0).cost(&Usage::tokens(1, 0), PLAIN), NanoUsd(36)); // 36.5 → 36 (even)
        assert_eq!(price(0.15, 0.6).cost(&Usage::tokens(40, 40), PLAIN), NanoUsd(30_000));
    }

    #[test]
    fn device_time_is_priced_by_the_hour() {
        let price = Price { device_hour: NanoUsd(100_000_000), ..Price::default() };
        assert_eq!(price.device_cost(Duration::from_secs(36)), NanoUsd(1_000_000));
    }

    /// The list prices of a provider that doubles them above 200,000 tokens of prompt.
    #[test]
    fn a_long_prompt_costs_its_tier_for_every_token() {
        let tier = Tier { above: 200_000, rates: price(2.5, 15.0).standard.rates };
        let price = of(Tariff { tiers: [tier].into(), ..price(1.25, 10.0).standard });
        assert_eq!(price.cost(&Usage::tokens(200_000, 10), PLAIN), NanoUsd(250_100_000));
        assert_eq!(price.cost(&Usage::tokens(200_001, 10), PLAIN), NanoUsd(500_152_500));
        let cached = Usage { input: 1, cache_read: 200_000, output: 10, ..Usage::default() };
        assert_eq!(price.cost(&cached, PLAIN), NanoUsd(500_152_500), "cached tokens make a prompt as long as others");
    }

    #[test]
    fn a_request_costs_its_fee_once_and_each_image_only_if_it_used_anything() {
        let price = of(Tariff { request: NanoUsd(7), image: NanoUsd(20), ..price(1.0, 1.0).standard });
        assert_eq!(price.cost(&Usage::tokens(1, 0), PLAIN), NanoUsd(1_007));
        let two = Extras { images: 2, ..PLAIN };
        assert_eq!(price.cost(&Usage::tokens(1, 0), two), NanoUsd(1_047));
        assert_eq!(price.cost(&Usage::default(), two), NanoUsd(0));
    }

    #[test]
    fn a_service_costs_its_own_price_and_one_without_costs_what_others_do() {
        let services = [(Service::Flex, price(0.5, 1.0).standard), (Service::Priority, price(2.0, 4.0).standard)];
        let price = Price { services: services.into(), ..price(1.0, 2.0) };
        let cost = |service| price.cost(&Usage::tokens(10, 10), Extras { service, ..PLAIN }).0;
        let most = |service| price.most(&Usage::tokens(10, 10), Extras { service, ..PLAIN }).0;
        let [flex, priority, scale] = [Service::Flex, Service::Priority, Service::Scale].map(Some);
        assert_eq!(
            [None, Some(Service::Default), scale, flex, priority].map(cost),
            [30_000, 30_000, 30_000, 15_000, 60_000]
        );
        // Who asks for nothing may get the dearest; who asks for less may still get what others do.
        assert_eq!(
            [None, Some(Service::Default), scale, flex, priority].map(most),
            [60_000, 30_000, 30_000, 30_000, 60_000]
        );
        assert_eq!(
            [None, Some(Service::Default), scale, flex].map(|service| price.lacks(service)),
            [false, false, true, false]
        );
    }

    #[test]
    fn a_price_holds_until_the_next_one_begins() {
        let prices = Prices { first: price(1.0, 1.0), changes: vec![(10, price(2.0, 2.0)), (20, price(3.0, 3.0))] };
        let input = |at| prices.at(at).standard.rates.input;
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
        fn tariff()(
            rates in rates(), tiers in proptest::collection::btree_map(0u64..1 << 22, rates(), 0..4),
            request in 0u64..1 << 30, image in 0u64..1 << 30,
        ) -> Tariff {
            let tiers = tiers.into_iter().map(|(above, rates)| Tier { above, rates }).collect();
            Tariff { rates, tiers, request: NanoUsd(request), image: NanoUsd(image) }
        }
    }

    prop_compose! {
        fn prices()(standard in tariff(), services in proptest::collection::vec(tariff(), 0..=4)) -> Price {
            let services = Service::PRICED.into_iter().zip(services).collect();
            Price { standard, services, ..Price::default() }
        }
    }

    fn service() -> impl Strategy<Value = Option<Service>> {
        proptest::option::of(proptest::sample::select(&Service::ALL[..]))
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
            let price = of(Tariff { rates, ..Tariff::default() });
            let longer = [
                Usage { input: usage.input + more, ..usage },
                Usage { reasoning: usage.reasoning + more, ..usage },
            ];
            prop_assert!(longer.iter().all(|longer| price.cost(&usage, PLAIN) <= price.cost(longer, PLAIN)));
        }

        /// Whatever is cached or reasoning of it, whichever tier it ends in, and however it is served of what it can be.
        #[test]
        fn nothing_costs_more_than_what_was_reserved_for_it(
            price in prices(), reserved in usage(1 << 21), share in proptest::array::uniform4(0.0..=1.0f64),
            images in 0u64..1 << 20, asked in service(), told in service(),
        ) {
            prop_assume!(told.is_none_or(|told| told.is_within(asked)));
            let part = |of: u64, share: f64| (of as f64 * share) as u64;
            let prompt = part(reserved.prompt(), share[0]);
            let completion = part(reserved.completion(), share[1]);
            let (cache_read, reasoning) = (part(prompt, share[2]), part(completion, share[3]));
            let cache_write = part(prompt - cache_read, share[3]);
            let used = Usage {
                input: prompt - cache_read - cache_write, cache_read, cache_write, output: completion - reasoning, reasoning,
            };
            let [asked, told] = [asked, told].map(|service| Extras { images, service });
            prop_assert!(price.cost(&used, told) <= price.most(&reserved, asked));
        }
    }
}
