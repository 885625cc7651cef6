//! How many connections there may be, in all and from one address. A slot is given back when its connection is dropped.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::network::host;

#[derive(Debug)]
pub struct Slots {
    total_max: usize,
    per_address_max: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    total: usize,
    /// Never larger than `total`: an address without a connection has no entry.
    by_address: HashMap<IpAddr, usize>,
}

#[derive(Debug)]
pub struct Slot {
    slots: Arc<Slots>,
    /// Nobody's in particular for a proxy of ours.
    address: Option<IpAddr>,
}

impl Slots {
    pub fn new(total_max: usize, per_address_max: usize) -> Arc<Slots> {
        Arc::new(Slots { total_max, per_address_max, taken: Mutex::default() })
    }

    /// `None` at either cap. Without an address only the one on all counts: a proxy of ours brings many clients.
    pub fn take(self: &Arc<Self>, address: Option<IpAddr>) -> Option<Slot> {
        let address = address.map(host);
        let mut taken = self.taken.lock();
        if taken.total >= self.total_max {
            return None;
        }
        if let Some(address) = address {
            let from_here = taken.by_address.entry(address).or_default();
            if *from_here >= self.per_address_max {
                return None;
            }
            *from_here += 1;
        }
        taken.total += 1;
        Some(Slot { slots: self.clone(), address })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.slots.taken.lock();
        taken.total -= 1;
        let Some(address) = self.address else { return };
        if let Entry::Occupied(mut from_here) = taken.by_address.entry(address) {
            *from_here.get_mut() -= 1;
            if *from_here.get() == 0 {
                from_here.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn caps_hold_in_all_and_for_each_address_and_slots_come_back() {
        let slots = Slots::new(3, 2);
        let (a, b) = (slots.take(ip("10.0.0.1")), slots.take(ip("10.0.0.1")));
        assert!(a.is_some() && b.is_some());
        assert!(slots.take(ip("10.0.0.1")).is_none(), "the third from one address");
        assert!(slots.take(ip("::ffff:10.0.0.1")).is_none(), "the same address in its IPv6 spelling");
        let c = slots.take(ip("10.0.0.2"));
        assert!(c.is_some() && slots.take(ip("10.0.0.3")).is_none(), "the fourth in all");
        drop(a);
        assert!(slots.take(ip("10.0.0.1")).is_some());
        drop(b);
        let many = (slots.take(None), slots.take(None));
        assert!(many.0.is_some() && many.1.is_some(), "a proxy of ours has only the cap on all");
        assert!(slots.take(None).is_none());
        drop((c, many));
        let taken = slots.taken.lock();
        assert_eq!((taken.total, taken.by_address.len()), (0, 0), "who has left is forgotten");
    }

    #[test]
    fn an_ipv6_network_counts_as_one() {
        let slots = Slots::new(9, 1);
        let first = slots.take(ip("2001:db8::1"));
        assert!(first.is_some() && slots.take(ip("2001:db8::2")).is_none());
        assert!(slots.take(ip("2001:db8:0:1::1")).is_some());
    }
}
