//! What every test uses: a gateway of its own, and a client that checks each answer.

pub mod collector;
pub mod evidence;
pub mod fault;
pub mod gateway;
pub mod http;
pub mod postgres;
pub mod prometheus;
pub mod redis;
pub mod server;
pub mod upstream;

use std::time::{Duration, Instant};

/// A change counts within a second; as long again is for a machine that has other things to do.
pub const SOON: Duration = Duration::from_secs(2);

/// Waits for a condition to hold and returns what it gives; fails loudly when it never does.
pub fn eventually<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The repository.
pub fn root() -> &'static std::path::Path {
    std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}
