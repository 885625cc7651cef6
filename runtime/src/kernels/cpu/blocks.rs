//! How a checkpoint stores numbers, byte by byte, and what they mean: the reference for everything that is packed.
//!
//! Block types are those of GGUF: a run of numbers along the columns shares its scales. `d` and `m` are f16, everything
//! is little endian. Formulas: ggml's block structs; results equal the Python package `gguf` bit for bit.

use half::{bf16, f16};

/// How a checkpoint stores its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    F32,
    F16,
    Bf16,
    /// 32 numbers: d, 32 × i8. `d · q`
    Q8_0,
    /// 32 numbers: d, 32 × u4. `d · (q − 8)`
    Q4_0,
    /// 256 numbers: d, m, eight 6-bit scales and minima, 256 × u4. `d · scale · q − m · minimum`, for each 32
    Q4K,
    /// 256 numbers: d, m, eight 6-bit scales and minima, 256 fifth bits, 256 × u4. As Q4K.
    Q5K,
    /// 256 numbers: 256 × u4, 256 × upper u2, sixteen i8 scales, d. `d · scale · (q − 32)`, for each 16
    Q6K,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::F32 => "f32",
            Kind::F16 => "f16",
            Kind::Bf16 => "bf16",
            Kind::Q8_0 => "q8_0",
            Kind::Q4_0 => "q4_0",
            Kind::Q4K => "q4_k",
            Kind::Q5K => "q5_k",
            Kind::Q6K => "q6_k",
        }
    }

    /// Numbers in a block; 1 for plain numbers. Rows are whole blocks.
    pub fn block_len(self) -> usize {
        match self {
            Kind::F32 | Kind::F16 | Kind::Bf16 => 1,
            Kind::Q8_0 | Kind::Q4_0 => 32,
            Kind::Q4K | Kind::Q5K | Kind::Q6K => 256,
        }
    }

    pub fn block_bytes(self) -> usize {
        match self {
            Kind::F32 => 4,
            Kind::F16 | Kind::Bf16 => 2,
            Kind::Q8_0 => 34,
            Kind::Q4_0 => 18,
            Kind::Q4K => 144,
            Kind::Q5K => 176,
            Kind::Q6K => 210,
        }
    }

    /// Bytes of a row of `columns` numbers; None if they are no whole blocks.
    pub fn row_bytes(self, columns: usize) -> Option<usize> {
        columns.is_multiple_of(self.block_len()).then(|| columns / self.block_len() * self.block_bytes())
    }

    /// Writes what whole blocks of `bytes` mean into `numbers`, in f32.
    pub fn widen(self, bytes: &[u8], numbers: &mut [f32]) {
        let blocks = bytes.chunks_exact(self.block_bytes()).zip(numbers.chunks_exact_mut(self.block_len()));
        for (block, out) in blocks {
            match self {
                Kind::F32 => out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
                Kind::F16 => out[0] = half_at(block, 0),
                Kind::Bf16 => out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
                Kind::Q8_0 => {
                    let d = half_at(block, 0);
                    out.iter_mut().zip(&block[2..]).for_each(|(x, &q)| *x = d * f32::from(q as i8));
                }
                Kind::Q4_0 => {
                    let d = half_at(block, 0);
                    for (i, &pair) in block[2..].iter().enumerate() {
                        out[i] = d * (f32::from(pair & 15) - 8.0);
                        out[i + 16] = d * (f32::from(pair >> 4) - 8.0);
                    }
                }
                Kind::Q4K | Kind::Q5K => {
                    let (d, m) = (half_at(block, 0), half_at(block, 2));
                    let quants = quants_of(self, block);
                    for (part, out) in out.chunks_exact_mut(32).enumerate() {
                        let (scale, minimum) = scale_and_minimum(&block[4..16], part);
                        let (scale, minimum) = (d * f32::from(scale), m * f32::from(minimum));
                        out.iter_mut()
                            .zip(&quants[part * 32..])
                            .for_each(|(x, &q)| *x = scale * f32::from(q) - minimum);
                    }
                }
                Kind::Q6K => {
                    let d = half_at(block, 208);
                    let quants = quants_of(self, block);
                    for (part, out) in out.chunks_exact_mut(16).enumerate() {
                        let scale = d * f32::from(block[192 + part] as i8);
                        out.iter_mut().zip(&quants[part * 16..]).for_each(|(x, &q)| *x = scale * (f32::from(q) - 32.0));
                    }
                }
            }
        }
    }

    /// Whether every number in `bytes` is finite: for blocks, whether their scales are.
    pub fn all_finite(self, bytes: &[u8]) -> bool {
        bytes.chunks_exact(self.block_bytes()).all(|block| match self {
            Kind::F32 => f32::from_le_bytes([block[0], block[1], block[2], block[3]]).is_finite(),
            Kind::Bf16 => bf16::from_le_bytes([block[0], block[1]]).is_finite(),
            Kind::F16 | Kind::Q8_0 | Kind::Q4_0 => half_at(block, 0).is_finite(),
            Kind::Q4K | Kind::Q5K => half_at(block, 0).is_finite() && half_at(block, 2).is_finite(),
            Kind::Q6K => half_at(block, 208).is_finite(),
        })
    }
}

