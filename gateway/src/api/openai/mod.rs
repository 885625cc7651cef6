//! OpenAI's dialect.

pub mod chat;
mod fields;
pub mod models;
pub mod ratelimit;
