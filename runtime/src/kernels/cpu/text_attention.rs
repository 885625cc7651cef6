//! Attention of every token of a text to every other token of the same text: no mask, no cache, no padding.
//!
//! One (text, head) at a time: its keys are laid out dimension by dimension, so that one load gives sixteen keys; the
//! scores of a few queries stay in cache until they have weighed the values. Every score and every output is one running
//! sum in the order of the text.

use super::{
    exp::exp,
    rows::{Cell, fill_grid},
    simd::{Job, LANES, Lanes, run},
    view::f32s,
};
use crate::kernels::texts::TextBatch;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use std::sync::Arc;

/// softmax(q·kᵀ / √d) · v within each text. `qkv`: `[T, 3·H]`, a row's queries, keys and values, each head after head;
/// `bias`: `[2, H]`, what is added to queries and to values. (What is added to every key moves all scores of a query by
/// the same amount, which a softmax does not see.) Gives `[T, H]`.
pub(crate) fn text_attention(qkv: &Tensor, bias: &Tensor, heads: usize, batch: &Arc<TextBatch>) -> Result<Tensor> {
    qkv.apply_op2_no_bwd(bias, &TextAttention { heads, batch: Arc::clone(batch) })
}

struct TextAttention {
    heads: usize,
    batch: Arc<TextBatch>,
}

impl CustomOp2 for TextAttention {
    fn name(&self) -> &'static str {
        "text_attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, ql: &Layout, bias: &CpuStorage, bl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (qkv, bias) = (f32s(qkv, ql, "text_attention")?, f32s(bias, bl, "text_attention")?);
        let (rows, hidden) = (self.batch.tokens(), bias.len() / 2);
        let dim = hidden / self.heads.max(1);
        let fits = bl.dims() == [2, hidden] && dim * self.heads == hidden && dim > 0 && dim.is_multiple_of(LANES);
        if !fits || ql.dims() != [rows, 3 * hidden] {
            bail!("text_attention: {:?} with {:?} and {} heads", ql.dims(), bl.dims(), self.heads);
        }
        let starts = &self.batch.starts;
        let pairs: usize = starts.windows(2).map(|text| (text[1] - text[0]).pow(2)).sum();
        let mut out = vec![0f32; rows * hidden];
        fill_grid(&mut out, starts, self.heads, dim, 2 * pairs * hidden, |text, head, out| {
            let rows = &qkv[starts[text] * 3 * hidden..starts[text + 1] * 3 * hidden];
            run(Attend::new(rows, bias, head, dim, out));
        })?;
        Ok((CpuStorage::F32(out), (rows, hidden).into()))
    }
}

type Line = [f32; LANES];

/// One head of one text of n tokens.
struct Attend<'a, 'c> {
    /// `[n · 3·H]`
    qkv: &'a [f32],
    /// `[2 · H]`
    bias: &'a [f32],
    head: usize,
    dim: usize,
    /// `[tiles · dim]`: sixteen keys' number `i` in line `tile · dim + i`.
    keys: Vec<Line>,
    /// `[n · dim / LANES]`
    values: Vec<Line>,
    out: &'a mut Cell<'c>,
}

impl<'a, 'c> Attend<'a, 'c> {
    fn new(qkv: &'a [f32], bias: &'a [f32], head: usize, dim: usize, out: &'a mut Cell<'c>) -> Self {
        let hidden = bias.len() / 2;
        let count = qkv.len() / (3 * hidden);
        let mut keys = vec![[0f32; LANES]; count.div_ceil(LANES) * dim];
        let mut values = Vec::with_capacity(count * dim / LANES);
        for (at, row) in qkv.chunks_exact(3 * hidden).enumerate() {
            let key = &row[hidden + head * dim..][..dim];
            for (line, &number) in keys[at / LANES * dim..][..dim].iter_mut().zip(key) {
                line[at % LANES] = number;
            }
            values.extend_from_slice(row[2 * hidden + head * dim..][..dim].as_chunks::<LANES>().0);
        }
        Attend { qkv, bias, head, dim, keys, values, out }
    }

    fn count(&self) -> usize {
        self.values.len() * LANES / self.dim
    }

    /// Queries `first..first + M`. `queries`: scratch of M · dim numbers, `scores`: of M lines for each tile.
    #[inline(always)]
    fn rows<L: Lanes, const M: usize, const N: usize>(
        &mut self,
        first: usize,
        queries: &mut [f32],
        scores: &mut [Line],
    ) {
        let (dim, hidden) = (self.dim, self.bias.len() / 2);
        let tiles = self.keys.len() / dim;
        let scale = 1.0 / (dim as f32).sqrt();
        let bias = &self.bias[self.head * dim..][..dim];
        for m in 0..M {
            let query = &self.qkv[(first + m) * 3 * hidden + self.head * dim..][..dim];
            for ((scaled, &number), &bias) in queries[m * dim..][..dim].iter_mut().zip(query).zip(bias) {
                *scaled = (number + bias) * scale;
            }
        }
        let mut tile = 0;
        while tile + N <= tiles {
            self.score::<L, M, N>(tile, tiles, queries, scores);
            tile += N;
        }
        while tile < tiles {
            self.score::<L, M, 1>(tile, tiles, queries, scores);
            tile += 1;
        }
        let mut totals = [0f32; M];
        for m in 0..M {
            totals[m] = softmax::<L>(&mut scores[m * tiles..][..tiles], self.count());
        }
        let mut lane = 0;
        while lane + N <= dim / LANES {
            self.mix::<L, M, N>(first, lane, tiles, scores, &totals);
            lane += N;
        }
        while lane < dim / LANES {
            self.mix::<L, M, 1>(first, lane, tiles, scores, &totals);
            lane += 1;
        }
    }

