//! y = x · Wᵀ over quantised weights: integer products of unsigned quants and rounded inputs, scaled into f32.
//!
//! With w = d·(q − bias) and x = e·a:  Σ w·x = d·e·(Σ q·a − bias·Σ a). Every output is one running f32 sum over its
//! blocks in order.

use super::{
    dots::{DotJob, Dots, prefetch, run},
    rounded::{Inputs32, Inputs256},
    rows::{Columns, Tiles, fill_tiles},
    simd::LANES,
    sweep::{On, Sweep, sweep},
    tiles::{Cell, Large, Quants, Small},
};
use candle_core::{Result, bail};
use std::marker::PhantomData;

/// Cells whose products with rounded inputs of type `X` the kernels know.
pub(crate) trait Multiplied<X>: Cell {
    /// M rows (`x`) times N tiles (`w`), cell by cell; lanes as f32.
    fn block<D: Dots, const M: usize, const N: usize>(x: [&[X]; M], w: [&[Self]; N]) -> [[D::Floats; N]; M];
}

/// `x`: rounded rows, each as many cells long as a tile of `cells`.
pub(crate) fn multiply<X: Sync, C: Multiplied<X>>(x: &[X], cells: &[C], length: usize, y: Columns<'_>) -> Result<()> {
    let tiles = y.columns.len().div_ceil(LANES);
    if length == 0 || cells.len() != tiles * length || x.len() != y.rows() * length {
        bail!("linear: {} cells of packed weights for {tiles} tiles of {length}", cells.len());
    }
    // An integer product costs about a quarter of one in f32.
    let work = y.rows() * cells.len() * C::INPUTS * LANES / 4;
    fill_tiles(y, work, |tiles| run(Multiply { x, cells, length, tiles }))
}

/// The tiles of one thread.
pub(super) struct Multiply<'a, 't, X, C> {
    pub x: &'a [X],
    pub cells: &'a [C],
    /// Cells in a row and in a tile.
    pub length: usize,
    pub tiles: &'a mut Tiles<'t>,
}

impl<X, C: Multiplied<X>> DotJob for Multiply<'_, '_, X, C> {
    #[inline(always)]
    fn run<D: Dots>(self) {
        let rows = self.x.len() / self.length;
        let job = On::<D, _>(self, PhantomData);
        match (D::WIDE, rows) {
            (true, 1) => sweep::<_, 1, 4>(job),
            (true, _) => sweep::<_, 4, 2>(job),
            (false, 1) => sweep::<_, 1, 2>(job),
            (false, _) => sweep::<_, 2, 1>(job),
        }
    }
}

impl<D: Dots, X, C: Multiplied<X>> Sweep for On<D, Multiply<'_, '_, X, C>> {
    #[inline(always)]
    fn rows(&self) -> usize {
        self.0.x.len() / self.0.length
    }
    #[inline(always)]
    fn tiles(&self) -> &Tiles<'_> {
        self.0.tiles
    }
    #[inline(always)]
    fn block<const M: usize, const N: usize>(&mut self, row: usize, tile: usize) {
        let Multiply { x, cells, length, ref mut tiles } = self.0;
        let x: [&[X]; M] = std::array::from_fn(|m| &x[(row + m) * length..][..length]);
        let w: [&[C]; N] = std::array::from_fn(|n| &cells[(tile + n) * length..][..length]);
        let sums = C::block::<D, M, N>(x, w);
        let mut values = [0f32; LANES];
        for (m, sums) in sums.into_iter().enumerate() {
            for (n, sum) in sums.into_iter().enumerate() {
                D::store(sum, &mut values);
                tiles.put(row + m, tile + n, &values);
            }
        }
    }
}

