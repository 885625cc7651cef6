//! How many prompt tokens a step may take on, so that whoever decodes beside them gets the next token in time.
//!
//! A step's time is modelled as a + b·tokens + c·keys + d·rows, where keys counts the cached positions that all its tokens
//! attend to and rows those that are scored beyond the one that anybody samples from, and fitted to the steps that were measured. Pure: the same measurements give the same numbers.

use super::Work;
use std::time::Duration;

/// What a step's time depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Load {
    pub tokens: f64,
    /// Σ over the tokens of the positions each attends to.
    pub keys: f64,
    /// Σ over the sequences of the rows that need logits, but the last.
    pub rows: f64,
}

impl Load {
    pub fn of(work: &[Work]) -> Load {
        work.iter().fold(Load::default(), |load, work| {
            let (first, count) = (work.first as f64, work.count as f64);
            Load {
                tokens: load.tokens + count,
                keys: load.keys + count * (first + (count + 1.0) / 2.0),
                rows: load.rows + work.rows.saturating_sub(1) as f64,
            }
        })
    }
}

/// How much one measurement fades with the next: about 200 steps are remembered.
const FADE: f64 = 0.995;
/// A step that takes so many times what it should was held up by something else on the machine.
const OUTLIER: f64 = 2.0;
/// Steps before anything counts as an outlier.
const LEARNING_STEPS: u32 = 8;
const SWEEPS: usize = 8;

/// Least squares with fading memory and coefficients that are never negative. Times in microseconds.
#[derive(Clone, Debug, Default)]
pub(super) struct CostModel {
    /// Σ x·xᵀ and Σ x·y for x = (1, tokens, keys, rows).
    squares: [[f64; 4]; 4],
    products: [f64; 4],
    /// a, b, c, d
    costs: [f64; 4],
    steps: u32,
}

impl CostModel {
    pub fn observe(&mut self, load: Load, took: Duration) {
        let expected = self.micros(load);
        let mut micros = took.as_secs_f64() * 1e6;
        if self.steps >= LEARNING_STEPS {
            micros = micros.min(OUTLIER * expected);
        }
        self.steps = self.steps.saturating_add(1);
        let x = [1.0, load.tokens, load.keys, load.rows];
        for i in 0..4 {
            for j in 0..4 {
                self.squares[i][j] = FADE * self.squares[i][j] + x[i] * x[j];
            }
            self.products[i] = FADE * self.products[i] + x[i] * micros;
        }
        // Gauss–Seidel on the normal equations, from where the last step left it: with every step closer, never singular.
        for i in (0..SWEEPS).flat_map(|_| 0..4) {
            let others: f64 = (0..4).filter(|&j| j != i).map(|j| self.squares[i][j] * self.costs[j]).sum();
            if self.squares[i][i] > 0.0 {
                self.costs[i] = ((self.products[i] - others) / self.squares[i][i]).max(0.0);
            }
        }
    }

    pub fn micros(&self, load: Load) -> f64 {
        let [a, b, c, d] = self.costs;
        a + b * load.tokens + c * load.keys + d * load.rows
    }

    /// One more token that attends to `keys` positions.
    fn micros_of_token(&self, keys: usize, is_scored: bool) -> f64 {
        let [_, b, c, d] = self.costs;
        b + c * keys as f64 + if is_scored { d } else { 0.0 }
    }
}

/// Prompt tokens that get on in every step, however slow the model: prompts are late then, but not for ever.
pub(super) const PROMPT_TOKENS_MIN: usize = 16;

/// Rows that are scored in a step at most: each is a row of logits, half a megabyte with a large vocabulary.
pub(crate) const SCORED_ROWS_MAX: usize = 32;

/// How many tokens from `first` on need no logits.
pub(super) fn before_rows(first: usize, scored_from: Option<usize>) -> usize {
    // A row tells of the token behind it.
    scored_from.map_or(usize::MAX, |from| (from - 1).saturating_sub(first))
}

/// What is left of one step.
#[derive(Debug)]
pub(super) struct Budget<'a> {
    cost: &'a CostModel,
    tokens: usize,
    rows: usize,
    /// None: nobody decodes, so nobody's next token is late.
    micros: Option<f64>,
    granted: usize,
}

