//! Sixteen f32 lanes under one name for AVX-512, AVX2 and plain Rust, and the one place that chooses between them.
//! A kernel is a [`Job`], generic over its lanes; [`run`] calls it inside a function compiled for the chosen set.
//!
//! The plain lanes do not fuse multiply and add, so results may differ in the last bit between machines, never
//! between batches on one machine.

#![allow(unsafe_code)] // Intrinsics that read or write through pointers, and the calls into `target_feature` code.

use half::bf16;
use std::sync::LazyLock;

pub(crate) const LANES: usize = 16;

pub(crate) trait Lanes: Copy {
    /// Whether there are 32 registers of sixteen lanes; otherwise 16 of eight.
    const WIDE: bool;
    fn splat(value: f32) -> Self;
    fn load(from: &[f32; LANES]) -> Self;
    fn load_bf16(from: &[bf16; LANES]) -> Self;
    /// 32 bf16 as the values at even and at odd places.
    fn load_bf16_pairs(from: &[bf16; 2 * LANES]) -> (Self, Self);
    fn store(self, to: &mut [f32; LANES]);
    /// `self + a · b`
    fn add_product(self, a: Self, b: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    /// The larger of each pair of lanes; either of them if one is not a number.
    fn max(self, other: Self) -> Self;
    /// The largest lane; any lane if one is not a number.
    fn highest(self) -> f32;
    /// The sum of all lanes, in a fixed order.
    fn sum(self) -> f32;
}

/// A kernel's body. `run` must be `#[inline(always)]`, or it is compiled without the instruction set it is meant for.
pub(crate) trait Job {
    fn run<L: Lanes>(self);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

static PATH: LazyLock<Path> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        if avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            return Path::Avx512;
        }
        if avx2 {
            return Path::Avx2;
        }
    }
    Path::Portable
});

/// The instruction set in use, for reports.
pub(crate) fn kernel_name() -> &'static str {
    match *PATH {
        #[cfg(target_arch = "x86_64")]
        Path::Avx512 => "avx512",
        #[cfg(target_arch = "x86_64")]
        Path::Avx2 => "avx2",
        Path::Portable => "portable",
    }
}

pub(crate) fn run(job: impl Job) {
    run_on(*PATH, job);
}

fn run_on(path: Path, job: impl Job) {
    match path {
        // SAFETY: `PATH` is Avx512 only where avx2, fma, avx512f and avx512bw were detected.
        #[cfg(target_arch = "x86_64")]
        Path::Avx512 => unsafe { run_avx512(job) },
        // SAFETY: `PATH` is Avx2 only where avx2 and fma were detected.
        #[cfg(target_arch = "x86_64")]
        Path::Avx2 => unsafe { run_avx2(job) },
        Path::Portable => job.run::<Portable>(),
    }
}

/// Runs the job once on every instruction set that this machine has.
#[cfg(test)]
pub(crate) fn run_on_each(mut job: impl FnMut(Path)) {
    #[cfg(target_arch = "x86_64")]
    {
        if *PATH == Path::Avx512 {
            job(Path::Avx512);
        }
        if *PATH != Path::Portable {
            job(Path::Avx2);
        }
    }
    job(Path::Portable);
}

#[cfg(test)]
pub(crate) fn run_exactly_on(path: Path, job: impl Job) {
    run_on(path, job);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx2,fma")]
fn run_avx512<J: Job>(job: J) {
    job.run::<x86::Avx512>();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2<J: Job>(job: J) {
    job.run::<x86::Avx2>();
}

#[derive(Clone, Copy)]
struct Portable([f32; LANES]);

impl Lanes for Portable {
    const WIDE: bool = false;
    #[inline(always)]
    fn splat(value: f32) -> Self {
        Portable([value; LANES])
    }
    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        Portable(*from)
    }
    #[inline(always)]
    fn load_bf16(from: &[bf16; LANES]) -> Self {
        Portable(from.map(widen))
    }
    #[inline(always)]
    fn load_bf16_pairs(from: &[bf16; 2 * LANES]) -> (Self, Self) {
        (
            Portable(std::array::from_fn(|i| widen(from[2 * i]))),
            Portable(std::array::from_fn(|i| widen(from[2 * i + 1]))),
        )
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        *to = self.0;
    }
    #[inline(always)]
    fn add_product(self, a: Self, b: Self) -> Self {
        Portable(std::array::from_fn(|i| self.0[i] + a.0[i] * b.0[i]))
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Portable(std::array::from_fn(|i| self.0[i] * other.0[i]))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Portable(std::array::from_fn(|i| if self.0[i] > other.0[i] { self.0[i] } else { other.0[i] }))
    }
    #[inline(always)]
    fn highest(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut lanes = self.0;
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
            width /= 2;
        }
        lanes[0]
    }
}

