//! A server's addresses: looked up in the background, so that no request waits for DNS but the first, and tried in order,
//! so that a dead one is nobody's fate.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::watch;

/// How old an answer of the resolver may be before it is asked again.
const FRESH: Duration = Duration::from_secs(30);
/// After a failed lookup the next one waits this long.
const AGAIN: Duration = Duration::from_secs(5);
/// An address that could not be reached comes last for this long.
const AVOIDED: Duration = Duration::from_secs(10);

#[derive(Clone)]
pub struct Addresses(Arc<Shared>);

struct Shared {
    host: String,
    port: u16,
    known: Mutex<Known>,
    /// Goes up with every lookup that ends: whoever needs one waits for the one that is under way.
    lookups: watch::Sender<u64>,
    turn: AtomicUsize,
}

#[derive(Default)]
struct Known {
    /// In the resolver's order (RFC 6724), each with when it was last found dead.
    addresses: Vec<(SocketAddr, Option<Instant>)>,
    /// When to ask again; at once where nothing is known, never for an address that was written down.
    due: Option<Instant>,
    is_asking: bool,
}

impl Addresses {
    pub fn new(host: &str, port: u16) -> Addresses {
        let written: Option<IpAddr> = host.parse().ok();
        let due = if written.is_some() { None } else { Some(Instant::now()) };
        let addresses = written.map(|ip| (SocketAddr::new(ip, port), None)).into_iter().collect();
        let known = Mutex::new(Known { addresses, due, is_asking: false });
        let (lookups, turn) = (watch::Sender::new(0), AtomicUsize::new(0));
        Addresses(Arc::new(Shared { host: host.to_owned(), port, known, lookups, turn }))
    }

    /// The addresses in the order in which to try them: the resolver's first family in turn, then the others; those that
    /// were just found dead last.
    ///
    /// # Errors
    /// While there is no answer, and none comes within this time.
    pub async fn in_turn(&self, within: Duration) -> io::Result<Vec<SocketAddr>> {
        let mut lookups = self.0.lookups.subscribe();
        let must_wait = {
            let mut known = self.0.known.lock();
            if known.due.is_some_and(|due| due <= Instant::now()) && !known.is_asking {
                match self.ask() {
                    Ok(()) => known.is_asking = true,
                    Err(error) => tracing::warn!(%error, "no thread to look up a name with"),
                }
            }
            known.addresses.is_empty() && known.is_asking
        };
        if must_wait {
            // Who waits in vain leaves the lookup running: its answer is for the next one.
            let _ = tokio::time::timeout(within, lookups.changed()).await;
        }
        let known = self.0.known.lock();
        let turn = self.0.turn.fetch_add(1, Ordering::Relaxed);
        let order = order(&known.addresses, turn, Instant::now());
        if order.is_empty() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
        }
        Ok(order)
    }

    /// Nobody answers at this address at the moment.
    pub fn avoid(&self, address: SocketAddr) {
        let mut known = self.0.known.lock();
        for (_, dead) in known.addresses.iter_mut().filter(|(found, _)| *found == address) {
            *dead = Some(Instant::now());
        }
    }

    /// Looks the name up on a thread of its own: a resolver that hangs must not take one from work that others wait for,
    /// and a request that gives up must not take the answer with it.
    fn ask(&self) -> io::Result<()> {
        let addresses = self.clone();
        let look_up = move || {
            let shared = &addresses.0;
            let found = (shared.host.as_str(), shared.port).to_socket_addrs();
            let mut known = shared.known.lock();
            known.is_asking = false;
            match found.map(Iterator::collect::<Vec<_>>) {
                Ok(found) if !found.is_empty() => {
                    known.addresses = found.into_iter().map(|address| (address, None)).collect();
                    known.due = Some(Instant::now() + FRESH);
                }
                failed => {
                    // The old answer stands.
                    known.due = Some(Instant::now() + AGAIN);
                    tracing::warn!(host = shared.host, error = ?failed.err(), "an upstream's name cannot be resolved");
                }
            }
            drop(known);
            shared.lookups.send_modify(|lookups| *lookups += 1);
        };
        std::thread::Builder::new().name("resolver".into()).spawn(look_up).map(drop)
    }
}

fn order(addresses: &[(SocketAddr, Option<Instant>)], turn: usize, now: Instant) -> Vec<SocketAddr> {
    let is_dead = |dead: &Option<Instant>| dead.is_some_and(|since| now.saturating_duration_since(since) < AVOIDED);
    let (dead, alive): (Vec<_>, Vec<_>) = addresses.iter().partition(|(_, dead)| is_dead(dead));
    let first_family = alive.first().map(|(address, _)| address.is_ipv4());
    let (mut order, others): (Vec<SocketAddr>, Vec<SocketAddr>) =
        alive.iter().map(|(address, _)| *address).partition(|address| Some(address.is_ipv4()) == first_family);
    let places = order.len().max(1);
    order.rotate_left(turn % places);
    order.extend(others);
    order.extend(dead.iter().map(|(address, _)| *address));
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_resolvers_first_family_takes_turns_and_the_dead_come_last() {
        let [a, b, c] = ["10.0.0.1:1", "10.0.0.2:1", "[fd00::1]:1"].map(|text| text.parse::<SocketAddr>().unwrap());
        let now = Instant::now();
        let alive = [(a, None), (b, None), (c, None)];
        assert_eq!(order(&alive, 0, now), [a, b, c]);
        assert_eq!(order(&alive, 1, now), [b, a, c]);
        assert_eq!(order(&[(a, Some(now)), (b, None), (c, None)], 1, now), [b, c, a]);
        assert_eq!(order(&[(a, Some(now)), (b, None)], 0, now + AVOIDED), [a, b], "for a while");
        assert_eq!(order(&[], 3, now), []);
    }

    #[tokio::test]
    async fn a_name_is_looked_up_and_an_address_is_not() {
        let within = Duration::from_secs(20);
        let written = Addresses::new("127.0.0.1", 7);
        assert_eq!(written.in_turn(within).await.unwrap(), ["127.0.0.1:7".parse().unwrap()]);
        let named = Addresses::new("localhost", 7);
        assert!(
            named
                .in_turn(within)
                .await
                .unwrap()
                .iter()
                .all(|address| address.ip().is_loopback() && address.port() == 7)
        );
        assert!(Addresses::new("no-such-host.invalid", 7).in_turn(within).await.is_err());
    }
}
