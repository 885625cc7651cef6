//! RMS norm, rotary positions and SiLU·mul: one pass over their operands each, row by row.

use super::{
    exp::exp,
    rows::fill_parts,
    simd::{Job, LANES, Lanes, run},
    view::f32s,
};
use crate::kernels::batch::StepBatch;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, InplaceOp3, Layout, Result, Shape, Tensor, bail};
use std::sync::Arc;

/// x / √(mean(x²) + eps) · weight, each row for itself. `x`: `[T, H]`, `weight`: `[H]`, H a multiple of 16.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    x.apply_op2_no_bwd(weight, &RmsNorm { eps })
}

/// silu(gate) · up for rows that hold gate and up side by side: `[T, 2·I]` → `[T, I]`.
pub(crate) fn silu_mul(gate_up: &Tensor) -> Result<Tensor> {
    gate_up.apply_op1_no_bwd(&SiluMul)
}

/// Turns the first `heads` heads of every row by its position, in place: element i of a head pairs with i + d/2.
/// `x`: `[T, ≥ heads · d]`; `cos`, `sin`: `[positions, d/2]`.
pub(crate) fn rope(x: &Tensor, heads: usize, cos: &Tensor, sin: &Tensor, batch: &Arc<StepBatch>) -> Result<()> {
    x.inplace_op3(cos, sin, &Rope { heads, batch: Arc::clone(batch) })
}

struct RmsNorm {
    eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, w: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (f32s(x, xl, "rms_norm")?, f32s(w, wl, "rms_norm")?);
        let width = w.len();
        if width == 0 || width % LANES != 0 || x.len() % width != 0 {
            bail!("rms_norm: rows of {:?} with a weight of {width}", xl.dims());
        }
        let mut out = vec![0f32; x.len()];
        fill_parts(&mut out, width, x.len(), |t, out| {
            run(Norm { x: &x[t * width..][..width], w, out, eps: self.eps });
        })?;
        Ok((CpuStorage::F32(out), xl.shape().clone()))
    }
}

struct Norm<'a> {
    x: &'a [f32],
    w: &'a [f32],
    out: &'a mut [f32],
    eps: f32,
}

impl Job for Norm<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (x, w) = (self.x.as_chunks::<LANES>().0, self.w.as_chunks::<LANES>().0);
        let mut squares = L::splat(0.0);
        for x in x {
            let x = L::load(x);
            squares = squares.add_product(x, x);
        }
        let scale = L::splat(1.0 / (squares.sum() / self.x.len() as f32 + self.eps).sqrt());
        for ((x, w), out) in x.iter().zip(w).zip(self.out.as_chunks_mut::<LANES>().0) {
            L::load(x).mul(scale).mul(L::load(w)).store(out);
        }
    }
}

struct SiluMul;

impl CustomOp1 for SiluMul {
    fn name(&self) -> &'static str {
        "silu_mul"
    }

    fn cpu_fwd(&self, gate_up: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let gate_up = f32s(gate_up, layout, "silu_mul")?;
        let (rows, both) = layout.shape().dims2()?;
        let width = both / 2;
        let mut out = vec![0f32; rows * width];
        // An exponential weighs about as much as eight multiply-adds.
        fill_parts(&mut out, width, 8 * rows * width, |t, out| {
            let (gate, up) = gate_up[t * both..][..both].split_at(width);
            run(Gate { gate, up, out });
        })?;
        Ok((CpuStorage::F32(out), (rows, width).into()))
    }
}

struct Gate<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Job for Gate<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        for ((&gate, &up), out) in self.gate.iter().zip(self.up).zip(self.out) {
            *out = gate / (1.0 + exp(-gate)) * up;
        }
    }
}

struct Rope {
    heads: usize,
    batch: Arc<StepBatch>,
}

impl InplaceOp3 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(
        &self,
        x: &mut CpuStorage,
        xl: &Layout,
        cos: &CpuStorage,
        cl: &Layout,
        sin: &CpuStorage,
        sl: &Layout,
    ) -> Result<()> {
        let (cos, sin) = (f32s(cos, cl, "rope")?, f32s(sin, sl, "rope")?);
        let (positions, half) = cl.shape().dims2()?;
        let (rows, width) = xl.shape().dims2()?;
        let fits = rows == self.batch.tokens() && self.heads * 2 * half <= width && cos.len() == sin.len();
        let CpuStorage::F32(x) = x else { bail!("rope: operand is not f32") };
        if !fits || !xl.is_contiguous() || xl.start_offset() != 0 {
            bail!("rope: {:?} with {} heads of {}", xl.dims(), self.heads, 2 * half);
        }
        if self.batch.pos.iter().any(|&pos| pos as usize >= positions) {
            bail!("rope: a position beyond the table of {positions}");
        }
        fill_parts(&mut x[..rows * width], width, rows * self.heads * half * 4, |t, row| {
            let at = self.batch.pos[t] as usize * half;
            run(Turn { row: &mut row[..self.heads * 2 * half], cos: &cos[at..][..half], sin: &sin[at..][..half] });
        })
    }
}

struct Turn<'a> {
    row: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Job for Turn<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let half = self.cos.len();
        for head in self.row.chunks_exact_mut(2 * half) {
            let (left, right) = head.split_at_mut(half);
            for i in 0..half {
                let (a, b) = (left[i], right[i]);
                left[i] = a * self.cos[i] - b * self.sin[i];
                right[i] = b * self.cos[i] + a * self.sin[i];
            }
        }
    }
}