/// `half`'s own conversion keeps NaNs quiet with a branch; the plain shift is the same for every other value.
#[inline(always)]
fn widen(value: bf16) -> f32 {
    f32::from_bits(u32::from(value.to_bits()) << 16)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LANES, Lanes};
    use half::bf16;
    use std::arch::x86_64::*;

    // SAFETY of every block below: the types are private to `simd`, which instantiates them only inside functions
    // compiled for their instruction set and only after detecting it; every pointer comes from a reference to an array
    // of exactly the length that is read or written, and all loads and stores are unaligned ones.

    #[derive(Clone, Copy)]
    pub(super) struct Avx512(__m512);

    impl Lanes for Avx512 {
        const WIDE: bool = true;
        #[inline(always)]
        fn splat(value: f32) -> Self {
            unsafe { Avx512(_mm512_set1_ps(value)) }
        }
        #[inline(always)]
        fn load(from: &[f32; LANES]) -> Self {
            unsafe { Avx512(_mm512_loadu_ps(from.as_ptr())) }
        }
        #[inline(always)]
        fn load_bf16(from: &[bf16; LANES]) -> Self {
            unsafe {
                let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
                Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)))
            }
        }
        #[inline(always)]
        fn load_bf16_pairs(from: &[bf16; 2 * LANES]) -> (Self, Self) {
            unsafe {
                let pairs = _mm512_loadu_si512(from.as_ptr().cast());
                let even = _mm512_slli_epi32::<16>(pairs);
                let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xFFFF_0000_u32 as i32));
                (Avx512(_mm512_castsi512_ps(even)), Avx512(_mm512_castsi512_ps(odd)))
            }
        }
        #[inline(always)]
        fn store(self, to: &mut [f32; LANES]) {
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), self.0) }
        }
        #[inline(always)]
        fn add_product(self, a: Self, b: Self) -> Self {
            unsafe { Avx512(_mm512_fmadd_ps(a.0, b.0, self.0)) }
        }
        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            unsafe { Avx512(_mm512_mul_ps(self.0, other.0)) }
        }
        #[inline(always)]
        fn max(self, other: Self) -> Self {
            unsafe { Avx512(_mm512_max_ps(self.0, other.0)) }
        }
        #[inline(always)]
        fn highest(self) -> f32 {
            unsafe { _mm512_reduce_max_ps(self.0) }
        }
        #[inline(always)]
        fn sum(self) -> f32 {
            unsafe { _mm512_reduce_add_ps(self.0) }
        }
    }

    #[derive(Clone, Copy)]
    pub(super) struct Avx2(__m256, __m256);

    impl Lanes for Avx2 {
        const WIDE: bool = false;
        #[inline(always)]
        fn splat(value: f32) -> Self {
            unsafe { Avx2(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
        }
        #[inline(always)]
        fn load(from: &[f32; LANES]) -> Self {
            unsafe { Avx2(_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from[8..].as_ptr())) }
        }
        #[inline(always)]
        fn load_bf16(from: &[bf16; LANES]) -> Self {
            unsafe {
                let half = |at: usize| {
                    let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(from[at..].as_ptr().cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
                };
                Avx2(half(0), half(8))
            }
        }
        #[inline(always)]
        fn load_bf16_pairs(from: &[bf16; 2 * LANES]) -> (Self, Self) {
            unsafe {
                let odd_places = _mm256_set1_epi32(0xFFFF_0000_u32 as i32);
                let low = _mm256_loadu_si256(from.as_ptr().cast());
                let high = _mm256_loadu_si256(from[16..].as_ptr().cast());
                let even = |pairs| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs));
                let odd = |pairs| _mm256_castsi256_ps(_mm256_and_si256(pairs, odd_places));
                (Avx2(even(low), even(high)), Avx2(odd(low), odd(high)))
            }
        }
        #[inline(always)]
        fn store(self, to: &mut [f32; LANES]) {
            let (low, high) = to.split_at_mut(8);
            unsafe {
                _mm256_storeu_ps(low.as_mut_ptr(), self.0);
                _mm256_storeu_ps(high.as_mut_ptr(), self.1);
            }
        }
        #[inline(always)]
        fn add_product(self, a: Self, b: Self) -> Self {
            unsafe { Avx2(_mm256_fmadd_ps(a.0, b.0, self.0), _mm256_fmadd_ps(a.1, b.1, self.1)) }
        }
        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            unsafe { Avx2(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
        }
        #[inline(always)]
        fn max(self, other: Self) -> Self {
            unsafe { Avx2(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)) }
        }
        #[inline(always)]
        fn highest(self) -> f32 {
            unsafe {
                let eight = _mm256_max_ps(self.0, self.1);
                let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
                let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
            }
        }
        #[inline(always)]
        fn sum(self) -> f32 {
            unsafe {
                let eight = _mm256_add_ps(self.0, self.1);
                let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
            }
        }
    }
}
