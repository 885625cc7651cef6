//! Any device that candle has, by candle's own operations: slow where candle is, and always there to compare with. On a
//! CUDA device our kernels take over what would be slowest.
//!
//! Weights are kept as bf16 or f32, whatever the files hold, and matrices are multiplied in that type; activations are f32.

use super::{
    batch::{BLOCK_TOKENS, StepBatch},
    cpu::{Activation, Heads, Kind, Raw, Scores},
    ops::{Ops, Pool, candle_dtype},
    reference,
};
use crate::settings::Activations;
use candle_core::{DType, Device, Result, Tensor};
use std::{collections::BTreeMap, sync::Arc};

pub(crate) struct Plain {
    device: Device,
    weights: DType,
    #[cfg(feature = "cuda")]
    uploaded: super::cuda::Uploaded,
}

impl Plain {
    /// `weights`: the type to keep them in, f32 or bf16.
    pub fn new(device: Device, weights: DType) -> Plain {
        Plain {
            device,
            weights,
            #[cfg(feature = "cuda")]
            uploaded: super::cuda::Uploaded::default(),
        }
    }
}

/// `[slots, kv · dim]`, as the kernels and `reference` read it.
fn slots(pool: &Tensor, heads: Heads) -> Result<Tensor> {
    let slots = pool.elem_count() / (heads.kv * heads.dim);
    pool.reshape((slots, heads.kv, heads.dim))?.to_dtype(DType::F32)
}

impl Ops for Plain {
    type Matrix = Tensor;

    fn matrix(&self, parts: &[Raw]) -> Result<Tensor> {
        let parts = parts.iter().map(|part| {
            let mut numbers = vec![0f32; part.rows * part.columns];
            part.kind.widen(&part.bytes, &mut numbers);
            // One part at a time goes over in full width.
            Tensor::from_vec(numbers, (part.rows, part.columns), &Device::Cpu)?
                .to_dtype(self.weights)?
                .to_device(&self.device)
        });
        Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)
    }

    fn count(matrix: &Tensor, kinds: &mut BTreeMap<Kind, usize>) {
        let kind = if matrix.dtype() == DType::F32 { Kind::F32 } else { Kind::Bf16 };
        *kinds.entry(kind).or_default() += matrix.elem_count() * matrix.dtype().size_in_bytes();
    }

    fn vector(&self, numbers: &Tensor) -> Result<Tensor> {
        numbers.to_device(&self.device)
    }

    fn pool(&self, blocks: usize, heads: Heads, dtype: Activations) -> Result<Pool> {
        let zeros = || Tensor::zeros((blocks, BLOCK_TOKENS, heads.kv * heads.dim), candle_dtype(dtype), &self.device);
        Ok(Pool { keys: zeros()?, values: zeros()? })
    }

    fn embed(&self, ids: &[u32], table: &Tensor) -> Result<Tensor> {
        table.index_select(&Tensor::new(ids, &self.device)?, 0)?.to_dtype(DType::F32)
    }

    fn linear(&self, x: &Tensor, weights: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let y = x.to_dtype(weights.dtype())?.matmul(&weights.t()?)?.to_dtype(DType::F32)?;
        match bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        reference::rms_norm(x, weight, eps)
    }

    fn qk_norm(&self, qkv: Tensor, q: &Tensor, k: &Tensor, heads: Heads, eps: f32) -> Result<Tensor> {
        reference::qk_norm(&qkv, q, k, [heads.q * heads.dim, heads.kv * heads.dim], eps)
    }

    fn rope(&self, qkv: Tensor, (cos, sin): &(Tensor, Tensor), heads: Heads, batch: &Arc<StepBatch>) -> Result<Tensor> {
        reference::rope(&qkv, heads.q + heads.kv, heads.dim, (cos, sin), batch)
    }

    fn kv_write(&self, pool: &Pool, qkv: &Tensor, heads: Heads, batch: &Arc<StepBatch>) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = &self.device {
            return super::cuda::kv_write(pool, qkv, heads, &self.uploaded.get(batch, heads, device)?);
        }
        let width = heads.kv * heads.dim;
        for (pool, at) in [(&pool.keys, heads.q * heads.dim), (&pool.values, heads.q * heads.dim + width)] {
            let new = qkv.narrow(1, at, width)?.to_dtype(pool.dtype())?;
            let slots = pool.reshape((pool.elem_count() / width, width))?;
            for (row, &slot) in batch.slot.iter().enumerate() {
                slots.slice_set(&new.narrow(0, row, 1)?.contiguous()?, 0, slot as usize)?;
            }
        }
        Ok(())
    }

    fn attention(
        &self,
        qkv: &Tensor,
        pool: &Pool,
        heads: Heads,
        scores: Scores,
        batch: &Arc<StepBatch>,
    ) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = &self.device {
            return super::cuda::attention(qkv, pool, heads, scores, &self.uploaded.get(batch, heads, device)?);
        }
        reference::paged_attention(qkv, &slots(&pool.keys, heads)?, &slots(&pool.values, heads)?, heads, scores, batch)
    }

    fn gate_mul(&self, gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if self.device.is_cuda() {
            return super::cuda::gate_mul(gate_up, activation);
        }
        reference::gate_mul(gate_up, activation)
    }

    fn add(&self, h: Tensor, y: &Tensor, scale: f32, next: Option<&Tensor>, eps: f32) -> Result<(Tensor, Tensor)> {
        #[cfg(feature = "cuda")]
        if let (true, Some(next)) = (self.device.is_cuda(), next) {
            return super::cuda::add_rms_norm(&h, y, scale, next, eps);
        }
        let h = reference::add(&h, y, scale)?;
        let x = next.map_or_else(|| Ok(h.clone()), |weight| reference::rms_norm(&h, weight, eps))?;
        Ok((h, x))
    }

    fn add_normed(&self, h: Tensor, y: &Tensor, own: &Tensor, eps: f32, scale: f32) -> Result<Tensor> {
        reference::add(&h, &reference::rms_norm(y, own, eps)?, scale)
    }

    fn select(&self, x: &Tensor, rows: &[u32]) -> Result<Tensor> {
        x.index_select(&Tensor::new(rows, &self.device)?, 0)
    }

    fn softcap(&self, x: Tensor, cap: f32) -> Result<Tensor> {
        reference::softcap(&x, cap)
    }

    fn copy_blocks(&self, pool: &Pool, copies: &Arc<[(usize, usize)]>) -> Result<()> {
        for pool in [&pool.keys, &pool.values] {
            for &(from, to) in copies.iter() {
                pool.slice_set(&pool.narrow(0, from, 1)?.copy()?, 0, to)?;
            }
        }
        Ok(())
    }
}
