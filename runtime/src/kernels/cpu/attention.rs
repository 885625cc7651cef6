//! Attention over paged keys and values, and writing them into their pages.
//!
//! A row attends to positions `0..=pos` of its own sequence, found through the block table: no mask, no gather. The
//! softmax is computed online, one KV block at a time, so how keys are grouped depends on the sequence alone.

use super::{
    exp::exp,
    packed::Weight,
    rows::fill_parts,
    simd::{Job, LANES, Lanes, run},
    view::{Stored, f32s, stored},
};
use crate::kernels::batch::{BLOCK_TOKENS, StepBatch};
use candle_core::{CpuStorage, CustomOp3, InplaceOp2, Layout, Result, Shape, Tensor, bail};
use half::bf16;
use std::sync::Arc;

/// How the heads of a fused qkv row are laid out: all q heads, then all k heads, then all v heads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    pub q: usize,
    pub kv: usize,
    /// Numbers in a head; a multiple of 16.
    pub dim: usize,
}

impl Heads {
    pub fn width(self) -> usize {
        (self.q + 2 * self.kv) * self.dim
    }
}

/// Which part of a qkv row goes into a pool.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part {
    Key,
    Value,
}

/// Shapes of the two pools for `blocks` blocks. Keys lie dimension by dimension, so that one load gives the same
/// dimension of a whole block's keys; values lie token by token.
pub(crate) fn pool_shapes(blocks: usize, heads: Heads) -> [[usize; 4]; 2] {
    [[blocks, heads.kv, heads.dim, BLOCK_TOKENS], [blocks, BLOCK_TOKENS, heads.kv, heads.dim]]
}

/// Copies every row's keys or values to its slot in a pool of [`pool_shapes`]. `qkv`: `[T, width]`.
pub(crate) fn kv_write(pool: &Tensor, qkv: &Tensor, part: Part, heads: Heads, batch: &Arc<StepBatch>) -> Result<()> {
    pool.inplace_op2(qkv, &KvWrite { part, heads, batch: Arc::clone(batch) })
}

/// softmax(q·kᵀ / √dim) · v for every row: `[T, q · dim]`.
pub(crate) fn paged_attention(
    qkv: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    heads: Heads,
    batch: &Arc<StepBatch>,
) -> Result<Tensor> {
    qkv.apply_op3_no_bwd(keys, values, &Attention { heads, batch: Arc::clone(batch) })
}

struct KvWrite {
    part: Part,
    heads: Heads,
    batch: Arc<StepBatch>,
}

impl InplaceOp2 for KvWrite {
    fn name(&self) -> &'static str {
        "kv_write"
    }

    fn cpu_fwd(&self, pool: &mut CpuStorage, pl: &Layout, qkv: &CpuStorage, ql: &Layout) -> Result<()> {
        let qkv = f32s(qkv, ql, "kv_write")?;
        let token = self.heads.kv * self.heads.dim;
        let slots = pl.shape().elem_count() / token.max(1);
        if qkv.len() != self.batch.tokens() * self.heads.width() || !pl.is_contiguous() || pl.start_offset() != 0 {
            bail!("kv_write: {:?} into {:?}", ql.dims(), pl.dims());
        }
        if self.batch.slot.iter().any(|&slot| slot as usize >= slots) {
            bail!("kv_write: a slot beyond the pool of {slots}");
        }
        match pool {
            CpuStorage::F32(pool) => self.copy(qkv, pool, |value| value),
            CpuStorage::BF16(pool) => self.copy(qkv, pool, bf16::from_f32),
            _ => bail!("kv_write: the pool is neither f32 nor bf16"),
        }
        Ok(())
    }
}

impl KvWrite {
    fn copy<C>(&self, qkv: &[f32], pool: &mut [C], narrow: impl Fn(f32) -> C) {
        let Heads { q, kv, dim } = self.heads;
        let token = kv * dim;
        for (row, &slot) in qkv.chunks_exact(self.heads.width()).zip(&self.batch.slot) {
            let slot = slot as usize;
            match self.part {
                Part::Key => {
                    let (block, offset) = (slot / BLOCK_TOKENS, slot % BLOCK_TOKENS);
                    let cells =
                        pool[block * BLOCK_TOKENS * token..][..BLOCK_TOKENS * token].chunks_exact_mut(BLOCK_TOKENS);
                    for (line, &value) in cells.zip(&row[q * dim..][..token]) {
                        line[offset] = narrow(value);
                    }
                }
                Part::Value => {
                    for (cell, &value) in pool[slot * token..][..token].iter_mut().zip(&row[(q + kv) * dim..][..token])
                    {
                        *cell = narrow(value);
                    }
                }
            }
        }
    }
}

