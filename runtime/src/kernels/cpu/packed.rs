//! Weight matrices in the order in which the kernels read them, packed once at load.
//!
//! `[outputs, inputs]` becomes tiles of 16 outputs; a tile is a run of lines (plain numbers) or of cells (blocks, see
//! `tiles`). A line holds two inputs for 16 outputs: bf16 lines interleave the two (one load gives both, by shift and by
//! mask), f32 lines keep them side by side.

use super::{
    blocks::Kind,
    pool::fill_on_threads,
    simd::{LANES, Lanes},
    tiles::{Cell, Q4_0, Q4K, Q5K, Q6K, Q8_0},
};
use candle_core::{Result, bail};
use half::bf16;
use std::ops::Range;

pub(crate) const LINE: usize = 2 * LANES;

/// A number type in which weights are kept.
pub(crate) trait Weight: Copy + Send + Sync {
    const ZERO: Self;
    /// The values of the line's first and second input.
    fn line<L: Lanes>(line: &[Self; LINE]) -> (L, L);
    /// Sixteen values side by side.
    fn lanes<L: Lanes>(from: &[Self; LANES]) -> L;
    /// Where in its line one weight is: `lane` 0..16 of the first (0) or second (1) input.
    fn place(lane: usize, second: usize) -> usize;
    /// The inverse of `place`, as an index into the two inputs laid end to end.
    fn lane_of(place: usize) -> usize;
    fn widen(self) -> f32;
    fn narrow(number: f32) -> Self;
}

impl Weight for bf16 {
    const ZERO: bf16 = bf16::ZERO;
    #[inline(always)]
    fn line<L: Lanes>(line: &[bf16; LINE]) -> (L, L) {
        L::load_bf16_pairs(line)
    }
    #[inline(always)]
    fn lanes<L: Lanes>(from: &[bf16; LANES]) -> L {
        L::load_bf16(from)
    }
    #[inline(always)]
    fn place(lane: usize, second: usize) -> usize {
        2 * lane + second
    }
    #[inline(always)]
    fn lane_of(place: usize) -> usize {
        (place % 2) * LANES + place / 2
    }
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn narrow(number: f32) -> bf16 {
        bf16::from_f32(number)
    }
}

impl Weight for f32 {
    const ZERO: f32 = 0.0;
    #[inline(always)]
    fn line<L: Lanes>(line: &[f32; LINE]) -> (L, L) {
        let halves = line.as_chunks::<LANES>().0;
        (L::load(&halves[0]), L::load(&halves[1]))
    }
    #[inline(always)]
    fn lanes<L: Lanes>(from: &[f32; LANES]) -> L {
        L::load(from)
    }
    #[inline(always)]
    fn place(lane: usize, second: usize) -> usize {
        second * LANES + lane
    }
    #[inline(always)]
    fn lane_of(place: usize) -> usize {
        place
    }
    fn widen(self) -> f32 {
        self
    }
    fn narrow(number: f32) -> f32 {
        number
    }
}

/// A matrix `[rows, columns]` as a checkpoint stores it. Blocks run along the columns.
pub(crate) struct Raw {
    pub kind: Kind,
    pub rows: usize,
    pub columns: usize,
    pub bytes: Vec<u8>,
}

/// Aligned, so that no load touches two cache lines.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line<W>(pub [W; LINE]);

pub(crate) enum Store {
    F32(Vec<Line<f32>>),
    Bf16(Vec<Line<bf16>>),
    Q8_0(Vec<Q8_0>),
    Q4_0(Vec<Q4_0>),
    Q4K(Vec<Q4K>),
    Q5K(Vec<Q5K>),
    Q6K(Vec<Q6K>),
}

/// Outputs next to each other that are stored in one kind.
pub(crate) struct Band {
    pub outputs: Range<usize>,
    pub store: Store,
}

/// What weights in bf16 meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inputs {
    F32,
    /// Rounded, as in the frameworks that such models come from.
    Bf16,
}

/// A packed `[outputs, inputs]` matrix.
pub(crate) struct Packed {
    pub bands: Vec<Band>,
    pub met: Inputs,
    pub outputs: usize,
    pub inputs: usize,
}