pub(crate) fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The 256 unsigned quants of a K block in the order of their columns.
pub(crate) fn quants_of(kind: Kind, block: &[u8]) -> [u8; 256] {
    std::array::from_fn(|i| match kind {
        // 32 bytes hold 64 columns: low halves first.
        Kind::Q5K => {
            let high = (block[16 + i % 32] >> (i / 32)) & 1;
            nibble(block[48 + i / 64 * 32 + i % 32], i / 32) | (high << 4)
        }
        // 64 bytes hold 128 columns: low halves first; 32 bytes hold their upper two bits.
        Kind::Q6K => {
            let high = (block[128 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3;
            nibble(block[i / 128 * 64 + i % 64], i / 64) | (high << 4)
        }
        _ => nibble(block[16 + i / 64 * 32 + i % 32], i / 32),
    })
}

fn nibble(byte: u8, which: usize) -> u8 {
    if which.is_multiple_of(2) { byte & 15 } else { byte >> 4 }
}

/// Scale and minimum (6 bits each) of one of the eight parts, from the 12 bytes that hold all of them: the first four
/// take the low bits of bytes 0..4 and 4..8; the others four bits of 8..12 and the two that are left of the first eight.
pub(crate) fn scale_and_minimum(packed: &[u8], part: usize) -> (u8, u8) {
    if part < 4 {
        (packed[part] & 63, packed[part + 4] & 63)
    } else {
        let (low, scale, minimum) = (packed[part + 4], packed[part - 4], packed[part]);
        ((low & 15) | (scale >> 6 << 4), (low >> 4) | (minimum >> 6 << 4))
    }
}

#[cfg(test)]
mod tests {
    use super::Kind;

    /// `tests/golden/blocks.py` writes the fixture: two blocks of random bits and what `gguf` makes of them.
    #[test]
    fn blocks_mean_what_gguf_says_bit_for_bit() {
        let fixture: &[u8] = include_bytes!("../../../tests/golden/blocks.bin");
        let mut rest = fixture;
        for kind in [Kind::Q8_0, Kind::Q4_0, Kind::Q4K, Kind::Q5K, Kind::Q6K] {
            let (bytes, after) = rest.split_at(2 * kind.block_bytes());
            let (want, after) = after.split_at(2 * kind.block_len() * 4);
            rest = after;
            let mut got = vec![0f32; 2 * kind.block_len()];
            kind.widen(bytes, &mut got);
            for (at, (got, want)) in got.iter().zip(want.as_chunks().0).enumerate() {
                assert_eq!(got.to_bits(), u32::from_le_bytes(*want), "{kind:?}, number {at}");
            }
            assert!(kind.all_finite(bytes));
        }
        assert!(rest.is_empty());
    }

    #[test]
    fn a_scale_that_is_not_finite_is_seen() {
        for (kind, places) in [
            (Kind::Q8_0, &[1][..]),
            (Kind::Q4_0, &[1]),
            (Kind::Q4K, &[1, 3]),
            (Kind::Q5K, &[1, 3]),
            (Kind::Q6K, &[209]),
        ] {
            for &place in places {
                let mut block = vec![0; kind.block_bytes()];
                block[place] = 0x7C;
                assert!(!kind.all_finite(&block), "{kind:?}");
            }
        }
    }
}
