//! The order in which a kernel goes over rows and column tiles: all rows for a few tiles, so that these stay in cache.

use super::rows::Tiles;
use std::marker::PhantomData;

/// A matrix product that can do `M` rows times `N` tiles at once. How it is cut decides nothing about the results.
pub(crate) trait Sweep {
    fn rows(&self) -> usize;
    fn tiles(&self) -> &Tiles<'_>;
    fn block<const M: usize, const N: usize>(&mut self, row: usize, tile: usize);
}

/// A job on one instruction set.
pub(crate) struct On<L, J>(pub J, pub PhantomData<L>);

/// Goes over everything, `M` rows times `N` tiles at a time while there are as many.
#[inline(always)]
pub(crate) fn sweep<S: Sweep, const M: usize, const N: usize>(mut job: S) {
    let range = job.tiles().range();
    let mut tile = range.start;
    while tile + N <= range.end {
        column::<S, M, N>(&mut job, tile);
        tile += N;
    }
    while tile < range.end {
        column::<S, M, 1>(&mut job, tile);
        tile += 1;
    }
}

#[inline(always)]
fn column<S: Sweep, const M: usize, const N: usize>(job: &mut S, tile: usize) {
    let rows = job.rows();
    let mut row = 0;
    while row + M <= rows {
        job.block::<M, N>(row, tile);
        row += M;
    }
    while M > 4 && row + 4 <= rows {
        job.block::<4, N>(row, tile);
        row += 4;
    }
    while M > 2 && row + 2 <= rows {
        job.block::<2, N>(row, tile);
        row += 2;
    }
    while row < rows {
        job.block::<1, N>(row, tile);
        row += 1;
    }
}
