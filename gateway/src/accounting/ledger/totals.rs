//! Control totals: what the log has taken, by its own count. The store must hold the same in the end.

use serde::{Deserialize, Serialize};

use super::super::row::Row;

/// Rows and everything in them that can be summed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sums {
    pub rows: u64,
    /// Input, cache read, cache write, output, reasoning.
    pub tokens: [u64; 5],
    pub billed: u64,
    pub provider_cost: u64,
}

impl Sums {
    pub fn of<'r>(rows: impl IntoIterator<Item = &'r Row>) -> Sums {
        let mut sums = Sums::default();
        rows.into_iter().for_each(|row| sums.add(row));
        sums
    }

    pub fn add(&mut self, row: &Row) {
        let tokens = row.usage.kinds().map(|(_, tokens)| tokens);
        *self = self.plus(&Sums { rows: 1, tokens, billed: row.billed.0, provider_cost: row.provider_cost.0 });
    }

    #[must_use]
    pub fn plus(&self, more: &Sums) -> Sums {
        self.with(more, u64::saturating_add)
    }

    /// What came after `before`.
    #[must_use]
    pub fn since(&self, before: &Sums) -> Sums {
        self.with(before, u64::saturating_sub)
    }

    fn with(&self, other: &Sums, of: fn(u64, u64) -> u64) -> Sums {
        Sums {
            rows: of(self.rows, other.rows),
            tokens: std::array::from_fn(|kind| of(self.tokens[kind], other.tokens[kind])),
            billed: of(self.billed, other.billed),
            provider_cost: of(self.provider_cost, other.provider_cost),
        }
    }

    /// Each sum by the name of its column.
    pub fn named(&self) -> [(&'static str, u64); 8] {
        let [input, cache_read, cache_write, output, reasoning] = self.tokens;
        [
            ("rows", self.rows),
            ("input_tokens", input),
            ("cache_read_tokens", cache_read),
            ("cache_write_tokens", cache_write),
            ("output_tokens", output),
            ("reasoning_tokens", reasoning),
            ("billed_nano_usd", self.billed),
            ("provider_cost_nano_usd", self.provider_cost),
        ]
    }
}

/// A record of its own in the log: at the head of every segment, and before any is removed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Which log this is, among those that share a store: drawn when it began. Older logs do not say (0).
    #[serde(default)]
    pub log: i64,
    /// Which count this is: the Unix nanosecond in which it began. It begins anew where a log was lost or damaged.
    pub epoch: i64,
    /// All terminal rows of this count that come before this record, and the ends that recoveries gave to cut off ones.
    pub sums: Sums,
    /// Every intent before this has its end, though the segment that held it may be gone.
    pub ended_below: u64,
    /// The segments that must be there, this record's own at last. Another that begins later says so itself.
    pub segments: Vec<u64>,
}
