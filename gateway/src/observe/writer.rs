//! A thread that writes, behind a queue that never makes anybody wait: full, it hands the item back to be counted.

use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How long the end waits for a sink that does not take what is queued.
const PATIENCE: Duration = Duration::from_secs(5);

pub struct Writer<T> {
    /// `None` asks the thread to end.
    queue: SyncSender<Option<T>>,
    ended: Mutex<Receiver<()>>,
}

impl<T: Send + 'static> Writer<T> {
    /// # Errors
    /// When no thread can be started.
    pub fn start(name: &str, places: usize, mut write: impl FnMut(T) + Send + 'static) -> std::io::Result<Writer<T>> {
        let (queue, items) = sync_channel::<Option<T>>(places);
        let (end, ended) = sync_channel(1);
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            while let Ok(Some(item)) = items.recv() {
                write(item);
            }
            // Nobody may be waiting.
            let _ = end.send(());
        })?;
        Ok(Writer { queue, ended: Mutex::new(ended) })
    }

    /// # Errors
    /// The item, when the queue is full or the thread is gone.
    pub fn write(&self, item: T) -> Result<(), T> {
        match self.queue.try_send(Some(item)) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(item) | TrySendError::Disconnected(item)) => item.map_or(Ok(()), Err),
        }
    }

    /// Writes what is queued and ends, or gives up on a sink that is stuck.
    pub fn shut_down(&self) {
        let deadline = Instant::now() + PATIENCE;
        // A full queue whose sink is stuck takes nothing more, not even this.
        while let Err(TrySendError::Full(_)) = self.queue.try_send(None) {
            if Instant::now() >= deadline {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.ended.lock().recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }
}
