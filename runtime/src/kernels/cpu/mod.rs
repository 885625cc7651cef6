//! The CPU kernels: plain Rust over candle storage, as candle custom ops. `simd` chooses the instruction set once.

mod attention;
mod copy;
mod elementwise;
mod exp;
mod linear;
mod packed;
mod pool;
mod rows;
mod simd;
mod view;

pub(crate) use attention::{Heads, Part, kv_write, paged_attention, pool_shapes};
pub(crate) use copy::copy_blocks;
pub(crate) use elementwise::{rms_norm, rope, silu_mul};
pub(crate) use linear::{embed, linear};
pub(crate) use packed::{Kind, Packed, Raw};
pub(crate) use pool::use_threads;
pub(crate) use simd::kernel_name;

#[cfg(test)]
pub(crate) use self::{attention::attend_on_each, linear::linear_on_each};
