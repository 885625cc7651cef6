//! RMS norm, alone, of heads in place, and fused with the residual sum; and the plain residual sum. Row by row.

use super::{
    rows::fill_parts,
    simd::{Job, LANES, Lanes, run},
    view::{f32s, rows_mut},
};
use candle_core::{CpuStorage, CustomOp2, InplaceOp2, InplaceOp3, Layout, Result, Shape, Tensor, bail};

/// x / √(mean(x²) + eps) · weight, each row for itself. `x`: `[T, H]`, `weight`: `[H]`, H a multiple of 16.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    x.apply_op2_no_bwd(weight, &RmsNorm { eps })
}

/// Norms the first `q_width` numbers of every row in runs of `q_weight`'s length, the next `k_width` in runs of
/// `k_weight`'s, in place: a weight as long as a head norms each head, one as long as the width norms all heads together.
pub(crate) fn qk_norm(
    qkv: &Tensor,
    q_weight: &Tensor,
    k_weight: &Tensor,
    [q_width, k_width]: [usize; 2],
    eps: f32,
) -> Result<()> {
    qkv.inplace_op3(q_weight, k_weight, &QkNorm { q_width, k_width, eps })
}

/// h + scale · y, in place of `h`. Both `[T, H]`, H a multiple of 16.
pub(crate) fn add(h: &Tensor, y: &Tensor, scale: f32) -> Result<()> {
    h.inplace_op2(y, &Add { scale })
}

/// h + scale · rms_norm(y), in place of `h`. `h`, `y`: `[T, H]`, `weight`: `[H]`, H a multiple of 16.
pub(crate) fn add_normed(h: &Tensor, y: &Tensor, weight: &Tensor, eps: f32, scale: f32) -> Result<()> {
    h.inplace_op3(y, weight, &AddNormed { eps, scale })
}

/// 1 / √(mean(x²) + eps)
#[inline(always)]
fn reciprocal_rms<L: Lanes>(x: &[[f32; LANES]], eps: f32) -> f32 {
    let mut squares = L::splat(0.0);
    for x in x {
        let x = L::load(x);
        squares = squares.add_product(x, x);
    }
    1.0 / (squares.sum() / (x.len() * LANES) as f32 + eps).sqrt()
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
        let scale = L::splat(reciprocal_rms::<L>(x, self.eps));
        for ((x, w), out) in x.iter().zip(w).zip(self.out.as_chunks_mut::<LANES>().0) {
            L::load(x).mul(scale).mul(L::load(w)).store(out);
        }
    }
}

struct QkNorm {
    q_width: usize,
    k_width: usize,
    eps: f32,
}

impl InplaceOp3 for QkNorm {
    fn name(&self) -> &'static str {
        "qk_norm"
    }

    fn cpu_fwd(
        &self,
        x: &mut CpuStorage,
        xl: &Layout,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
    ) -> Result<()> {
        let (q, k) = (f32s(q, ql, "qk_norm")?, f32s(k, kl, "qk_norm")?);
        let (x, width) = rows_mut(x, xl, "qk_norm")?;
        let fits = |weight: &[f32], width: usize| {
            !weight.is_empty() && weight.len().is_multiple_of(LANES) && width.is_multiple_of(weight.len())
        };
        if !fits(q, self.q_width) || !fits(k, self.k_width) || self.q_width + self.k_width > width {
            bail!("qk_norm: weights of {} and {} for {:?}", q.len(), k.len(), xl.dims());
        }
        let work = x.len();
        fill_parts(x, width, work, |_, row| {
            let (queries, rest) = row.split_at_mut(self.q_width);
            run(NormRuns { runs: queries, w: q, eps: self.eps });
            run(NormRuns { runs: &mut rest[..self.k_width], w: k, eps: self.eps });
        })
    }
}

/// Runs as long as the weight, each normed for itself.
struct NormRuns<'a> {
    runs: &'a mut [f32],
    w: &'a [f32],
    eps: f32,
}

impl Job for NormRuns<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        for x in self.runs.chunks_exact_mut(self.w.len()) {
            let x = x.as_chunks_mut::<LANES>().0;
            let scale = L::splat(reciprocal_rms::<L>(x, self.eps));
            for (x, w) in x.iter_mut().zip(self.w.as_chunks::<LANES>().0) {
                L::load(x).mul(scale).mul(L::load(w)).store(x);
            }
        }
    }
}

struct Add {
    scale: f32,
}

impl InplaceOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(&self, h: &mut CpuStorage, hl: &Layout, y: &CpuStorage, yl: &Layout) -> Result<()> {
        let y = f32s(y, yl, "add")?;
        let (h, width) = rows_mut(h, hl, "add")?;
        if hl.dims() != yl.dims() || !width.is_multiple_of(LANES) {
            bail!("add: {:?} to {:?}", yl.dims(), hl.dims());
        }
        let work = h.len();
        fill_parts(h, width, work, |t, h| run(Sum { h, y: &y[t * width..][..width], scale: self.scale }))
    }
}

struct Sum<'a> {
    h: &'a mut [f32],
    y: &'a [f32],
    scale: f32,
}

impl Job for Sum<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let scale = L::splat(self.scale);
        for (h, y) in self.h.as_chunks_mut::<LANES>().0.iter_mut().zip(self.y.as_chunks::<LANES>().0) {
            L::load(h).add_product(L::load(y), scale).store(h);
        }
    }
}

struct AddNormed {
    eps: f32,
    scale: f32,
}

impl InplaceOp3 for AddNormed {
    fn name(&self) -> &'static str {
        "add_normed"
    }

    fn cpu_fwd(
        &self,
        h: &mut CpuStorage,
        hl: &Layout,
        y: &CpuStorage,
        yl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> Result<()> {
        let (y, w) = (f32s(y, yl, "add_normed")?, f32s(w, wl, "add_normed")?);
        let (h, width) = rows_mut(h, hl, "add_normed")?;
        if hl.dims() != yl.dims() || w.len() != width || !width.is_multiple_of(LANES) {
            bail!("add_normed: {:?} to {:?} with a weight of {}", yl.dims(), hl.dims(), w.len());
        }
        let work = h.len();
        fill_parts(h, width, work, |t, h| {
            run(NormedSum { h, y: &y[t * width..][..width], w, eps: self.eps, scale: self.scale });
        })
    }
}

struct NormedSum<'a> {
    h: &'a mut [f32],
    y: &'a [f32],
    w: &'a [f32],
    eps: f32,
    scale: f32,
}

impl Job for NormedSum<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (y, w) = (self.y.as_chunks::<LANES>().0, self.w.as_chunks::<LANES>().0);
        let scale = L::splat(reciprocal_rms::<L>(y, self.eps) * self.scale);
        for ((h, y), w) in self.h.as_chunks_mut::<LANES>().0.iter_mut().zip(y).zip(w) {
            L::load(h).add_product(L::load(y).mul(scale), L::load(w)).store(h);
        }
    }
}
