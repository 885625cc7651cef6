//! The memory that keys and values live in between steps. Who owns which block is the scheduler's business.

use super::spec::ModelSpec;
use crate::{
    kernels::{batch::BLOCK_TOKENS, cpu::pool_shapes},
    settings::KvDtype,
};
use candle_core::{DType, Device, Result, Tensor};

/// For each layer keys and values, in the shapes that the kernels ask for.
pub(crate) struct KvPools {
    pub layers: Vec<(Tensor, Tensor)>,
}

impl KvPools {
    pub fn new(spec: &ModelSpec, dtype: KvDtype, blocks: usize) -> Result<KvPools> {
        let [keys, values] = pool_shapes(blocks, spec.heads());
        let pool = |shape: [usize; 4]| Tensor::zeros(&shape, candle_dtype(dtype), &Device::Cpu);
        let layers = spec.layers.iter().map(|_| Ok((pool(keys)?, pool(values)?))).collect::<Result<_>>()?;
        Ok(KvPools { layers })
    }
}

/// Bytes of one block over all layers, keys and values.
pub(crate) fn block_bytes(spec: &ModelSpec, dtype: KvDtype) -> usize {
    2 * spec.layers.len() * BLOCK_TOKENS * spec.kv_heads * spec.head_dim * candle_dtype(dtype).size_in_bytes()
}

fn candle_dtype(dtype: KvDtype) -> DType {
    match dtype {
        KvDtype::F32 => DType::F32,
        KvDtype::Bf16 => DType::BF16,
    }
}
