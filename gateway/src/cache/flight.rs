//! Single flight: of everybody who asks the same at the same time, one asks the model and the others wait for its answer.
//!
//! Whoever leads owns the work and pays for it. When it leaves, the first of those who wait leads anew, on its own
//! account; when the answer fails or cannot be shared, everybody goes alone.

use std::collections::HashMap;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::{Cache, Entry, Key};
use crate::answer::{Chunk, Chunks, Ended};
use crate::api::openai::gather::Gather;

#[derive(Default)]
pub struct Flights(Mutex<HashMap<Key, watch::Receiver<Option<Landing>>>>);

/// How a flight ended.
#[derive(Clone)]
pub enum Landing {
    Landed(Arc<Entry>),
    /// The answer failed, or only some of those who wait may have it.
    Failed,
    /// Its leader left.
    Lost,
}

/// Waits for somebody else's flight.
pub struct Passenger(watch::Receiver<Option<Landing>>);

impl Passenger {
    pub async fn wait(&mut self) -> Landing {
        // A sender that is dropped without a word has left.
        let landed = self.0.wait_for(Option::is_some).await;
        landed.ok().and_then(|landed| landed.clone()).unwrap_or(Landing::Lost)
    }
}

impl Flights {
    /// Leads a new flight, or waits for the one that is under way.
    pub fn board(&self, cache: &Arc<Cache>, key: Key, ttl: Duration) -> Result<Flight, Passenger> {
        let mut flights = self.0.lock();
        if let Some(flight) = flights.get(&key) {
            return Err(Passenger(flight.clone()));
        }
        let (landing, passengers) = watch::channel(None);
        flights.insert(key, passengers);
        Ok(Flight { cache: cache.clone(), key, ttl, landing })
    }
}

/// The right to ask for everybody. Dropped, somebody else has it.
#[must_use]
pub struct Flight {
    cache: Arc<Cache>,
    key: Key,
    ttl: Duration,
    landing: watch::Sender<Option<Landing>>,
}

impl Flight {
    /// Everybody goes alone.
    pub fn fail(self) {
        self.end(Landing::Failed);
    }

    /// Listens to the answer as its leader reads it, and brings it to the others when it is complete.
    pub fn record(self, chunks: Box<dyn Chunks>) -> Box<dyn Chunks> {
        Box::new(Recorded { chunks, gather: Gather::default(), flight: Some(self) })
    }

    fn end(&self, landing: Landing) {
        // The entry comes before the end, so that nobody who comes between finds neither.
        if let Landing::Landed(entry) = &landing {
            self.cache.entries.insert(self.key, entry.clone());
        }
        self.landing.send_if_modified(|old| {
            let is_first = old.is_none();
            if is_first {
                *old = Some(landing);
            }
            is_first
        });
        let mut flights = self.cache.flights.0.lock();
        // A later flight of the same key is not ours to end.
        if flights.get(&self.key).is_some_and(|flight| flight.same_channel(&self.landing.subscribe())) {
            flights.remove(&self.key);
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.end(Landing::Lost);
    }
}

struct Recorded {
    chunks: Box<dyn Chunks>,
    gather: Gather,
    /// `None` once it has ended.
    flight: Option<Flight>,
}

impl Chunks for Recorded {
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Chunk> {
        let chunk = std::task::ready!(self.chunks.poll_next(context));
        let Some(flight) = &self.flight else { return Poll::Ready(chunk) };
        match &chunk {
            Chunk::Part(part) => {
                self.gather.add(part);
                if self.gather.bytes() > flight.cache.entry_bytes_max {
                    // Too large to keep: nobody needs to wait for it.
                    self.gather = Gather::default();
                    self.flight.take().into_iter().for_each(Flight::fail);
                }
            }
            Chunk::End(end) => {
                let gathered = std::mem::take(&mut self.gather);
                let flight = self.flight.take();
                match (&end.how, flight) {
                    (Ended::Finished(finishes), Some(flight)) => {
                        let parts = gathered.finish(finishes.len());
                        let entry = Entry::new(parts, finishes.clone(), (end.usage, end.source), flight.ttl);
                        flight.end(Landing::Landed(Arc::new(entry)));
                    }
                    (Ended::Failed(_) | Ended::Stale, Some(flight)) => flight.fail(),
                    (Ended::Cancelled, _) | (_, None) => {}
                }
            }
        }
        Poll::Ready(chunk)
    }

    fn cancel(&mut self) {
        // Its leader has left: the others need not wait until the work has stopped.
        self.flight = None;
        self.chunks.cancel();
    }
}
