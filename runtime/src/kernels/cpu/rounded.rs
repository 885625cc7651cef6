//! Inputs rounded to int8 for the quantised kernels and to bf16 for weights in bf16, each row by itself: the same
//! whatever else is in the batch.

use super::{
    rows::fill_parts,
    simd::{Job, Lanes, run},
};
use candle_core::Result;

/// 32 inputs of a row with one scale.
#[derive(Clone, Copy, Default)]
pub(crate) struct Inputs32 {
    pub quants: [[i8; 4]; 8],
    pub scale: f32,
    pub sum: i32,
}

/// 256 inputs of a row with one scale, and the sums of their parts.
#[derive(Clone, Copy)]
pub(crate) struct Inputs256 {
    pub quants: [[i8; 4]; 64],
    pub scale: f32,
    /// Of each 16.
    pub sums: [i32; 16],
    /// Of each 32, two by two.
    pub pairs: [[i16; 2]; 4],
}

/// What a cell of weights meets.
pub(crate) trait Rounded: Copy + Send + Sync {
    const INPUTS: usize;
    const EMPTY: Self;
    fn fill(&mut self, x: &[f32]);
}

impl Rounded for [Inputs32; 2] {
    const INPUTS: usize = 64;
    const EMPTY: Self = [Inputs32 { quants: [[0; 4]; 8], scale: 0.0, sum: 0 }; 2];
    #[inline(always)]
    fn fill(&mut self, x: &[f32]) {
        for (block, x) in self.iter_mut().zip(x.chunks(32)) {
            block.scale = round(x, &mut block.quants);
            block.sum = sum(&block.quants);
        }
    }
}

impl Rounded for Inputs256 {
    const INPUTS: usize = 256;
    const EMPTY: Self = Inputs256 { quants: [[0; 4]; 64], scale: 0.0, sums: [0; 16], pairs: [[0; 2]; 4] };
    #[inline(always)]
    fn fill(&mut self, x: &[f32]) {
        self.scale = round(x, &mut self.quants);
        for (part, sum_of_part) in self.quants.as_chunks::<4>().0.iter().zip(&mut self.sums) {
            *sum_of_part = sum(part);
        }
        for (pair, sums) in self.pairs.iter_mut().zip(self.sums.as_chunks::<4>().0) {
            // At most 32 · 127.
            *pair = [(sums[0] + sums[1]) as i16, (sums[2] + sums[3]) as i16];
        }
    }
}

/// Eight numbers as bf16, two in a word with the first one in its low half.
pub(crate) type Pairs = [u32; 4];

impl Rounded for Pairs {
    const INPUTS: usize = 8;
    const EMPTY: Self = [0; 4];
    #[inline(always)]
    fn fill(&mut self, x: &[f32]) {
        for (pair, x) in self.iter_mut().zip(x.as_chunks::<2>().0) {
            *pair = nearest(x[0]) >> 16 | nearest(x[1]);
        }
    }
}

/// Numbers that bf16 has, in f32.
impl Rounded for [f32; 8] {
    const INPUTS: usize = 8;
    const EMPTY: Self = [0.0; 8];
    #[inline(always)]
    fn fill(&mut self, x: &[f32]) {
        for (number, &x) in self.iter_mut().zip(x) {
            *number = f32::from_bits(nearest(x));
        }
    }
}

/// The bits of the nearest number that bf16 has (ties to even). Unlike the `half` crate's way it has no branch.
#[inline(always)]
fn nearest(x: f32) -> u32 {
    let bits = x.to_bits();
    if x.is_nan() { 0x7FC0_0000 } else { (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF_0000 }
}

#[inline(always)]
fn sum(quants: &[[i8; 4]]) -> i32 {
    quants.as_flattened().iter().map(|&quant| i32::from(quant)).sum()
}

/// A smaller range is zero for every purpose, and has no inverse in f32.
const SMALLEST: f32 = 1e-30;

/// Added to a small number, it leaves the nearest integer (ties to even) in the low bits.
const NEAREST: f32 = 12_582_912.0;

/// Quants of `x` between −127 and 127, and what one of them is worth: not a number if `x` holds anything not finite.
#[inline(always)]
fn round(x: &[f32], quants: &mut [[i8; 4]]) -> f32 {
    // Bits without the sign order like the numbers, and what is not finite comes last.
    let largest = x.iter().fold(0, |largest: u32, x| largest.max(x.to_bits() & 0x7FFF_FFFF));
    let largest = f32::from_bits(largest);
    if !largest.is_finite() {
        return f32::NAN;
    }
    if largest < SMALLEST {
        return 0.0;
    }
    let inverse = 127.0 / largest;
    for (quant, x) in quants.as_flattened_mut().iter_mut().zip(x) {
        *quant = (x * inverse + NEAREST).to_bits().wrapping_sub(NEAREST.to_bits()) as i8;
    }
    largest / 127.0
}

/// The rows of `x`, each `inputs` wide, filled up with zeros to whole cells.
pub(crate) fn rounded<R: Rounded>(x: &[f32], inputs: usize) -> Result<Vec<R>> {
    let cells = inputs.div_ceil(R::INPUTS);
    let mut rows = vec![R::EMPTY; x.len() / inputs * cells];
    fill_parts(&mut rows, cells, x.len(), |row, cells| run(Round { x: &x[row * inputs..][..inputs], cells }))?;
    Ok(rows)
}

struct Round<'a, R> {
    x: &'a [f32],
    cells: &'a mut [R],
}

impl<R: Rounded> Job for Round<'_, R> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        for (cell, x) in self.cells.iter_mut().zip(self.x.chunks(R::INPUTS)) {
            cell.fill(x);
        }
    }
}
