//! Weight matrices in the order in which the kernels read them, packed once at load.
//!
//! `[outputs, inputs]` becomes tiles of 16 outputs; a tile is a run of lines, a line holds two inputs for 16 outputs.
//! bf16 lines interleave the two (one load gives both, by shift and by mask), f32 lines keep them side by side.

use super::{
    blocks::Kind,
    simd::{LANES, Lanes},
};
use candle_core::{Device, Result, Tensor, bail};
use half::bf16;

pub(crate) const LINE: usize = 2 * LANES;

/// A number type in which weights are kept.
pub(crate) trait Weight: Copy + Send + Sync {
    /// The values of the line's first and second input.
    fn line<L: Lanes>(line: &[Self; LINE]) -> (L, L);
    /// Sixteen values side by side.
    fn lanes<L: Lanes>(from: &[Self; LANES]) -> L;
    /// Where in its line one weight is: `lane` 0..16 of the first (0) or second (1) input.
    fn place(lane: usize, second: usize) -> usize;
    /// The inverse of `place`, as an index into the two inputs laid end to end.
    fn lane_of(place: usize) -> usize;
    fn widen(self) -> f32;
}

impl Weight for bf16 {
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
}

impl Weight for f32 {
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
}

/// A matrix `[rows, columns]` as a checkpoint stores it.
pub(crate) struct Raw {
    pub kind: Kind,
    pub rows: usize,
    pub columns: usize,
    pub bytes: Vec<u8>,
}

/// A packed `[outputs, inputs]` matrix. The tensor is `[tiles, inputs / 2, LINE]`, bf16 or f32.
pub(crate) struct Packed {
    pub data: Tensor,
    pub outputs: usize,
    pub inputs: usize,
}

impl Packed {
    /// Stacks matrices of the same width on top of each other. All bf16 stays bf16; any other mix becomes f32.
    pub fn stack(parts: &[Raw]) -> Result<Packed> {
        let inputs = parts.first().map_or(0, |part| part.columns);
        if inputs == 0 || !inputs.is_multiple_of(2) || parts.iter().any(|part| part.columns != inputs) {
            bail!("packed weights need one common, even, positive width");
        }
        let whole = |part: &Raw| part.kind.row_bytes(inputs).map(|row| row * part.rows) == Some(part.bytes.len());
        if !parts.iter().all(whole) {
            bail!("packed weights need whole rows of whole blocks");
        }
        let outputs = parts.iter().map(|part| part.rows).sum();
        let shape = (usize::div_ceil(outputs, LANES), inputs / 2, LINE);
        let data = if parts.iter().all(|part| part.kind == Kind::Bf16) {
            Tensor::from_vec(place(parts, outputs, inputs, bf16::from_f32), shape, &Device::Cpu)?
        } else {
            Tensor::from_vec(place(parts, outputs, inputs, |number| number), shape, &Device::Cpu)?
        };
        Ok(Packed { data, outputs, inputs })
    }

    pub fn bytes(&self) -> usize {
        self.data.elem_count() * self.data.dtype().size_in_bytes()
    }

    /// The matrix as it was, `[outputs, inputs]` in f32.
    #[cfg(test)]
    pub(crate) fn unpacked(&self) -> Result<Tensor> {
        fn collect<W: Weight>(data: &[W], outputs: usize, inputs: usize) -> Vec<f32> {
            (0..outputs * inputs).map(|i| data[index::<W>(i / inputs, i % inputs, inputs)].widen()).collect()
        }
        let flat = self.data.flatten_all()?;
        let numbers = match self.data.dtype() {
            candle_core::DType::BF16 => collect(&flat.to_vec1::<bf16>()?, self.outputs, self.inputs),
            _ => collect(&flat.to_vec1::<f32>()?, self.outputs, self.inputs),
        };
        Tensor::from_vec(numbers, (self.outputs, self.inputs), &Device::Cpu)
    }
}

/// Where weight (output, input) is in the packed data.
#[inline(always)]
pub(crate) fn index<W: Weight>(output: usize, input: usize, inputs: usize) -> usize {
    let line = (output / LANES) * (inputs / 2) + input / 2;
    line * LINE + W::place(output % LANES, input % 2)
}

fn place<W: Weight + Default>(parts: &[Raw], outputs: usize, inputs: usize, narrow: impl Fn(f32) -> W) -> Vec<W> {
    // Lanes beyond the last output stay zero; what they compute is dropped.
    let mut packed = vec![W::default(); outputs.div_ceil(LANES) * LANES * inputs];
    let mut numbers = vec![0f32; inputs];
    let mut output = 0;
    for part in parts {
        for row in part.bytes.chunks_exact(part.kind.row_bytes(inputs).unwrap_or(usize::MAX)) {
            part.kind.widen(row, &mut numbers);
            for (input, &number) in numbers.iter().enumerate() {
                packed[index::<W>(output, input, inputs)] = narrow(number);
            }
            output += 1;
        }
    }
    packed
}
