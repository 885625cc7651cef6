//! The CPU kernels: plain Rust over candle storage, as candle custom ops. `simd` chooses the instruction set once.

mod attention;
mod elementwise;
mod encoder;
mod exp;
mod linear;
mod packed;
mod pool;
mod rows;
mod simd;
mod text_attention;
mod view;

pub(crate) use attention::{Heads, Part, kv_write, paged_attention, pool_shapes};
pub(crate) use elementwise::{rms_norm, rope, silu_mul};
pub(crate) use encoder::{Gelu, add_layer_norm, bias_gelu};
pub(crate) use linear::{embed, linear};
pub(crate) use packed::{Kind, Packed, Raw};
pub(crate) use pool::use_threads;
pub(crate) use simd::kernel_name;
pub(crate) use text_attention::text_attention;

#[cfg(test)]
pub(crate) use self::{
    attention::attend_on_each, encoder::encoder_on_each, linear::linear_on_each, text_attention::text_attention_on_each,
};
