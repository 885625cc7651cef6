//! Lets several threads fill one matrix, each its own part. The two functions are safe to call: they hand out parts
//! that cannot overlap.

#![allow(unsafe_code)] // Safe slices cannot express columns of a row-major matrix in several hands.

use super::{pool::share, simd::LANES};
use candle_core::Result;
use std::{marker::PhantomData, ops::Range};

/// As many as a kernel has in hand at a time: fewer would load every input once more.
const TILES_MIN: usize = 8;

/// Calls `each(index, part)` for every run of `part_len` numbers in `out`. `work`: multiply-adds in total.
pub(crate) fn fill_parts<T: Send>(
    out: &mut [T],
    part_len: usize,
    work: usize,
    each: impl Fn(usize, &mut [T]) + Sync,
) -> Result<()> {
    let shared = Shared::new(out);
    share(shared.len / part_len.max(1), 1, work, |range| {
        for index in range {
            // SAFETY: `share` gives every index to one call only, and parts of different indices are disjoint.
            each(index, unsafe { shared.cells(index * part_len, part_len) });
        }
    })
}

/// Like [`fill_parts`], for parts of different lengths: part `i` ends at `ends[i]`, where the next one begins.
pub(crate) fn fill_uneven(
    out: &mut [f32],
    ends: &[usize],
    work: usize,
    each: impl Fn(usize, &mut [f32]) + Sync,
) -> Result<()> {
    let shared = Shared::new(out);
    share(ends.len(), 1, work, |range| {
        for index in range {
            let start = if index == 0 { 0 } else { ends[index - 1] };
            let len = ends[index].checked_sub(start);
            // SAFETY: `share` gives every index to one call only, and parts that never go back are disjoint.
            each(index, unsafe { shared.cells(start, len.unwrap_or(0)) });
        }
    })
}

/// Some columns of a row-major matrix.
pub(crate) struct Columns<'a> {
    pub numbers: &'a mut [f32],
    /// Of the whole matrix.
    pub width: usize,
    pub columns: Range<usize>,
}

impl Columns<'_> {
    pub fn rows(&self) -> usize {
        self.numbers.len() / self.width.max(1)
    }
}

/// Calls `each` with tiles of the columns ([`LANES`] wide, the last one narrower), and with the right to write to these
/// in every row.
pub(crate) fn fill_tiles(out: Columns<'_>, work: usize, each: impl Fn(&mut Tiles<'_>) + Sync) -> Result<()> {
    let Columns { numbers, width, columns } = out;
    let shared = Shared::new(numbers);
    share(columns.len().div_ceil(LANES), TILES_MIN, work, |range| {
        each(&mut Tiles { shared: &shared, width, columns: columns.clone(), range });
    })
}

/// The right to write some column tiles of a matrix.
pub(crate) struct Tiles<'a> {
    shared: &'a Shared<'a, f32>,
    width: usize,
    columns: Range<usize>,
    range: Range<usize>,
}

impl Tiles<'_> {
    /// Which tiles of the columns.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// Writes one row of one tile; lanes beyond the columns are dropped.
    pub fn put(&mut self, row: usize, tile: usize, values: &[f32; LANES]) {
        assert!(self.range.contains(&tile), "a tile that belongs to another thread");
        let column = self.columns.start + tile * LANES;
        let count = LANES.min(self.columns.end - column);
        // SAFETY: only this value may write to this tile (`share` gives each to one call), and `self` is borrowed mutably.
        unsafe { self.shared.cells(row * self.width + column, count) }.copy_from_slice(&values[..count]);
    }
}

/// Calls `each(band, column, cell)` for every cell of a grid over the row-major `out`: band b has the rows
/// `starts[b]..starts[b + 1]`, and each of the `columns` is `width` numbers wide.
pub(crate) fn fill_grid(
    out: &mut [f32],
    starts: &[usize],
    columns: usize,
    width: usize,
    work: usize,
    each: impl Fn(usize, usize, &mut Cell<'_>) + Sync,
) -> Result<()> {
    assert!(starts.is_sorted(), "bands that overlap");
    let shared = Shared::new(out);
    share(starts.len().saturating_sub(1) * columns, 1, work, |range| {
        for index in range {
            let (band, column) = (index / columns, index % columns);
            let rows = starts[band]..starts[band + 1];
            each(band, column, &mut Cell { shared: &shared, rows, stride: columns * width, column, width });
        }
    })
}

/// The right to write one column of a band of rows.
pub(crate) struct Cell<'a> {
    shared: &'a Shared<'a, f32>,
    rows: Range<usize>,
    stride: usize,
    column: usize,
    width: usize,
}

impl Cell<'_> {
    /// The cell's part of row `row` of its band.
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows.len(), "a row of another band");
        let at = (self.rows.start + row) * self.stride + self.column * self.width;
        // SAFETY: only this value may write to this cell (`share` gives each to one call, and bands do not overlap), and
        // `self` is borrowed mutably.
        unsafe { self.shared.cells(at, self.width) }
    }
}

struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: the only access is `cells`, whose callers above never let two threads hold overlapping cells.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    fn new(numbers: &'a mut [T]) -> Self {
        Shared { start: numbers.as_mut_ptr(), len: numbers.len(), borrow: PhantomData }
    }

    /// # Safety
    /// No other live slice may overlap `at..at + count`.
    #[allow(clippy::mut_from_ref)]
    unsafe fn cells(&self, at: usize, count: usize) -> &mut [T] {
        assert!(at + count <= self.len, "cells outside the matrix");
        // SAFETY: in bounds by the assertion, unaliased by the caller's promise, alive by the borrow.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), count) }
    }
}
