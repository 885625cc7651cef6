//! `Ticket → Running → settled`: every admitted request ends in exactly one priced row, whatever happens to it.
//!
//! The values carry the duty. A `Ticket` dropped is released and costs nothing; a `Running` dropped is settled with the
//! tokens counted so far, else with its reservation, so that neither a hang-up nor a panic is free. The journal has
//! reserved room for the last row since admission. Nothing here knows tokio, pingora or a file.

mod journal;
mod pending;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::core::{NanoUsd, Usage};
use super::price::{Extras, Price};
use super::row::{Outcome, Role, Row, Service, UsageSource};
use crate::ports::{Clock, Meter};

pub use journal::{Durability, Held, Journal, JournalClosed, Slot};
pub use pending::Pending;
use pending::{Told, Waiting};

/// What limits hold for a request until its end. Dropped, all of it is given back.
pub trait Hold: Send {
    /// Keeps what was used and gives the rest back. `model`: whose answer it is, or who was asked last.
    fn settle(self: Box<Self>, receipt: &Receipt, model: &str);
}

/// Nothing is held.
impl Hold for () {
    fn settle(self: Box<Self>, _receipt: &Receipt, _model: &str) {}
}

/// How a request was settled. The record, the span, the log line and the metrics all read it. What is told again from
/// the cache (`saved`) was somebody else's work: limits of tokens do not count it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    pub role: Role,
    pub outcome: Outcome,
    pub usage: Usage,
    pub usage_source: UsageSource,
    pub billed: NanoUsd,
    /// What it would have cost beyond the most that could be billed.
    pub unbilled: NanoUsd,
    pub provider_cost: NanoUsd,
    /// It was served in a way that nobody gave a price of its own, so it costs what others do.
    pub unpriced_service: Option<Service>,
    /// What the caller would have been billed, had it not been answered from the cache.
    pub saved: Option<NanoUsd>,
}

/// What both states carry: the row as it would stand at the bound, and how to end it.
struct Debt {
    row: Row,
    rate: Rate,
    cost_max: NanoUsd,
    durability: Durability,
    holds: Vec<Box<dyn Hold>>,
    slot: Slot,
    journal: Arc<dyn Journal>,
    clock: Arc<dyn Clock>,
    receipt: Arc<OnceLock<Receipt>>,
}

impl Debt {
    /// `delivered`: whether any of the answer has left. What nobody got is not charged if its row is in doubt.
    fn end(mut self, outcome: Outcome, used: Spent, delivered: bool) -> Pending {
        self.row.ended_ns = self.clock.now_ns().max(self.row.started_ns);
        let receipt = self.rate.fill(&mut self.row, outcome, used);
        let in_doubt = if delivered { used } else { Spent::NOTHING };
        let Debt { rate, journal, holds, receipt: cell, .. } = self;
        let told = Told { cell, holds, model: self.row.model.clone() };
        match journal.close(self.slot, self.row, self.durability) {
            Ok(None) => Pending::Told(told.tell(receipt, true)),
            Ok(Some(held)) => Waiting { held, receipt, rate, in_doubt, journal, told }.into(),
            Err(mut row) => {
                let receipt = rate.fill(&mut row, Outcome::Failed, in_doubt);
                journal.amend(None, *row);
                Pending::Told(told.tell(receipt, false))
            }
        }
    }

    /// As `end`, for when nobody waits for the disk.
    fn end_now(mut self, outcome: Outcome, used: Spent, delivered: bool) -> Result<Receipt, JournalClosed> {
        self.durability = Durability::Process;
        self.end(outcome, used, delivered).now()
    }
}

/// Turns what was spent into money.
#[derive(Clone)]
struct Rate {
    price: Price,
    costs: Costs,
    is_charged: bool,
    billed_max: Option<NanoUsd>,
}

impl Rate {
    fn fill(&self, row: &mut Row, outcome: Outcome, used: Spent) -> Receipt {
        row.outcome = outcome;
        row.usage = used.usage;
        row.usage_source = used.source;
        row.service_tier = used.service;
        let price = self.price.cost(&used.usage, row.extras());
        row.billed = self.billed(price);
        row.unpriced = self.price.is_missing && used.usage.total() > 0;
        row.provider_cost = match self.costs {
            Costs::DeviceTime => self.price.device_cost(used.compute),
            Costs::Tokens => price,
            Costs::Nothing => NanoUsd(0),
        };
        Receipt {
            role: row.role,
            outcome,
            usage: used.usage,
            usage_source: used.source,
            billed: row.billed,
            unbilled: NanoUsd(if self.is_charged { price.0 - row.billed.0 } else { 0 }),
            provider_cost: row.provider_cost,
            unpriced_service: used.service.filter(|service| self.price.lacks(Some(*service))),
            saved: (self.costs == Costs::Nothing).then_some(price),
        }
    }

