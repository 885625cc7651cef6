//! Rotary positions, gates, biases and softcaps: one pass over their operands each, row by row.

use super::{
    exp::{exp, tanh},
    rows::fill_parts,
    simd::{Job, Lanes, run},
    view::{f32s, rows_mut},
};
use crate::kernels::batch::StepBatch;
use candle_core::{CpuStorage, CustomOp1, InplaceOp1, InplaceOp2, InplaceOp3, Layout, Result, Shape, Tensor, bail};
use std::sync::Arc;

/// What a gate does to its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    /// x · σ(x)
    Silu,
    /// GELU by its tanh approximation: x/2 · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))
    GeluTanh,
}

/// act(gate) · up for rows that hold gate and up side by side: `[T, 2·I]` → `[T, I]`.
pub(crate) fn gate_mul(gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
    gate_up.apply_op1_no_bwd(&GateMul { activation })
}

/// Turns the first `heads` heads of every row by its position, in place: of each head's `dim` numbers the first
/// 2·n, element i with element i + n. `x`: `[T, ≥ heads · dim]`; `cos`, `sin`: `[positions, n]`.
pub(crate) fn rope(
    x: &Tensor,
    heads: usize,
    dim: usize,
    (cos, sin): (&Tensor, &Tensor),
    batch: &Arc<StepBatch>,
) -> Result<()> {
    x.inplace_op3(cos, sin, &Rope { heads, dim, batch: Arc::clone(batch) })
}

/// Adds `bias` `[N]` to every row of `x` `[T, N]`, in place.
pub(crate) fn add_bias(x: &Tensor, bias: &Tensor) -> Result<()> {
    x.inplace_op2(bias, &AddBias)
}

/// cap · tanh(x / cap), in place. `x`: `[R, N]`.
pub(crate) fn softcap(x: &Tensor, cap: f32) -> Result<()> {
    x.inplace_op1(&Softcap { cap })
}

struct GateMul {
    activation: Activation,
}

impl CustomOp1 for GateMul {
    fn name(&self) -> &'static str {
        "gate_mul"
    }

    fn cpu_fwd(&self, gate_up: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let gate_up = f32s(gate_up, layout, "gate_mul")?;
        let (rows, both) = layout.shape().dims2()?;
        let width = both / 2;
        let mut out = vec![0f32; rows * width];
        // An exponential weighs about as much as eight multiply-adds.
        fill_parts(&mut out, width, 8 * rows * width, |t, out| {
            let (gate, up) = gate_up[t * both..][..both].split_at(width);
            run(Gate { gate, up, out, activation: self.activation });
        })?;
        Ok((CpuStorage::F32(out), (rows, width).into()))
    }
}

struct Gate<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
    activation: Activation,
}

impl Job for Gate<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let numbers = self.gate.iter().zip(self.up).zip(self.out);
        match self.activation {
            Activation::Silu => {
                for ((&gate, &up), out) in numbers {
                    *out = gate / (1.0 + exp(-gate)) * up;
                }
            }
            Activation::GeluTanh => {
                // (1 + tanh(u)) / 2 = 1 / (1 + e^(−2u)), without a difference that loses digits.
                const TWICE_ROOT: f32 = -2.0 * 0.797_884_6;
                for ((&gate, &up), out) in numbers {
                    let inner = gate + 0.044_715 * (gate * gate * gate);
                    *out = gate / (1.0 + exp(TWICE_ROOT * inner)) * up;
                }
            }
        }
    }
}

struct Rope {
    heads: usize,
    dim: usize,
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
        let (x, width) = rows_mut(x, xl, "rope")?;
        let turned = self.heads * self.dim;
        let fits = x.len() == self.batch.tokens() * width && turned <= width && 2 * half <= self.dim;
        if !fits || cos.len() != sin.len() {
            bail!("rope: {:?} with {} heads of {}, {} of them turned", xl.dims(), self.heads, self.dim, 2 * half);
        }
        if self.batch.pos.iter().any(|&pos| pos as usize >= positions) {
            bail!("rope: a position beyond the table of {positions}");
        }
        let work = self.batch.tokens() * self.heads * half * 4;
        fill_parts(x, width, work, |t, row| {
            let at = self.batch.pos[t] as usize * half;
            let (cos, sin) = (&cos[at..][..half], &sin[at..][..half]);
            run(Turn { row: &mut row[..turned], dim: self.dim, cos, sin });
        })
    }
}

struct Turn<'a> {
    row: &'a mut [f32],
    dim: usize,
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Job for Turn<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let half = self.cos.len();
        for head in self.row.chunks_exact_mut(self.dim) {
            let (left, right) = head[..2 * half].split_at_mut(half);
            for i in 0..half {
                let (a, b) = (left[i], right[i]);
                left[i] = a * self.cos[i] - b * self.sin[i];
                right[i] = b * self.cos[i] + a * self.sin[i];
            }
        }
    }
}

struct AddBias;

impl InplaceOp2 for AddBias {
    fn name(&self) -> &'static str {
        "add_bias"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, xl: &Layout, bias: &CpuStorage, bl: &Layout) -> Result<()> {
        let bias = f32s(bias, bl, "add_bias")?;
        let (x, width) = rows_mut(x, xl, "add_bias")?;
        if bias.len() != width {
            bail!("add_bias: {} numbers for {:?}", bias.len(), xl.dims());
        }
        let work = x.len();
        fill_parts(x, width, work, |_, row| {
            for (x, bias) in row.iter_mut().zip(bias) {
                *x += bias;
            }
        })
    }
}

struct Softcap {
    cap: f32,
}

impl InplaceOp1 for Softcap {
    fn name(&self) -> &'static str {
        "softcap"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (x, width) = rows_mut(x, layout, "softcap")?;
        let work = 8 * x.len();
        fill_parts(x, width, work, |_, row| run(Cap { row, cap: self.cap }))
    }
}

struct Cap<'a> {
    row: &'a mut [f32],
    cap: f32,
}

impl Job for Cap<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        for x in self.row {
            *x = self.cap * tanh(*x / self.cap);
        }
    }
}
