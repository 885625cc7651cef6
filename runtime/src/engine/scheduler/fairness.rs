//! What each tenant was given, in weighted tokens: of those who wait, whoever had least is next.
//!
//! After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): while two tenants have work, their
//! counters differ by a constant.

use std::collections::HashMap;

/// An output token costs a step of its own; a prompt token shares one with many.
pub(super) const PROMPT_WEIGHT: u64 = 1;
pub(super) const OUTPUT_WEIGHT: u64 = 2;

/// Idle tenants remembered at most. Beyond it they are forgotten, and return as if they had had the least.
pub(super) const IDLE_TENANTS_MAX: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct Tenant {
    pub served: u64,
    /// Its sequences that wait or run.
    pub active: usize,
}

#[derive(Debug, Default)]
pub(super) struct Tenants {
    tenants: HashMap<u64, Tenant>,
    /// The least that any active tenant was given so far. Nobody returns from idling with less: an idle hour is not saved
    /// up.
    floor: u64,
}

impl Tenants {
    pub fn enter(&mut self, tenant: u64, sequences: usize) {
        self.raise_floor();
        let floor = self.floor;
        let tenant = self.tenants.entry(tenant).or_default();
        if tenant.active == 0 {
            tenant.served = tenant.served.max(floor);
        }
        tenant.active += sequences;
    }

    pub fn leave(&mut self, tenant: u64) {
        self.raise_floor();
        if let Some(tenant) = self.tenants.get_mut(&tenant) {
            tenant.active -= 1;
        }
        // Who has had no more than the floor would return at the floor anyway.
        let floor = self.floor;
        let crowded = self.tenants.len() > IDLE_TENANTS_MAX;
        self.tenants.retain(|_, tenant| tenant.active > 0 || (tenant.served > floor && !crowded));
    }

    pub fn charge(&mut self, tenant: u64, tokens: u64) {
        if let Some(tenant) = self.tenants.get_mut(&tenant) {
            tenant.served += tokens;
        }
    }

    pub fn served(&self, tenant: u64) -> u64 {
        self.tenants.get(&tenant).map_or(0, |tenant| tenant.served)
    }

    #[cfg(test)]
    pub fn all(&self) -> impl Iterator<Item = &Tenant> {
        self.tenants.values()
    }

    fn raise_floor(&mut self) {
        let active = self.tenants.values().filter(|tenant| tenant.active > 0);
        self.floor = active.map(|tenant| tenant.served).min().unwrap_or(0).max(self.floor);
    }
}
