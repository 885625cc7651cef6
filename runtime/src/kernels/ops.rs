//! What the decoder asks of a device, and the CPU's answer. `plain` answers for any device that candle has.

use super::{
    batch::{BLOCK_TOKENS, StepBatch},
    cpu::{self, Activation, Heads, Inputs, Kind, Packed, Part, Raw, Scores},
};
use crate::settings::Activations;
use candle_core::{DType, Device, Result, Tensor};
use std::{collections::BTreeMap, sync::Arc};

/// Keys and values of one layer.
pub(crate) struct Pool {
    pub keys: Tensor,
    pub values: Tensor,
}

/// The decoder's operations on one device. Activations are f32. What takes a `Tensor` by value may work in place.
pub(crate) trait Ops: Send {
    /// A matrix of weights `[outputs, inputs]`, ready for this device.
    type Matrix: Send;

    /// Stacks matrices of the same width on top of each other.
    fn matrix(&self, parts: &[Raw]) -> Result<Self::Matrix>;
    /// Adds the bytes that the matrix takes in memory, by the kind in which they are kept.
    fn count(matrix: &Self::Matrix, kinds: &mut BTreeMap<Kind, usize>);
    /// Brings a norm's weights, a bias, a rotary table.
    fn vector(&self, numbers: &Tensor) -> Result<Tensor>;
    /// Room for one layer's keys and values.
    fn pool(&self, blocks: usize, heads: Heads, dtype: Activations) -> Result<Pool>;

    /// The rows of the table that `ids` name: `[T, inputs]`.
    fn embed(&self, ids: &[u32], table: &Self::Matrix) -> Result<Tensor>;
    /// x · Wᵀ + bias: `[T, inputs]` → `[T, outputs]`.
    fn linear(&self, x: &Tensor, weights: &Self::Matrix, bias: Option<&Tensor>) -> Result<Tensor>;
    /// x / √(mean(x²) + eps) · weight for every row.
    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor>;
    /// `rms_norm` of the queries in runs as long as `q`, and of the keys in runs as long as `k`.
    fn qk_norm(&self, qkv: Tensor, q: &Tensor, k: &Tensor, heads: Heads, eps: f32) -> Result<Tensor>;
    /// Turns queries and keys by their positions. `table`: cos and sin, `[positions, n]` each.
    fn rope(&self, qkv: Tensor, table: &(Tensor, Tensor), heads: Heads, batch: &Arc<StepBatch>) -> Result<Tensor>;
    /// Copies the new tokens' keys and values to their slots.
    fn kv_write(&self, pool: &Pool, qkv: &Tensor, heads: Heads, batch: &Arc<StepBatch>) -> Result<()>;
    /// softmax(scores of q·kᵀ) · v for every row: `[T, q · dim]`.
    fn attention(
        &self,
        qkv: &Tensor,
        pool: &Pool,
        heads: Heads,
        scores: Scores,
        batch: &Arc<StepBatch>,
    ) -> Result<Tensor>;
    /// act(gate) · up: `[T, 2·N]` → `[T, N]`.
    fn gate_mul(&self, gate_up: &Tensor, activation: Activation) -> Result<Tensor>;
    /// The residual stream h + scale · y, and what the next part of the model reads of it: its norm by `next`, or itself.
    fn add(&self, h: Tensor, y: &Tensor, scale: f32, next: Option<&Tensor>, eps: f32) -> Result<(Tensor, Tensor)>;
    /// As `add`, of y's norm by `own`.
    fn add_normed(&self, h: Tensor, y: &Tensor, own: &Tensor, eps: f32, scale: f32) -> Result<Tensor>;
    fn select(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor>;
    /// cap · tanh(x / cap).
    fn softcap(&self, x: Tensor, cap: f32) -> Result<Tensor>;
    /// Copies whole blocks, each (from, to) in turn.
    fn copy_blocks(&self, pool: &Pool, copies: &Arc<[(usize, usize)]>) -> Result<()>;
}

/// This machine's processor, by our own kernels.
pub(crate) struct Cpu(pub Activations);

impl Ops for Cpu {
    type Matrix = Packed;

