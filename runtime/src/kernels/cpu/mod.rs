//! The CPU kernels: plain Rust over candle storage, as candle custom ops. `simd` chooses the instruction set once.

mod attend;
mod attention;
mod blocks;
mod copy;
mod dots;
mod elementwise;
mod encoder;
mod exp;
mod linear;
mod norms;
mod packed;
mod pairs;
mod pool;
mod quantised;
mod rounded;
mod row;
mod rows;
mod simd;
mod sweep;
mod text_attention;
mod tiles;
mod view;

pub(crate) use attention::{Heads, Part, Scores, kv_write, paged_attention, pool_shapes};
pub(crate) use blocks::Kind;
pub(crate) use copy::copy_blocks;
pub(crate) use elementwise::{Activation, add_bias, gate_mul, rope, softcap};
pub(crate) use encoder::{Gelu, add_layer_norm, bias_gelu};
pub(crate) use linear::{embed, linear};
pub(crate) use norms::{add, add_normed, qk_norm, rms_norm};
pub(crate) use packed::{Inputs, Packed, Raw};
pub(crate) use pool::{fill_on_threads, use_threads};
pub(crate) use row::{PART, largest, largest_up_to, weigh};
pub(crate) use simd::kernel_name;
pub(crate) use text_attention::text_attention;

#[cfg(test)]
pub(crate) use self::{
    attend::attend_on_each, encoder::encoder_on_each, linear::linear_on_each, text_attention::text_attention_on_each,
};
