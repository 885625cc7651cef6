//! How much of a model's queue each tenant holds, so that one cannot fill it alone.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Counted in whatever its owner counts.
#[derive(Debug, Default)]
pub(crate) struct Places(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    total: u64,
    /// Of those that hold any.
    tenants: HashMap<u64, u64>,
}

/// The most that may be held.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Most {
    pub total: u64,
    pub tenant: u64,
}

impl Most {
    /// No tenant holds more than half of it: there is always room for another.
    pub fn halves(total: u64) -> Most {
        Most { total, tenant: total.div_ceil(2) }
    }
}

/// Held until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    tenant: u64,
    count: u64,
}

impl Places {
    /// None: too much is held. What alone is more than there may ever be is let in when nothing is held: it would be
    /// refused for ever.
    pub fn take(self: &Arc<Self>, tenant: u64, count: u64, most: Most) -> Option<Place> {
        let mut held = self.held();
        let own = held.tenants.get(&tenant).copied().unwrap_or(0);
        let has_room = |held: u64, most: u64| held == 0 || held.saturating_add(count) <= most;
        if !has_room(held.total, most.total) || !has_room(own, most.tenant) {
            return None;
        }
        held.total += count;
        held.tenants.insert(tenant, own + count);
        Some(Place { places: Arc::clone(self), tenant, count })
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// One of it, apart.
    pub fn split(&mut self) -> Place {
        self.count -= 1;
        Place { places: Arc::clone(&self.places), tenant: self.tenant, count: 1 }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.places.held();
        held.total -= self.count;
        if let Some(own) = held.tenants.get_mut(&self.tenant) {
            *own -= self.count;
            if *own == 0 {
                held.tenants.remove(&self.tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Most, Place, Places};
    use std::sync::Arc;

    #[test]
    fn no_tenant_holds_more_than_half_and_what_is_too_much_is_let_in_alone() {
        let places = Arc::<Places>::default();
        let take = |tenant, count| places.take(tenant, count, Most::halves(5));
        let mut held: Vec<Place> = (0..3).map(|_| take(1, 1).expect("a place")).collect();
        assert!(take(1, 1).is_none(), "half, rounded up");
        assert!(take(2, 3).is_none(), "more than are left");
        let others = take(2, 2).expect("the rest");
        assert!(take(3, 1).is_none(), "all are held");
        held.pop();
        assert!(take(1, 1).is_some());
        drop((held, others));
        let many = take(1, 100).expect("nobody is here");
        assert!(take(2, 1).is_none());
        drop(many);
        assert!(places.held().tenants.is_empty() && places.held().total == 0);
    }
}