    fn matrix(&self, parts: &[Raw]) -> Result<Packed> {
        let inputs = if self.0 == Activations::Bf16 { Inputs::Bf16 } else { Inputs::F32 };
        Packed::stack(parts, inputs)
    }

    fn count(matrix: &Packed, kinds: &mut BTreeMap<Kind, usize>) {
        for band in &matrix.bands {
            *kinds.entry(band.kind()).or_default() += band.bytes();
        }
    }

    fn vector(&self, numbers: &Tensor) -> Result<Tensor> {
        Ok(numbers.clone())
    }

    fn pool(&self, blocks: usize, heads: Heads, dtype: Activations) -> Result<Pool> {
        let [keys, values] = cpu::pool_shapes(blocks, heads);
        let zeros = |shape: [usize; 4]| Tensor::zeros(&shape, candle_dtype(dtype), &Device::Cpu);
        Ok(Pool { keys: zeros(keys)?, values: zeros(values)? })
    }

    fn embed(&self, ids: &[u32], table: &Packed) -> Result<Tensor> {
        cpu::embed(Arc::from(ids), table)
    }

    fn linear(&self, x: &Tensor, weights: &Packed, bias: Option<&Tensor>) -> Result<Tensor> {
        let y = cpu::linear(x, weights)?;
        if let Some(bias) = bias {
            cpu::add_bias(&y, bias)?;
        }
        Ok(y)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        cpu::rms_norm(x, weight, eps)
    }

    fn qk_norm(&self, qkv: Tensor, q: &Tensor, k: &Tensor, heads: Heads, eps: f32) -> Result<Tensor> {
        cpu::qk_norm(&qkv, q, k, [heads.q * heads.dim, heads.kv * heads.dim], eps)?;
        Ok(qkv)
    }

    fn rope(&self, qkv: Tensor, (cos, sin): &(Tensor, Tensor), heads: Heads, batch: &Arc<StepBatch>) -> Result<Tensor> {
        cpu::rope(&qkv, heads.q + heads.kv, heads.dim, (cos, sin), batch)?;
        Ok(qkv)
    }

    fn kv_write(&self, pool: &Pool, qkv: &Tensor, heads: Heads, batch: &Arc<StepBatch>) -> Result<()> {
        cpu::kv_write(&pool.keys, qkv, Part::Key, heads, batch)?;
        cpu::kv_write(&pool.values, qkv, Part::Value, heads, batch)
    }

    fn attention(
        &self,
        qkv: &Tensor,
        pool: &Pool,
        heads: Heads,
        scores: Scores,
        batch: &Arc<StepBatch>,
    ) -> Result<Tensor> {
        cpu::paged_attention(qkv, &pool.keys, &pool.values, heads, scores, batch)
    }

    fn gate_mul(&self, gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
        cpu::gate_mul(gate_up, activation)
    }

    fn add(&self, h: Tensor, y: &Tensor, scale: f32, next: Option<&Tensor>, eps: f32) -> Result<(Tensor, Tensor)> {
        cpu::add(&h, y, scale)?;
        let x = next.map_or_else(|| Ok(h.clone()), |weight| cpu::rms_norm(&h, weight, eps))?;
        Ok((h, x))
    }

    fn add_normed(&self, h: Tensor, y: &Tensor, own: &Tensor, eps: f32, scale: f32) -> Result<Tensor> {
        cpu::add_normed(&h, y, own, eps, scale)?;
        Ok(h)
    }

    fn select(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        x.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)
    }

    fn softcap(&self, x: Tensor, cap: f32) -> Result<Tensor> {
        cpu::softcap(&x, cap)?;
        Ok(x)
    }

    fn copy_blocks(&self, pool: &Pool, copies: &Arc<[(usize, usize)]>) -> Result<()> {
        cpu::copy_blocks(&pool.keys, copies)?;
        cpu::copy_blocks(&pool.values, copies)
    }
}

/// Bytes of one layer's keys and values in one block.
pub(crate) fn block_bytes(heads: Heads, dtype: Activations) -> usize {
    2 * BLOCK_TOKENS * heads.kv * heads.dim * candle_dtype(dtype).size_in_bytes()
}

pub(crate) fn candle_dtype(dtype: Activations) -> DType {
    match dtype {
        Activations::F32 => DType::F32,
        Activations::Bf16 => DType::BF16,
    }
}
