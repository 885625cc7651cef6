//! Quantised weights in the order in which the kernels read them: a cell holds a few blocks of 16 outputs side by side.
//!
//! A line is four inputs of each of the 16 outputs, 64 unsigned quants: what one integer dot instruction takes. Quants
//! that a checkpoint keeps signed are stored plus a bias, which the kernels take off again through the sum of the inputs.
//! All block types keep their exact meaning; Q5_K takes a whole byte a quant.

use super::{
    blocks::{Kind, half_at, quants_of, scale_and_minimum},
    dots::Dots,
    simd::LANES,
};

/// Quants of a cell.
pub(crate) trait Quants: Copy + Send + Sync {
    const EMPTY: Self;
    fn line<D: Dots>(&self, line: usize) -> D::Line;
    fn get(&self, lane: usize, input: usize) -> u8;
    fn put(&mut self, lane: usize, input: usize, quant: u8);
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Bytes<const LINES: usize>([[u8; 4 * LANES]; LINES]);

impl<const LINES: usize> Quants for Bytes<LINES> {
    const EMPTY: Self = Bytes([[0; 4 * LANES]; LINES]);
    #[inline(always)]
    fn line<D: Dots>(&self, line: usize) -> D::Line {
        D::load(&self.0[line])
    }
    fn get(&self, lane: usize, input: usize) -> u8 {
        self.0[input / 4][4 * lane + input % 4]
    }
    fn put(&mut self, lane: usize, input: usize, quant: u8) {
        self.0[input / 4][4 * lane + input % 4] = quant;
    }
}

/// Even lines in the low halves of the bytes, odd ones in the high halves.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Nibbles<const PAIRS: usize>([[u8; 4 * LANES]; PAIRS]);

impl<const PAIRS: usize> Quants for Nibbles<PAIRS> {
    const EMPTY: Self = Nibbles([[0; 4 * LANES]; PAIRS]);
    #[inline(always)]
    fn line<D: Dots>(&self, line: usize) -> D::Line {
        let pair = D::load(&self.0[line / 2]);
        if line.is_multiple_of(2) { D::low_nibbles(pair) } else { D::high_nibbles(pair) }
    }
    fn get(&self, lane: usize, input: usize) -> u8 {
        (self.0[input / 8][4 * lane + input % 4] >> (input / 4 % 2 * 4)) & 15
    }
    fn put(&mut self, lane: usize, input: usize, quant: u8) {
        self.0[input / 8][4 * lane + input % 4] |= quant << (input / 4 % 2 * 4);
    }
}

/// Four lines in three: low halves as in `Nibbles`, then two more bits of each quant, those of the first line lowest.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Sixes<const FOURS: usize>([(Nibbles<2>, [u8; 4 * LANES]); FOURS]);

impl<const FOURS: usize> Quants for Sixes<FOURS> {
    const EMPTY: Self = Sixes([(Nibbles::EMPTY, [0; 4 * LANES]); FOURS]);
    #[inline(always)]
    fn line<D: Dots>(&self, line: usize) -> D::Line {
        let (low, high) = &self.0[line / 4];
        D::with_high_bits(low.line::<D>(line % 4), D::load(high), line % 4)
    }
    fn get(&self, lane: usize, input: usize) -> u8 {
        let (low, high) = &self.0[input / 16];
        low.get(lane, input % 16) | (high[4 * lane + input % 4] >> (2 * (input / 4 % 4)) & 3) << 4
    }
    fn put(&mut self, lane: usize, input: usize, quant: u8) {
        let (low, high) = &mut self.0[input / 16];
        low.put(lane, input % 16, quant & 15);
        high[4 * lane + input % 4] |= quant >> 4 << (2 * (input / 4 % 4));
    }
}

/// A few blocks of 16 outputs.
pub(crate) trait Cell: Copy + Send + Sync {
    const KIND: Kind;
    const INPUTS: usize;
    const EMPTY: Self;
    /// Stores one output's block, `at` blocks into the cell.
    fn put(&mut self, lane: usize, at: usize, block: &[u8]);
    /// The numbers of one output.
    fn numbers(&self, lane: usize, out: &mut [f32]);
}

/// Two blocks of 32 inputs with one scale each: Q8_0 (bias 128) and Q4_0 (bias 8).
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Small<Q, const BIAS: i32> {
    pub scales: [[u8; 2 * LANES]; 2],
    pub quants: Q,
}

pub(crate) type Q8_0 = Small<Bytes<16>, 128>;
pub(crate) type Q4_0 = Small<Nibbles<8>, 8>;

impl<Q: Quants, const BIAS: i32> Cell for Small<Q, BIAS> {
    const KIND: Kind = if BIAS == 128 { Kind::Q8_0 } else { Kind::Q4_0 };
    const INPUTS: usize = 64;
    const EMPTY: Self = Small { scales: [[0; 2 * LANES]; 2], quants: Q::EMPTY };

    fn put(&mut self, lane: usize, at: usize, block: &[u8]) {
        self.scales[at][2 * lane..][..2].copy_from_slice(&block[..2]);
        for i in 0..32 {
            let quant = match Self::KIND {
                Kind::Q8_0 => block[2 + i] ^ 0x80,
                _ => block[2 + i % 16] >> (i / 16 * 4) & 15,
            };
            self.quants.put(lane, 32 * at + i, quant);
        }
    }

