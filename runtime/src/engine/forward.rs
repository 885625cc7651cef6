//! What the engine needs of a model: logits for a step. The engine knows nothing else about tensors.

use crate::{
    kernels::{
        batch::StepBatch,
        ops::{Ops, Pool},
    },
    kv::block_pool::BlockCopy,
    model::{decoder::Decoder, spec::ModelSpec},
    settings::Activations,
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
pub(crate) struct Llm<O: Ops> {
    spec: ModelSpec,
    decoder: Decoder<O>,
    kv: Vec<Pool>,
    activations: Activations,
    blocks: usize,
}

impl<O: Ops> Llm<O> {
    pub fn new(
        spec: ModelSpec,
        decoder: Decoder<O>,
        activations: Activations,
        blocks: usize,
    ) -> candle_core::Result<Llm<O>> {
        let mut llm = Llm { spec, decoder, kv: Vec::new(), activations, blocks };
        llm.make_room()?;
        Ok(llm)
    }

    fn make_room(&mut self) -> candle_core::Result<()> {
        let pool = || self.decoder.ops.pool(self.blocks, self.spec.heads(), self.activations);
        self.kv = self.spec.layers.iter().map(|_| pool()).collect::<candle_core::Result<_>>()?;
        Ok(())
    }
}

impl<O: Ops> Forward for Llm<O> {
    fn forward(&mut self, batch: StepBatch) -> Result<Vec<f32>, String> {
        let logits = self.decoder.forward(&Arc::new(batch), &self.kv);
        logits.and_then(|logits| logits.flatten_all()?.to_vec1()).map_err(|error| error.to_string())
    }

    fn copy(&mut self, copies: &[BlockCopy]) -> Result<(), String> {
        if copies.is_empty() {
            return Ok(());
        }
        let copies: Arc<[(usize, usize)]> = copies.iter().map(|copy| (copy.from as usize, copy.to as usize)).collect();
        let copy = |pool| self.decoder.ops.copy_blocks(pool, &copies);
        self.kv.iter().try_for_each(copy).map_err(|error| error.to_string())
    }

    fn reset(&mut self) -> Result<(), String> {
        // New tensors, not zeroed ones: a panic while a pool was written to leaves its lock poisoned.
        self.kv.clear();
        self.make_room().map_err(|error| error.to_string())
    }

    fn vocab(&self) -> usize {
        self.spec.vocab
    }
}
