//! The kernels once more, in plain candle ops: slow, obvious, and the same on any device.

use super::{
    batch::{BLOCK_TOKENS, StepBatch},
    cpu::{Gelu, Heads},
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

pub(crate) fn silu_mul(gate_up: &Tensor) -> Result<Tensor> {
    let halves = gate_up.chunk(2, D::Minus1)?;
    let gate = &halves[0];
    (gate / (gate.neg()?.exp()? + 1.0)?)? * &halves[1]
}

/// The first `heads` heads turned, the rest as it was.
pub(crate) fn rope(x: &Tensor, heads: usize, cos: &Tensor, sin: &Tensor, batch: &StepBatch) -> Result<Tensor> {
    let (rows, half) = (batch.tokens(), cos.dim(1)?);
    let at = Tensor::new(batch.pos.as_slice(), x.device())?;
    let cos = cos.index_select(&at, 0)?.reshape((rows, 1, half))?;
    let sin = sin.index_select(&at, 0)?.reshape((rows, 1, half))?;
    let turned = x.narrow(1, 0, heads * 2 * half)?.reshape((rows, heads, 2, half))?;
    let (a, b) = (turned.narrow(2, 0, 1)?.squeeze(2)?, turned.narrow(2, 1, 1)?.squeeze(2)?);
    let left = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let right = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    let turned = Tensor::cat(&[left, right], 2)?.reshape((rows, heads * 2 * half))?;
    let rest = x.dim(1)? - heads * 2 * half;
    Tensor::cat(&[turned, x.narrow(1, heads * 2 * half, rest)?], 1)
}

/// `keys`, `values`: the pools as `[blocks · BLOCK_TOKENS, kv, dim]` in f32, whatever order they are stored in.
pub(crate) fn paged_attention(
    qkv: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    heads: Heads,
    batch: &StepBatch,
) -> Result<Tensor> {
    let group = heads.q / heads.kv;
    let rows = (0..batch.tokens()).map(|row| {
        let seen = batch.pos[row] as usize + 1;
        let slots: Vec<u32> = (0..seen)
            .map(|at| batch.table_of(row)[at / BLOCK_TOKENS] * BLOCK_TOKENS as u32 + (at % BLOCK_TOKENS) as u32)
            .collect();
        let slots = Tensor::new(slots, qkv.device())?;
        let q = qkv.narrow(0, row, 1)?.narrow(1, 0, heads.q * heads.dim)?.reshape((heads.kv, group, heads.dim))?;
        let k = keys.index_select(&slots, 0)?.transpose(0, 1)?.contiguous()?;
        let v = values.index_select(&slots, 0)?.transpose(0, 1)?.contiguous()?;
        let scores = (q.contiguous()?.matmul(&k.transpose(1, 2)?.contiguous()?)? / (heads.dim as f64).sqrt())?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
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
