//! Sixteen sums of small integers under one name for AVX512-VNNI, AVX-VNNI, AVX2 and plain Rust.
//!
//! Integer sums are exact and the few f32 operations are fused the same way everywhere, so that all instruction sets
//! give identical bits.

#![allow(unsafe_code)] // Intrinsics that read or write through pointers, and the calls into `target_feature` code.

use super::simd::LANES;
use half::f16;
use std::sync::LazyLock;

/// Sixteen i32 lanes.
pub(crate) trait Dots: Copy {
    /// Whether there are 32 registers of sixteen lanes; otherwise 16 of eight.
    const WIDE: bool;
    /// 64 bytes, four for each lane.
    type Line: Copy;
    /// Sixteen f32 lanes.
    type Floats: Copy;
    fn splat(value: i32) -> Self;
    fn load(from: &[u8; 4 * LANES]) -> Self::Line;
    fn low_nibbles(line: Self::Line) -> Self::Line;
    fn high_nibbles(line: Self::Line) -> Self::Line;
    /// Bytes of `low`, all below 16, plus 16 times the `place`-th two bits of each byte of `high`.
    fn with_high_bits(low: Self::Line, high: Self::Line, place: usize) -> Self::Line;
    /// In each lane, `self` plus the products of four unsigned quants and the four signed inputs.
    fn dot(self, line: Self::Line, x: [i8; 4]) -> Self;
    /// In each lane, `self` plus the products of two unsigned bytes and the two inputs.
    fn dot_pairs(self, pairs: &[u8; 2 * LANES], x: [i16; 2]) -> Self;
    fn unsigned(from: &[u8; LANES]) -> Self;
    fn signed(from: &[u8; LANES]) -> Self;
    /// `self + a · b`
    fn add_product(self, a: Self, b: Self) -> Self;
    fn zeros() -> Self::Floats;
    /// Sixteen f16.
    fn halves(from: &[u8; 2 * LANES]) -> Self::Floats;
    /// `sum + self · (scales · x)`, rounded after the product of the scales and once at the end.
    fn scaled_onto(self, sum: Self::Floats, scales: Self::Floats, x: f32) -> Self::Floats;
    fn store(floats: Self::Floats, to: &mut [f32; LANES]);
}

/// A kernel's body. `run` must be `#[inline(always)]`, or it is compiled without the instruction set it is meant for.
pub(crate) trait DotJob {
    fn run<D: Dots>(self);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

/// What this machine has, the best first.
static PATHS: LazyLock<Vec<Path>> = LazyLock::new(|| {
    let mut paths = Vec::new();
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni")
        {
            paths.push(Path::Avx512Vnni);
        }
        if is_x86_feature_detected!("avxvnni") {
            paths.push(Path::AvxVnni);
        }
        paths.push(Path::Avx2);
    }
    paths.push(Path::Portable);
    paths
});

pub(crate) fn run(job: impl DotJob) {
    run_on(PATHS[0], job);
}

