//! A matrix of weights with its bias, if it has one.

use crate::kernels::cpu::{Packed, add_bias, linear};
use candle_core::{Result, Tensor};

pub(crate) struct Dense {
    pub weights: Packed,
    /// `[outputs]` in f32.
    pub bias: Option<Tensor>,
}

impl Dense {
    /// `[T, inputs]` → `[T, outputs]`
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = linear(x, &self.weights)?;
        if let Some(bias) = &self.bias {
            add_bias(&y, bias)?;
        }
        Ok(y)
    }
}
