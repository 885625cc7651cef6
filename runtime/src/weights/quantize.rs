//! Weights made smaller while they are read: a layer over [`Tensors`] that turns plain numbers into blocks.
//!
//! One tensor at a time and by several threads, so that a load needs little more memory than its result.

use super::{Tensors, WeightError};
use crate::{
    kernels::cpu::{Kind, Raw, fill_on_threads},
    settings::Quantize,
};
use candle_core::Tensor;
use half::f16;
use std::{cell::RefCell, path::PathBuf};

/// These two are Q8_0 whatever the rest is: each row of them is a token of its own.
const TABLES: [&str; 2] = ["model.embed_tokens.weight", "lm_head.weight"];

/// Another source of tensors, quantised.
pub(crate) struct Quantized<'a> {
    source: &'a dyn Tensors,
    to: Quantize,
    exceptions: RefCell<Vec<String>>,
}

impl<'a> Quantized<'a> {
    pub fn new(source: &'a dyn Tensors, to: Quantize) -> Quantized<'a> {
        Quantized { source, to, exceptions: RefCell::default() }
    }

    /// Which matrices could not become what was asked for, and why.
    pub fn exceptions(self) -> Vec<String> {
        self.exceptions.into_inner()
    }

    /// What a matrix becomes, and why it is not what was asked for.
    fn kind(&self, name: &str, stored: Kind, columns: usize) -> (Kind, Option<String>) {
        let stays = |why: String| (stored, Some(format!("{name}: stays {}, {why}", stored.name())));
        if stored.block_len() > 1 {
            stays("as the file stores it".to_owned())
        } else if !columns.is_multiple_of(32) {
            stays(format!("its width {columns} is no multiple of 32"))
        } else if self.to == Quantize::Q8_0 || TABLES.contains(&name) {
            (Kind::Q8_0, None)
        } else if !columns.is_multiple_of(256) {
            (Kind::Q8_0, Some(format!("{name}: is q8_0, its width {columns} is no multiple of 256")))
        } else {
            (Kind::Q4K, None)
        }
    }
}

impl Tensors for Quantized<'_> {
    fn kinds(&self, name: &str, rows: usize, columns: usize) -> Result<[Kind; 2], WeightError> {
        let [stored, _] = self.source.kinds(name, rows, columns)?;
        Ok([stored, self.kind(name, stored, columns).0])
    }

    fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Raw, WeightError> {
        let raw = self.source.matrix(name, rows, columns)?;
        let (kind, exception) = self.kind(name, raw.kind, columns);
        self.exceptions.borrow_mut().extend(exception);
        if kind == raw.kind {
            return Ok(raw);
        }
        let quantized = quantize(&raw, kind);
        if !kind.all_finite(&quantized.bytes) {
            let why = format!("holds numbers too large for {}: load it without quantisation", kind.name());
            return Err(WeightError::new(
                &self.files().first().cloned().unwrap_or_default(),
                format!("tensor `{name}` {why}"),
            ));
        }
        Ok(quantized)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Tensor, WeightError> {
        self.source.vector(name, len)
    }

    fn files(&self) -> Vec<PathBuf> {
        self.source.files()
    }
}

/// `kind` is Q8_0 or Q4K, and the rows are whole blocks of it.
fn quantize(raw: &Raw, kind: Kind) -> Raw {
    let (from, to) = (raw.columns * raw.kind.block_bytes(), raw.columns / kind.block_len() * kind.block_bytes());
    let mut bytes = vec![0; raw.rows * to];
    fill_on_threads(&mut bytes, to, |row, out| {
        let mut numbers = vec![0f32; raw.columns];
        raw.kind.widen(&raw.bytes[row * from..][..from], &mut numbers);
        for (x, block) in numbers.chunks_exact(kind.block_len()).zip(out.chunks_exact_mut(kind.block_bytes())) {
            if kind == Kind::Q4K { q4_k(x, block) } else { q8_0(x, block) }
        }
    });
    Raw { kind, rows: raw.rows, columns: raw.columns, bytes }
}

/// 32 numbers: the largest becomes ±127.
fn q8_0(x: &[f32], block: &mut [u8]) {
    let largest = x.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let d = put_half(&mut block[..2], largest / 127.0);
    let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
    for (quant, x) in block[2..].iter_mut().zip(x) {
        *quant = (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8 as u8;
    }
}

/// 256 numbers: each part's best scale and minimum, these rounded to 6 bits, and the quants that suit what is left of
/// them.
fn q4_k(x: &[f32], block: &mut [u8]) {
    let parts = x.as_chunks::<32>().0;
    let fits: [(f32, f32); 8] = std::array::from_fn(|part| fit(&parts[part]));
    let largest = |of: fn(&(f32, f32)) -> f32| fits.iter().map(of).fold(0f32, f32::max);
    let d = put_half(&mut block[..2], largest(|fit| fit.0) / 63.0);
    let m = put_half(&mut block[2..4], largest(|fit| fit.1) / 63.0);
    for (part, (scale, minimum)) in fits.into_iter().enumerate() {
        let (scale, minimum) = (steps(scale, d, 63.0), steps(minimum, m, 63.0));
        put_scale_and_minimum(&mut block[4..16], part, scale, minimum);
        let (scale, minimum) = (d * f32::from(scale), m * f32::from(minimum));
        for (i, x) in parts[part].iter().enumerate() {
            block[16 + part / 2 * 32 + i] |= steps(x + minimum, scale, 15.0) << (part % 2 * 4);
        }
    }
}

/// Scale s and minimum m ≥ 0 such that s·q − m with q in 0..=15 comes near to `x`: for ranges around the one that `x`
/// spans, the least squares solution for the quants that the range gives; the best of them.
fn fit(x: &[f32; 32]) -> (f32, f32) {
    let lowest = x.iter().fold(0f32, |a, &b| a.min(b));
    let highest = x.iter().fold(lowest, |a, &b| a.max(b));
    if highest == lowest {
        return (0.0, -lowest);
    }
    // Numbers so large that no trial's error is one are too large: so is this, and whoever asked for blocks hears of it.
    let mut best = (f32::INFINITY, (f32::INFINITY, 0.0));
    for trial in 0..=20 {
        let inverse = (14.0 + 0.1 * trial as f32) / (highest - lowest);
        let (mut q_sum, mut qq_sum, mut x_sum, mut qx_sum) = (0.0, 0.0, 0.0, 0.0);
        let quants = x.map(|x| ((x - lowest) * inverse).round_ties_even().clamp(0.0, 15.0));
        for (x, q) in x.iter().zip(&quants) {
            q_sum += q;
            qq_sum += q * q;
            x_sum += x;
            qx_sum += q * x;
        }
        let determinant = 32.0 * qq_sum - q_sum * q_sum;
        let mut scale = (32.0 * qx_sum - q_sum * x_sum) / determinant;
        let mut minimum = (q_sum * qx_sum - qq_sum * x_sum) / determinant;
        // A constant has no line through it; a negative minimum cannot be stored. Some quant is never zero.
        if determinant <= 0.0 || minimum < 0.0 {
            (scale, minimum) = (qx_sum / qq_sum, 0.0);
        }
        let error: f32 = x.iter().zip(&quants).map(|(x, q)| (scale * q - minimum - x).powi(2)).sum();
        if error < best.0 {
            best = (error, (scale, minimum));
        }
    }
    best.1
}

/// How many times `step` goes into `x`, to the nearest, at most `most`.
fn steps(x: f32, step: f32, most: f32) -> u8 {
    if step > 0.0 { (x / step).round_ties_even().clamp(0.0, most) as u8 } else { 0 }
}

/// Writes an f16 and returns what it became.
fn put_half(out: &mut [u8], number: f32) -> f32 {
    let half = f16::from_f32(number);
    out.copy_from_slice(&half.to_le_bytes());
    half.to_f32()
}

/// The inverse of how `blocks` reads them.
fn put_scale_and_minimum(packed: &mut [u8], part: usize, scale: u8, minimum: u8) {
    if part < 4 {
        packed[part] |= scale;
        packed[part + 4] |= minimum;
    } else {
        packed[part + 4] |= (scale & 15) | (minimum << 4);
        packed[part - 4] |= scale >> 4 << 6;
        packed[part] |= minimum >> 4 << 6;
    }
}

#[cfg(test)]
mod tests {
    use super::{Kind, Raw, quantize};

    /// Sums of uniform numbers, close enough to a normal distribution.
    fn gaussian(count: usize) -> Vec<f32> {
        let mut state = 7u64;
        let mut uniform = || {
            state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        (0..count).map(|_| (0..12).map(|_| uniform()).sum::<f32>() * 0.02).collect()
    }

    fn raw(numbers: &[f32], columns: usize) -> Raw {
        let bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        Raw { kind: Kind::F32, rows: numbers.len() / columns, columns, bytes }
    }

    fn back(raw: &Raw) -> Vec<f32> {
        let mut numbers = vec![0f32; raw.rows * raw.columns];
        raw.kind.widen(&raw.bytes, &mut numbers);
        numbers
    }

    /// The format itself sets the bound of Q8_0: the largest of 32 is about 2.3 standard deviations, and 2.3 / 127 / √12
    /// is 0.53 %. Likewise Q4_K: 15 steps for a range of about 4.1 leave 7 to 8 %, and the search the lower end of it.
    #[test]
    fn gaussian_weights_lose_no_more_than_promised() {
        let want = gaussian(64 * 1024);
        for (kind, bound) in [(Kind::Q8_0, 0.0055), (Kind::Q4K, 0.072)] {
            let got = back(&quantize(&raw(&want, 1024), kind));
            let energy = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x * x)).sum::<f64>();
            let error = energy(&mut got.iter().zip(&want).map(|(x, y)| x - y)) / energy(&mut want.iter().copied());
            assert!(error.sqrt() < bound, "{kind:?}: relative error {}", error.sqrt());
        }
    }

    #[test]
    fn what_fits_exactly_stays_exact_and_edges_are_no_trouble() {
        for kind in [Kind::Q8_0, Kind::Q4K] {
            for constant in [0.0, -0.5, 0.5, 1e-30] {
                let want = vec![constant; 256];
                let got = back(&quantize(&raw(&want, 256), kind));
                assert!(
                    got.iter().all(|x| (x - constant).abs() <= 0.001 * constant.abs() + 1e-9),
                    "{kind:?}: {constant}"
                );
            }
            let once = quantize(&raw(&gaussian(1024), 256), Kind::Q8_0);
            let twice = quantize(&raw(&back(&once), 256), Kind::Q8_0);
            assert_eq!(back(&once), back(&twice));
            for large in [1e8, 1e22, 3e38] {
                let numbers: Vec<f32> = (0..256).map(|i| if i % 3 == 0 { large } else { -large }).collect();
                for numbers in [vec![large; 256], numbers] {
                    let too_large = quantize(&raw(&numbers, 256), kind);
                    assert!(!kind.all_finite(&too_large.bytes), "{kind:?}: {large}");
                }
            }
        }
    }
}
