//! What the demo saw, summed: one line while it runs, a table at its end.

use std::collections::BTreeMap;
use std::time::Duration;

use super::client::Answer;
use crate::accounting::core::NanoUsd;

/// What was seen so far.
#[derive(Default)]
pub struct Tally {
    variants: BTreeMap<String, Variant>,
    /// By the code that they were told.
    refused: BTreeMap<String, u64>,
    /// What should not have happened, by what it was.
    unexpected: BTreeMap<String, u64>,
    sent: u64,
    left: u64,
    failed: u64,
    judged: u64,
    streams: u64,
}

/// The answers of one variant.
#[derive(Default)]
struct Variant {
    answers: u64,
    correct: u64,
    from_cache: u64,
    cost: NanoUsd,
    first_token: Vec<Duration>,
    tokens_per_s: Vec<f64>,
}

impl Tally {
    pub fn sent(&mut self) {
        self.sent += 1;
    }

    pub fn answered(&mut self, answer: &Answer, correct: bool) {
        self.streams += u64::from(answer.stream);
        let variant = self.variants.entry(answer.variant.clone()).or_default();
        variant.answers += 1;
        variant.correct += u64::from(correct);
        variant.cost = NanoUsd(variant.cost.0.saturating_add(answer.cost.0));
        if matches!(answer.cache.as_str(), "hit" | "coalesced") {
            // A replay says nothing of how fast a model is.
            variant.from_cache += 1;
        } else {
            variant.first_token.extend(answer.first_token);
            variant.tokens_per_s.extend(answer.tokens_per_s);
        }
    }

    pub fn judged(&mut self) {
        self.judged += 1;
    }

    pub fn left(&mut self) {
        self.left += 1;
    }

    pub fn refused(&mut self, code: &str) {
        *self.refused.entry(code.to_owned()).or_default() += 1;
    }

    /// A request that ended as it should not have.
    pub fn failed(&mut self, what: String) {
        self.failed += 1;
        self.unexpected(what);
    }

    pub fn unexpected(&mut self, what: String) {
        *self.unexpected.entry(what).or_default() += 1;
    }

    fn refusals(&self) -> u64 {
        self.refused.values().sum()
    }

    fn answers(&self) -> u64 {
        self.variants.values().map(|variant| variant.answers).sum()
    }

    pub fn progress(&self, elapsed: Duration, length: Duration) -> String {
        let correct: u64 = self.variants.values().map(|variant| variant.correct).sum();
        let from_cache: u64 = self.variants.values().map(|variant| variant.from_cache).sum();
        let unexpected: u64 = self.unexpected.values().sum();
        let mut line = format!(
            "{:>4} of {} s   sent {}   answered {} ({:.1} % correct, {from_cache} from the cache)   left {}   refused {}",
            elapsed.as_secs().min(length.as_secs()),
            length.as_secs(),
            self.sent,
            self.answers(),
            percent(correct, self.answers()),
            self.left,
            self.refusals(),
        );
        if unexpected > 0 {
            line.push_str(&format!("   UNEXPECTED {unexpected}"));
        }
        line
    }

    pub fn summary(&self) -> String {
        let mut text = format!(
            "{:16} {:>8} {:>10} {:>12} {:>12} {:>9} {:>16} {:>11}\n",
            "variant", "answers", "correct", "TTFT p50", "TTFT p95", "tokens/s", "billed USD", "from cache"
        );
        for (name, variant) in &self.variants {
            let millis = |share: f64| {
                let mut times = variant.first_token.clone();
                times.sort();
                quantile(&times, share).map_or("-".to_owned(), |time| format!("{:.1} ms", time.as_secs_f64() * 1e3))
            };
            let mut speeds = variant.tokens_per_s.clone();
            speeds.sort_by(f64::total_cmp);
            text.push_str(&format!(
                "{name:16} {:>8} {:>8.1} % {:>12} {:>12} {:>9} {:>16} {:>11}\n",
                variant.answers,
                percent(variant.correct, variant.answers),
                millis(0.5),
                millis(0.95),
                quantile(&speeds, 0.5).map_or("-".to_owned(), |speed| format!("{speed:.0}")),
                variant.cost.to_string(),
                variant.from_cache,
            ));
        }
        text.push_str(&format!(
            "\n{} requests: {} answered ({} streamed), {} left in the middle of a stream, {} refused as they should be, {} failed, {} unfinished.\n",
            self.sent,
            self.answers(),
            self.streams,
            self.left,
            self.refusals(),
            self.failed,
            self.sent - self.answers() - self.left - self.refusals() - self.failed,
        ));
        for (code, count) in &self.refused {
            text.push_str(&format!("  refused {code}: {count}\n"));
        }
        text.push_str(&format!("{} answers judged with `correct`.\n", self.judged));
        text
    }

    /// What should not have happened, if anything did.
    pub fn complaints(&self) -> Option<String> {
        let lines: Vec<String> = self.unexpected.iter().map(|(what, count)| format!("  {count} × {what}")).collect();
        (!lines.is_empty()).then(|| lines.join("\n"))
    }
}

fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole.max(1) as f64
}

/// The smallest value that at least this share is not above; of values in order.
fn quantile<T: Copy>(values: &[T], share: f64) -> Option<T> {
    let rank = (values.len() as f64 * share).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_a_value_that_was_seen() {
        assert_eq!(quantile(&[1, 2, 3, 4], 0.5), Some(2));
        assert_eq!(quantile(&[1, 2, 3, 4], 0.95), Some(4));
        assert_eq!(quantile(&[7], 0.5), Some(7));
        assert_eq!(quantile::<u8>(&[], 0.5), None);
    }
}