impl<Q: Quants, const BIAS: i32> Multiplied<[Inputs32; 2]> for Small<Q, BIAS> {
    #[inline(always)]
    fn block<D: Dots, const M: usize, const N: usize>(
        x: [&[[Inputs32; 2]]; M],
        w: [&[Self]; N],
    ) -> [[D::Floats; N]; M] {
        let mut sums = [[D::zeros(); N]; M];
        for cell in 0..w[0].len() {
            for half in 0..2 {
                // Found once, so that the loop over lines has no bounds to check.
                let x: [&Inputs32; M] = std::array::from_fn(|m| &x[m][cell][half]);
                let w: [&Self; N] = std::array::from_fn(|n| &w[n][cell]);
                let mut dots = [[D::splat(0); N]; M];
                for m in 0..M {
                    dots[m] = [D::splat(-BIAS * x[m].sum); N];
                }
                for line in 0..8 {
                    for n in 0..N {
                        let quants = w[n].quants.line::<D>(8 * half + line);
                        for m in 0..M {
                            dots[m][n] = dots[m][n].dot(quants, x[m].quants[line]);
                        }
                    }
                }
                for n in 0..N {
                    let scales = D::halves(&w[n].scales[half]);
                    for m in 0..M {
                        sums[m][n] = dots[m][n].scaled_onto(sums[m][n], scales, x[m].scale);
                    }
                }
            }
        }
        sums
    }
}

impl<C: Large> Multiplied<Inputs256> for C {
    #[inline(always)]
    fn block<D: Dots, const M: usize, const N: usize>(x: [&[Inputs256]; M], w: [&[C]; N]) -> [[D::Floats; N]; M] {
        let mut sums = [[D::zeros(); N]; M];
        for cell in 0..w[0].len() {
            let x: [&Inputs256; M] = std::array::from_fn(|m| &x[m][cell]);
            let w: [&C; N] = std::array::from_fn(|n| &w[n][cell]);
            let mut whole = [[D::splat(0); N]; M];
            for part in 0..256 / C::PART {
                if M == 1 {
                    ask_ahead(w, part);
                }
                let mut dots = [[D::splat(0); N]; M];
                for m in 0..M {
                    dots[m] = [D::splat(-C::BIAS * x[m].sums[part]); N];
                }
                for line in 0..C::PART / 4 {
                    let line = C::PART / 4 * part + line;
                    for n in 0..N {
                        let quants = w[n].line::<D>(line);
                        for m in 0..M {
                            dots[m][n] = dots[m][n].dot(quants, x[m].quants[line]);
                        }
                    }
                }
                for n in 0..N {
                    let scale = w[n].scale::<D>(part);
                    for m in 0..M {
                        whole[m][n] = whole[m][n].add_product(dots[m][n], scale);
                    }
                }
            }
            for n in 0..N {
                let d = D::halves(w[n].d());
                for m in 0..M {
                    sums[m][n] = whole[m][n].scaled_onto(sums[m][n], d, x[m].scale);
                }
                let Some((scale, minima)) = w[n].minima() else { continue };
                let scale = D::halves(scale);
                for m in 0..M {
                    let mut taken = D::splat(0);
                    for (minima, sums) in minima.iter().zip(x[m].pairs) {
                        taken = taken.dot_pairs(minima, sums);
                    }
                    sums[m][n] = taken.scaled_onto(sums[m][n], scale, -x[m].scale);
                }
            }
        }
        sums
    }
}

/// Asks for what lies one cell after the given ones, in as many portions as a cell has parts. One row alone waits for
/// memory, and the processor's own prefetching does not keep up with streams that are unpacked on the way.
#[inline(always)]
fn ask_ahead<C: Large, const N: usize>(cells: [&C; N], part: usize) {
    const LINE: usize = 64;
    let lines = size_of::<C>() / LINE;
    let parts = 256 / C::PART;
    for cell in cells {
        for line in lines * part / parts..lines * (part + 1) / parts {
            prefetch(std::ptr::from_ref(cell).wrapping_byte_add(size_of::<C>() + line * LINE));
        }
    }
}
