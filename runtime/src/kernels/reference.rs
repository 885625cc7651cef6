//! The kernels once more, in plain candle ops: slow, obvious, and the same on any device.

use super::{
    batch::{BLOCK_TOKENS, StepBatch},
    cpu::{Activation, Gelu, Heads, Scores},
    texts::TextBatch,
};
use candle_core::{D, DType, Result, Tensor};

pub(crate) fn linear(x: &Tensor, weights: &Tensor) -> Result<Tensor> {
    x.matmul(&weights.to_dtype(DType::F32)?.t()?)
}

pub(crate) fn embed(ids: &[u32], table: &Tensor) -> Result<Tensor> {
    table.to_dtype(DType::F32)?.index_select(&Tensor::new(ids, table.device())?, 0)
}

pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean + f64::from(eps))?.sqrt()?)?.broadcast_mul(weight)
}

/// The first `q_width` numbers of a row normed in runs as long as `q`, the next `k_width` in runs as long as `k`.
pub(crate) fn qk_norm(x: &Tensor, q: &Tensor, k: &Tensor, [q_width, k_width]: [usize; 2], eps: f32) -> Result<Tensor> {
    let rows = x.dim(0)?;
    let normed = |from: usize, width: usize, weight: &Tensor| {
        let runs = x.narrow(1, from, width)?.reshape((rows, width / weight.dim(0)?, weight.dim(0)?))?;
        rms_norm(&runs, weight, eps)?.reshape((rows, width))
    };
    let rest = x.narrow(1, q_width + k_width, x.dim(1)? - q_width - k_width)?;
    Tensor::cat(&[normed(0, q_width, q)?, normed(q_width, k_width, k)?, rest], 1)
}

pub(crate) fn add(h: &Tensor, y: &Tensor, scale: f32) -> Result<Tensor> {
    h + (y * f64::from(scale))?
}

pub(crate) fn softcap(x: &Tensor, cap: f32) -> Result<Tensor> {
    (x / f64::from(cap))?.tanh()? * f64::from(cap)
}

pub(crate) fn gate_mul(gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
    let halves = gate_up.chunk(2, D::Minus1)?;
    let gate = &halves[0];
    let gate = match activation {
        Activation::Silu => (gate / (gate.neg()?.exp()? + 1.0)?)?,
        Activation::GeluTanh => gate.gelu()?,
    };
    gate * &halves[1]
}

/// The first `heads` heads turned, as much of each as the tables are wide; the rest as it was.
pub(crate) fn rope(
    x: &Tensor,
    heads: usize,
    dim: usize,
    (cos, sin): (&Tensor, &Tensor),
    batch: &StepBatch,
) -> Result<Tensor> {
    let (rows, half) = (batch.tokens(), cos.dim(1)?);
    let at = Tensor::new(batch.pos.as_slice(), x.device())?;
    let cos = cos.index_select(&at, 0)?.reshape((rows, 1, half))?;
    let sin = sin.index_select(&at, 0)?.reshape((rows, 1, half))?;
    let turned = x.narrow(1, 0, heads * dim)?.reshape((rows, heads, dim))?;
    let (a, b) = (turned.narrow(2, 0, half)?, turned.narrow(2, half, half)?);
    let left = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let right = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    let kept = turned.narrow(2, 2 * half, dim - 2 * half)?;
    let turned = Tensor::cat(&[left, right, kept], 2)?.reshape((rows, heads * dim))?;
    Tensor::cat(&[turned, x.narrow(1, heads * dim, x.dim(1)? - heads * dim)?], 1)
}

/// `keys`, `values`: the pools as `[blocks · BLOCK_TOKENS, kv, dim]` in f32, whatever order they are stored in.
pub(crate) fn paged_attention(
    qkv: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    heads: Heads,
    scores: Scores,
    batch: &StepBatch,
) -> Result<Tensor> {
    let group = heads.q / heads.kv;
    let rows = (0..batch.tokens()).map(|row| {
        let end = batch.pos[row] as usize + 1;
        let start = scores.window.map_or(0, |window| end.saturating_sub(window));
        let slots: Vec<u32> = (start..end)
            .map(|at| batch.table_of(row)[at / BLOCK_TOKENS] * BLOCK_TOKENS as u32 + (at % BLOCK_TOKENS) as u32)
            .collect();
        let slots = Tensor::new(slots, qkv.device())?;
        let q = qkv.narrow(0, row, 1)?.narrow(1, 0, heads.q * heads.dim)?.reshape((heads.kv, group, heads.dim))?;
        let k = keys.index_select(&slots, 0)?.transpose(0, 1)?.contiguous()?;
        let v = values.index_select(&slots, 0)?.transpose(0, 1)?.contiguous()?;
        let products = (q.contiguous()?.matmul(&k.transpose(1, 2)?.contiguous()?)? * f64::from(scores.scale))?;
        let products = scores.softcap.map_or_else(|| Ok(products.clone()), |cap| softcap(&products, cap))?;
        let weights = products.broadcast_sub(&products.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        weights.matmul(&v)?.reshape((1, heads.q * heads.dim))
    });
    Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 0)
}

/// `params`: the rows bias, weight and shift.
pub(crate) fn add_layer_norm(x: &Tensor, residual: &Tensor, params: &Tensor, eps: f32) -> Result<Tensor> {
    let sum = (x.broadcast_add(&params.narrow(0, 0, 1)?)? + residual)?;
    let centred = sum.broadcast_sub(&sum.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = centred.broadcast_div(&(variance + f64::from(eps))?.sqrt()?)?;
    normed.broadcast_mul(&params.narrow(0, 1, 1)?)?.broadcast_add(&params.narrow(0, 2, 1)?)
}

pub(crate) fn bias_gelu(x: &Tensor, bias: &Tensor, gelu: Gelu) -> Result<Tensor> {
    let x = x.broadcast_add(bias)?;
    match gelu {
        Gelu::Erf => x.gelu_erf(),
        Gelu::Tanh => x.gelu(),
    }
}

/// `bias`: `[1, 3·H]`, of queries, keys and values.
pub(crate) fn text_attention(qkv: &Tensor, bias: &Tensor, heads: usize, batch: &TextBatch) -> Result<Tensor> {
    let qkv = qkv.broadcast_add(bias)?;
    let hidden = qkv.dim(1)? / 3;
    let texts = batch.starts.windows(2).map(|text| {
        let count = text[1] - text[0];
        let part = |number: usize| {
            let rows = qkv.narrow(0, text[0], count)?.narrow(1, number * hidden, hidden)?;
            rows.reshape((count, heads, hidden / heads))?.transpose(0, 1)?.contiguous()
        };
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? / ((hidden / heads) as f64).sqrt())?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        weights.matmul(&v)?.transpose(0, 1)?.reshape((count, hidden))
    });
    Tensor::cat(&texts.collect::<Result<Vec<_>>>()?, 0)
}
