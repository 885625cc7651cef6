//! The model as data, the one decoder that runs it, and the encoder of texts (`bert`). Nothing here keeps anything about
//! a request: state comes in as a `StepBatch` and the KV pools.

pub(crate) mod bert;
pub(crate) mod decoder;
#[cfg(test)]
mod family_tests;
mod fields;
pub(crate) mod layout;
mod rope;
pub(crate) mod spec;
#[cfg(test)]
mod tests;
