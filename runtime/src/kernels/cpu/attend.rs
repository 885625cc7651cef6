//! The arithmetic of attention: a few queries that share one kv head, over the blocks of one sequence.
//!
//! The softmax is computed online, one KV block at a time. How a query's keys are grouped, and in which order they are
//! summed, depends on its position and window alone, not on the queries that it shares a pass with.

use super::{
    attention::Scores,
    exp::{exp, tanh},
    packed::Weight,
    simd::{Job, LANES, Lanes},
};
use crate::kernels::batch::BLOCK_TOKENS;
use std::ops::Range;

/// Queries in one pass over keys and values: each has two running lines of scores in registers.
pub(super) const QUERIES_MAX: usize = 8;

/// The queries of a few rows, neighbours in one sequence, that share one kv head.
pub(super) struct Attend<'a, C> {
    /// The rows, `width` numbers each.
    pub qkv: &'a [f32],
    pub width: usize,
    /// Where in a row the group's queries begin.
    pub first: usize,
    /// Query heads that share the kv head.
    pub group: usize,
    /// `[rows]` positions, one after the other.
    pub pos: &'a [u32],
    /// `[blocks · kv · dim]` lines of one dimension of a block's keys.
    pub keys: &'a [[C; BLOCK_TOKENS]],
    /// `[blocks · BLOCK_TOKENS · kv · dim / LANES]`
    pub values: &'a [[C; LANES]],
    /// `[rows · group · dim]`, zeros.
    pub out: &'a mut [f32],
    pub table: &'a [u32],
    pub scores: Scores,
    pub kv: usize,
    /// Which kv head.
    pub head: usize,
    pub dim: usize,
}

impl<C: Weight> Job for Attend<'_, C> {
    #[inline(always)]
    fn run<L: Lanes>(mut self) {
        let queries = self.pos.len() * self.group;
        let most = if L::WIDE { QUERIES_MAX } else { QUERIES_MAX / 2 };
        let mut first = 0;
        while first < queries {
            let count = most.min(queries - first);
            match count {
                1 => self.pass::<L, 1, 4>(first),
                2 => self.pass::<L, 2, 4>(first),
                3 => self.pass::<L, 3, 2>(first),
                4 => self.pass::<L, 4, 2>(first),
                5 => self.pass::<L, 5, 2>(first),
                6 => self.pass::<L, 6, 2>(first),
                7 => self.pass::<L, 7, 2>(first),
                _ => self.pass::<L, 8, 2>(first),
            }
            first += count;
        }
    }
}

/// What a pass keeps of each query between blocks, and of the block at hand.
struct Softmax<const Q: usize> {
    highest: [f32; Q],
    total: [f32; Q],
    /// What sums so far shrink by as the highest score rises.
    shrink: [f32; Q],
    /// Of the block's keys, in the order in which a line's lanes come; `lane_of` finds a key's.
    weights: [[[f32; LANES]; 2]; Q],
}

