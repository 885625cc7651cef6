//! OpenAI's dialect.

pub mod answer;
pub mod asked;
pub mod embeddings;
pub mod fields;
pub mod gather;
pub mod logprobs;
pub mod models;
pub mod ratelimit;
pub mod request;
pub mod upstream;