    /// The scores of M queries and N tiles of keys.
    #[inline(always)]
    fn score<L: Lanes, const M: usize, const N: usize>(
        &self,
        tile: usize,
        tiles: usize,
        queries: &[f32],
        scores: &mut [Line],
    ) {
        let dim = self.dim;
        let query: [&[f32]; M] = std::array::from_fn(|m| &queries[m * dim..][..dim]);
        let keys: [&[Line]; N] = std::array::from_fn(|n| &self.keys[(tile + n) * dim..][..dim]);
        let mut sums = [[L::splat(0.0); N]; M];
        for i in 0..dim {
            let line: [L; N] = std::array::from_fn(|n| L::load(&keys[n][i]));
            for m in 0..M {
                let number = L::splat(query[m][i]);
                for n in 0..N {
                    sums[m][n] = sums[m][n].add_product(number, line[n]);
                }
            }
        }
        for (m, sums) in sums.into_iter().enumerate() {
            for (n, sum) in sums.into_iter().enumerate() {
                sum.store(&mut scores[m * tiles + tile + n]);
            }
        }
    }

    /// N lines of M outputs: the values by their weights.
    #[inline(always)]
    fn mix<L: Lanes, const M: usize, const N: usize>(
        &mut self,
        first: usize,
        lane: usize,
        tiles: usize,
        scores: &[Line],
        totals: &[f32; M],
    ) {
        let stride = self.dim / LANES;
        let weights: [&[f32]; M] = std::array::from_fn(|m| scores[m * tiles..][..tiles].as_flattened());
        let mut sums = [[L::splat(0.0); N]; M];
        for (key, values) in self.values.chunks_exact(stride).enumerate() {
            let value: [L; N] = std::array::from_fn(|n| L::load(&values[lane + n]));
            for m in 0..M {
                let weight = L::splat(weights[m][key]);
                for n in 0..N {
                    sums[m][n] = sums[m][n].add_product(weight, value[n]);
                }
            }
        }
        let hidden = self.bias.len() / 2;
        let bias = self.bias[hidden + self.head * self.dim..][..self.dim].as_chunks::<LANES>().0;
        for (m, sums) in sums.into_iter().enumerate() {
            let whole = L::splat(1.0 / totals[m]);
            let out = self.out.row(first + m).as_chunks_mut::<LANES>().0;
            for (n, sum) in sums.into_iter().enumerate() {
                L::load(&bias[lane + n]).add_product(sum, whole).store(&mut out[lane + n]);
            }
        }
    }

    #[inline(always)]
    fn all_rows<L: Lanes, const M: usize, const N: usize>(&mut self) {
        let mut queries = vec![0f32; M * self.dim];
        let mut scores = vec![[0f32; LANES]; M * self.keys.len() / self.dim];
        let count = self.count();
        let mut row = 0;
        while row + M <= count {
            self.rows::<L, M, N>(row, &mut queries, &mut scores);
            row += M;
        }
        while row < count {
            self.rows::<L, 1, N>(row, &mut queries, &mut scores);
            row += 1;
        }
    }
}

impl Job for Attend<'_, '_> {
    #[inline(always)]
    fn run<L: Lanes>(mut self) {
        // As many sums at a time as there are registers for.
        if L::WIDE { self.all_rows::<L, 4, 2>() } else { self.all_rows::<L, 4, 1>() }
    }
}

/// Scores → e^(score − highest), and their sum. Scores beyond `count` become zero.
#[inline(always)]
fn softmax<L: Lanes>(scores: &mut [Line], count: usize) -> f32 {
    for beyond in &mut scores.as_flattened_mut()[count..] {
        *beyond = f32::NEG_INFINITY;
    }
    let mut highest = L::splat(f32::NEG_INFINITY);
    for line in scores.iter() {
        highest = highest.max(L::load(line));
    }
    let highest = highest.highest();
    for line in scores.iter_mut() {
        for score in line {
            *score = exp(*score - highest);
        }
    }
    for beyond in &mut scores.as_flattened_mut()[count..] {
        *beyond = 0.0;
    }
    let mut total = L::splat(0.0);
    for line in scores.iter() {
        total = total.add_product(L::load(line), L::splat(1.0));
    }
    total.sum()
}

/// One text's attention on every instruction set of this machine, by name.
#[cfg(test)]
pub(crate) fn text_attention_on_each(qkv: &[f32], bias: &[f32], dim: usize) -> Vec<(String, Vec<f32>)> {
    use super::simd::{run_exactly_on, run_on_each};
    let hidden = bias.len() / 2;
    let count = qkv.len() / (3 * hidden);
    let mut results = Vec::new();
    run_on_each(|path| {
        let mut out = vec![0f32; count * hidden];
        let done = fill_grid(&mut out, &[0, count], hidden / dim, dim, 0, |_, head, out| {
            run_exactly_on(path, Attend::new(qkv, bias, head, dim, out));
        });
        done.expect("no kernel panics");
        results.push((format!("{path:?}"), out));
    });
    results
}
