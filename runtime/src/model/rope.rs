//! Tables of cosines and sines for rotary positions.

use candle_core::{Device, Result, Tensor};

/// cos and sin of position · theta^(−2i/d): two `[positions, d / 2]` tables in f32.
///
/// Frequencies and angles are rounded to f32 on the way, as in the implementations that models are trained with: at
/// position 1,000 an exact angle would differ from theirs in the fifth digit.
pub(crate) fn tables(positions: usize, head_dim: usize, theta: f64) -> Result<(Tensor, Tensor)> {
    let half = head_dim / 2;
    let frequencies: Vec<f32> =
        (0..half).map(|i| 1.0 / (theta as f32).powf((2 * i) as f32 / head_dim as f32)).collect();
    let angles = |of: fn(f64) -> f64| -> Vec<f32> {
        (0..positions).flat_map(|at| frequencies.iter().map(move |f| of(f64::from(at as f32 * f)) as f32)).collect()
    };
    let table = |numbers| Tensor::from_vec(numbers, (positions, half), &Device::Cpu);
    Ok((table(angles(f64::cos))?, table(angles(f64::sin))?))
}
