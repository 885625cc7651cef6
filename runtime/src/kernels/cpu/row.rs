//! What sampling asks of a row of logits as long as a vocabulary.

use super::{
    exp::exp,
    simd::{Job, LANES, Lanes, run},
};

/// The largest number, minus infinity if there is none. What is not a number is passed over.
pub(crate) fn largest(row: &[f32]) -> f32 {
    let mut largest = f32::NEG_INFINITY;
    run(Largest { row, largest: &mut largest });
    largest
}

/// Whether every number is at most `most`. What is not a number is not.
pub(crate) fn are_at_most(row: &[f32], most: f32) -> bool {
    let mut more = 0;
    run(CountMore { row, most, more: &mut more });
    more == 0
}

/// Every number x becomes e^((x - best) / temperature), and minus infinity 0; `best` is the largest of them.
pub(crate) fn weigh(row: &mut [f32], best: f32, temperature: f32) {
    run(Weigh { row, best, temperature });
}

struct Largest<'a> {
    row: &'a [f32],
    largest: &'a mut f32,
}

impl Job for Largest<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (chunks, rest) = self.row.as_chunks::<LANES>();
        let larger = |a: f32, b: f32| if b > a { b } else { a };
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for chunk in chunks {
            lanes = std::array::from_fn(|lane| larger(lanes[lane], chunk[lane]));
        }
        *self.largest = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger);
    }
}

struct CountMore<'a> {
    row: &'a [f32],
    most: f32,
    more: &'a mut u32,
}

impl Job for CountMore<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        *self.more = self.row.iter().map(|&x| u32::from(x > self.most || x.is_nan())).sum();
    }
}

struct Weigh<'a> {
    row: &'a mut [f32],
    best: f32,
    temperature: f32,
}

impl Job for Weigh<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        for x in self.row {
            // Dividing the difference, not the logit, cannot overflow to infinity however small the temperature.
            let weight = exp((*x - self.best) / self.temperature);
            *x = if *x == f32::NEG_INFINITY { 0.0 } else { weight };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_any_length_are_seen_to_their_last_number() {
        for len in 1..70 {
            for at in 0..len {
                let mut row = vec![-3.0f32; len];
                row[at] = 2.0;
                assert_eq!(largest(&row), 2.0, "{at} of {len}");
                assert!(are_at_most(&row, 2.0) && !are_at_most(&row, 1.9), "{at} of {len}");
                weigh(&mut row, 2.0, 0.5);
                let low = (-10f32).exp();
                assert!(row.iter().enumerate().all(|(i, w)| (w - if i == at { 1.0 } else { low }).abs() < 1e-7));
                row[at] = f32::NAN;
                assert!(!are_at_most(&row, f32::INFINITY) && (len == 1 || largest(&row) > 0.0), "{at} of {len}");
            }
        }
        let mut row = [f32::NEG_INFINITY, 1.0, -1e30];
        assert_eq!(largest(&[f32::NEG_INFINITY; 40]), f32::NEG_INFINITY);
        weigh(&mut row, 1.0, 1e-3);
        assert_eq!((row[0], row[1]), (0.0, 1.0));
        assert!(row[2] < 1e-37, "{row:?}");
    }
}
