//! What encoders do between their products: layer norm over a sum, and bias with GELU. One pass over the operands each,
//! row by row.

use super::{
    exp::exp,
    rows::fill_parts,
    simd::{Job, LANES, Lanes, run},
    view::f32s,
};
use candle_core::{CpuStorage, CustomOp3, InplaceOp2, Layout, Result, Shape, Tensor, bail};

/// The layer norm of x + bias + residual, each row for itself: (v − mean) / √(variance + eps) · weight + shift.
/// `x`, `residual`: `[T, H]`; `params`: `[3, H]`, the rows bias, weight and shift; H a multiple of 16.
pub(crate) fn add_layer_norm(x: &Tensor, residual: &Tensor, params: &Tensor, eps: f32) -> Result<Tensor> {
    x.apply_op3_no_bwd(residual, params, &AddLayerNorm { eps })
}

/// The two ways in which models compute GELU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gelu {
    /// x · Φ(x), with the error function.
    Erf,
    /// Its approximation with a hyperbolic tangent.
    Tanh,
}

/// gelu(x + bias), in place. `x`: `[T, I]`, `bias`: `[I]`.
pub(crate) fn bias_gelu(x: &Tensor, bias: &Tensor, gelu: Gelu) -> Result<()> {
    x.inplace_op2(bias, &BiasGelu { gelu })
}

struct AddLayerNorm {
    eps: f32,
}

impl CustomOp3 for AddLayerNorm {
    fn name(&self) -> &'static str {
        "add_layer_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        residual: &CpuStorage,
        rl: &Layout,
        params: &CpuStorage,
        pl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let name = "add_layer_norm";
        let (x, residual, params) = (f32s(x, xl, name)?, f32s(residual, rl, name)?, f32s(params, pl, name)?);
        let width = params.len() / 3;
        let fits = width > 0 && width % LANES == 0 && pl.dims() == [3, width] && x.len() % width == 0;
        if !fits || x.len() != residual.len() {
            bail!("{name}: {:?} and {:?} with {:?}", xl.dims(), rl.dims(), pl.dims());
        }
        let mut out = vec![0f32; x.len()];
        fill_parts(&mut out, width, 4 * x.len(), |t, out| {
            let at = t * width..(t + 1) * width;
            run(Norm { x: &x[at.clone()], residual: &residual[at], params, out, eps: self.eps });
        })?;
        Ok((CpuStorage::F32(out), xl.shape().clone()))
    }
}

struct Norm<'a> {
    x: &'a [f32],
    residual: &'a [f32],
    /// Three rows as wide as `x`.
    params: &'a [f32],
    out: &'a mut [f32],
    eps: f32,
}

impl Job for Norm<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let width = self.x.len();
        let (bias, rest) = self.params.split_at(width);
        let (weight, shift) = rest.split_at(width);
        let [x, residual, bias, weight, shift] =
            [self.x, self.residual, bias, weight, shift].map(|row| row.as_chunks::<LANES>().0);
        let out = self.out.as_chunks_mut::<LANES>().0;
        let one = L::splat(1.0);
        let mut sum = L::splat(0.0);
        for (i, out) in out.iter_mut().enumerate() {
            let value = L::load(&x[i]).add_product(L::load(&bias[i]), one).add_product(L::load(&residual[i]), one);
            sum = sum.add_product(value, one);
            value.store(out);
        }
        let less_mean = L::splat(-(sum.sum() / width as f32));
        let mut squares = L::splat(0.0);
        for out in out.iter() {
            let value = less_mean.add_product(L::load(out), one);
            squares = squares.add_product(value, value);
        }
        let scale = L::splat(1.0 / (squares.sum() / width as f32 + self.eps).sqrt());
        for (i, out) in out.iter_mut().enumerate() {
            let value = less_mean.add_product(L::load(out), one).mul(scale);
            L::load(&shift[i]).add_product(value, L::load(&weight[i])).store(out);
        }
    }
}

struct BiasGelu {
    gelu: Gelu,
}

