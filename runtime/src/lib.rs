//! Tensors behind a handle: loads model versions and generates token streams. Knows no HTTP, key, price or JSON API.
//!
//! # Layout, in reading order
//! - `registry`: [`Runtime`], [`Model`] and [`Embedder`], what a caller holds
//! - `engine`: one thread per device: receive → schedule → forward → sample → emit; `scheduler` is pure
//! - `kv`: which sequence owns which block of the KV pool
//! - `model`: `config.json` → `ModelSpec` → the one decoder; `bert`: the encoder of texts
//! - `kernels`: what the decoder is made of, on the CPU
//! - `weights`: safetensors into owned, packed memory
//! - `text`: chat template, tokenizer, incremental detokenizer
//! - `sampling`: logits → the next token; stop strings
//! - `report`: what the engine tells; plain structs

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod engine;
mod kernels;
mod kv;
mod model;
mod registry;
mod report;
mod sampling;
mod settings;
mod text;
mod weights;

pub use engine::embed::Embedded;
pub use engine::events::{Event, Failure, FinishReason, Generation, Handle, Refusal};
pub use engine::request::{Class, Request};
pub use registry::embedder::{Embedder, Embedding, is_embedder};
pub use registry::{LoadError, Model, Runtime, StartError};
pub use report::{EmbedTimeline, ModelReport, Report, Sink, StepRecord, Timeline};
pub use sampling::params::{BadParam, SamplingParams};
pub use settings::{KvDtype, Settings, set_threads};
pub use text::{Message, TemplateError, TextError};
