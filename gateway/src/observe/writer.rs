//! A thread that writes, behind a queue that never makes anybody wait: full, it hands the item back to be counted.
//!
//! An item that comes alone is written at once. While items come quickly they are gathered: waking a thread and calling
//! the kernel for every one of them costs more than they do.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// The most that is written at once.
const BATCH: usize = 256;
/// While items come quickly, a batch has so long to grow.
pub const GATHER: Duration = Duration::from_millis(20);
/// How long the end waits for a sink that does not take what is queued.
const PATIENCE: Duration = Duration::from_secs(5);

pub struct Writer<T> {
    shared: Arc<Shared<T>>,
    places: usize,
    ended: Mutex<Receiver<()>>,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    work: Condvar,
}

struct State<T> {
    queue: VecDeque<T>,
    is_closed: bool,
}

impl<T: Send + 'static> Writer<T> {
    /// Starts the thread; `write` is called with one item or more.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(
        name: &str,
        places: usize,
        mut write: impl FnMut(Vec<T>) + Send + 'static,
    ) -> std::io::Result<Writer<T>> {
        let state = State { queue: VecDeque::new(), is_closed: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), work: Condvar::new() });
        let (end, ended) = sync_channel(1);
        std::thread::Builder::new().name(name.to_owned()).spawn({
            let shared = shared.clone();
            move || {
                let mut gather_until = Instant::now();
                while let Some(batch) = shared.batch(gather_until) {
                    let came_quickly = batch.len() > 1;
                    write(batch);
                    if came_quickly {
                        gather_until = Instant::now() + GATHER;
                    }
                }
                // Nobody may be waiting.
                let _ = end.send(());
            }
        })?;
        Ok(Writer { shared, places, ended: Mutex::new(ended) })
    }

    /// # Errors
    /// The item, when the queue is full or closed.
    pub fn write(&self, item: T) -> Result<(), T> {
        let mut state = self.shared.state.lock();
        if state.is_closed || state.queue.len() >= self.places {
            return Err(item);
        }
        state.queue.push_back(item);
        // In between the thread only waits for more.
        if matches!(state.queue.len(), 1 | BATCH) {
            self.shared.work.notify_one();
        }
        Ok(())
    }

    /// Takes no more, writes what is queued and ends, or gives up on a sink that is stuck.
    pub fn shut_down(&self) {
        self.shared.state.lock().is_closed = true;
        self.shared.work.notify_one();
        let _ = self.ended.lock().recv_timeout(PATIENCE);
    }
}

impl<T> Shared<T> {
    /// What is to be written next; `None` at the end.
    fn batch(&self, gather_until: Instant) -> Option<Vec<T>> {
        let mut state = self.state.lock();
        while state.queue.is_empty() && !state.is_closed {
            self.work.wait(&mut state);
        }
        while state.queue.len() < BATCH && !state.is_closed {
            if self.work.wait_until(&mut state, gather_until).timed_out() {
                break;
            }
        }
        let count = state.queue.len().min(BATCH);
        (count > 0).then(|| state.queue.drain(..count).collect())
    }
}
