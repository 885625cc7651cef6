//! y = x · Wᵀ and the embedding lookup over packed weights. Plain weights (two bytes or four a number) are computed on
//! in f32 here, or in `pairs` where inputs are rounded and the processor knows bf16; blocks in `quantised`.
//!
//! Every output is one running sum over the pairs of inputs in order, of each pair the second one first. How many rows
//! and tiles share a pass only decides which sums are in registers together, so the bits of a row are the same for any
//! batch.

use super::{
    blocks::Kind,
    packed::{Inputs, Line, Packed, Store, Weight},
    pairs, quantised,
    rounded::{Inputs32, Inputs256, Pairs, Rounded, rounded},
    rows::{Columns, Tiles, fill_parts, fill_tiles},
    simd::{Job, LANES, Lanes, run},
    sweep::{On, Sweep, sweep},
    view::f32s,
};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use std::{marker::PhantomData, sync::Arc};

/// `x`: `[T, inputs]` f32 → `[T, outputs]` f32.
pub(crate) fn linear(x: &Tensor, weights: &Packed) -> Result<Tensor> {
    x.apply_op1_no_bwd(&Linear(weights))
}

/// The rows of the packed table that `ids` name: `[T, inputs]` f32.
pub(crate) fn embed(ids: Arc<[u32]>, table: &Packed) -> Result<Tensor> {
    if let Some(id) = ids.iter().find(|&&id| id as usize >= table.outputs) {
        bail!("embed: id {id} for a table of {}", table.outputs);
    }
    let mut rows = vec![0f32; ids.len() * table.inputs];
    let work = rows.len();
    fill_parts(&mut rows, table.inputs, work, |t, row| table.row(ids[t] as usize, row))?;
    Tensor::from_vec(rows, (ids.len(), table.inputs), &candle_core::Device::Cpu)
}

struct Linear<'a>(&'a Packed);

impl CustomOp1 for Linear<'_> {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let weights = self.0;
        let x = f32s(x, layout, "linear")?;
        let rows = x.len() / weights.inputs;
        if layout.dims() != [rows, weights.inputs] {
            bail!("linear: input {:?} for a width of {}", layout.dims(), weights.inputs);
        }
        let mut y = vec![0f32; rows * weights.outputs];
        let input = Input::new(x, weights)?;
        for band in &weights.bands {
            let y = Columns { numbers: &mut y, width: weights.outputs, columns: band.outputs.clone() };
            match &band.store {
                Store::F32(lines) => multiply(x, lines, weights.inputs, y)?,
                Store::Bf16(lines) => match weights.met {
                    Inputs::F32 => multiply(x, lines, weights.inputs, y)?,
                    Inputs::Bf16 if pairs::known() => pairs::multiply(&input.pairs, lines, weights.inputs, y)?,
                    Inputs::Bf16 => multiply(input.wide.as_flattened(), lines, weights.inputs, y)?,
                },
                Store::Q8_0(cells) => quantised::multiply(&input.by32, cells, input.cells::<64>(), y)?,
                Store::Q4_0(cells) => quantised::multiply(&input.by32, cells, input.cells::<64>(), y)?,
                Store::Q4K(cells) => quantised::multiply(&input.by256, cells, input.cells::<256>(), y)?,
                Store::Q5K(cells) => quantised::multiply(&input.by256, cells, input.cells::<256>(), y)?,
                Store::Q6K(cells) => quantised::multiply(&input.by256, cells, input.cells::<256>(), y)?,
            }
        }
        Ok((CpuStorage::F32(y), (rows, weights.outputs).into()))
    }
}

/// Rounded as the weights need it, once for all bands.
struct Input {
    by32: Vec<[Inputs32; 2]>,
    by256: Vec<Inputs256>,
    /// For weights in bf16, where the processor multiplies these.
    pairs: Vec<Pairs>,
    /// For weights in bf16 elsewhere.
    wide: Vec<[f32; STEP]>,
    inputs: usize,
}

impl Input {
    fn new(x: &[f32], weights: &Packed) -> Result<Input> {
        fn when<R: Rounded>(needed: bool, x: &[f32], inputs: usize) -> Result<Vec<R>> {
            if needed { rounded(x, inputs) } else { Ok(Vec::new()) }
        }
        let inputs = weights.inputs;
        let any = |is: &dyn Fn(Kind) -> bool| weights.bands.iter().any(|band| is(band.kind()));
        let in_bf16 = weights.met == Inputs::Bf16 && any(&|kind| kind == Kind::Bf16);
        Ok(Input {
            by32: when(any(&|kind| kind.block_len() == 32), x, inputs)?,
            by256: when(any(&|kind| kind.block_len() == 256), x, inputs)?,
            pairs: when(in_bf16 && pairs::known(), x, inputs)?,
            wide: when(in_bf16 && !pairs::known(), x, inputs)?,
            inputs,
        })
    }

    fn cells<const INPUTS: usize>(&self) -> usize {
        self.inputs.div_ceil(INPUTS)
    }
}

fn multiply<W: Weight>(x: &[f32], lines: &[Line<W>], inputs: usize, y: Columns<'_>) -> Result<()> {
    fit(lines, inputs, &y)?;
    let work = x.len() * y.columns.len();
    fill_tiles(y, work, |tiles| run(Multiply { x, lines, inputs, tiles }))
}

/// Whether the lines are those of the columns.
pub(super) fn fit<W>(lines: &[Line<W>], inputs: usize, y: &Columns<'_>) -> Result<()> {
    let outputs = y.columns.len();
    if lines.len() != outputs.div_ceil(LANES) * inputs / 2 || !inputs.is_multiple_of(STEP) {
        bail!("linear: {} lines of packed weights for {inputs} inputs and {outputs} outputs", lines.len());
    }
    Ok(())
}

