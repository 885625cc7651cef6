//! The runtime as its caller sees it. One binary, so that it links once.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod cancel;
mod embeddings;
mod equality;
mod folders;
mod goldens;
mod lifecycle;
mod minilm;
mod refusals;
mod support;
