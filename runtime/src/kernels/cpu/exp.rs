//! e^x for softmax and gates, and tanh of it: a polynomial that vectorises, within two units in the last place of the true value.
//! The library's `expf` is exact to half a unit but costs a call per number.

/// Inputs below about -87 give a number near 1e-38 instead of a denormal or zero; above 88 it saturates near 1e38.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5 · 2²³ leaves the rounded integer in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts: the first has so few bits that n · LN2_HIGH is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    // Taylor's series is enough: |r| ≤ ln2 / 2.
    let mut sum = 1.0 / 5040.0;
    for factor in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = sum * r + factor;
    }
    // Times 2ⁿ, by adding n to the exponent.
    f32::from_bits(sum.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// Within 2.4e-7 of the true value: absolute, so small results have fewer right digits.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (1.0 + exp(2.0 * x))
}

#[cfg(test)]
mod tests {
    #[test]
    fn tanh_is_within_four_units_of_one_half() {
        for step in -100_000..=100_000 {
            let x = step as f32 * 1e-3;
            let (got, want) = (f64::from(super::tanh(x)), f64::from(x).tanh());
            assert!((got - want).abs() < 2.4e-7, "tanh {x}: {got}, expected {want}");
        }
        assert!(super::tanh(f32::NAN).is_nan());
        assert_eq!((super::tanh(f32::NEG_INFINITY), super::tanh(f32::INFINITY)), (-1.0, 1.0));
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for step in -870_000..=880_000 {
            let x = step as f32 * 1e-4;
            let (got, want) = (f64::from(super::exp(x)), f64::from(x).exp());
            assert!(((got - want) / want).abs() < 2.5e-7, "e^{x}: {got}, expected {want}");
        }
        assert_eq!(super::exp(0.0), 1.0);
        assert!(super::exp(f32::NAN).is_nan());
        assert!(super::exp(f32::NEG_INFINITY) < 1e-37);
    }
}
