//! The public wire: what clients send and what they read. Leaves; they know no stage.

pub mod feedback;
pub mod glassgate;
pub mod head;
pub mod limit;
pub mod openai;
pub mod retry_after;
pub mod sse;