impl<'a> Budget<'a> {
    /// Beside `decodes`, with at most `tokens` more, aiming at a step of `target`.
    pub fn new(cost: &'a CostModel, tokens: usize, decodes: &[Work], target: Duration) -> Budget<'a> {
        let left = || (target.as_secs_f64() * 1e6 - cost.micros(Load::of(decodes))).max(0.0);
        let micros = (!decodes.is_empty()).then(left);
        Budget { cost, tokens, rows: SCORED_ROWS_MAX, micros, granted: 0 }
    }

    /// How many of `want` tokens from `first` on there is room for.
    pub fn take(&mut self, first: usize, want: usize, scored_from: Option<usize>) -> usize {
        let plain = before_rows(first, scored_from);
        let want = want.min(plain.saturating_add(self.rows));
        let each = self.cost.micros_of_token(first + want, want > plain);
        let in_time = match self.micros {
            // Before much was learnt, a token may seem to cost nothing.
            Some(0.0) => 0,
            Some(left) if each > 0.0 => (left / each) as usize,
            _ => usize::MAX,
        };
        let least = PROMPT_TOKENS_MIN.saturating_sub(self.granted);
        let count = want.min(self.tokens).min(in_time.max(least));
        self.tokens -= count;
        self.rows -= count.saturating_sub(plain);
        self.granted += count;
        self.micros = self.micros.map(|left| (left - count as f64 * each).max(0.0));
        count
    }

    /// Whether there is time for a token of a sequence of so many.
    pub fn is_open(&self, length: usize, scored_from: Option<usize>) -> bool {
        let each = self.cost.micros_of_token(length, scored_from.is_some());
        self.tokens > 0
            && (self.granted < PROMPT_TOKENS_MIN || self.micros.is_none_or(|left| left > 0.0 && left >= each))
    }

    /// Whether a sequence may begin for all that it needs to be scored.
    pub fn has_rows(&self, scored_from: Option<usize>) -> bool {
        self.rows > 0 || before_rows(0, scored_from) > 0
    }
}

#[cfg(test)]
mod tests {
    use super::{Budget, CostModel, Load, PROMPT_TOKENS_MIN, Work};
    use std::time::Duration;

    /// 400 µs a step, 30 µs a token, 50 ns a key; every 17th step is held up by something else.
    fn measured() -> CostModel {
        let mut cost = CostModel::default();
        for n in 0..2000u64 {
            let (tokens, first) = (1 + (n * 7919) % 200, (n * 104_729) % 4000);
            let load = Load { tokens: tokens as f64, keys: (tokens * first) as f64, rows: 0.0 };
            let micros = 400.0 + 30.0 * load.tokens + 0.05 * load.keys;
            let noise = 1.0 + ((n * 31) % 11) as f64 / 100.0;
            let held_up = if n % 17 == 16 { 20.0 } else { 1.0 };
            cost.observe(load, Duration::from_secs_f64(micros * noise * held_up / 1e6));
        }
        cost
    }

    #[test]
    fn the_cost_of_a_step_is_learnt_though_some_are_held_up() {
        let cost = measured();
        for (tokens, first) in [(8, 100), (64, 0), (128, 2000)] {
            let load = Load { tokens: f64::from(tokens), keys: f64::from(tokens * first), rows: 0.0 };
            let truth = 400.0 + 30.0 * load.tokens + 0.05 * load.keys;
            let ratio = cost.micros(load) / truth;
            assert!((0.8..1.5).contains(&ratio), "{tokens} tokens at {first}: {ratio}");
        }
    }

    #[test]
    fn prompts_take_what_is_left_until_the_next_token_is_due() {
        let cost = measured();
        let decodes: Vec<Work> = (0..8).map(|id| Work { id, first: 500, count: 1, samples: true, rows: 1 }).collect();
        let alone = Duration::from_secs_f64(cost.micros(Load::of(&decodes)) / 1e6);
        let granted = |target: Duration| Budget::new(&cost, 256, &decodes, target).take(1000, 256, None);
        assert_eq!(granted(Duration::ZERO), PROMPT_TOKENS_MIN, "never starved");
        assert_eq!(granted(Duration::from_secs(1)), 256, "never more than the step");
        let some = granted(alone + Duration::from_millis(6));
        assert!((30..90).contains(&some), "{some} tokens of about 80 µs in 6 ms");
        // The second prompt gets what the first left.
        let mut budget = Budget::new(&cost, 256, &decodes, alone + Duration::from_millis(6));
        assert!(budget.take(1000, 20, None) == 20 && budget.is_open(1256, None));
        assert!(budget.take(1000, 256, None) < some && !budget.is_open(1256, None));
        // Whom it calls open gets a token, however little is left.
        for micros in 0..3000 {
            let mut budget = Budget::new(&cost, 256, &decodes, alone + Duration::from_micros(micros));
            budget.take(1000, PROMPT_TOKENS_MIN, None);
            assert!(!budget.is_open(1256, None) || budget.take(1000, 256, None) > 0, "{micros} µs");
        }
        // Nobody decodes: nobody waits.
        assert_eq!(Budget::new(&cost, 256, &[], Duration::ZERO).take(1000, 256, None), 256);
    }

    #[test]
    fn the_same_measurements_give_the_same_costs() {
        assert_eq!(measured().costs, measured().costs);
    }
}
