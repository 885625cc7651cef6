//! What a caller asks of a model.

use crate::sampling::params::SamplingParams;
use std::time::Instant;

/// Who is served first when blocks are short. Nobody waits forever but shadows: see `engine::scheduler`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    Interactive,
    Batch,
    Shadow,
}

impl Class {
    pub const ALL: [Class; 3] = [Class::Interactive, Class::Batch, Class::Shadow];
}

#[derive(Clone, Debug)]
pub struct Request {
    pub prompt: Vec<u32>,
    /// Most tokens to sample, the end token included.
    pub max_tokens: u32,
    pub params: SamplingParams,
    /// The answer ends before the first of these. Empty strings are ignored.
    pub stop: Vec<String>,
    /// Goes on to `max_tokens` past the model's end tokens: for measurements, which need answers of one length.
    pub ignore_eos: bool,
    /// Opaque: requests with the same number share one place in the fair order.
    pub tenant: u64,
    /// Requests with different salts never share what is computed: opaque, and nobody but its owner's to guess.
    pub salt: [u8; 16],
    pub class: Class,
    /// Fails the request if it is still queued then. Once admitted it runs to its end.
    pub deadline: Option<Instant>,
}
