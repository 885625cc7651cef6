//! Tokens and money, as integers from the price file to the ledger; `price` turns one into the other.
//!
//! Prices are pico-dollars per token, because $0.0375 per million is no whole nano-dollar.

use serde::{Deserialize, Serialize};

/// Tokens of one request in disjoint buckets: their sum is everything that was processed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Prompt tokens that were computed (not read from a cache).
    pub input: u64,
    pub cache_read: u64,
    pub cache_write: u64,
    /// Tokens produced, the end token included, reasoning excluded.
    pub output: u64,
    pub reasoning: u64,
}

impl Usage {
    pub fn tokens(input: u64, output: u64) -> Self {
        Usage { input, output, ..Usage::default() }
    }

    /// All prompt tokens, cached or not: what OpenAI calls `prompt_tokens`.
    pub fn prompt(&self) -> u64 {
        self.input.saturating_add(self.cache_read).saturating_add(self.cache_write)
    }

    /// All produced tokens: what OpenAI calls `completion_tokens`.
    pub fn completion(&self) -> u64 {
        self.output.saturating_add(self.reasoning)
    }

    /// Everything that was processed: what limits count.
    pub fn total(&self) -> u64 {
        self.prompt().saturating_add(self.completion())
    }

    /// The buckets with their names as they appear in labels, spans and logs.
    pub fn kinds(&self) -> [(&'static str, u64); 5] {
        [
            ("input", self.input),
            ("cache_read", self.cache_read),
            ("cache_write", self.cache_write),
            ("output", self.output),
            ("reasoning", self.reasoning),
        ]
    }
}

/// An amount of US dollars in billionths. Displays as decimal USD with nine places.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NanoUsd(pub u64);

/// Amounts above this are a typing error.
const USD_MAX: f64 = 1_000_000.0;

impl NanoUsd {
    /// From US dollars as people write them.
    ///
    /// # Errors
    /// A negative, absurd or not finite number.
    pub fn from_usd(usd: f64) -> Result<Self, &'static str> {
        if !(0.0..=USD_MAX).contains(&usd) {
            return Err("must be a number of US dollars from 0 to 1,000,000");
        }
        // Below 2⁵³: every whole nano-dollar has a float of its own.
        Ok(NanoUsd((usd * 1e9).round() as u64))
    }
}

impl std::fmt::Display for NanoUsd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{:09}", self.0 / 1_000_000_000, self.0 % 1_000_000_000)
    }
}

/// Pico-dollars for one token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct PicoPerToken(pub u64);

/// Prices above this are a typing error, and would let sums overflow: $1,000,000 per million tokens.
const USD_PER_MILLION_MAX: f64 = 1_000_000.0;

impl PicoPerToken {
    /// From "USD per million tokens": one dollar per million is 10⁶ pico-dollars a token.
    ///
    /// # Errors
    /// A negative, absurd or not finite number, or one finer than a pico-dollar per token.
    pub fn from_usd_per_million(usd: f64) -> Result<Self, &'static str> {
        if !usd.is_finite() || usd < 0.0 {
            return Err("must be a number of US dollars, zero or more");
        }
        if usd > USD_PER_MILLION_MAX {
            return Err("is above 1,000,000 USD per million tokens, surely a slip");
        }
        let pico = usd * 1e6;
        let whole = pico.round();
        // A decimal such as 0.0375 is not exact in binary; what is left after rounding must be only that.
        if (pico - whole).abs() > 1e-6 * whole.max(1.0) {
            return Err("is finer than 0.000001 USD per million tokens");
        }
        Ok(PicoPerToken(whole as u64))
    }
}

/// Rounds half to even, so that many small amounts do not drift upwards. Saturates at `u64::MAX`.
pub(super) fn divide_half_even(value: u128, by: u128) -> u64 {
    let (whole, rest) = (value / by, value % by);
    let up = match (rest * 2).cmp(&by) {
        std::cmp::Ordering::Less => 0,
        std::cmp::Ordering::Greater => 1,
        std::cmp::Ordering::Equal => whole & 1,
    };
    u64::try_from(whole + up).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_amount_is_shown_to_the_nano_dollar() {
        assert_eq!(NanoUsd(1_234_567_890).to_string(), "1.234567890");
    }

    #[test]
    fn a_price_that_cannot_be_meant_is_refused() {
        for bad in [-0.1, f64::NAN, f64::INFINITY, 2e6, 0.000_000_4] {
            assert!(PicoPerToken::from_usd_per_million(bad).is_err(), "{bad}");
        }
        assert_eq!(PicoPerToken::from_usd_per_million(0.0375), Ok(PicoPerToken(37_500)));
    }

    #[test]
    fn an_amount_that_cannot_be_meant_is_refused() {
        for bad in [-0.1, f64::NAN, f64::INFINITY, 1_000_000.1] {
            assert!(NanoUsd::from_usd(bad).is_err(), "{bad}");
        }
        assert_eq!(NanoUsd::from_usd(0.000_000_001), Ok(NanoUsd(1)));
        assert_eq!(NanoUsd::from_usd(5.0).map(|usd| usd.to_string()), Ok("5.000000000".to_owned()));
    }

    proptest! {
        #[test]
        fn the_sum_of_buckets_is_what_openai_reports(input in 0u64..1 << 30, read in 0u64..1 << 30, output in 0u64..1 << 30) {
            let usage = Usage { input, cache_read: read, output, ..Usage::default() };
            prop_assert_eq!(usage.prompt() + usage.completion(), usage.kinds().iter().map(|(_, n)| n).sum::<u64>());
        }
    }
}
