//! Have we answered this? → the answer, or leave to ask once for everybody who asks the same now.
//!
//! Exact and in memory. Only complete answers are kept, of the target that the request was routed to, and only where the
//! same request must get the same answer (or the route says that any will do). Tenants never share.

mod flight;
mod key;

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use moka::Expiry;

use crate::accounting::core::Usage;
use crate::accounting::row::UsageSource;
use crate::answer::{Chunk, Chunks, End, Ended, Finish, Part};
use crate::config::{CacheRule, Timeouts};
use crate::observe::metrics::Metrics;
use crate::ports::Inbound;
use crate::refusal::Refusal;
use crate::routing::Route;
pub use flight::Flight;
use flight::{Flights, Landing};
pub use key::{Key, key};

/// One answer may take this share of the cache at the most.
const SHARE_MAX: u64 = 8;
/// What an entry costs beyond its text.
const ENTRY_BYTES: usize = 256;

/// A complete answer.
#[derive(Debug)]
pub struct Entry {
    parts: Vec<Part>,
    finishes: Vec<Finish>,
    /// As first produced.
    pub usage: Usage,
    pub source: UsageSource,
    bytes: u32,
    made: Instant,
    ttl: Duration,
}

/// Answers by what was asked, and the flights that will bring more.
pub struct Cache {
    entries: moka::sync::Cache<Key, Arc<Entry>>,
    flights: Flights,
    entry_bytes_max: usize,
    metrics: Arc<Metrics>,
}

/// What there is for a request.
pub enum Find {
    /// It was answered before, or just now for somebody else.
    Hit { entry: Arc<Entry>, how: &'static str },
    /// Nobody has asked: whoever asks the same meanwhile waits for this flight.
    Lead(Flight),
    /// It is not to be cached, or somebody else's flight brought nothing that can be shared.
    Alone,
}

struct PerEntry;

impl Expiry<Key, Arc<Entry>> for PerEntry {
    fn expire_after_create(&self, _key: &Key, entry: &Arc<Entry>, _now: Instant) -> Option<Duration> {
        Some(entry.ttl)
    }
}

impl Cache {
    pub fn new(bytes_max: u64, metrics: Arc<Metrics>) -> Arc<Cache> {
        let entries = moka::sync::Cache::builder()
            .max_capacity(bytes_max)
            .weigher(|_, entry: &Arc<Entry>| entry.bytes)
            .expire_after(PerEntry)
            .build();
        let entry_bytes_max = usize::try_from(bytes_max / SHARE_MAX).unwrap_or(usize::MAX);
        Arc::new(Cache { entries, flights: Flights::default(), entry_bytes_max, metrics })
    }

    /// Looks the request up, and waits for somebody else's answer to it as long as a model would be waited for; its own
    /// must be there by `end`. Returns also how long it waited.
    ///
    /// # Errors
    /// `ClientGone` and `Draining`, while waiting.
    pub async fn find(
        self: &Arc<Self>,
        key: Option<Key>,
        route: &Route,
        end: Instant,
        inbound: &mut impl Inbound,
    ) -> Result<(Find, Duration), Refusal> {
        let mut waited = Duration::ZERO;
        let (Some(key), Some(rule)) = (key, route.cache()) else { return Ok((Find::Alone, waited)) };
        let Timeouts { first_token, idle, .. } = route.timeouts();
        // Half of the time at the most: whoever goes alone then has the other half.
        let now = Instant::now();
        let patience = now + (first_token + idle).min(end.saturating_duration_since(now) / 2);
        let found = loop {
            if let Some(entry) = self.get(&key, rule) {
                break Find::Hit { entry, how: "hit" };
            }
            let mut landing = match self.flights.board(self, key, rule.ttl) {
                // One that landed between these two looks is as good.
                Ok(flight) => match self.get(&key, rule) {
                    Some(entry) => break Find::Hit { entry, how: "hit" },
                    None => break Find::Lead(flight),
                },
                Err(landing) => landing,
            };
            let _waiting = Waiting::begin(&self.metrics);
            let boarded = Instant::now();
            let landed = tokio::select! {
                landed = landing.wait() => landed,
                why = inbound.gone() => return Err(why),
                // It comes no faster than its leader reads it, who may be slow.
                () = tokio::time::sleep_until(patience.into()) => Landing::Failed,
            };
            waited += boarded.elapsed();
            match landed {
                Landing::Landed(entry) => break Find::Hit { entry, how: "coalesced" },
                Landing::Failed => break Find::Alone,
                // Whoever led it has left: somebody else does.
                Landing::Lost => {}
            }
        };
        let result = match &found {
            Find::Hit { how, .. } => how,
            Find::Lead(_) => "miss",
            Find::Alone => "alone",
        };
        self.metrics.cache_request(route.name(), result);
        Ok((found, waited))
    }

    /// Who else may have written an entry may also have wanted it kept for longer.
    fn get(&self, key: &Key, rule: CacheRule) -> Option<Arc<Entry>> {
        self.entries.get(key).filter(|entry| entry.made.elapsed() < rule.ttl)
    }

    /// Bytes that answers take.
    pub fn bytes(&self) -> u64 {
        self.entries.run_pending_tasks();
        self.entries.weighted_size()
    }
}

impl Entry {
    fn new(parts: Vec<Part>, finishes: Vec<Finish>, end: (Usage, UsageSource), ttl: Duration) -> Entry {
        let bytes = ENTRY_BYTES + parts.iter().map(Part::bytes).sum::<usize>();
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        Entry { parts, finishes, usage: end.0, source: end.1, bytes, made: Instant::now(), ttl }
    }

    /// The answer once more.
    pub fn replay(self: &Arc<Self>) -> Box<dyn Chunks> {
        Box::new(Replay { entry: self.clone(), next: 0 })
    }
}

/// Counts one who waits for somebody else's answer.
struct Waiting<'m>(&'m Metrics);

impl Waiting<'_> {
    fn begin(metrics: &Metrics) -> Waiting<'_> {
        metrics.cache_waiting(1);
        Waiting(metrics)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.cache_waiting(-1);
    }
}

struct Replay {
    entry: Arc<Entry>,
    next: usize,
}

impl Chunks for Replay {
    fn poll_next(&mut self, _context: &mut Context<'_>) -> Poll<Chunk> {
        let entry = &self.entry;
        self.next += 1;
        Poll::Ready(match entry.parts.get(self.next - 1) {
            Some(part) => Chunk::Part(part.clone()),
            None => Chunk::End(End {
                how: Ended::Finished(entry.finishes.clone()),
                usage: entry.usage,
                source: entry.source,
                service: None,
                engine: None,
            }),
        })
    }

    fn cancel(&mut self) {}
}
