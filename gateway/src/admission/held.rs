//! What a request holds of its limits until it ends, and what it then has used.

use std::sync::Arc;

use super::Watch;
use super::counts::Grant;
use super::queue::Queue;
use crate::accounting::core::NanoUsd;
use crate::accounting::row::Outcome;
use crate::accounting::settlement::{Hold, Most, Receipt};
use crate::api::limit::Of;

/// What a request has reserved. Dropped, all of it is given back.
pub(super) struct Held {
    grant: Option<Box<dyn Grant>>,
    /// Whom rules by model count it for.
    model: String,
    most: Most,
    watch: Arc<Watch>,
    queue: Arc<Queue>,
}

impl Held {
    pub(super) fn new(
        grant: Box<dyn Grant>,
        model: &str,
        most: Most,
        watch: Arc<Watch>,
        queue: Arc<Queue>,
    ) -> Box<Held> {
        watch.metrics.reserved(signed(most.tokens), signed(most.cost.0));
        Box::new(Held { grant: Some(grant), model: model.to_owned(), most, watch, queue })
    }
}

impl Hold for Held {
    fn settle(mut self: Box<Self>, receipt: &Receipt, model: &str) {
        if let Some(grant) = self.grant.take() {
            let is_anothers = self.model != model;
            grant.settle(&|rule| if is_anothers && rule.is_by_model() { 0 } else { used(rule.of, receipt) });
        }
        if receipt.unbilled > NanoUsd(0) {
            tracing::warn!(usd = %receipt.unbilled, "a server reports more than a strict budget had reserved; it is not billed");
            self.watch.metrics.unbilled(receipt.unbilled);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.grant.take());
        self.queue.freed();
        self.watch.metrics.reserved(-signed(self.most.tokens), -signed(self.most.cost.0));
    }
}

/// What a request that could use so much asks of a rule.
pub(super) fn amount(of: Of, most: Most) -> u64 {
    match of {
        Of::Requests | Of::Concurrency => 1,
        Of::Tokens => most.tokens,
        Of::InputTokens => most.input,
        Of::OutputTokens => most.output,
        Of::Usd => most.cost.0,
    }
}

/// What a request has used when it ends. What is told again from a cache is a request, and nobody's tokens.
fn used(of: Of, receipt: &Receipt) -> u64 {
    let tokens = |tokens: u64| if receipt.saved.is_some() { 0 } else { tokens };
    match of {
        Of::Requests => u64::from(receipt.outcome != Outcome::Released),
        Of::Concurrency => 0,
        Of::Tokens => tokens(receipt.usage.total()),
        Of::InputTokens => tokens(receipt.usage.prompt()),
        Of::OutputTokens => tokens(receipt.usage.completion()),
        Of::Usd => receipt.billed.0,
    }
}

/// A gauge's change. Neither tokens nor money of one request come near the bound.
fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