    /// The intent is the row that recovery will let stand if this process is killed.
    fn intend(&self, row: &mut Row, reservation: Usage) {
        row.ended_ns = row.started_ns;
        row.outcome = Outcome::Killed;
        row.usage = reservation;
        row.usage_source = UsageSource::Reserved;
        row.billed = self.billed(self.price.most(&reservation, row.extras()));
        row.unpriced = self.price.is_missing;
        row.provider_cost = NanoUsd(0);
    }

    fn billed(&self, price: NanoUsd) -> NanoUsd {
        match self.is_charged {
            true => price.min(self.billed_max.unwrap_or(price)),
            false => NanoUsd(0),
        }
    }
}

/// What a settlement is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spent {
    pub usage: Usage,
    pub source: UsageSource,
    /// How an upstream says that it served it.
    pub service: Option<Service>,
    /// Time on a device of ours.
    pub compute: Duration,
}

impl Spent {
    pub const NOTHING: Spent = Spent {
        usage: Usage { input: 0, cache_read: 0, cache_write: 0, output: 0, reasoning: 0 },
        source: UsageSource::Counted,
        service: None,
        compute: Duration::ZERO,
    };
}

/// What an attempt costs us, as opposed to its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Costs {
    /// Our own device's time.
    DeviceTime,
    /// A provider's price list.
    Tokens,
    /// It was answered from the cache.
    Nothing,
}

/// What several attempts, of which one is paid, can use: of each amount the largest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Most {
    pub input: u64,
    pub output: u64,
    pub tokens: u64,
    pub cost: NanoUsd,
}

impl Most {
    pub fn of(usage: &Usage, asked: Extras, price: &Price) -> Most {
        let cost = price.most(usage, asked);
        Most { input: usage.prompt(), output: usage.completion(), tokens: usage.total(), cost }
    }

    pub fn max(self, other: Most) -> Most {
        Most {
            input: self.input.max(other.input),
            output: self.output.max(other.output),
            tokens: self.tokens.max(other.tokens),
            cost: self.cost.max(other.cost),
        }
    }
}

/// What a request may use at the most, and who it belongs to.
pub struct Terms {
    /// The row's identity; outcome, usage and money are filled in here.
    pub row: Row,
    pub price: Price,
    pub costs: Costs,
    pub reservation: Usage,
    /// What the allowed attempts can use: what limits reserve.
    pub most: Most,
    /// The same where it is no estimate, if a limit asks for that.
    pub bound: Option<Most>,
    /// What the caller is billed at the most, if that is settled before.
    pub billed_max: Option<NanoUsd>,
    /// False for work that nobody asked for, such as shadows.
    pub is_charged: bool,
    pub durability: Durability,
    pub hold: Box<dyn Hold>,
}

/// Another go at the same request, on other terms.
pub struct Attempt {
    pub role: Role,
    pub model: String,
    pub variant: String,
    pub provider: String,
    pub price: Price,
    pub costs: Costs,
    pub reservation: Usage,
}

/// Leave to spend up to a reservation. Dropped, it gives everything back.
#[must_use]
pub struct Ticket(Option<Debt>);

impl Ticket {
    /// Writes the intent. `receipt` will hold how it ended, for the request's record.
    ///
    /// # Errors
    /// When the journal has no room for intent and end.
    pub fn admit(
        terms: Terms,
        journal: Arc<dyn Journal>,
        clock: Arc<dyn Clock>,
        receipt: Arc<OnceLock<Receipt>>,
    ) -> Result<Ticket, JournalClosed> {
        let Terms { mut row, price, costs, reservation, most, bound: _, billed_max, is_charged, durability, hold } =
            terms;
        let cost_max = billed_max.unwrap_or(most.cost);
        let rate = Rate { price, costs, is_charged, billed_max };
        rate.intend(&mut row, reservation);
        let slot = journal.open(&row)?;
        let holds = vec![hold];
        Ok(Ticket(Some(Debt { row, rate, cost_max, durability, holds, slot, journal, clock, receipt })))
    }

    /// The most that this request can cost its caller.
    pub fn cost_max(&self) -> NanoUsd {
        self.0.as_ref().map_or(NanoUsd(0), |debt| debt.cost_max)
    }

    /// Answered without any work: the usage is told as it was first produced, and costs nobody anything.
    pub fn settle_hit(mut self, usage: Usage, source: UsageSource, cache: &str) -> Pending {
        let Some(mut debt) = self.0.take() else { return Pending::Told(Err(JournalClosed)) };
        cache.clone_into(&mut debt.row.cache);
        (debt.rate.is_charged, debt.rate.costs) = (false, Costs::Nothing);
        debt.end(Outcome::Answered, Spent { usage, source, ..Spent::NOTHING }, false)
    }