impl Packed {
    /// Stacks matrices of the same width on top of each other. Each keeps its kind, but f16 becomes f32.
    pub fn stack(parts: &[Raw], met: Inputs) -> Result<Packed> {
        let inputs = parts.first().map_or(0, |part| part.columns);
        if inputs == 0 || !inputs.is_multiple_of(2) || parts.iter().any(|part| part.columns != inputs) {
            bail!("packed weights need one common, even, positive width");
        }
        let whole = |part: &Raw| part.kind.row_bytes(inputs).map(|row| row * part.rows) == Some(part.bytes.len());
        if !parts.iter().all(whole) {
            bail!("packed weights need whole rows of whole blocks");
        }
        let mut outputs = 0;
        let bands = parts.chunk_by(|a, b| kept(a.kind) == kept(b.kind)).map(|parts| {
            let first = outputs;
            outputs += parts.iter().map(|part| part.rows).sum::<usize>();
            Band { outputs: first..outputs, store: Store::pack(parts, inputs) }
        });
        Ok(Packed { bands: bands.collect(), met, outputs, inputs })
    }

    /// Bytes that [`Packed::stack`] will take for parts of these kinds and heights.
    pub fn stacked_bytes(parts: &[(Kind, usize)], inputs: usize) -> usize {
        let bands = parts.chunk_by(|a, b| kept(a.0) == kept(b.0));
        let band = |parts: &[(Kind, usize)]| {
            let outputs: usize = parts.iter().map(|part| part.1).sum();
            outputs.div_ceil(LANES) * parts.first().map_or(0, |part| tile_bytes(part.0, inputs))
        };
        bands.map(band).sum()
    }

    /// In memory.
    #[cfg(test)]
    pub fn bytes(&self) -> usize {
        self.bands.iter().map(Band::bytes).sum()
    }

    /// Writes the weights of one output into `row`; leaves it as it is if there is no such output.
    pub fn row(&self, output: usize, row: &mut [f32]) {
        if let Some(band) = self.bands.iter().find(|band| band.outputs.contains(&output)) {
            band.row(output - band.outputs.start, row, self.inputs);
        }
    }

    /// The matrix as it was, `[outputs, inputs]` in f32.
    #[cfg(test)]
    pub(crate) fn unpacked(&self) -> Result<candle_core::Tensor> {
        let mut numbers = vec![0f32; self.outputs * self.inputs];
        numbers.chunks_exact_mut(self.inputs).enumerate().for_each(|(output, row)| self.row(output, row));
        candle_core::Tensor::from_vec(numbers, (self.outputs, self.inputs), &candle_core::Device::Cpu)
    }
}

fn kept(kind: Kind) -> Kind {
    if kind == Kind::F16 { Kind::F32 } else { kind }
}

/// Bytes of 16 outputs.
fn tile_bytes(kind: Kind, inputs: usize) -> usize {
    fn cells<C: Cell>(inputs: usize) -> usize {
        inputs.div_ceil(C::INPUTS) * size_of::<C>()
    }
    match kind {
        Kind::F32 | Kind::F16 => inputs / 2 * size_of::<Line<f32>>(),
        Kind::Bf16 => inputs / 2 * size_of::<Line<bf16>>(),
        Kind::Q8_0 => cells::<Q8_0>(inputs),
        Kind::Q4_0 => cells::<Q4_0>(inputs),
        Kind::Q4K => cells::<Q4K>(inputs),
        Kind::Q5K => cells::<Q5K>(inputs),
        Kind::Q6K => cells::<Q6K>(inputs),
    }
}

impl Band {
    pub fn kind(&self) -> Kind {
        match self.store {
            Store::F32(_) => Kind::F32,
            Store::Bf16(_) => Kind::Bf16,
            Store::Q8_0(_) => Kind::Q8_0,
            Store::Q4_0(_) => Kind::Q4_0,
            Store::Q4K(_) => Kind::Q4K,
            Store::Q5K(_) => Kind::Q5K,
            Store::Q6K(_) => Kind::Q6K,
        }
    }