impl<C: Weight> Attend<'_, C> {
    /// Queries `first..first + Q`, row by row; values in columns of N lines.
    #[inline(always)]
    fn pass<L: Lanes, const Q: usize, const N: usize>(&mut self, first: usize) {
        let dim = self.dim;
        let spans: [Range<usize>; Q] = std::array::from_fn(|n| self.scores.keys(self.pos[(first + n) / self.group]));
        let mut softmax = Softmax {
            highest: [f32::NEG_INFINITY; Q],
            total: [0.0; Q],
            shrink: [0.0; Q],
            weights: [[[0.0; LANES]; 2]; Q],
        };
        // Both ends of a span grow with the position.
        for block in spans[0].start / BLOCK_TOKENS..spans[Q - 1].end.div_ceil(BLOCK_TOKENS) {
            let base = block * BLOCK_TOKENS;
            let inside = |at: usize| at.clamp(base, base + BLOCK_TOKENS) - base;
            let seen: [(usize, usize); Q] = std::array::from_fn(|n| (inside(spans[n].start), inside(spans[n].end)));
            let number = self.table[block] as usize;

            let (low, high) = self.products::<L, Q>(first, number);
            for n in 0..Q {
                let begins = spans[n].start / BLOCK_TOKENS == block;
                self.weigh(&mut softmax, n, [low[n], high[n]], seen[n], begins);
            }

            // Keys that all queries see come in one loop, the ends that only some see one by one.
            let from = seen.iter().fold(0, |most, seen| most.max(seen.0));
            let to = seen.iter().fold(BLOCK_TOKENS, |least, seen| least.min(seen.1));
            let common = if from < to { from..to } else { BLOCK_TOKENS..BLOCK_TOKENS };
            let mut lane = 0;
            while lane + N <= dim / LANES {
                self.mix::<L, Q, N>(first, number, lane, &softmax, &seen, common.clone());
                lane += N;
            }
            while lane < dim / LANES {
                self.mix::<L, Q, 1>(first, number, lane, &softmax, &seen, common.clone());
                lane += 1;
            }
        }
        for n in 0..Q {
            // Where no score was a number above −∞ there is no answer, and none is made up.
            let none = softmax.highest[n] == f32::NEG_INFINITY;
            let whole = L::splat(if none { f32::NAN } else { 1.0 / softmax.total[n] });
            for lane in 0..dim / LANES {
                self.store_out(first + n, lane, self.load_out::<L>(first + n, lane).mul(whole));
            }
        }
    }

    /// q·k of each query with a block's keys, the two halves of a line.
    #[inline(always)]
    fn products<L: Lanes, const Q: usize>(&self, first: usize, number: usize) -> ([L; Q], [L; Q]) {
        let dim = self.dim;
        let query: [&[f32]; Q] = std::array::from_fn(|n| {
            let (row, head) = ((first + n) / self.group, (first + n) % self.group);
            &self.qkv[row * self.width + self.first + head * dim..][..dim]
        });
        let lines = &self.keys[(number * self.kv + self.head) * dim..][..dim];
        let mut low = [L::splat(0.0); Q];
        let mut high = [L::splat(0.0); Q];
        for i in 0..dim {
            let (first, second) = C::line::<L>(&lines[i]);
            for n in 0..Q {
                let q = L::splat(query[n][i]);
                low[n] = low[n].add_product(q, first);
                high[n] = high[n].add_product(q, second);
            }
        }
        (low, high)
    }

    /// Turns query n's products with a block into weights. `from..to` of the block's keys count; `begins`: it is the
    /// first block of the query's span.
    #[inline(always)]
    fn weigh<L: Lanes, const Q: usize>(
        &self,
        softmax: &mut Softmax<Q>,
        n: usize,
        products: [L; 2],
        (from, to): (usize, usize),
        begins: bool,
    ) {
        if from == to {
            softmax.shrink[n] = 1.0;
            return;
        }
        let weights = &mut softmax.weights[n];
        for half in 0..2 {
            products[half].mul(L::splat(self.scores.scale)).store(&mut weights[half]);
            if let Some(cap) = self.scores.softcap {
                for score in &mut weights[half] {
                    *score = cap * tanh(*score / cap);
                }
            }
        }
        for key in (0..from).chain(to..BLOCK_TOKENS) {
            weights.as_flattened_mut()[C::lane_of(key)] = f32::NEG_INFINITY;
        }
        let largest = L::load(&weights[0]).max(L::load(&weights[1])).highest();
        let before = softmax.highest[n];
        if largest > before {
            softmax.highest[n] = largest;
        }
        // Scores that overflowed to −∞ have no highest to compare with.
        let highest = if softmax.highest[n] == f32::NEG_INFINITY { 0.0 } else { softmax.highest[n] };
        softmax.shrink[n] = if begins { 0.0 } else { exp(before - highest) };
        for half in weights.iter_mut() {
            for score in half.iter_mut() {
                *score = exp(*score - highest);
            }
        }
        for key in (0..from).chain(to..BLOCK_TOKENS) {
            weights.as_flattened_mut()[C::lane_of(key)] = 0.0;
        }
        let sum = L::load(&weights[0]).add_product(L::load(&weights[1]), L::splat(1.0)).sum();
        softmax.total[n] = softmax.total[n] * softmax.shrink[n] + sum;
    }

    /// Adds a block's values, weighted, to N lines of each query's output.
    #[inline(always)]
    fn mix<L: Lanes, const Q: usize, const N: usize>(
        &mut self,
        first: usize,
        number: usize,
        lane: usize,
        softmax: &Softmax<Q>,
        seen: &[(usize, usize); Q],
        common: Range<usize>,
    ) {
        let stride = self.kv * self.dim / LANES;
        let column = self.head * self.dim / LANES + lane;
        let values = &self.values[number * BLOCK_TOKENS * stride..][..BLOCK_TOKENS * stride];
        let mut sums = [[L::splat(0.0); N]; Q];
        for n in 0..Q {
            let shrink = L::splat(softmax.shrink[n]);
            for (i, sum) in sums[n].iter_mut().enumerate() {
                *sum = self.load_out::<L>(first + n, lane + i).mul(shrink);
            }
            for key in seen[n].0..seen[n].1.min(common.start) {
                add_key::<C, L, N>(&mut sums[n], &softmax.weights[n], &values[key * stride + column..][..N], key);
            }
        }
        for key in common.clone() {
            let line = &values[key * stride + column..][..N];
            let mut value = [L::splat(0.0); N];
            for i in 0..N {
                value[i] = C::lanes(&line[i]);
            }
            let at = C::lane_of(key);
            for (sums, weights) in sums.iter_mut().zip(&softmax.weights) {
                let weight = L::splat(weights[at / LANES][at % LANES]);
                for i in 0..N {
                    sums[i] = sums[i].add_product(weight, value[i]);
                }
            }
        }
        for n in 0..Q {
            for key in common.end.max(seen[n].0)..seen[n].1 {
                add_key::<C, L, N>(&mut sums[n], &softmax.weights[n], &values[key * stride + column..][..N], key);
            }
            for (i, &sum) in sums[n].iter().enumerate() {
                self.store_out(first + n, lane + i, sum);
            }
        }
    }

    #[inline(always)]
    fn load_out<L: Lanes>(&self, query: usize, lane: usize) -> L {
        L::load(&self.out.as_chunks::<LANES>().0[query * self.dim / LANES + lane])
    }

    #[inline(always)]
    fn store_out<L: Lanes>(&mut self, query: usize, lane: usize, value: L) {
        value.store(&mut self.out.as_chunks_mut::<LANES>().0[query * self.dim / LANES + lane]);
    }
}

