//! A step's layout on the device: brought there once, and used by every layer.

use super::{Heads, StepBatch};
use candle_core::{CudaDevice, Result, bail, cuda_backend::cudarc::driver::CudaSlice};
use std::sync::{Arc, Mutex, PoisonError};

/// How `attend` cuts a batch into tiles: see `kernels.cu`.
pub(super) struct Tiling {
    /// Dimensions of a head in each of a warp's lanes.
    pub per_lane: usize,
    /// Queries of a tile.
    pub queries: usize,
    /// Tiles that a key head's queries of one row need.
    pub parts: usize,
    /// Rows of a tile.
    pub rows: usize,
}

impl Tiling {
    pub fn of(heads: Heads) -> Result<Tiling> {
        let (per_lane, queries) = match heads.dim {
            0..=32 => (1, 8),
            33..=64 => (2, 8),
            65..=128 => (4, 8),
            129..=256 => (8, 4),
            more => bail!("heads of {more} numbers are wider than the CUDA kernels' 256"),
        };
        let group = heads.q / heads.kv;
        Ok(Tiling { per_lane, queries, parts: group.div_ceil(queries), rows: (queries / group.min(queries)).max(1) })
    }
}

pub(crate) struct Batch {
    pub rows: usize,
    /// Keys of the row that sees most.
    pub longest: u32,
    pub pos: CudaSlice<u32>,
    pub slot: CudaSlice<u32>,
    pub tables: CudaSlice<u32>,
    /// `[tile_count, 4]`
    pub tiles: CudaSlice<u32>,
    pub tile_count: u32,
}

/// The last batch that was brought.
#[derive(Default)]
pub(crate) struct Uploaded(Mutex<Option<(Arc<StepBatch>, Arc<Batch>)>>);

impl Uploaded {
    pub fn get(&self, batch: &Arc<StepBatch>, heads: Heads, device: &CudaDevice) -> Result<Arc<Batch>> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, brought)) = &*last
            && Arc::ptr_eq(of, batch)
        {
            return Ok(Arc::clone(brought));
        }
        let tiles = tiles(batch, Tiling::of(heads)?.rows);
        let brought = Arc::new(Batch {
            rows: batch.tokens(),
            longest: batch.pos.iter().max().map_or(0, |pos| pos + 1),
            pos: device.clone_htod(&batch.pos)?,
            slot: device.clone_htod(&batch.slot)?,
            tables: device.clone_htod(&batch.tables)?,
            tile_count: (tiles.len() / 4) as u32,
            tiles: device.clone_htod(&tiles)?,
        });
        *last = Some((Arc::clone(batch), Arc::clone(&brought)));
        Ok(brought)
    }
}

/// Neighbouring rows of one sequence, at most `rows_max` to a tile.
fn tiles(batch: &StepBatch, rows_max: usize) -> Vec<u32> {
    let mut tiles = Vec::new();
    let mut first = 0;
    while first < batch.tokens() {
        let seq = batch.seq[first];
        let rows = batch.seq[first..].iter().take(rows_max).take_while(|&&other| other == seq).count();
        tiles.extend([first as u32, rows as u32, batch.table_start[seq as usize], 0]);
        first += rows;
    }
    tiles
}