    pub fn bytes(&self) -> usize {
        match &self.store {
            Store::F32(lines) => size_of_val(lines.as_slice()),
            Store::Bf16(lines) => size_of_val(lines.as_slice()),
            Store::Q8_0(cells) => size_of_val(cells.as_slice()),
            Store::Q4_0(cells) => size_of_val(cells.as_slice()),
            Store::Q4K(cells) => size_of_val(cells.as_slice()),
            Store::Q5K(cells) => size_of_val(cells.as_slice()),
            Store::Q6K(cells) => size_of_val(cells.as_slice()),
        }
    }

    fn row(&self, output: usize, row: &mut [f32], inputs: usize) {
        fn plain<W: Weight>(lines: &[Line<W>], output: usize, row: &mut [f32], inputs: usize) {
            let lines = &lines[output / LANES * (inputs / 2)..];
            for (input, number) in row.iter_mut().enumerate() {
                *number = lines[input / 2].0[W::place(output % LANES, input % 2)].widen();
            }
        }
        fn blocks<C: Cell>(cells: &[C], output: usize, row: &mut [f32]) {
            let length = row.len().div_ceil(C::INPUTS);
            for (cell, numbers) in cells[output / LANES * length..].iter().zip(row.chunks_mut(C::INPUTS)) {
                cell.numbers(output % LANES, numbers);
            }
        }
        match &self.store {
            Store::F32(lines) => plain(lines, output, row, inputs),
            Store::Bf16(lines) => plain(lines, output, row, inputs),
            Store::Q8_0(cells) => blocks(cells, output, row),
            Store::Q4_0(cells) => blocks(cells, output, row),
            Store::Q4K(cells) => blocks(cells, output, row),
            Store::Q5K(cells) => blocks(cells, output, row),
            Store::Q6K(cells) => blocks(cells, output, row),
        }
    }
}

impl Store {
    /// Whole rows of one kept kind.
    fn pack(parts: &[Raw], inputs: usize) -> Store {
        let rows = |part: &'_ Raw| part.kind.row_bytes(inputs).unwrap_or(usize::MAX);
        let rows: Vec<_> = parts.iter().flat_map(|p| p.bytes.chunks_exact(rows(p)).map(|row| (p.kind, row))).collect();
        match parts.first().map_or(Kind::F32, |part| kept(part.kind)) {
            Kind::F32 | Kind::F16 => Store::F32(pack_lines(&rows, inputs)),
            Kind::Bf16 => Store::Bf16(pack_lines(&rows, inputs)),
            Kind::Q8_0 => Store::Q8_0(pack_cells(&rows, inputs)),
            Kind::Q4_0 => Store::Q4_0(pack_cells(&rows, inputs)),
            Kind::Q4K => Store::Q4K(pack_cells(&rows, inputs)),
            Kind::Q5K => Store::Q5K(pack_cells(&rows, inputs)),
            Kind::Q6K => Store::Q6K(pack_cells(&rows, inputs)),
        }
    }
}

// Lanes beyond the last output and inputs beyond the last one stay zero; what these lanes compute is dropped.

fn pack_lines<W: Weight>(rows: &[(Kind, &[u8])], inputs: usize) -> Vec<Line<W>> {
    let length = inputs / 2;
    let mut lines = vec![Line([W::ZERO; LINE]); rows.len().div_ceil(LANES) * length];
    fill_on_threads(&mut lines, length, |tile, lines| {
        let mut numbers = vec![0f32; inputs];
        for (lane, (kind, row)) in rows[tile * LANES..].iter().take(LANES).enumerate() {
            kind.widen(row, &mut numbers);
            for (input, &number) in numbers.iter().enumerate() {
                lines[input / 2].0[W::place(lane, input % 2)] = W::narrow(number);
            }
        }
    });
    lines
}

fn pack_cells<C: Cell>(rows: &[(Kind, &[u8])], inputs: usize) -> Vec<C> {
    let length = inputs.div_ceil(C::INPUTS);
    let blocks = C::INPUTS / C::KIND.block_len();
    let mut cells = vec![C::EMPTY; rows.len().div_ceil(LANES) * length];
    fill_on_threads(&mut cells, length, |tile, cells| {
        for (lane, (_, row)) in rows[tile * LANES..].iter().take(LANES).enumerate() {
            for (at, block) in row.chunks_exact(C::KIND.block_bytes()).enumerate() {
                cells[at / blocks].put(lane, at % blocks, block);
            }
        }
    });
    cells
}