impl InplaceOp2 for BiasGelu {
    fn name(&self) -> &'static str {
        "bias_gelu"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, xl: &Layout, bias: &CpuStorage, bl: &Layout) -> Result<()> {
        let bias = f32s(bias, bl, "bias_gelu")?;
        let (rows, width) = xl.shape().dims2()?;
        let CpuStorage::F32(x) = x else { bail!("bias_gelu: operand is not f32") };
        if bias.len() != width || !xl.is_contiguous() || xl.start_offset() != 0 {
            bail!("bias_gelu: {:?} with a bias of {}", xl.dims(), bias.len());
        }
        // It weighs about as much as sixteen multiply-adds.
        fill_parts(&mut x[..rows * width], width, 16 * rows * width, |_, row| match self.gelu {
            Gelu::Erf => run(Activate { row, bias, gelu: erf_gelu }),
            Gelu::Tanh => run(Activate { row, bias, gelu: tanh_gelu }),
        })
    }
}

struct Activate<'a, F> {
    row: &'a mut [f32],
    bias: &'a [f32],
    gelu: F,
}

impl<F: Fn(f32) -> f32> Job for Activate<'_, F> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        for (x, &bias) in self.row.iter_mut().zip(self.bias) {
            *x = (self.gelu)(*x + bias);
        }
    }
}

/// x · Φ(x), with Φ's tail after Abramowitz and Stegun 7.1.26: off by at most 3e-7 · |x|, most of which is rounding.
#[inline(always)]
fn erf_gelu(x: f32) -> f32 {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let mut sum = 1.061_405_4;
    for factor in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        sum = sum * t + factor;
    }
    let tail = 0.5 * sum * t * exp(-z * z);
    x * if x < 0.0 { tail } else { 1.0 - tail }
}

/// x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))), which is x · σ of twice the inner term.
#[inline(always)]
fn tanh_gelu(x: f32) -> f32 {
    const TWO_ROOT: f32 = 1.595_769;
    x / (1.0 + exp(-TWO_ROOT * (x + 0.044_715 * x * x * x)))
}

/// One row normed and activated on every instruction set of this machine, by name.
#[cfg(test)]
pub(crate) fn encoder_on_each(x: &[f32], residual: &[f32], params: &[f32]) -> Vec<(String, Vec<f32>)> {
    use super::simd::{run_exactly_on, run_on_each};
    let mut results = Vec::new();
    run_on_each(|path| {
        let mut row = vec![0f32; x.len()];
        run_exactly_on(path, Norm { x, residual, params, out: &mut row, eps: 1e-5 });
        let (erf, tanh) = row.split_at_mut(x.len() / 2);
        run_exactly_on(path, Activate { row: erf, bias: x, gelu: erf_gelu });
        run_exactly_on(path, Activate { row: tanh, bias: x, gelu: tanh_gelu });
        results.push((format!("{path:?}"), row));
    });
    results
}

#[cfg(test)]
mod tests {
    use super::{erf_gelu, tanh_gelu};

    /// erf by its Maclaurin series, good to 1e-12 below 3.
    fn erf(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    }

    #[test]
    fn gelu_is_exact_to_six_digits_of_its_argument() {
        for step in -4_200..=4_200 {
            let x = step as f32 * 1e-3;
            let wide = f64::from(x);
            let want = wide * 0.5 * (1.0 + erf(wide / 2f64.sqrt()));
            assert!((f64::from(erf_gelu(x)) - want).abs() < 3e-7 * wide.abs().max(0.1), "{x}");
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide.powi(3));
            assert!((f64::from(tanh_gelu(x)) - wide * 0.5 * (1.0 + inner.tanh())).abs() < 1e-6 * wide.abs().max(0.1));
        }
        for gelu in [erf_gelu, tanh_gelu] {
            assert_eq!((gelu(0.0), gelu(50.0)), (0.0, 50.0));
            assert!(gelu(-50.0).abs() < 1e-6 && gelu(f32::NAN).is_nan());
        }
    }
}
