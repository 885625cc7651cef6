//! The embedding models that the engine serves, and what it is told about them.

use super::{
    ModelId,
    embed::{Encoder, Job},
    events::Failure,
    roster::Resident,
};
use crate::report::{ModelState, Sink};
use std::{
    sync::{Arc, mpsc::Sender},
    time::Instant,
};

pub(crate) enum EncoderCommand {
    /// Warms the model and takes it into service; answers on `ready`.
    Add {
        id: ModelId,
        encoder: Box<Encoder>,
        resident: Resident,
        ready: Sender<Result<(), String>>,
    },
    Submit {
        id: ModelId,
        job: Box<Job>,
    },
    /// As of a model that writes.
    Drain {
        id: ModelId,
        cut_at: Instant,
    },
    /// No more requests will come; free the model when the last one is answered.
    Retire {
        id: ModelId,
    },
}

struct Served {
    id: ModelId,
    encoder: Box<Encoder>,
    resident: Resident,
}

#[derive(Default)]
pub(super) struct Encoders {
    served: Vec<Served>,
}

impl Encoders {
    pub fn is_idle(&self) -> bool {
        self.served.iter().all(|served| served.encoder.is_idle())
    }

    pub fn obey(&mut self, command: EncoderCommand) {
        match command {
            EncoderCommand::Add { id, mut encoder, resident, ready } => {
                let outcome = encoder.warm();
                if outcome.is_ok() {
                    resident.stats.enter(ModelState::Ready);
                    self.served.push(Served { id, encoder, resident });
                }
                let _ = ready.send(outcome);
            }
            EncoderCommand::Submit { id, job } => {
                // A job that is dropped tells its caller so: the model was cut.
                if let Some(served) = self.served.iter_mut().find(|served| served.id == id) {
                    served.encoder.submit(*job);
                }
            }
            EncoderCommand::Drain { id, cut_at } => {
                if let Some(served) = self.served.iter_mut().find(|served| served.id == id) {
                    served.resident.drain(cut_at);
                }
            }
            EncoderCommand::Retire { id } => {
                if let Some(served) = self.served.iter_mut().find(|served| served.id == id) {
                    served.resident.retire();
                }
                self.free_leaving();
            }
        }
    }

    /// A turn for each of them. False: there was nothing to do.
    pub fn turn(&mut self, sink: Option<&Arc<dyn Sink>>) -> bool {
        let mut progress = false;
        for served in &mut self.served {
            progress |= served.encoder.turn(sink);
        }
        self.free_leaving();
        progress
    }

    pub fn next_cut(&self) -> Option<Instant> {
        self.served.iter().filter_map(|served| served.resident.cut_at()).min()
    }

    fn free_leaving(&mut self) {
        let now = Instant::now();
        for served in self.served.iter_mut().filter(|served| served.resident.is_cut(now)) {
            served.encoder.fail_all(&Failure::Unloaded);
        }
        self.served.retain(|served| !(served.resident.may_go(now) && served.encoder.is_idle()));
    }
}
