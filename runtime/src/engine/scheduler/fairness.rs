//! What each tenant was given, in weighted tokens: of those who wait, whoever had least is next.
//!
//! After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): while two tenants have something that
//! waits, their counters differ by a constant. An idle hour is not saved up. Nor is one in which a little of a tenant ran
//! and nothing had to wait, beyond a credit: without any, a tenant whose next request comes when its last one began would
//! be behind for good.

use std::{
    collections::{BTreeSet, HashMap},
    time::Instant,
};

/// An output token costs a step of its own; a prompt token shares one with many.
pub(super) const PROMPT_WEIGHT: u64 = 1;
pub(super) const OUTPUT_WEIGHT: u64 = 2;

/// Idle tenants remembered at most. Beyond it those that had the least are forgotten, and return as if they had had no
/// more than anybody.
pub(super) const IDLE_TENANTS_MAX: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct Tenant {
    pub served: u64,
    /// Its sequences that wait or run.
    pub active: usize,
    /// Its entries in the queue.
    waiting: usize,
    /// When one of its requests last got blocks.
    last_admitted: Option<Instant>,
}

#[derive(Debug, Default)]
pub(super) struct Tenants {
    tenants: HashMap<u64, Tenant>,
    /// (served, tenant) of those with something in the queue.
    waiting: BTreeSet<(u64, u64)>,
    /// (served, tenant)
    idle: BTreeSet<(u64, u64)>,
    /// The least that anybody in the queue was given so far. Nobody comes back from idling with less.
    floor: u64,
    /// So much less may be had by one with something running.
    credit: u64,
}

impl Tenants {
    pub fn new(credit: u64) -> Tenants {
        Tenants { credit, ..Tenants::default() }
    }

    pub fn enter(&mut self, id: u64, sequences: usize) {
        self.raise_floor();
        let tenant = self.tenants.entry(id).or_default();
        if tenant.active == 0 {
            self.idle.remove(&(tenant.served, id));
            tenant.served = tenant.served.max(self.floor);
        }
        tenant.active += sequences;
    }

    pub fn leave(&mut self, id: u64) {
        let Some(tenant) = self.tenants.get_mut(&id) else { return };
        tenant.active -= 1;
        if tenant.active == 0 {
            self.idle.insert((tenant.served, id));
        }
        // Who has had no more than the floor would return at the floor anyway.
        while let Some(&(served, id)) = self.idle.first()
            && (served <= self.floor || self.idle.len() > IDLE_TENANTS_MAX)
        {
            self.idle.pop_first();
            self.tenants.remove(&id);
        }
    }

    /// An entry of an active tenant comes into the queue.
    pub fn queue(&mut self, id: u64) {
        self.raise_floor();
        let Some(tenant) = self.tenants.get_mut(&id) else { return };
        if tenant.waiting == 0 {
            if !seeded!(CreditWithoutEnd) {
                tenant.served = tenant.served.max(self.floor.saturating_sub(self.credit));
            }
            self.waiting.insert((tenant.served, id));
        }
        tenant.waiting += 1;
    }

    /// One leaves it.
    pub fn unqueue(&mut self, id: u64) {
        self.raise_floor();
        let Some(tenant) = self.tenants.get_mut(&id) else { return };
        tenant.waiting -= 1;
        if tenant.waiting == 0 {
            self.waiting.remove(&(tenant.served, id));
        }
    }

    /// For an active tenant.
    pub fn charge(&mut self, id: u64, tokens: u64) {
        let Some(tenant) = self.tenants.get_mut(&id) else { return };
        let waits = self.waiting.remove(&(tenant.served, id));
        tenant.served += tokens;
        if waits {
            self.waiting.insert((tenant.served, id));
        }
    }

    pub fn note_admission(&mut self, id: u64, now: Instant) {
        if let Some(tenant) = self.tenants.get_mut(&id) {
            tenant.last_admitted = Some(now);
        }
    }

    pub fn served(&self, id: u64) -> u64 {
        self.tenants.get(&id).map_or(0, |tenant| tenant.served)
    }

    pub fn last_admitted(&self, id: u64) -> Option<Instant> {
        self.tenants.get(&id)?.last_admitted
    }

    #[cfg(test)]
    pub fn all(&self) -> impl Iterator<Item = &Tenant> {
        self.tenants.values()
    }

    fn raise_floor(&mut self) {
        let least = self.waiting.first().map_or(0, |&(served, _)| served);
        self.floor = self.floor.max(least);
    }
}
