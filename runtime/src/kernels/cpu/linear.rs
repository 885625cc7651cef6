//! y = x · Wᵀ and the embedding lookup, over packed weights of two bytes (or four) a number, in f32.
//!
//! Every output is one running sum over the inputs in order. How many rows and tiles share a pass only decides which
//! sums are in registers together, so the bits of a row are the same for any batch.

use super::{
    packed::{LINE, Packed, Weight, index},
    rows::{Tiles, fill_parts, fill_tiles},
    simd::{Job, LANES, Lanes, run},
    view::{Stored, f32s, stored},
};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};
use std::{ops::Range, sync::Arc};

/// `x`: `[T, inputs]` f32 → `[T, outputs]` f32.
pub(crate) fn linear(x: &Tensor, weights: &Packed) -> Result<Tensor> {
    x.apply_op2_no_bwd(&weights.data, &Linear { outputs: weights.outputs, inputs: weights.inputs })
}

/// The rows of the packed table that `ids` name: `[T, inputs]` f32.
pub(crate) fn embed(ids: Arc<[u32]>, table: &Packed) -> Result<Tensor> {
    table.data.apply_op1_no_bwd(&Embed { ids, outputs: table.outputs, inputs: table.inputs })
}

struct Linear {
    outputs: usize,
    inputs: usize,
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, w: &CpuStorage, wl: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = f32s(x, xl, "linear")?;
        let rows = x.len() / self.inputs;
        if xl.dims() != [rows, self.inputs] {
            bail!("linear: input {:?} for a width of {}", xl.dims(), self.inputs);
        }
        let mut y = vec![0f32; rows * self.outputs];
        match stored(w, wl, "linear")? {
            Stored::F32(w) => multiply(x, w, &mut y, self.inputs, self.outputs)?,
            Stored::Bf16(w) => multiply(x, w, &mut y, self.inputs, self.outputs)?,
        }
        Ok((CpuStorage::F32(y), (rows, self.outputs).into()))
    }
}

fn multiply<W: Weight>(x: &[f32], w: &[W], y: &mut [f32], inputs: usize, outputs: usize) -> Result<()> {
    let work = x.len() * outputs;
    let (lines, _) = w.as_chunks::<LINE>();
    if lines.len() != outputs.div_ceil(LANES) * inputs / 2 || !inputs.is_multiple_of(2 * STEP) {
        bail!("linear: {} lines of packed weights for {inputs} inputs and {outputs} outputs", lines.len());
    }
    fill_tiles(y, outputs, work, |range, tiles| run(Multiply { x, lines, inputs, range, tiles }))
}

/// Lines between two bounds checks.
const STEP: usize = 4;

/// The tiles of one thread.
pub(super) struct Multiply<'a, 't, W> {
    pub x: &'a [f32],
    pub lines: &'a [[W; LINE]],
    pub inputs: usize,
    pub range: Range<usize>,
    pub tiles: &'a mut Tiles<'t>,
}

impl<W: Weight> Job for Multiply<'_, '_, W> {
    #[inline(always)]
    fn run<L: Lanes>(mut self) {
        let rows = self.x.len() / self.inputs;
        // One row alone needs many tiles at once to hide the latency of its additions; several rows reuse each loaded
        // line. Both shapes are limited by how many registers the instruction set has.
        match (L::WIDE, rows) {
            (true, 1) => self.all_rows::<L, 1, 8>(),
            (true, 2 | 3) => self.all_rows::<L, 2, 4>(),
            (true, _) => self.all_rows::<L, 4, 4>(),
            (false, 1) => self.all_rows::<L, 1, 4>(),
            (false, _) => self.all_rows::<L, 4, 1>(),
        }
    }
}

impl<W: Weight> Multiply<'_, '_, W> {
    #[inline(always)]
    fn all_rows<L: Lanes, const M: usize, const N: usize>(&mut self) {
        let rows = self.x.len() / self.inputs;
        let mut tile = self.range.start;
        while tile + N <= self.range.end {
            self.column::<L, M, N>(tile, rows);
            tile += N;
        }
        while tile < self.range.end {
            self.column::<L, M, 1>(tile, rows);
            tile += 1;
        }
    }

