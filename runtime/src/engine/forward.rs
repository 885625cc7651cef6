//! What the engine needs of a model: logits for a step. The engine knows nothing else about tensors.

use crate::{
    kernels::{batch::StepBatch, cpu::copy_blocks},
    kv::block_pool::BlockCopy,
    model::{decoder::Decoder, kv_pools::KvPools, spec::ModelSpec},
    settings::KvDtype,
};
use std::sync::Arc;

pub(crate) trait Forward: Send {
    /// Logits of the rows in `batch.sel`, one after the other, `vocab` numbers each.
    fn forward(&mut self, batch: StepBatch) -> Result<Vec<f32>, String>;
    /// Copies whole blocks between steps, one after the other.
    fn copy(&mut self, copies: &[BlockCopy]) -> Result<(), String>;
    /// Gives up everything kept between steps, after a step that did not end well.
    fn reset(&mut self) -> Result<(), String>;
    fn vocab(&self) -> usize;
}

/// A decoder with its KV pools.
pub(crate) struct Llm {
    spec: ModelSpec,
    decoder: Decoder,
    kv: KvPools,
    kv_dtype: KvDtype,
    blocks: usize,
}

impl Llm {
    pub fn new(spec: ModelSpec, decoder: Decoder, kv_dtype: KvDtype, blocks: usize) -> candle_core::Result<Llm> {
        let kv = KvPools::new(&spec, kv_dtype, blocks)?;
        Ok(Llm { spec, decoder, kv, kv_dtype, blocks })
    }
}

impl Forward for Llm {
    fn forward(&mut self, batch: StepBatch) -> Result<Vec<f32>, String> {
        let logits = self.decoder.forward(&Arc::new(batch), &self.kv);
        logits.and_then(|logits| logits.flatten_all()?.to_vec1()).map_err(|error| error.to_string())
    }

    fn copy(&mut self, copies: &[BlockCopy]) -> Result<(), String> {
        if copies.is_empty() {
            return Ok(());
        }
        let copies: Arc<[(usize, usize)]> = copies.iter().map(|copy| (copy.from as usize, copy.to as usize)).collect();
        let mut pools = self.kv.layers.iter().flat_map(|(keys, values)| [keys, values]);
        pools.try_for_each(|pool| copy_blocks(pool, &copies)).map_err(|error| error.to_string())
    }

    fn reset(&mut self) -> Result<(), String> {
        // New tensors, not zeroed ones: a panic while a pool was written to leaves its lock poisoned.
        self.kv = KvPools { layers: Vec::new() };
        self.kv = KvPools::new(&self.spec, self.kv_dtype, self.blocks).map_err(|error| error.to_string())?;
        Ok(())
    }

    fn vocab(&self) -> usize {
        self.spec.vocab
    }
}
