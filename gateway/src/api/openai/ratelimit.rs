//! OpenAI's `x-ratelimit-*` headers: how much of a limit there is, how much is left, and when all of it is back.

use std::time::Duration;

/// One limit as its holder sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    pub limit: u64,
    pub remaining: u64,
    /// Until all of it is there again, if nothing is used meanwhile.
    pub reset: Duration,
}

impl Quota {
    pub fn used(&self) -> u64 {
        self.limit.saturating_sub(self.remaining)
    }
}

/// The limits that these headers tell of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quotas {
    pub requests: Quota,
    pub tokens: Quota,
}

impl Quotas {
    pub fn headers(&self) -> [(&'static str, String); 6] {
        [
            ("x-ratelimit-limit-requests", self.requests.limit.to_string()),
            ("x-ratelimit-remaining-requests", self.requests.remaining.to_string()),
            ("x-ratelimit-reset-requests", duration(self.requests.reset)),
            ("x-ratelimit-limit-tokens", self.tokens.limit.to_string()),
            ("x-ratelimit-remaining-tokens", self.tokens.remaining.to_string()),
            ("x-ratelimit-reset-tokens", duration(self.tokens.reset)),
        ]
    }
}

/// As OpenAI writes it: `0s`, `12ms`, `1.2s`, `6m0s`. Rounded up to milliseconds.
fn duration(time: Duration) -> String {
    let millis = time.as_nanos().div_ceil(1_000_000);
    if (1..1_000).contains(&millis) {
        return format!("{millis}ms");
    }
    let (minutes, rest) = (millis / 60_000, millis % 60_000);
    let seconds = match rest % 1_000 {
        0 => (rest / 1_000).to_string(),
        fraction => format!("{}.{fraction:03}", rest / 1_000).trim_end_matches('0').to_owned(),
    };
    match (minutes / 60, minutes % 60) {
        (0, 0) => format!("{seconds}s"),
        (0, minutes) => format!("{minutes}m{seconds}s"),
        (hours, minutes) => format!("{hours}h{minutes}m{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_openai_writes_them() {
        for (millis, text) in [
            (0, "0s"),
            (12, "12ms"),
            (1_000, "1s"),
            (1_200, "1.2s"),
            (8_640, "8.64s"),
            (60_000, "1m0s"),
            (360_000, "6m0s"),
            (72_500, "1m12.5s"),
            (3_600_000, "1h0m0s"),
        ] {
            assert_eq!(duration(Duration::from_millis(millis)), text);
        }
        assert_eq!(duration(Duration::from_nanos(1)), "1ms", "rounded up");
    }
}
