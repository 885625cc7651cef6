//! Copying whole KV blocks within a pool, whatever lies in them.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor, bail};
use std::sync::Arc;

/// Copies each (from, to) in turn. `pool`: blocks are its first dimension.
pub(crate) fn copy_blocks(pool: &Tensor, copies: &Arc<[(usize, usize)]>) -> Result<()> {
    pool.inplace_op1(&CopyBlocks(Arc::clone(copies)))
}

struct CopyBlocks(Arc<[(usize, usize)]>);

impl InplaceOp1 for CopyBlocks {
    fn name(&self) -> &'static str {
        "copy_blocks"
    }

    fn cpu_fwd(&self, pool: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let blocks = layout.dims().first().copied().unwrap_or(0);
        let numbers = layout.shape().elem_count() / blocks.max(1);
        if !layout.is_contiguous() || layout.start_offset() != 0 {
            bail!("copy_blocks: a pool of {:?}", layout.dims());
        }
        if self.0.iter().any(|&(from, to)| from.max(to) >= blocks) {
            bail!("copy_blocks: a block beyond the pool of {blocks}");
        }
        match pool {
            CpuStorage::F32(pool) => self.copy(pool, numbers),
            CpuStorage::BF16(pool) => self.copy(pool, numbers),
            _ => bail!("copy_blocks: the pool is neither f32 nor bf16"),
        }
        Ok(())
    }
}

impl CopyBlocks {
    fn copy<C: Copy>(&self, pool: &mut [C], numbers: usize) {
        for &(from, to) in self.0.iter() {
            pool.copy_within(from * numbers..(from + 1) * numbers, to * numbers);
        }
    }
}
