//! Tensors behind a handle: loads model versions and generates token streams. Knows no HTTP, key, price or JSON API.
//!
//! # Layout, in reading order
//! - `registry`: [`Runtime`], [`Model`] and [`Embedder`], what a caller holds
//! - `engine`: one thread per device: receive → schedule → forward → sample → emit; `scheduler` is pure
//! - `kv`: which sequence owns which block of the KV pool
//! - `model`: `config.json` → `ModelSpec` → the one decoder; `bert`: the encoder of texts
//! - `kernels`: what the decoder is made of, on the CPU
//! - `source`: a folder or a GGUF file; `weights`: safetensors and GGUF into owned, packed memory
//! - `text`: chat template, tokenizer, incremental detokenizer
//! - `grammar`: which tokens may come next, for answers that must keep to a schema
//! - `sampling`: logits → the next token; stop strings
//! - `memory`: what a model takes of it, before it does
//! - `report`: what the engine tells; plain structs

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

#[macro_use]
mod fault;

mod engine;
mod grammar;
mod kernels;
mod kv;
mod memory;
mod model;
mod registry;
mod report;
mod sampling;
mod settings;
mod source;
mod text;
mod weights;

pub use engine::embed::Embedded;
pub use engine::events::{Event, Failure, FinishReason, Generation, Handle, Refusal};
pub use engine::request::{Class, Request};
pub use grammar::{BadGrammar, Constraint, Grammar};
pub use memory::Memory;
pub use registry::{
    LoadError, Model, Runtime, ScoreError, StartError,
    embedder::{Embedder, Embedding, is_embedder},
};
pub use report::{
    EmbedTimeline, ModelReport, ModelState, PrefixReport, Report, Sink, StepRecord, Stuck, Timeline, WeightKind,
};
pub use sampling::{
    logprobs::Logprobs,
    params::{BadParam, SamplingParams},
};
pub use settings::{Activations, Device, LoadOptions, Quantize, Renders, Settings, set_threads};
pub use source::check_text;
pub use text::{
    Message, TemplateError, TextError,
    template::{Template, TemplateSource},
};