    #[inline(always)]
    fn column<L: Lanes, const M: usize, const N: usize>(&mut self, tile: usize, rows: usize) {
        let mut row = 0;
        while row + M <= rows {
            self.block::<L, M, N>(row, tile);
            row += M;
        }
        while row < rows {
            self.block::<L, 1, N>(row, tile);
            row += 1;
        }
    }

    /// M rows times N tiles.
    #[inline(always)]
    fn block<L: Lanes, const M: usize, const N: usize>(&mut self, row: usize, tile: usize) {
        let steps = self.inputs / (2 * STEP);
        let x: [&[[[f32; 2]; STEP]]; M] = std::array::from_fn(|m| {
            let row = &self.x[(row + m) * self.inputs..][..self.inputs];
            &row.as_chunks::<2>().0.as_chunks::<STEP>().0[..steps]
        });
        let w: [&[[[W; LINE]; STEP]]; N] =
            std::array::from_fn(|n| &self.lines[(tile + n) * self.inputs / 2..].as_chunks::<STEP>().0[..steps]);
        let mut sums = [[L::splat(0.0); N]; M];
        for step in 0..steps {
            for i in 0..STEP {
                let mut first = [L::splat(0.0); N];
                let mut second = [L::splat(0.0); N];
                for n in 0..N {
                    (first[n], second[n]) = W::line(&w[n][step][i]);
                }
                for m in 0..M {
                    let [a, b] = x[m][step][i];
                    let (a, b) = (L::splat(a), L::splat(b));
                    for n in 0..N {
                        sums[m][n] = sums[m][n].add_product(a, first[n]).add_product(b, second[n]);
                    }
                }
            }
        }
        let mut values = [0f32; LANES];
        for (m, sums) in sums.into_iter().enumerate() {
            for (n, sum) in sums.into_iter().enumerate() {
                sum.store(&mut values);
                self.tiles.put(row + m, tile + n, &values);
            }
        }
    }
}

struct Embed {
    ids: Arc<[u32]>,
    outputs: usize,
    inputs: usize,
}

impl CustomOp1 for Embed {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn cpu_fwd(&self, table: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        if let Some(id) = self.ids.iter().find(|&&id| id as usize >= self.outputs) {
            bail!("embed: id {id} for a table of {}", self.outputs);
        }
        let mut rows = vec![0f32; self.ids.len() * self.inputs];
        match stored(table, layout, "embed")? {
            Stored::F32(table) => self.look_up(table, &mut rows)?,
            Stored::Bf16(table) => self.look_up(table, &mut rows)?,
        }
        Ok((CpuStorage::F32(rows), (self.ids.len(), self.inputs).into()))
    }
}

impl Embed {
    fn look_up<W: Weight>(&self, table: &[W], rows: &mut [f32]) -> Result<()> {
        let work = rows.len();
        fill_parts(rows, self.inputs, work, |t, row| {
            let id = self.ids[t] as usize;
            for (input, value) in row.iter_mut().enumerate() {
                *value = table[index::<W>(id, input, self.inputs)].widen();
            }
        })
    }
}

/// The product on every instruction set of this machine, by name.
#[cfg(test)]
pub(crate) fn linear_on_each(x: &[f32], weights: &Packed) -> Result<Vec<(String, Vec<f32>)>> {
    use super::simd::{run_exactly_on, run_on_each};
    let (storage, layout) = weights.data.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else { bail!("not on the CPU") };
    let mut results = Vec::new();
    run_on_each(|path| {
        let mut y = vec![0f32; x.len() / weights.inputs * weights.outputs];
        let inputs = weights.inputs;
        let done = fill_tiles(&mut y, weights.outputs, 0, |range, tiles| match stored(storage, layout, "linear") {
            Ok(Stored::F32(w)) => run_exactly_on(path, Multiply { x, lines: w.as_chunks().0, inputs, range, tiles }),
            Ok(Stored::Bf16(w)) => run_exactly_on(path, Multiply { x, lines: w.as_chunks().0, inputs, range, tiles }),
            Err(_) => {}
        });
        if done.is_ok() {
            results.push((format!("{path:?}"), y));
        }
    });
    Ok(results)
}
