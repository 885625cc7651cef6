//! Who is let in next of those who wait for the same limit: keys take turns, by what they ask for.
//!
//! Each key's requests follow each other in a time of their own, in which asking for more takes longer; the earliest end is
//! next (self-clocked fair queueing). So a key that sends a thousand requests delays another's first one by one of its own.

use std::collections::{BTreeMap, HashMap};

/// Who waits, at most …
const WAITING_MAX: usize = 1_000;
/// … and of one key.
const OF_A_KEY_MAX: usize = WAITING_MAX / 2;

#[derive(Debug, Default)]
pub struct Order {
    /// By the end in that time, and among equals by who came first.
    waiting: BTreeMap<Place, String>,
    keys: HashMap<String, Key>,
    /// The end of whoever went in last.
    time: u64,
    number: u64,
}

#[derive(Debug, Default)]
struct Key {
    waiting: usize,
    /// The end of its last request.
    end: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    end: u64,
    number: u64,
}

impl Order {
    /// A place, or `None` where too many wait already.
    pub fn join(&mut self, key: &str, amount: u64) -> Option<Place> {
        if self.waiting.len() >= WAITING_MAX {
            return None;
        }
        let time = self.time;
        let of_key = self.keys.entry(key.to_owned()).or_default();
        if of_key.waiting >= OF_A_KEY_MAX {
            return None;
        }
        of_key.waiting += 1;
        of_key.end = of_key.end.max(time).saturating_add(amount.max(1));
        self.number += 1;
        let place = Place { end: of_key.end, number: self.number };
        self.waiting.insert(place, key.to_owned());
        Some(place)
    }

    /// Who is let in next.
    pub fn next(&self) -> Option<Place> {
        self.waiting.keys().next().copied()
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Gives up a place, by going in or by going away.
    pub fn leave(&mut self, place: Place, went_in: bool) {
        let Some(key) = self.waiting.remove(&place) else { return };
        if went_in {
            self.time = self.time.max(place.end);
        }
        if let Some(of_key) = self.keys.get_mut(&key) {
            of_key.waiting -= 1;
            // Who has waited for nothing since is nobody's debtor.
            if of_key.waiting == 0 && of_key.end <= self.time {
                self.keys.remove(&key);
            }
        }
        if self.waiting.is_empty() {
            (self.keys, self.time) = (HashMap::new(), 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Lets `rounds` amounts in, while every key keeps as many waiting as it likes to; how much each was given.
    fn simulate(keys: &[(usize, u64)], rounds: u64) -> Vec<u64> {
        let mut order = Order::default();
        let mut places: Vec<Vec<(Place, u64)>> = vec![Vec::new(); keys.len()];
        let mut given = vec![0; keys.len()];
        while given.iter().sum::<u64>() < rounds {
            for (key, (depth, amount)) in keys.iter().enumerate() {
                while places[key].len() < *depth {
                    // Nobody asks for the same each time.
                    let amount = 1 + (amount * (places[key].len() as u64 + given[key]) * 7919) % amount.max(&1);
                    places[key].push((order.join(&key.to_string(), amount).expect("room"), amount));
                }
            }
            let next = places.iter().enumerate().find_map(|(key, places)| {
                Some((key, places.iter().position(|(place, _)| order.next() == Some(*place))?))
            });
            let (key, at) = next.expect("somebody is next");
            let (place, amount) = places[key].swap_remove(at);
            order.leave(place, true);
            given[key] += amount;
        }
        given
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn keys_that_always_wait_get_the_same_however_much_they_send(
            keys in proptest::collection::vec((1usize..40, 1u64..50), 2..8),
        ) {
            let given = simulate(&keys, 4_000);
            let (least, most) = (given.iter().min().unwrap(), given.iter().max().unwrap());
            prop_assert!(*least > 0, "nobody starves");
            prop_assert!(*most as f64 <= 1.5 * *least as f64, "{given:?}");
        }

        #[test]
        fn whatever_happens_somebody_is_next_while_anybody_waits(
            steps in proptest::collection::vec((0u8..4, 0usize..6, 1u64..100, any::<usize>()), 1..200),
        ) {
            let mut order = Order::default();
            let mut places: Vec<Place> = Vec::new();
            for (what, key, amount, which) in steps {
                match what {
                    0 | 1 => places.extend(order.join(&key.to_string(), amount)),
                    2 if !places.is_empty() => {
                        order.leave(places.swap_remove(which % places.len()), false);
                    }
                    _ => {
                        if let Some(at) = places.iter().position(|place| order.next() == Some(*place)) {
                            order.leave(places.swap_remove(at), true);
                        }
                    }
                }
                prop_assert_eq!(places.iter().filter(|place| order.next() == Some(**place)).count(), usize::from(!places.is_empty()));
                prop_assert_eq!(order.waiting.len(), places.len());
                prop_assert!(order.keys.len() <= 6 && (!places.is_empty() || order.keys.is_empty()));
            }
        }
    }

    #[test]
    fn a_line_has_an_end_and_one_key_is_no_more_than_half_of_it() {
        let mut order = Order::default();
        let loud = (0..WAITING_MAX).filter_map(|_| order.join("loud", 1)).count();
        assert_eq!(loud, OF_A_KEY_MAX);
        let quiet = order.join("quiet", 1).expect("there is room for others");
        order.leave(order.next().unwrap(), true);
        assert_eq!(order.next(), Some(quiet), "after one of them, not after five hundred");
        let others = (0..WAITING_MAX).filter_map(|i| order.join(&format!("key-{i}"), 1)).count();
        assert_eq!(others, WAITING_MAX - OF_A_KEY_MAX);
    }
}