/// Inputs between two bounds checks.
pub(super) const STEP: usize = 8;

/// The tiles of one thread.
struct Multiply<'a, 't, W> {
    x: &'a [f32],
    lines: &'a [Line<W>],
    inputs: usize,
    tiles: &'a mut Tiles<'t>,
}

impl<W: Weight> Job for Multiply<'_, '_, W> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let rows = self.x.len() / self.inputs;
        let job = On::<L, _>(self, PhantomData);
        // One row alone needs many tiles at once to hide the latency of its additions; several rows reuse each loaded
        // line. Both shapes are limited by how many registers the instruction set has.
        match (L::WIDE, rows) {
            (true, 1) => sweep::<_, 1, 8>(job),
            (true, 2 | 3) => sweep::<_, 2, 4>(job),
            // What five rows leave over goes by fewer: that pays only where there are many.
            (true, 4..32) => sweep::<_, 4, 4>(job),
            (true, _) => sweep::<_, 5, 4>(job),
            (false, 1) => sweep::<_, 1, 4>(job),
            (false, _) => sweep::<_, 4, 1>(job),
        }
    }
}

impl<L: Lanes, W: Weight> Sweep for On<L, Multiply<'_, '_, W>> {
    #[inline(always)]
    fn rows(&self) -> usize {
        self.0.x.len() / self.0.inputs
    }
    #[inline(always)]
    fn tiles(&self) -> &Tiles<'_> {
        self.0.tiles
    }
    #[inline(always)]
    fn block<const M: usize, const N: usize>(&mut self, row: usize, tile: usize) {
        let Multiply { x, lines, inputs, ref mut tiles } = self.0;
        let steps = inputs / STEP;
        let x: [&[[f32; STEP]]; M] =
            std::array::from_fn(|m| &x[(row + m) * inputs..][..inputs].as_chunks::<STEP>().0[..steps]);
        let w: [&[[Line<W>; STEP / 2]]; N] =
            std::array::from_fn(|n| &lines[(tile + n) * inputs / 2..].as_chunks::<{ STEP / 2 }>().0[..steps]);
        let mut sums = [[L::splat(0.0); N]; M];
        for step in 0..steps {
            for i in 0..STEP / 2 {
                let mut first = [L::splat(0.0); N];
                let mut second = [L::splat(0.0); N];
                for n in 0..N {
                    (first[n], second[n]) = W::line(&w[n][step][i].0);
                }
                for m in 0..M {
                    let (a, b) = (L::splat(x[m][step][2 * i]), L::splat(x[m][step][2 * i + 1]));
                    for n in 0..N {
                        sums[m][n] = sums[m][n].add_product(b, second[n]).add_product(a, first[n]);
                    }
                }
            }
        }
        let mut values = [0f32; LANES];
        for (m, sums) in sums.into_iter().enumerate() {
            for (n, sum) in sums.into_iter().enumerate() {
                sum.store(&mut values);
                tiles.put(row + m, tile + n, &values);
            }
        }
    }
}

/// The product on every instruction set of this machine, by name. `weights` are of one kind.
#[cfg(test)]
pub(crate) fn linear_on_each(x: &[f32], weights: &Packed) -> Result<Vec<(String, Vec<f32>)>> {
    use super::{dots, simd};
    let input = Input::new(x, weights)?;
    let inputs = weights.inputs;
    let mut paths = Vec::new();
    simd::run_on_each(|path| paths.push(path));
    let product = |each: &(dyn Fn(&mut Tiles<'_>) + Sync)| {
        let mut numbers = vec![0f32; x.len() / inputs * weights.outputs];
        let y = Columns { numbers: &mut numbers, width: weights.outputs, columns: 0..weights.outputs };
        fill_tiles(y, 0, each).map(|()| numbers)
    };
    macro_rules! on_each {
        ($run:path, $paths:expr, $job:expr) => {
            $paths
                .iter()
                .map(|&path| Ok((format!("{path:?}"), product(&|tiles| $run(path, $job(tiles)))?)))
                .collect::<Result<_>>()
        };
    }
    macro_rules! blocks {
        ($x:expr, $cells:expr, $len:literal) => {
            on_each!(dots::run_exactly_on, dots::paths(), |tiles| quantised::Multiply {
                x: &$x,
                cells: $cells,
                length: input.cells::<$len>(),
                tiles
            })
        };
    }
    match &weights.bands[0].store {
        Store::F32(lines) => on_each!(simd::run_exactly_on, paths, |tiles| Multiply { x, lines, inputs, tiles }),
        Store::Bf16(lines) => {
            let wide: Vec<[f32; STEP]> = rounded(x, inputs)?;
            let x = if weights.met == Inputs::Bf16 { wide.as_flattened() } else { x };
            let mut each: Vec<(String, Vec<f32>)> =
                on_each!(simd::run_exactly_on, paths, |tiles| Multiply { x, lines, inputs, tiles })?;
            if !input.pairs.is_empty() {
                let mut numbers = vec![0f32; x.len() / inputs * weights.outputs];
                let y = Columns { numbers: &mut numbers, width: weights.outputs, columns: 0..weights.outputs };
                pairs::multiply(&input.pairs, lines, inputs, y)?;
                each.push(("Avx512Bf16".to_owned(), numbers));
            }
            Ok(each)
        }
        Store::Q8_0(cells) => blocks!(input.by32, cells, 64),
        Store::Q4_0(cells) => blocks!(input.by32, cells, 64),
        Store::Q4K(cells) => blocks!(input.by256, cells, 256),
        Store::Q5K(cells) => blocks!(input.by256, cells, 256),
        Store::Q6K(cells) => blocks!(input.by256, cells, 256),
    }
}