struct Attention {
    heads: Heads,
    batch: Arc<StepBatch>,
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "paged_attention"
    }

    fn cpu_fwd(
        &self,
        qkv: &CpuStorage,
        ql: &Layout,
        keys: &CpuStorage,
        kl: &Layout,
        values: &CpuStorage,
        vl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let qkv = f32s(qkv, ql, "paged_attention")?;
        let Heads { q, kv, dim } = self.heads;
        let rows = self.batch.tokens();
        let shaped = dim % LANES == 0 && kv > 0 && q % kv == 0 && qkv.len() == rows * self.heads.width();
        let blocks = kl.dims().first().copied().unwrap_or(0);
        if !shaped || [kl.dims(), vl.dims()] != pool_shapes(blocks, self.heads) {
            bail!("paged_attention: {:?} over {:?} with {:?}", ql.dims(), kl.dims(), self.heads);
        }
        if self.batch.tables.iter().any(|&block| block as usize >= blocks) {
            bail!("paged_attention: a block beyond the pool of {blocks}");
        }
        let mut out = vec![0f32; rows * q * dim];
        match (stored(keys, kl, "paged_attention")?, stored(values, vl, "paged_attention")?) {
            (Stored::F32(keys), Stored::F32(values)) => self.attend(qkv, keys, values, &mut out)?,
            (Stored::Bf16(keys), Stored::Bf16(values)) => self.attend(qkv, keys, values, &mut out)?,
            _ => bail!("paged_attention: keys and values of different types"),
        }
        Ok((CpuStorage::F32(out), (rows, q * dim).into()))
    }
}

impl Attention {
    fn attend<C: Weight>(&self, qkv: &[f32], keys: &[C], values: &[C], out: &mut [f32]) -> Result<()> {
        let Heads { q, kv, dim } = self.heads;
        let group = q / kv;
        let keys_seen: usize = self.batch.pos.iter().map(|&pos| pos as usize + 1).sum();
        let (keys, values) = (keys.as_chunks::<BLOCK_TOKENS>().0, values.as_chunks::<LANES>().0);
        // One part of the output is one row's heads that share a kv head: a key or value is widened once for several.
        fill_parts(out, group * dim, 2 * keys_seen * q * dim, |index, out| {
            let (row, head) = (index / kv, index % kv);
            let query = &qkv[row * self.heads.width() + head * group * dim..][..group * dim];
            run(Attend {
                query,
                keys,
                values,
                out,
                table: self.batch.table_of(row),
                seen: self.batch.pos[row] as usize + 1,
                kv,
                head,
                dim,
            });
        })
    }
}

/// The query heads of one row that share one kv head.
struct Attend<'a, C> {
    /// `[group · dim]`
    query: &'a [f32],
    /// `[blocks · kv · dim]` lines of one dimension of a block's keys.
    keys: &'a [[C; BLOCK_TOKENS]],
    /// `[blocks · BLOCK_TOKENS · kv · dim / LANES]`
    values: &'a [[C; LANES]],
    /// `[group · dim]`
    out: &'a mut [f32],
    table: &'a [u32],
    /// Keys 0..seen count.
    seen: usize,
    kv: usize,
    /// Which kv head.
    head: usize,
    dim: usize,
}

impl<C: Weight> Job for Attend<'_, C> {
    #[inline(always)]
    fn run<L: Lanes>(mut self) {
        let heads = self.query.len() / self.dim;
        let mut head = 0;
        while head + 4 <= heads {
            self.heads::<L, 4>(head);
            head += 4;
        }
        while head < heads {
            self.heads::<L, 1>(head);
            head += 1;
        }
    }
}

