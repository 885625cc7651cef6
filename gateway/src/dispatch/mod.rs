//! Who answers → `Answer`.

pub mod embedded;

use std::collections::HashMap;
use std::sync::Arc;

use crate::accounting::settlement::Running;
use crate::answer::Answer;
use crate::api::openai::chat::ChatRequest;
use crate::auth::Caller;
use crate::refusal::Refusal;
use crate::routing::{Measure, Route};
use embedded::Embedded;

/// Every model that can answer, by name.
#[derive(Clone, Default)]
pub struct Backends(pub HashMap<String, Arc<Embedded>>);

impl Backends {
    /// Starts the work. If the backend would not take it, nothing is owed.
    ///
    /// # Errors
    /// What the backend said.
    pub fn send(
        &self,
        running: Running,
        caller: &Caller,
        route: &Route,
        request: &ChatRequest,
        measure: Measure,
    ) -> Result<Answer, Refusal> {
        match self.0.get(route.model()) {
            Some(model) => model.send(running, caller, request, measure),
            None => {
                running.release();
                Err(Refusal::ModelUnavailable { model: route.name().to_owned() })
            }
        }
    }
}