/// Adds one key's value, weighted, to one query's lines.
#[inline(always)]
fn add_key<C: Weight, L: Lanes, const N: usize>(
    sums: &mut [L; N],
    weights: &[[f32; LANES]; 2],
    line: &[[C; LANES]],
    key: usize,
) {
    let at = C::lane_of(key);
    let weight = L::splat(weights[at / LANES][at % LANES]);
    for i in 0..N {
        sums[i] = sums[i].add_product(weight, C::lanes(&line[i]));
    }
}

/// Four rows' attention over fixed bf16 keys and values on every instruction set of this machine, by name.
#[cfg(test)]
pub(crate) fn attend_on_each(qkv: &[f32], dim: usize, scores: Scores) -> Vec<(String, Vec<f32>)> {
    use super::simd::{run_exactly_on, run_on_each};
    use half::bf16;
    let pool: Vec<bf16> = (0..3 * BLOCK_TOKENS * dim).map(|i| bf16::from_f32((i as f32 * 0.37).sin())).collect();
    let (keys, values) = (pool.as_chunks().0, pool.as_chunks().0);
    let mut results = Vec::new();
    run_on_each(|path| {
        let mut out = vec![0f32; qkv.len()];
        let (width, group) = (qkv.len() / 4, qkv.len() / 4 / dim);
        run_exactly_on(
            path,
            Attend {
                qkv,
                width,
                first: 0,
                group,
                pos: &[30, 31, 32, 33],
                keys,
                values,
                out: &mut out,
                table: &[2, 0],
                scores,
                kv: 1,
                head: 0,
                dim,
            },
        );
        results.push((format!("{path:?}"), out));
    });
    results
}