impl<C: Weight> Attend<'_, C> {
    /// Heads `first..first + H` of the group.
    #[inline(always)]
    fn heads<L: Lanes, const H: usize>(&mut self, first: usize) {
        let dim = self.dim;
        let scale = L::splat(1.0 / (dim as f32).sqrt());
        let query: [&[f32]; H] = std::array::from_fn(|h| &self.query[(first + h) * dim..][..dim]);
        let mut highest = [f32::NEG_INFINITY; H];
        let mut total = [0f32; H];
        for block in 0..self.seen.div_ceil(BLOCK_TOKENS) {
            let number = self.table[block] as usize;
            let count = (self.seen - block * BLOCK_TOKENS).min(BLOCK_TOKENS);

            let lines = &self.keys[(number * self.kv + self.head) * dim..][..dim];
            let mut low = [L::splat(0.0); H];
            let mut high = [L::splat(0.0); H];
            for i in 0..dim {
                let (first, second) = C::line::<L>(&lines[i]);
                for h in 0..H {
                    let q = L::splat(query[h][i]);
                    low[h] = low[h].add_product(q, first);
                    high[h] = high[h].add_product(q, second);
                }
            }

            // Scores stay in the order in which a line's lanes come; `lane_of` finds a key's.
            let mut weights = [[[0f32; LANES]; 2]; H];
            let mut shrink = [0f32; H];
            for h in 0..H {
                let weights = &mut weights[h];
                low[h].mul(scale).store(&mut weights[0]);
                high[h].mul(scale).store(&mut weights[1]);
                for key in count..BLOCK_TOKENS {
                    weights.as_flattened_mut()[C::lane_of(key)] = f32::NEG_INFINITY;
                }
                let largest = L::load(&weights[0]).max(L::load(&weights[1])).highest();
                let before = highest[h];
                if largest > before {
                    highest[h] = largest;
                }
                shrink[h] = if block == 0 { 0.0 } else { exp(before - highest[h]) };
                for half in weights.iter_mut() {
                    for score in half.iter_mut() {
                        *score = exp(*score - highest[h]);
                    }
                }
                for key in count..BLOCK_TOKENS {
                    weights.as_flattened_mut()[C::lane_of(key)] = 0.0;
                }
                let sum = L::load(&weights[0]).add_product(L::load(&weights[1]), L::splat(1.0)).sum();
                total[h] = total[h] * shrink[h] + sum;
            }

            let stride = self.kv * dim / LANES;
            let values = &self.values[number * BLOCK_TOKENS * stride..][..BLOCK_TOKENS * stride];
            for lane in 0..dim / LANES {
                let column = self.head * dim / LANES + lane;
                let mut sums = [L::splat(0.0); H];
                for h in 0..H {
                    sums[h] = self.load_out::<L>(first + h, lane).mul(L::splat(shrink[h]));
                }
                for key in 0..count {
                    let value = C::lanes::<L>(&values[key * stride + column]);
                    let at = C::lane_of(key);
                    for h in 0..H {
                        sums[h] = sums[h].add_product(L::splat(weights[h][at / LANES][at % LANES]), value);
                    }
                }
                for (h, sum) in sums.into_iter().enumerate() {
                    self.store_out(first + h, lane, sum);
                }
            }
        }
        for (h, total) in total.into_iter().enumerate() {
            let whole = L::splat(1.0 / total);
            for lane in 0..dim / LANES {
                self.store_out(first + h, lane, self.load_out::<L>(first + h, lane).mul(whole));
            }
        }
    }

    #[inline(always)]
    fn load_out<L: Lanes>(&self, head: usize, lane: usize) -> L {
        L::load(&self.out.as_chunks::<LANES>().0[head * self.dim / LANES + lane])
    }

    #[inline(always)]
    fn store_out<L: Lanes>(&mut self, head: usize, lane: usize, value: L) {
        value.store(&mut self.out.as_chunks_mut::<LANES>().0[head * self.dim / LANES + lane]);
    }
}

/// One row's attention over fixed bf16 keys and values on every instruction set of this machine, by name.
#[cfg(test)]
pub(crate) fn attend_on_each(query: &[f32], dim: usize) -> Vec<(String, Vec<f32>)> {
    use super::simd::{run_exactly_on, run_on_each};
    let pool: Vec<bf16> = (0..3 * BLOCK_TOKENS * dim).map(|i| bf16::from_f32((i as f32 * 0.37).sin())).collect();
    let (keys, values) = (pool.as_chunks().0, pool.as_chunks().0);
    let mut results = Vec::new();
    run_on_each(|path| {
        let mut out = vec![0f32; query.len()];
        let job = Attend { query, keys, values, out: &mut out, table: &[2, 0], seen: 45, kv: 1, head: 0, dim };
        run_exactly_on(path, job);
        results.push((format!("{path:?}"), out));
    });
    results
}
