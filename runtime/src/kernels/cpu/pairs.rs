//! y = x · Wᵀ over bf16 weights on processors that multiply bf16 themselves: twice as many products an instruction as
//! in f32.
//!
//! To each sum `vdpbf16ps` adds the product of a pair's second numbers, then that of the first ones, and rounds each time
//! as a fused multiply-add does. `linear` does the same in f32 with the same rounded inputs, so that both give the same
//! bits; only numbers below 1e-38 are an exception, which are zero to the instruction.

#![allow(unsafe_code)] // The intrinsics, and the call into `target_feature` code.

use super::{
    linear::{STEP, fit},
    packed::Line,
    rounded::Pairs,
    rows::Columns,
};
use candle_core::Result;
use half::bf16;

/// Whether this machine has the instruction.
pub(super) fn known() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// `x`: rounded rows of `inputs`. Only where the instruction is [`known`].
pub(super) fn multiply(x: &[Pairs], lines: &[Line<bf16>], inputs: usize, y: Columns<'_>) -> Result<()> {
    fit(lines, inputs, &y)?;
    assert!(known(), "an instruction that this machine has not");
    #[cfg(target_arch = "x86_64")]
    x86::multiply(x, lines, inputs / STEP, y)?;
    Ok(())
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{
        super::{
            rows::{Tiles, fill_tiles},
            simd::LANES,
            sweep::{Sweep, sweep},
        },
        Columns, Line, Pairs, Result, STEP, bf16,
    };
    use std::arch::x86_64::*;

    pub(super) fn multiply(x: &[Pairs], lines: &[Line<bf16>], steps: usize, y: Columns<'_>) -> Result<()> {
        // Two products are done in the time of one in f32.
        let work = x.len() * STEP / 2 * y.columns.len();
        // SAFETY: the caller saw that the instruction is known.
        fill_tiles(y, work, |tiles| unsafe { run(Multiply { x, lines, steps, tiles }) })
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn run(job: Multiply<'_, '_>) {
        // Sixteen sums and more hide the latency of the additions, and eight rows need few loads for them: with inputs of
        // 8,192 that is worth a fifth. One row alone waits for memory.
        match job.rows() {
            1 => sweep::<_, 1, 8>(job),
            2 | 3 => sweep::<_, 2, 4>(job),
            4..8 => sweep::<_, 4, 4>(job),
            _ => sweep::<_, 8, 3>(job),
        }
    }

    #[inline(always)]
    fn as_bf16(bits: __m512i) -> __m512bh {
        // SAFETY: 64 bytes of any kind.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(bits) }
    }

    /// The tiles of one thread.
    struct Multiply<'a, 't> {
        x: &'a [Pairs],
        lines: &'a [Line<bf16>],
        /// In a row.
        steps: usize,
        tiles: &'a mut Tiles<'t>,
    }

    impl Sweep for Multiply<'_, '_> {
        #[inline(always)]
        fn rows(&self) -> usize {
            self.x.len() / self.steps
        }
        #[inline(always)]
        fn tiles(&self) -> &Tiles<'_> {
            self.tiles
        }
        #[inline(always)]
        fn block<const M: usize, const N: usize>(&mut self, row: usize, tile: usize) {
            const LINES: usize = STEP / 2;
            let Multiply { x, lines, steps, ref mut tiles } = *self;
            let x: [&[Pairs]; M] = std::array::from_fn(|m| &x[(row + m) * steps..][..steps]);
            let w: [&[[Line<bf16>; LINES]]; N] =
                std::array::from_fn(|n| &lines[(tile + n) * steps * LINES..].as_chunks::<LINES>().0[..steps]);
            // SAFETY of every block below: only `run` calls this, so it is compiled for the instructions, and each
            // pointer comes from an array of 64 bytes.
            let mut sums = [[unsafe { _mm512_setzero_ps() }; N]; M];
            for step in 0..steps {
                for i in 0..LINES {
                    // No closures: these would be compiled without the instructions.
                    let mut lines = [unsafe { _mm512_setzero_si512() }; N];
                    for n in 0..N {
                        lines[n] = unsafe { _mm512_loadu_si512(w[n][step][i].0.as_ptr().cast()) };
                    }
                    for m in 0..M {
                        let pair = unsafe { _mm512_set1_epi32(x[m][step][i] as i32) };
                        for n in 0..N {
                            sums[m][n] = unsafe { _mm512_dpbf16_ps(sums[m][n], as_bf16(lines[n]), as_bf16(pair)) };
                        }
                    }
                }
            }
            let mut values = [0f32; LANES];
            for (m, sums) in sums.into_iter().enumerate() {
                for (n, sum) in sums.into_iter().enumerate() {
                    unsafe { _mm512_storeu_ps(values.as_mut_ptr(), sum) };
                    tiles.put(row + m, tile + n, &values);
                }
            }
        }
    }
}
