//! Whose text is read next: tenants take turns, and so do the jobs of each.

use std::collections::{HashMap, VecDeque};

#[derive(Default)]
pub(super) struct Rota {
    /// Those who have jobs.
    tenants: VecDeque<u64>,
    jobs: HashMap<u64, VecDeque<u64>>,
}

impl Rota {
    pub fn push(&mut self, tenant: u64, job: u64) {
        let jobs = self.jobs.entry(tenant).or_default();
        if jobs.is_empty() {
            self.tenants.push_back(tenant);
        }
        jobs.push_back(job);
    }

    pub fn first(&self) -> Option<u64> {
        self.jobs.get(self.tenants.front()?)?.front().copied()
    }

    /// The first had its turn, and so had its tenant.
    pub fn pop(&mut self) {
        let Some(tenant) = self.tenants.pop_front() else { return };
        let Some(jobs) = self.jobs.get_mut(&tenant) else { return };
        jobs.pop_front();
        if jobs.is_empty() {
            self.jobs.remove(&tenant);
        } else {
            self.tenants.push_back(tenant);
        }
    }
}
