//! What sampling asks of a row of logits as long as a vocabulary.

use super::{
    exp::exp,
    simd::{Job, LANES, Lanes, run},
};

/// The largest number, minus infinity if there is none. What is not a number is passed over.
pub(crate) fn largest(row: &[f32]) -> f32 {
    survey(row, f32::INFINITY).largest
}

/// The largest number, if all are numbers and at most `most`.
pub(crate) fn largest_up_to(row: &[f32], most: f32) -> Option<f32> {
    let seen = survey(row, most);
    (seen.beyond == 0).then_some(seen.largest)
}

/// Every number x becomes its weight e^((x - best) / temperature), and minus infinity 0; `best` is the largest of them.
/// Gives what the weights of each [`PART`] add up to, in an order that is the same on every machine.
pub(crate) fn weigh(row: &mut [f32], best: f32, temperature: f32) -> Vec<f64> {
    let mut sums = Vec::with_capacity(row.len().div_ceil(PART));
    run(Weigh { row, best, temperature, sums: &mut sums });
    sums
}

/// Weights that are added up at a time.
pub(crate) const PART: usize = 512;

struct Seen {
    largest: f32,
    /// How many are above the bound or not a number.
    beyond: u32,
}

fn survey(row: &[f32], most: f32) -> Seen {
    let mut seen = Seen { largest: f32::NEG_INFINITY, beyond: 0 };
    run(Survey { row, most, seen: &mut seen });
    seen
}

struct Survey<'a> {
    row: &'a [f32],
    most: f32,
    seen: &'a mut Seen,
}

impl Job for Survey<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (chunks, rest) = self.row.as_chunks::<LANES>();
        let larger = |a: f32, b: f32| if b > a { b } else { a };
        let is_beyond = |x: f32| u32::from(x > self.most || x.is_nan());
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let mut beyond = [0; LANES];
        for chunk in chunks {
            for lane in 0..LANES {
                lanes[lane] = larger(lanes[lane], chunk[lane]);
                beyond[lane] += is_beyond(chunk[lane]);
            }
        }
        self.seen.largest = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger);
        self.seen.beyond = beyond.into_iter().chain(rest.iter().copied().map(is_beyond)).sum();
    }
}

struct Weigh<'a> {
    row: &'a mut [f32],
    best: f32,
    temperature: f32,
    sums: &'a mut Vec<f64>,
}

impl Job for Weigh<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        for part in self.row.chunks_mut(PART) {
            for x in &mut *part {
                // Dividing the difference, not the logit, cannot overflow to infinity however small the temperature.
                let weight = exp((*x - self.best) / self.temperature);
                *x = if *x == f32::NEG_INFINITY { 0.0 } else { weight };
            }
            let (chunks, rest) = part.as_chunks::<LANES>();
            // Side by side, so that no addition waits for the one before.
            let mut lanes = [0f64; LANES];
            for chunk in chunks {
                lanes.iter_mut().zip(chunk).for_each(|(lane, &weight)| *lane += f64::from(weight));
            }
            self.sums.push(lanes.into_iter().chain(rest.iter().copied().map(f64::from)).sum());
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
                assert_eq!((largest_up_to(&row, 2.0), largest_up_to(&row, 1.9)), (Some(2.0), None), "{at} of {len}");
                let sums = weigh(&mut row, 2.0, 0.5);
                let low = (-10f32).exp();
                assert!((sums[0] - 1.0 - f64::from(low) * (len - 1) as f64).abs() < 1e-7, "{at} of {len}");
                assert!(row.iter().enumerate().all(|(i, w)| (w - if i == at { 1.0 } else { low }).abs() < 1e-7));
                row[at] = f32::NAN;
                assert!(
                    largest_up_to(&row, f32::INFINITY).is_none() && (len == 1 || largest(&row) > 0.0),
                    "{at} of {len}"
                );
            }
        }
        let mut row = [f32::NEG_INFINITY, 1.0, -1e30];
        assert_eq!(largest(&[f32::NEG_INFINITY; 40]), f32::NEG_INFINITY);
        weigh(&mut row, 1.0, 1e-3);
        assert_eq!((row[0], row[1]), (0.0, 1.0));
        assert!(row[2] < 1e-37, "{row:?}");
    }
}
