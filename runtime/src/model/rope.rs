//! Rotary positions: how a model's frequencies are scaled beyond the length it was first trained for, and the tables of
//! cosines and sines that follow. A table depends on the model and its positions alone, never on a batch.
//!
//! Numbers are rounded to f32 where the implementations that models are trained with do so: at position 1,000 an exact
//! angle would differ from theirs in the fifth digit.

use candle_core::{Device, Result, Tensor};
use std::f64::consts::PI;

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RopeSpec {
    pub theta: f64,
    /// Of a head's numbers the first that turn; even. Less than the head: partial rotation.
    pub dims: usize,
    pub scaling: Scaling,
}

/// `original`: positions of the first training.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Scaling {
    None,
    /// Every frequency divided by `factor` (position interpolation).
    Linear {
        factor: f32,
    },
    /// Below `original` as it was. A position p beyond it turns by the base that a sequence of p + 1 tokens would have,
    /// as if each token had been computed when it was the last one: it never turns again.
    Dynamic {
        factor: f64,
        original: usize,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth blend between.
    Llama3 {
        factor: f32,
        low: f32,
        high: f32,
        original: f32,
    },
    /// YaRN (arXiv 2309.00071): a ramp over the dimensions between divided and kept; `attention` stretches both tables.
    Yarn {
        factor: f32,
        original: f64,
        beta_fast: f64,
        beta_slow: f64,
        truncate: bool,
        attention: f32,
    },
    /// LongRoPE (arXiv 2402.13753): one factor for each frequency. The long ones serve a model whose table reaches
    /// beyond `original`, at every position; the short ones any other.
    LongRope {
        short: Vec<f32>,
        long: Vec<f32>,
        original: usize,
        attention: f32,
    },
}

impl RopeSpec {
    /// cos and sin of every position's angles: two `[positions, dims / 2]` tables in f32.
    pub fn tables(&self, positions: usize) -> Result<(Tensor, Tensor)> {
        let half = self.dims / 2;
        let fixed = self.frequencies(positions);
        let stretch = match self.scaling {
            Scaling::Yarn { attention, .. } | Scaling::LongRope { attention, .. } => attention,
            _ => 1.0,
        };
        let (mut cos, mut sin) = (Vec::with_capacity(positions * half), Vec::with_capacity(positions * half));
        for at in 0..positions {
            let own = self.frequencies_at(at);
            for frequency in own.as_ref().unwrap_or(&fixed) {
                let angle = f64::from(at as f32 * frequency);
                cos.push(angle.cos() as f32 * stretch);
                sin.push(angle.sin() as f32 * stretch);
            }
        }
        let table = |numbers| Tensor::from_vec(numbers, (positions, half), &Device::Cpu);
        Ok((table(cos)?, table(sin)?))
    }

    /// base^(2i / dims) for each pair i.
    fn wavelengths(&self, base: f32) -> impl Iterator<Item = f32> {
        let dims = self.dims;
        (0..dims / 2).map(move |i| base.powf((2 * i) as f32 / dims as f32))
    }

    fn frequencies(&self, positions: usize) -> Vec<f32> {
        let plain = self.wavelengths(self.theta as f32).map(|length| 1.0 / length);
        match &self.scaling {
            Scaling::None | Scaling::Dynamic { .. } => plain.collect(),
            Scaling::Linear { factor } => plain.map(|frequency| frequency / factor).collect(),
            &Scaling::Llama3 { factor, low, high, original } => plain
                .map(|frequency| {
                    let wavelength = 2.0 * PI as f32 / frequency;
                    if wavelength < original / high {
                        frequency
                    } else if wavelength > original / low {
                        frequency / factor
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * frequency / factor + smooth * frequency
                    }
                })
                .collect(),
            &Scaling::Yarn { factor, original, beta_fast, beta_slow, truncate, .. } => {
                // The dimension whose frequency makes `turns` turns within the original length.
                let dimension =
                    |turns: f64| self.dims as f64 * (original / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
                let (mut from, mut to) = (dimension(beta_fast), dimension(beta_slow));
                if truncate {
                    (from, to) = (from.floor(), to.ceil());
                }
                let (from, mut to) = (from.max(0.0), to.min(self.dims as f64 - 1.0));
                if from == to {
                    to += 0.001;
                }
                let ramp = |i: usize| ((i as f32 - from as f32) / (to - from) as f32).clamp(0.0, 1.0);
                self.wavelengths(self.theta as f32)
                    .enumerate()
                    .map(|(i, length)| {
                        let kept = 1.0 - ramp(i);
                        1.0 / (factor * length) * (1.0 - kept) + 1.0 / length * kept
                    })
                    .collect()
            }
            Scaling::LongRope { short, long, original, .. } => {
                let factors = if positions > *original { long } else { short };
                self.wavelengths(self.theta as f32)
                    .zip(factors)
                    .map(|(length, factor)| 1.0 / (factor * length))
                    .collect()
            }
        }
    }

    /// The frequencies of one position, where they are its own.
    fn frequencies_at(&self, at: usize) -> Option<Vec<f32>> {
        let &Scaling::Dynamic { factor, original } = &self.scaling else { return None };
        if at < original {
            return None;
        }
        let dims = self.dims as f64;
        let stretch = factor * (at + 1) as f64 / original as f64 - (factor - 1.0);
        let base = self.theta * stretch.powf(dims / (dims - 2.0));
        Some(self.wavelengths(base as f32).map(|length| 1.0 / length).collect())
    }
}
