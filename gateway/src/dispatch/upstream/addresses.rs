//! A server's addresses: looked up in the background, so that no request waits for DNS but the first, and tried in order,
//! so that a dead one is nobody's fate.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

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
    /// One lookup at a time: whoever needs it waits for the same one.
    asking: tokio::sync::Mutex<()>,
    turn: AtomicUsize,
}

#[derive(Default)]
struct Known {
    /// In the resolver's order (RFC 6724), each with when it was last found dead.
    addresses: Vec<(SocketAddr, Option<Instant>)>,
    /// When to ask again; never for an address that was written down.
    due: Option<Instant>,
}

impl Addresses {
    pub fn new(host: &str, port: u16) -> Addresses {
        let written: Option<IpAddr> = host.parse().ok();
        let addresses = written.map(|ip| (SocketAddr::new(ip, port), None)).into_iter().collect();
        let known = Mutex::new(Known { addresses, due: None });
        let (asking, turn) = (tokio::sync::Mutex::default(), AtomicUsize::new(0));
        Addresses(Arc::new(Shared { host: host.to_owned(), port, known, asking, turn }))
    }

    /// The addresses in the order in which to try them: the resolver's first family in turn, then the others; those that
    /// were just found dead last.
    ///
    /// # Errors
    /// The resolver's, while there is no answer at all.
    pub async fn in_turn(&self) -> io::Result<Vec<SocketAddr>> {
        let (is_unknown, is_due) = {
            let known = self.0.known.lock();
            (known.addresses.is_empty(), known.due.is_some_and(|due| due <= Instant::now()))
        };
        if is_unknown {
            self.ask().await?;
        } else if is_due {
            let again = self.clone();
            // A failure leaves the old answer standing.
            tokio::spawn(async move { again.ask().await });
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
        for (found, dead) in known.addresses.iter_mut().filter(|(found, _)| *found == address) {
            tracing::debug!(%found, "an address is avoided");
            *dead = Some(Instant::now());
        }
    }

    async fn ask(&self) -> io::Result<()> {
        let _one_at_a_time = self.0.asking.lock().await;
        {
            let known = self.0.known.lock();
            // Somebody else has asked while we waited.
            if !known.addresses.is_empty() && known.due.is_none_or(|due| due > Instant::now()) {
                return Ok(());
            }
        }
        let (tell, told) = tokio::sync::oneshot::channel();
        let (host, port) = (self.0.host.clone(), self.0.port);
        // A thread of its own: a resolver that hangs must not take one from work that others wait for.
        std::thread::Builder::new().name("resolver".into()).spawn(move || {
            let found = (host.as_str(), port).to_socket_addrs().map(Iterator::collect::<Vec<_>>);
            // Nobody may be waiting any more.
            let _ = tell.send(found);
        })?;
        let found = told.await.unwrap_or_else(|_| Err(io::ErrorKind::Other.into()));
        let mut known = self.0.known.lock();
        match found {
            Ok(found) if !found.is_empty() => {
                known.addresses = found.into_iter().map(|address| (address, None)).collect();
                known.due = Some(Instant::now() + FRESH);
                Ok(())
            }
            failed => {
                known.due = Some(Instant::now() + AGAIN);
                failed.map(|_| ())
            }
        }
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
        let written = Addresses::new("127.0.0.1", 7);
        assert_eq!(written.in_turn().await.unwrap(), ["127.0.0.1:7".parse().unwrap()]);
        let named = Addresses::new("localhost", 7);
        assert!(named.in_turn().await.unwrap().iter().all(|address| address.ip().is_loopback() && address.port() == 7));
        assert!(Addresses::new("no-such-host.invalid", 7).in_turn().await.is_err());
    }
}
