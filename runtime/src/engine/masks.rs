//! Grammar masks beside the forward. A mask takes from some microseconds to some milliseconds and depends on the tokens
//! before it and on no logits: made after the forward, everybody in the step would wait for everybody's mask.

use super::{message, sequence::Sequence};
use std::thread::Builder;

/// Runs the forward while another thread makes the masks of these sequences. Without such a thread they are made when they
/// are needed: the same ones.
pub(super) fn beside<T>(
    sequences: Vec<&mut Sequence>,
    forward: impl FnOnce() -> Result<T, String>,
) -> Result<T, String> {
    if sequences.is_empty() {
        return forward();
    }
    std::thread::scope(|scope| {
        let make = || sequences.into_iter().for_each(Sequence::prepare);
        let masks = Builder::new().name("masks".to_owned()).spawn_scoped(scope, make);
        let outcome = forward();
        if let Ok(masks) = masks {
            masks.join().map_err(|panic| message(&*panic))?;
        }
        outcome
    })
}
