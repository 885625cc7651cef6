//! OpenAI's dialect.

pub mod answer;
pub mod embeddings;
pub mod fields;
pub mod gather;
pub mod models;
pub mod ratelimit;
pub mod request;
pub mod upstream;
