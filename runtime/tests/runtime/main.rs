//! The runtime as its caller sees it. One binary, so that it links once.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod cancel;
mod embeddings;
mod equality;
mod folders;
mod gguf;
mod gguf_file;
mod goldens;
mod hostile;
mod kinds;
mod lifecycle;
mod memory;
mod minilm;
mod quantised;
mod refusals;
mod steered;
mod support;
mod templates;
mod tokenizers;
mod twins;
mod versions;
