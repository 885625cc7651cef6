//! The embedding models that the engine serves, and what it is told about them.

use super::{
    ModelId, Roster,
    embed::{Encoder, Job},
};
use crate::report::Sink;
use std::sync::{Arc, PoisonError, mpsc::Sender};

pub(crate) enum EncoderCommand {
    /// Warms the model and takes it into service; answers on `ready`.
    Add {
        id: ModelId,
        encoder: Box<Encoder>,
        ready: Sender<Result<(), String>>,
    },
    Submit {
        id: ModelId,
        job: Box<Job>,
    },
    /// No more requests will come; free the model when the last one is answered.
    Retire {
        id: ModelId,
    },
}

struct Served {
    id: ModelId,
    encoder: Box<Encoder>,
    retired: bool,
}

pub(super) struct Encoders {
    served: Vec<Served>,
    roster: Roster,
}

impl Encoders {
    pub fn new(roster: Roster) -> Encoders {
        Encoders { served: Vec::new(), roster }
    }

    pub fn is_idle(&self) -> bool {
        self.served.iter().all(|served| served.encoder.is_idle())
    }

    pub fn obey(&mut self, command: EncoderCommand) {
        match command {
            EncoderCommand::Add { id, mut encoder, ready } => {
                let outcome = encoder.warm();
                if outcome.is_ok() {
                    self.roster.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(encoder.stats()));
                    self.served.push(Served { id, encoder, retired: false });
                }
                let _ = ready.send(outcome);
            }
            EncoderCommand::Submit { id, job } => {
                // Only a handle submits, and a model outlives its handles; a job that is dropped tells its caller so.
                if let Some(served) = self.served.iter_mut().find(|served| served.id == id) {
                    served.encoder.submit(*job);
                }
            }
            EncoderCommand::Retire { id } => {
                if let Some(served) = self.served.iter_mut().find(|served| served.id == id) {
                    served.retired = true;
                }
                self.free_retired();
            }
        }
    }

    /// A turn for each of them. False: there was nothing to do.
    pub fn turn(&mut self, sink: Option<&Arc<dyn Sink>>) -> bool {
        let mut progress = false;
        for served in &mut self.served {
            progress |= served.encoder.turn(sink);
        }
        self.free_retired();
        progress
    }

    fn free_retired(&mut self) {
        for gone in self.served.extract_if(.., |served| served.retired && served.encoder.is_idle()) {
            let stats = gone.encoder.stats();
            self.roster.lock().unwrap_or_else(PoisonError::into_inner).retain(|other| !Arc::ptr_eq(other, stats));
        }
    }
}
