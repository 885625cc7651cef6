//! One thread per device: receive → schedule → forward → sample → emit, round-robin over the models on it.
//!
//! Nobody waits for the engine and the engine waits for nobody: requests come in through a channel that is read between
//! steps, events leave through channels that have room for all there can be.

pub(crate) mod embed;
pub(crate) mod encoders;
pub(crate) mod events;
pub(crate) mod forward;
mod masks;
pub(crate) mod places;
pub(crate) mod request;
pub(crate) mod roster;
pub(crate) mod scheduler;
pub(crate) mod sequence;
pub(crate) mod stats;
pub(crate) mod stepper;
#[cfg(test)]
mod tests;

use crate::{
    kernels::cpu::use_threads,
    report::{ModelState, Sink},
};
use encoders::{EncoderCommand, Encoders};
use roster::Resident;
use sequence::Sequence;
use std::{
    any::Any,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};
use stepper::Stepper;

pub(crate) type ModelId = u64;

pub(crate) enum Command {
    /// Warms the model and takes it into service; answers on `ready`.
    Add {
        id: ModelId,
        stepper: Box<Stepper>,
        resident: Resident,
        ready: Sender<Result<(), String>>,
    },
    /// One request: a sequence for each of its choices.
    Submit {
        id: ModelId,
        choices: Vec<Sequence>,
    },
    /// Others serve instead: free the model when the last request is answered and no more can come, or at `cut_at`.
    Drain {
        id: ModelId,
        cut_at: Instant,
    },
    /// No more requests will come; free the model when the last one is answered.
    Retire {
        id: ModelId,
    },
    /// For the embedding models.
    Encoder(EncoderCommand),
    Stop,
}

/// How long the thread sleeps if sequences wait and none can run. There is no such state; this keeps a mistake from
/// burning a core.
const STUCK_PAUSE: Duration = Duration::from_millis(1);

struct Served {
    id: ModelId,
    stepper: Box<Stepper>,
    resident: Resident,
}

struct Engine {
    commands: Receiver<Command>,
    served: Vec<Served>,
    encoders: Encoders,
    sink: Option<Arc<dyn Sink>>,
}

/// Starts the engine's thread. It ends at `Stop`, or when every sender is gone.
pub(crate) fn start(threads: usize, sink: Option<Arc<dyn Sink>>) -> std::io::Result<(Sender<Command>, JoinHandle<()>)> {
    let (sender, commands) = channel();
    let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
        if let Err(error) = use_threads(threads) {
            tracing::warn!(%error, "no worker threads: kernels stay on the engine's");
        }
        Engine { commands, served: Vec::new(), encoders: Encoders::default(), sink }.run();
    })?;
    Ok((sender, thread))
}

impl Engine {
    fn run(&mut self) {
        let mut progress = true;
        while self.receive(progress) {
            progress = false;
            // Models take turns: a shadow of one would hold up the users of all.
            let serving_users = self.served.iter().filter(|served| served.stepper.has_users()).count();
            for served in &mut self.served {
                let elsewhere = !self.encoders.is_idle() || serving_users > usize::from(served.stepper.has_users());
                progress |= served.stepper.step(elsewhere, self.sink.as_ref());
            }
            progress |= self.encoders.turn(self.sink.as_ref());
            self.free_leaving();
        }
        for served in &mut self.served {
            served.stepper.end_all(|| sequence::Ending::Finished(events::FinishReason::Cancelled));
        }
        // A request that came in together with the end is answered too.
        for command in self.commands.try_iter() {
            if let Command::Submit { choices, .. } = command {
                end_all(choices, || sequence::Ending::Finished(events::FinishReason::Cancelled));
            }
        }
    }

    /// Takes in all commands there are; sleeps for the first one if there is nothing to do. False: stop.
    fn receive(&mut self, progress: bool) -> bool {
        let idle = self.encoders.is_idle() && self.served.iter().all(|served| served.stepper.is_idle());
        let first = if idle {
            match self.next_cut() {
                None => self.commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => self.commands.recv_timeout(at.saturating_duration_since(Instant::now())),
            }
        } else if progress {
            Err(RecvTimeoutError::Timeout)
        } else {
            self.commands.recv_timeout(STUCK_PAUSE)
        };
        let go_on = match first {
            Ok(command) => self.obey(command),
            Err(RecvTimeoutError::Timeout) => true,
            Err(RecvTimeoutError::Disconnected) => false,
        };
        if !go_on {
            return false;
        }
        while let Ok(command) = self.commands.try_recv() {
            if !self.obey(command) {
                return false;
            }
        }
        true
    }

    /// False: stop.
    fn obey(&mut self, command: Command) -> bool {
        match command {
            Command::Add { id, mut stepper, resident, ready } => {
                let outcome = stepper.warm();
                if outcome.is_ok() {
                    resident.stats.enter(ModelState::Ready);
                    self.served.push(Served { id, stepper, resident });
                }
                let _ = ready.send(outcome);
            }
            Command::Submit { id, choices } => match self.served.iter_mut().find(|served| served.id == id) {
                Some(served) => served.stepper.submit(choices),
                // Only a handle submits, and a model outlives its handles unless it was cut.
                None => end_all(choices, || sequence::Ending::Failed(events::Failure::Unloaded)),
            },
            Command::Drain { id, cut_at } => {
                if let Some(served) = self.served.iter_mut().find(|served| served.id == id) {
                    served.resident.drain(cut_at);
                }
            }
            Command::Retire { id } => {
                if let Some(served) = self.served.iter_mut().find(|served| served.id == id) {
                    served.resident.retire();
                }
                self.free_leaving();
            }
            Command::Encoder(command) => self.encoders.obey(command),
            Command::Stop => return false,
        }
        true
    }

    /// When the next draining model loses whoever is left on it.
    fn next_cut(&self) -> Option<Instant> {
        let mine = self.served.iter().filter_map(|served| served.resident.cut_at()).min();
        mine.into_iter().chain(self.encoders.next_cut()).min()
    }

    fn free_leaving(&mut self) {
        let now = Instant::now();
        for served in self.served.iter_mut().filter(|served| served.resident.is_cut(now)) {
            served.stepper.end_all(|| sequence::Ending::Failed(events::Failure::Unloaded));
        }
        self.served.retain(|served| !(served.resident.may_go(now) && served.stepper.is_idle()));
    }
}

/// What a panic said.
fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
    format!("panic: {}", text.unwrap_or("of unknown kind"))
}

fn end_all(choices: Vec<Sequence>, ending: impl Fn() -> sequence::Ending) {
    choices.into_iter().for_each(|choice| choice.end(ending()));
}