fn run_on(path: Path, job: impl DotJob) {
    match path {
        // SAFETY: paths are only made in `PATHS`, where the features of each were detected.
        #[cfg(target_arch = "x86_64")]
        Path::Avx512Vnni => unsafe { run_avx512_vnni(job) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Path::AvxVnni => unsafe { run_avx_vnni(job) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Path::Avx2 => unsafe { run_avx2(job) },
        Path::Portable => job.run::<Portable>(),
    }
}

/// Every instruction set that this machine has.
#[cfg(test)]
pub(crate) fn paths() -> &'static [Path] {
    &PATHS
}

#[cfg(test)]
pub(crate) fn run_exactly_on(path: Path, job: impl DotJob) {
    run_on(path, job);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
fn run_avx512_vnni<J: DotJob>(job: J) {
    job.run::<x86::Avx512Vnni>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avxvnni,avx2,fma,f16c")]
fn run_avx_vnni<J: DotJob>(job: J) {
    job.run::<x86::Avx2<true>>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2<J: DotJob>(job: J) {
    job.run::<x86::Avx2<false>>();
}

/// Asks for the cache line at an address, which need not be anybody's.
#[inline(always)]
pub(crate) fn prefetch<T>(at: *const T) {
    // SAFETY: SSE is part of x86-64, and asking for memory that is not there does nothing.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

#[derive(Clone, Copy)]
struct Portable([i32; LANES]);

impl Dots for Portable {
    const WIDE: bool = false;
    type Line = [u8; 4 * LANES];
    type Floats = [f32; LANES];
    #[inline(always)]
    fn splat(value: i32) -> Self {
        Portable([value; LANES])
    }
    #[inline(always)]
    fn load(from: &[u8; 4 * LANES]) -> Self::Line {
        *from
    }
    #[inline(always)]
    fn low_nibbles(line: Self::Line) -> Self::Line {
        line.map(|byte| byte & 15)
    }
    #[inline(always)]
    fn high_nibbles(line: Self::Line) -> Self::Line {
        line.map(|byte| byte >> 4)
    }
    #[inline(always)]
    fn with_high_bits(low: Self::Line, high: Self::Line, place: usize) -> Self::Line {
        std::array::from_fn(|i| low[i] | (high[i] >> (2 * place) & 3) << 4)
    }
    #[inline(always)]
    fn dot(self, line: Self::Line, x: [i8; 4]) -> Self {
        let product = |i: usize, k: usize| i32::from(line[4 * i + k]) * i32::from(x[k]);
        Portable(std::array::from_fn(|i| self.0[i] + (0..4).map(|k| product(i, k)).sum::<i32>()))
    }
    #[inline(always)]
    fn dot_pairs(self, pairs: &[u8; 2 * LANES], x: [i16; 2]) -> Self {
        let product = |i: usize, k: usize| i32::from(pairs[2 * i + k]) * i32::from(x[k]);
        Portable(std::array::from_fn(|i| self.0[i] + product(i, 0) + product(i, 1)))
    }
    #[inline(always)]
    fn unsigned(from: &[u8; LANES]) -> Self {
        Portable(from.map(i32::from))
    }
    #[inline(always)]
    fn signed(from: &[u8; LANES]) -> Self {
        Portable(from.map(|byte| i32::from(byte as i8)))
    }
    #[inline(always)]
    fn add_product(self, a: Self, b: Self) -> Self {
        Portable(std::array::from_fn(|i| self.0[i] + a.0[i] * b.0[i]))
    }
    #[inline(always)]
    fn zeros() -> Self::Floats {
        [0.0; LANES]
    }
    #[inline(always)]
    fn halves(from: &[u8; 2 * LANES]) -> Self::Floats {
        std::array::from_fn(|i| f16::from_le_bytes([from[2 * i], from[2 * i + 1]]).to_f32())
    }
    #[inline(always)]
    fn scaled_onto(self, sum: Self::Floats, scales: Self::Floats, x: f32) -> Self::Floats {
        std::array::from_fn(|i| (self.0[i] as f32).mul_add(scales[i] * x, sum[i]))
    }
    #[inline(always)]
    fn store(floats: Self::Floats, to: &mut [f32; LANES]) {
        *to = floats;
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Dots, LANES};
    use std::arch::x86_64::*;

    #[derive(Clone, Copy)]
    pub(super) struct Avx512Vnni(__m512i);

    impl Dots for Avx512Vnni {
        const WIDE: bool = true;
        type Line = __m512i;
        type Floats = __m512;
        #[inline(always)]
        fn splat(value: i32) -> Self {
            unsafe { Avx512Vnni(_mm512_set1_epi32(value)) }
        }
        #[inline(always)]
        fn load(from: &[u8; 4 * LANES]) -> __m512i {
            unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
        }
        #[inline(always)]
        fn low_nibbles(line: __m512i) -> __m512i {
            unsafe { _mm512_and_si512(line, _mm512_set1_epi8(15)) }
        }
        #[inline(always)]
        fn high_nibbles(line: __m512i) -> __m512i {
            unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(line), _mm512_set1_epi8(15)) }
        }
        #[inline(always)]
        fn with_high_bits(low: __m512i, high: __m512i, place: usize) -> __m512i {
            unsafe {
                let there = match place {
                    0 => _mm512_slli_epi16::<4>(high),
                    1 => _mm512_slli_epi16::<2>(high),
                    2 => high,
                    _ => _mm512_srli_epi16::<2>(high),
                };
                _mm512_or_si512(low, _mm512_and_si512(there, _mm512_set1_epi8(0x30)))
            }
        }
        #[inline(always)]
        fn dot(self, line: __m512i, x: [i8; 4]) -> Self {
            unsafe { Avx512Vnni(_mm512_dpbusd_epi32(self.0, line, _mm512_set1_epi32(quad(x)))) }
        }
        #[inline(always)]
        fn dot_pairs(self, pairs: &[u8; 2 * LANES], x: [i16; 2]) -> Self {
            unsafe {
                let pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(pairs.as_ptr().cast()));
                Avx512Vnni(_mm512_dpwssd_epi32(self.0, pairs, _mm512_set1_epi32(pair(x))))
            }
        }
        #[inline(always)]
        fn unsigned(from: &[u8; LANES]) -> Self {
            unsafe { Avx512Vnni(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.as_ptr().cast()))) }
        }
        #[inline(always)]
        fn signed(from: &[u8; LANES]) -> Self {
            unsafe { Avx512Vnni(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.as_ptr().cast()))) }
        }
        #[inline(always)]
        fn add_product(self, a: Self, b: Self) -> Self {
            unsafe { Avx512Vnni(_mm512_add_epi32(self.0, _mm512_mullo_epi32(a.0, b.0))) }
        }
        #[inline(always)]
        fn zeros() -> __m512 {
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        fn halves(from: &[u8; 2 * LANES]) -> __m512 {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())) }
        }
        #[inline(always)]
        fn scaled_onto(self, sum: __m512, scales: __m512, x: f32) -> __m512 {
            unsafe { _mm512_fmadd_ps(_mm512_cvtepi32_ps(self.0), _mm512_mul_ps(scales, _mm512_set1_ps(x)), sum) }
        }
        #[inline(always)]
        fn store(floats: __m512, to: &mut [f32; LANES]) {
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), floats) }
        }
    }

    /// Lanes 0..8 and 8..16.
    #[derive(Clone, Copy)]
    pub(super) struct Avx2<const VNNI: bool>(__m256i, __m256i);

    impl<const VNNI: bool> Dots for Avx2<VNNI> {
        const WIDE: bool = false;
        type Line = (__m256i, __m256i);
        type Floats = (__m256, __m256);
        #[inline(always)]
        fn splat(value: i32) -> Self {
            unsafe { Avx2(_mm256_set1_epi32(value), _mm256_set1_epi32(value)) }
        }
        #[inline(always)]
        fn load(from: &[u8; 4 * LANES]) -> Self::Line {
            unsafe { (_mm256_loadu_si256(from.as_ptr().cast()), _mm256_loadu_si256(from[32..].as_ptr().cast())) }
        }
        #[inline(always)]
        fn low_nibbles((a, b): Self::Line) -> Self::Line {
            unsafe { (_mm256_and_si256(a, _mm256_set1_epi8(15)), _mm256_and_si256(b, _mm256_set1_epi8(15))) }
        }
        #[inline(always)]
        fn high_nibbles((a, b): Self::Line) -> Self::Line {
            unsafe { Self::low_nibbles((_mm256_srli_epi16::<4>(a), _mm256_srli_epi16::<4>(b))) }
        }
        #[inline(always)]
        fn with_high_bits(low: Self::Line, high: Self::Line, place: usize) -> Self::Line {
            let half = |low, high| unsafe {
                let there = match place {
                    0 => _mm256_slli_epi16::<4>(high),
                    1 => _mm256_slli_epi16::<2>(high),
                    2 => high,
                    _ => _mm256_srli_epi16::<2>(high),
                };
                _mm256_or_si256(low, _mm256_and_si256(there, _mm256_set1_epi8(0x30)))
            };
            (half(low.0, high.0), half(low.1, high.1))
        }
        #[inline(always)]
        fn dot(self, (a, b): Self::Line, x: [i8; 4]) -> Self {
            unsafe {
                let x = _mm256_set1_epi32(quad(x));
                if VNNI {
                    return Avx2(_mm256_dpbusd_avx_epi32(self.0, a, x), _mm256_dpbusd_avx_epi32(self.1, b, x));
                }
                // As words: `maddubs` would saturate.
                let even_x = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x));
                let odd_x = _mm256_srai_epi16::<8>(x);
                let half = |sum, line| {
                    let even = _mm256_and_si256(line, _mm256_set1_epi16(0xFF));
                    let odd = _mm256_srli_epi16::<8>(line);
                    let products = _mm256_add_epi32(_mm256_madd_epi16(even, even_x), _mm256_madd_epi16(odd, odd_x));
                    _mm256_add_epi32(sum, products)
                };
                Avx2(half(self.0, a), half(self.1, b))
            }
        }
        #[inline(always)]
        fn dot_pairs(self, pairs: &[u8; 2 * LANES], x: [i16; 2]) -> Self {
            unsafe {
                let x = _mm256_set1_epi32(pair(x));
                let half = |sum, at: usize| {
                    let words = _mm256_cvtepu8_epi16(_mm_loadu_si128(pairs[at..].as_ptr().cast()));
                    _mm256_add_epi32(sum, _mm256_madd_epi16(words, x))
                };
                Avx2(half(self.0, 0), half(self.1, 16))
            }
        }
        #[inline(always)]
        fn unsigned(from: &[u8; LANES]) -> Self {
            let half = |at: usize| unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(from[at..].as_ptr().cast())) };
            Avx2(half(0), half(8))
        }
        #[inline(always)]
        fn signed(from: &[u8; LANES]) -> Self {
            let half = |at: usize| unsafe { _mm256_cvtepi8_epi32(_mm_loadl_epi64(from[at..].as_ptr().cast())) };
            Avx2(half(0), half(8))
        }
        #[inline(always)]
        fn add_product(self, a: Self, b: Self) -> Self {
            let half = |sum, a, b| unsafe { _mm256_add_epi32(sum, _mm256_mullo_epi32(a, b)) };
            Avx2(half(self.0, a.0, b.0), half(self.1, a.1, b.1))
        }
        #[inline(always)]
        fn zeros() -> Self::Floats {
            unsafe { (_mm256_setzero_ps(), _mm256_setzero_ps()) }
        }
        #[inline(always)]
        fn halves(from: &[u8; 2 * LANES]) -> Self::Floats {
            let half = |at: usize| unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from[at..].as_ptr().cast())) };
            (half(0), half(16))
        }
        #[inline(always)]
        fn scaled_onto(self, sum: Self::Floats, scales: Self::Floats, x: f32) -> Self::Floats {
            let half = |lanes, scales, sum| unsafe {
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(lanes), _mm256_mul_ps(scales, _mm256_set1_ps(x)), sum)
            };
            (half(self.0, scales.0, sum.0), half(self.1, scales.1, sum.1))
        }
        #[inline(always)]
        fn store(floats: Self::Floats, to: &mut [f32; LANES]) {
            let (low, high) = to.split_at_mut(8);
            unsafe {
                _mm256_storeu_ps(low.as_mut_ptr(), floats.0);
                _mm256_storeu_ps(high.as_mut_ptr(), floats.1);
            }
        }
    }

    #[inline(always)]
    fn quad(x: [i8; 4]) -> i32 {
        i32::from_le_bytes(x.map(|x| x as u8))
    }

    #[inline(always)]
    fn pair([first, second]: [i16; 2]) -> i32 {
        i32::from(first as u16) | i32::from(second) << 16
    }
}