    fn numbers(&self, lane: usize, out: &mut [f32]) {
        for (i, number) in out.iter_mut().enumerate() {
            let d = half_at(&self.scales[i / 32], 2 * lane);
            *number = d * (i32::from(self.quants.get(lane, i)) - BIAS) as f32;
        }
    }
}

/// One block of 256 inputs with whole scales within it.
pub(crate) trait Large: Cell {
    /// Inputs that share a scale.
    const PART: usize;
    const BIAS: i32;
    fn line<D: Dots>(&self, line: usize) -> D::Line;
    fn scale<D: Dots>(&self, part: usize) -> D;
    fn d(&self) -> &[u8; 2 * LANES];
    /// m, and the minima of each two parts side by side.
    fn minima(&self) -> Option<(&[u8; 2 * LANES], &[[u8; 2 * LANES]; 4])>;
}

/// Eight parts with scale and minimum: Q4_K and Q5_K.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Affine<Q> {
    d: [u8; 2 * LANES],
    m: [u8; 2 * LANES],
    scales: [[u8; LANES]; 8],
    minima: [[u8; 2 * LANES]; 4],
    quants: Q,
}

pub(crate) type Q4K = Affine<Nibbles<32>>;
pub(crate) type Q5K = Affine<Bytes<64>>;

impl<Q: Quants> Cell for Affine<Q> {
    const KIND: Kind = if size_of::<Q>() == size_of::<Nibbles<32>>() { Kind::Q4K } else { Kind::Q5K };
    const INPUTS: usize = 256;
    const EMPTY: Self = Affine {
        d: [0; 2 * LANES],
        m: [0; 2 * LANES],
        scales: [[0; LANES]; 8],
        minima: [[0; 2 * LANES]; 4],
        quants: Q::EMPTY,
    };

    fn put(&mut self, lane: usize, _: usize, block: &[u8]) {
        self.d[2 * lane..][..2].copy_from_slice(&block[..2]);
        self.m[2 * lane..][..2].copy_from_slice(&block[2..4]);
        for part in 0..8 {
            let (scale, minimum) = scale_and_minimum(&block[4..16], part);
            self.scales[part][lane] = scale;
            self.minima[part / 2][2 * lane + part % 2] = minimum;
        }
        let quants = quants_of(Self::KIND, block);
        quants.into_iter().enumerate().for_each(|(i, quant)| self.quants.put(lane, i, quant));
    }

    fn numbers(&self, lane: usize, out: &mut [f32]) {
        let (d, m) = (half_at(&self.d, 2 * lane), half_at(&self.m, 2 * lane));
        for (i, number) in out.iter_mut().enumerate() {
            let scale = d * f32::from(self.scales[i / 32][lane]);
            let minimum = m * f32::from(self.minima[i / 64][2 * lane + i / 32 % 2]);
            *number = scale * f32::from(self.quants.get(lane, i)) - minimum;
        }
    }
}

impl<Q: Quants> Large for Affine<Q> {
    const PART: usize = 32;
    const BIAS: i32 = 0;
    #[inline(always)]
    fn line<D: Dots>(&self, line: usize) -> D::Line {
        self.quants.line::<D>(line)
    }
    #[inline(always)]
    fn scale<D: Dots>(&self, part: usize) -> D {
        D::unsigned(&self.scales[part])
    }
    #[inline(always)]
    fn d(&self) -> &[u8; 2 * LANES] {
        &self.d
    }
    #[inline(always)]
    fn minima(&self) -> Option<(&[u8; 2 * LANES], &[[u8; 2 * LANES]; 4])> {
        Some((&self.m, &self.minima))
    }
}

/// Sixteen parts with a signed scale: Q6_K.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Q6K {
    d: [u8; 2 * LANES],
    scales: [[u8; LANES]; 16],
    quants: Sixes<16>,
}

impl Cell for Q6K {
    const KIND: Kind = Kind::Q6K;
    const INPUTS: usize = 256;
    const EMPTY: Self = Q6K { d: [0; 2 * LANES], scales: [[0; LANES]; 16], quants: Sixes::EMPTY };

    fn put(&mut self, lane: usize, _: usize, block: &[u8]) {
        self.d[2 * lane..][..2].copy_from_slice(&block[208..]);
        (0..16).for_each(|part| self.scales[part][lane] = block[192 + part]);
        let quants = quants_of(Kind::Q6K, block);
        quants.into_iter().enumerate().for_each(|(i, quant)| self.quants.put(lane, i, quant));
    }

    fn numbers(&self, lane: usize, out: &mut [f32]) {
        let d = half_at(&self.d, 2 * lane);
        for (i, number) in out.iter_mut().enumerate() {
            let scale = d * f32::from(self.scales[i / 16][lane] as i8);
            *number = scale * (f32::from(self.quants.get(lane, i)) - 32.0);
        }
    }
}

impl Large for Q6K {
    const PART: usize = 16;
    const BIAS: i32 = 32;
    #[inline(always)]
    fn line<D: Dots>(&self, line: usize) -> D::Line {
        self.quants.line::<D>(line)
    }
    #[inline(always)]
    fn scale<D: Dots>(&self, part: usize) -> D {
        D::signed(&self.scales[part])
    }
    #[inline(always)]
    fn d(&self) -> &[u8; 2 * LANES] {
        &self.d
    }
    #[inline(always)]
    fn minima(&self) -> Option<(&[u8; 2 * LANES], &[[u8; 2 * LANES]; 4])> {
        None
    }
}
