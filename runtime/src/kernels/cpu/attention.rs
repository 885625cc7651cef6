//! Attention over paged keys and values, and writing them into their pages.
//!
//! A row attends to positions up to its own, in its own sequence, found through the block table: no mask, no gather.
//! Neighbouring rows of a sequence share each key and value that is loaded; what a row computes is the same alone.

use super::{
    attend::{Attend, QUERIES_MAX},
    packed::Weight,
    rows::fill_uneven,
    simd::{LANES, run},
    view::{Stored, f32s, stored},
};
use crate::kernels::batch::{BLOCK_TOKENS, StepBatch};
use candle_core::{CpuStorage, CustomOp3, InplaceOp2, Layout, Result, Shape, Tensor, bail};
use half::bf16;
use std::{ops::Range, sync::Arc};

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

/// How strongly a query and a key match, and which keys count.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Scores {
    /// Of q·k.
    pub scale: f32,
    /// cap · tanh(score / cap) in place of each score.
    pub softcap: Option<f32>,
    /// Only the latest keys count, the query's own included.
    pub window: Option<usize>,
}

impl Scores {
    /// The keys that a query at `pos` attends to.
    pub fn keys(self, pos: u32) -> Range<usize> {
        let end = pos as usize + 1;
        self.window.map_or(0, |window| end.saturating_sub(window))..end
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

/// softmax(scores of q·kᵀ) · v for every row: `[T, q · dim]`.
pub(crate) fn paged_attention(
    qkv: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    heads: Heads,
    scores: Scores,
    batch: &Arc<StepBatch>,
) -> Result<Tensor> {
    qkv.apply_op3_no_bwd(keys, values, &Attention { heads, scores, batch: Arc::clone(batch) })
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
    scores: Scores,
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
        let shaped = dim % LANES == 0
            && self.scores.window != Some(0)
            && kv > 0
            && q % kv == 0
            && qkv.len() == rows * self.heads.width();
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
        let (group, width) = (q / kv, self.heads.width());
        let (keys, values) = (keys.as_chunks::<BLOCK_TOKENS>().0, values.as_chunks::<LANES>().0);
        let seen: usize = self.batch.pos.iter().map(|&pos| self.scores.keys(pos).len()).sum();
        let runs = self.runs(QUERIES_MAX.div_ceil(group));
        // One part is one run of rows for one kv head: `[kv, rows, group · dim]`, put in order below.
        let ends = runs.iter().flat_map(|rows| {
            let part = rows.len() * group * dim;
            (1..=kv).map(move |head| rows.start * q * dim + head * part)
        });
        let ends: Vec<usize> = ends.collect();
        fill_uneven(out, &ends, 2 * seen * q * dim, |index, out| {
            let (rows, head) = (&runs[index / kv], index % kv);
            run(Attend {
                qkv: &qkv[rows.start * width..rows.end * width],
                width,
                first: head * group * dim,
                group,
                pos: &self.batch.pos[rows.clone()],
                keys,
                values,
                out,
                table: self.batch.table_of(rows.start),
                scores: self.scores,
                kv,
                head,
                dim,
            });
        })?;
        let mut part = Vec::new();
        for rows in runs.iter().filter(|rows| rows.len() > 1) {
            let out = &mut out[rows.start * q * dim..rows.end * q * dim];
            part.clear();
            part.extend_from_slice(out);
            for (at, from) in part.chunks_exact(group * dim).enumerate() {
                let (head, row) = (at / rows.len(), at % rows.len());
                out[(row * kv + head) * group * dim..][..group * dim].copy_from_slice(from);
            }
        }
        Ok(())
    }

    /// Rows that are neighbours in one sequence, at most `most` at a time.
    fn runs(&self, most: usize) -> Vec<Range<usize>> {
        let seq = &self.batch.seq;
        let mut runs: Vec<Range<usize>> = Vec::new();
        for row in 0..seq.len() {
            match runs.last_mut() {
                Some(run) if run.len() < most && seq[run.start] == seq[row] => run.end = row + 1,
                _ => runs.push(row..row + 1),
            }
        }
        runs
    }
}
