//! A server's addresses: looked up in the background, so that no request waits for DNS but the first.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How old an answer of the resolver may be before it is asked again.
const FRESH: Duration = Duration::from_secs(30);

#[derive(Clone)]
pub struct Addresses(Arc<Shared>);

struct Shared {
    host: String,
    port: u16,
    known: Mutex<Known>,
    turn: AtomicUsize,
}

#[derive(Default)]
struct Known {
    addresses: Vec<SocketAddr>,
    /// `None` for an address that was written down, which never grows old.
    since: Option<Instant>,
    is_asking: bool,
}

impl Addresses {
    pub fn new(host: &str, port: u16) -> Addresses {
        let written: Option<IpAddr> = host.parse().ok();
        let addresses = written.map(|ip| SocketAddr::new(ip, port)).into_iter().collect();
        let known = Mutex::new(Known { addresses, ..Known::default() });
        Addresses(Arc::new(Shared { host: host.to_owned(), port, known, turn: AtomicUsize::new(0) }))
    }

    /// One of the addresses, in turn.
    ///
    /// # Errors
    /// The resolver's, while there is no answer at all.
    pub async fn pick(&self) -> io::Result<SocketAddr> {
        let must_wait = {
            let mut known = self.0.known.lock();
            let is_old = known.since.is_some_and(|since| since.elapsed() > FRESH);
            if is_old && !known.is_asking {
                known.is_asking = true;
                let again = self.clone();
                // A failure leaves the old answer standing.
                tokio::spawn(async move {
                    let _ = again.ask().await;
                });
            }
            known.addresses.is_empty()
        };
        if must_wait {
            self.ask().await?;
        }
        let known = self.0.known.lock();
        let turn = self.0.turn.fetch_add(1, Ordering::Relaxed);
        let picked = known.addresses.get(turn % known.addresses.len().max(1));
        picked.copied().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address"))
    }

    async fn ask(&self) -> io::Result<()> {
        let found = tokio::net::lookup_host((self.0.host.as_str(), self.0.port)).await;
        let mut known = self.0.known.lock();
        known.is_asking = false;
        let addresses: Vec<SocketAddr> = found?.collect();
        if !addresses.is_empty() {
            known.addresses = addresses;
        }
        known.since = Some(Instant::now());
        Ok(())
    }
}
