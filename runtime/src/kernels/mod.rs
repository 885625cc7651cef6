//! What the decoder is made of. Every function takes and gives candle tensors and keeps no state; `ops` is what the
//! decoder asks of a device. `cpu` holds the arithmetic, `reference` says the same in plain candle ops and is what `cpu`
//! is tested against; with it `plain` runs every model on any device that candle has, and `cuda` replaces its slow parts.
//!
//! On the CPU each output is summed in an order that depends on nothing but its own row: results are bit-identical whatever else
//! is in the batch, however it is chunked and however many threads work on it.

pub(crate) mod batch;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub(crate) mod ops;
#[cfg(any(test, feature = "cuda"))]
pub(crate) mod plain;
#[cfg(any(test, feature = "cuda"))]
#[cfg_attr(not(test), expect(dead_code, reason = "what only tests compare with"))]
pub(crate) mod reference;
#[cfg(test)]
mod tests;
pub(crate) mod texts;