    /// From here on, tokens may be produced and are owed.
    pub fn start(mut self) -> Running {
        Running { debt: self.0.take(), meter: None }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(debt) = self.0.take() {
            release(debt);
        }
    }
}

fn release(debt: Debt) {
    // A panic before any work still ends as `panicked`, so that the row tells the same story as the log.
    let outcome = if std::thread::panicking() { Outcome::Panicked } else { Outcome::Released };
    // A drop has nobody to tell about a failed disk; the journal itself stops admitting.
    let _ = debt.end_now(outcome, Spent::NOTHING, false);
}

/// Work under way. It must be settled; dropped, it settles itself.
#[must_use]
pub struct Running {
    debt: Option<Debt>,
    meter: Option<Arc<dyn Meter>>,
}

impl Running {
    /// From now on a drop is settled by this count instead of by the reservation.
    pub fn measured_by(mut self, meter: Arc<dyn Meter>) -> Self {
        self.meter = Some(meter);
        self
    }

    /// What is owed if it ends here: the prompt and what was counted, else the reservation.
    pub fn spent_so_far(&self) -> Spent {
        self.debt.as_ref().map_or(Spent::NOTHING, |debt| self.counted(debt))
    }

    fn counted(&self, debt: &Debt) -> Spent {
        let reserved = debt.row.usage;
        let (usage, source) = match &self.meter {
            Some(meter) => (Usage { output: meter.produced(), reasoning: 0, ..reserved }, meter.source()),
            None => (reserved, UsageSource::Reserved),
        };
        Spent { usage, source, ..Spent::NOTHING }
    }

    /// Holds this as well until the end: what limits of the next attempt's model ask for.
    pub fn holds_too(&mut self, hold: Box<dyn Hold>) {
        if let Some(debt) = &mut self.debt {
            debt.holds.push(hold);
        }
    }

    /// This attempt gave nothing: it ends without a charge, and the next one is owed instead. Its intent is written
    /// before this one's end, so that a crash between the two leaves one of them to pay, and only one.
    ///
    /// # Errors
    /// When the journal has no room for another attempt; then this one has ended as failed.
    pub fn fail_over(mut self, next: Attempt) -> Result<Running, JournalClosed> {
        let Some(mut debt) = self.debt.take() else { return Err(JournalClosed) };
        let mut row = Row {
            attempt: debt.row.attempt + 1,
            role: next.role,
            model: next.model,
            variant: next.variant,
            provider: next.provider,
            started_ns: debt.clock.now_ns().max(debt.row.started_ns),
            ..debt.row.clone()
        };
        let rate = Rate { price: next.price, costs: next.costs, ..debt.rate };
        rate.intend(&mut row, next.reservation);
        let slot = match debt.journal.open(&row) {
            Ok(slot) => slot,
            Err(closed) => {
                let _ = debt.end_now(Outcome::Failed, Spent::NOTHING, false);
                return Err(closed);
            }
        };
        debt.row.ended_ns = row.started_ns;
        debt.rate.fill(&mut debt.row, Outcome::FailedOver, Spent::NOTHING);
        let failed = std::mem::replace(&mut debt.row, row);
        // Nobody is told of it.
        let ended = debt.journal.close(std::mem::replace(&mut debt.slot, slot), failed, Durability::Process);
        if let Err(failed) = ended {
            debt.journal.amend(None, *failed);
        }
        debt.rate = rate;
        Ok(Running { debt: Some(debt), meter: None })
    }

    /// Writes the terminal row. Only when it is durable may bytes that carry usage leave. `delivered`: whether any of the
    /// answer has left already.
    pub fn end(mut self, outcome: Outcome, spent: Spent, delivered: bool) -> Pending {
        self.debt.take().map_or(Pending::Told(Err(JournalClosed)), |debt| debt.end(outcome, spent, delivered))
    }

    /// As `end`, for work that nobody is told of.
    ///
    /// # Errors
    /// When the row is not even written.
    pub fn settle(mut self, outcome: Outcome, spent: Spent, delivered: bool) -> Result<Receipt, JournalClosed> {
        self.debt.take().map_or(Err(JournalClosed), |debt| debt.end_now(outcome, spent, delivered))
    }

    /// The backend would not take it: nothing was produced, nothing is owed.
    pub fn release(mut self) {
        if let Some(debt) = self.debt.take() {
            release(debt);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some(debt) = self.debt.take() else { return };
        let outcome = if std::thread::panicking() { Outcome::Panicked } else { Outcome::Aborted };
        let used = self.counted(&debt);
        let _ = debt.end_now(outcome, used, true);
    }
}

#[cfg(test)]
#[path = "settlement_model.rs"]
mod model;
