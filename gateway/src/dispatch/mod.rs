//! Who answers → `Answer`.

pub mod embedded;
pub mod failover;
pub mod upstream;
pub mod waits;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::accounting::settlement::Running;
use crate::answer::Answer;
use crate::api::openai::request::Request;
use crate::ports::Priority;
use crate::refusal::Refusal;
use crate::routing::Leg;
use embedded::{Embedded, EmbeddingModel};
use upstream::UpstreamModel;

/// A model that can answer.
#[derive(Clone)]
pub enum Backend {
    Embedded(Arc<Embedded>),
    Embeddings(Arc<EmbeddingModel>),
    Upstream(Arc<UpstreamModel>),
}

/// Every model that can answer, by name.
#[derive(Clone, Default)]
pub struct Backends(pub HashMap<String, Backend>);

/// One attempt, beyond what its leg says.
pub struct Call<'a> {
    pub request: &'a Request,
    pub tenant: &'a str,
    pub request_id: &'a str,
    /// The span that the attempt is, as W3C `traceparent`.
    pub traceparent: String,
    pub urgency: Urgency,
    /// How long it may wait for a place in an engine of ours; as long as there is, if that is not said.
    pub queue: Option<Duration>,
    /// Not on a connection that was used before.
    pub is_fresh: bool,
}

/// Who waits for the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    User(Priority),
    /// Nobody: it runs only when no user does.
    Nobody,
}

impl Urgency {
    /// As the engine and its metrics call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Urgency::User(priority) => priority.as_str(),
            Urgency::Nobody => "shadow",
        }
    }
}

/// The backend would not begin. What is owed comes back with its reason: another one may be asked.
pub struct NotStarted {
    pub running: Running,
    pub refusal: Refusal,
}

impl Backends {
    /// Starts the work.
    ///
    /// # Errors
    /// `NotStarted`: what the backend said.
    pub fn start(&self, running: Running, leg: &Leg, call: &Call<'_>) -> Result<Answer, Box<NotStarted>> {
        match self.0.get(&leg.target.model) {
            Some(Backend::Embedded(model)) => model.start(running, leg, call),
            Some(Backend::Embeddings(model)) => model.start(running, leg, call),
            Some(Backend::Upstream(model)) => model.start(running, leg, call),
            None => {
                let refusal = Refusal::ModelUnavailable { model: leg.target.variant.clone() };
                Err(Box::new(NotStarted { running, refusal }))
            }
        }
    }
}
