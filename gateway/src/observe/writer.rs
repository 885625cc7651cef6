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

/// Dropped, it takes no more, and its thread ends once what is queued is written.
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
    /// Starts the thread; `write` is called with one item or more. Should it panic, `lost` is called with those items and
    /// all that are queued, and no more are taken.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(
        name: &str,
        places: usize,
        mut write: impl FnMut(&[T]) + Send + 'static,
        lost: impl FnMut(&[T]) + Send + 'static,
    ) -> std::io::Result<Writer<T>> {
        let state = State { queue: VecDeque::new(), is_closed: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), work: Condvar::new() });
        let (end, ended) = sync_channel(1);
        let mut held = Held { shared: shared.clone(), batch: Vec::new(), lost };
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let mut gather_until = Instant::now();
            loop {
                held.batch = held.shared.batch(gather_until);
                if held.batch.is_empty() {
                    break;
                }
                write(&held.batch);
                if held.batch.len() > 1 {
                    gather_until = Instant::now() + GATHER;
                }
            }
            drop(held);
            // Nobody may be waiting.
            let _ = end.send(());
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
        self.shared.close();
        let _ = self.ended.lock().recv_timeout(PATIENCE);
    }
}

impl<T> Drop for Writer<T> {
    fn drop(&mut self) {
        self.shared.close();
    }
}

impl<T> Shared<T> {
    fn close(&self) {
        self.state.lock().is_closed = true;
        self.work.notify_one();
    }

    /// What is to be written next; empty at the end.
    fn batch(&self, gather_until: Instant) -> Vec<T> {
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
        state.queue.drain(..count).collect()
    }
}

/// What the thread is responsible for. It is dropped when the thread ends, also by a panic.
struct Held<T, L: FnMut(&[T])> {
    shared: Arc<Shared<T>>,
    /// What is being written.
    batch: Vec<T>,
    lost: L,
}

impl<T, L: FnMut(&[T])> Drop for Held<T, L> {
    fn drop(&mut self) {
        self.shared.close();
        self.batch.extend(self.shared.state.lock().queue.drain(..));
        if !self.batch.is_empty() {
            (self.lost)(&self.batch);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    /// A writer that tells of every batch, and then waits for the gate.
    fn gated(places: usize) -> (Writer<u32>, Receiver<Vec<u32>>, Sender<()>) {
        let ((told, batches), (gate, opened)) = (channel(), channel());
        let write = move |batch: &[u32]| {
            told.send(batch.to_vec()).unwrap();
            // An error: the gate is open for good.
            let _ = opened.recv();
        };
        (Writer::start("test", places, write, |_: &[u32]| {}).unwrap(), batches, gate)
    }

    /// Writes one item and waits until the thread is busy with it.
    fn occupy(writer: &Writer<u32>, batches: &Receiver<Vec<u32>>) {
        writer.write(0).unwrap();
        assert_eq!(batches.recv().unwrap(), [0], "what comes alone is written at once");
    }

    #[test]
    fn more_than_a_batch_is_written_whole_and_in_order() {
        let (writer, batches, gate) = gated(10_000);
        occupy(&writer, &batches);
        let many = 2 * BATCH as u32 + 88;
        (1..=many).for_each(|item| writer.write(item).unwrap());
        drop(gate);
        writer.shut_down();
        drop(writer);
        let batches: Vec<_> = batches.iter().collect();
        assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), [BATCH, BATCH, 88]);
        assert_eq!(batches.concat(), (1..=many).collect::<Vec<_>>());
    }

    #[test]
    fn who_gathers_is_woken_by_a_full_batch_and_by_the_end() {
        let state = State { queue: VecDeque::from([0]), is_closed: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), work: Condvar::new() });
        let writer = Writer { shared: shared.clone(), places: 10_000, ended: Mutex::new(sync_channel(0).1) };
        let never = Instant::now() + Duration::from_secs(3600);
        let gather = || {
            std::thread::spawn({
                let shared = shared.clone();
                move || shared.batch(never).len()
            })
        };
        let first = gather();
        (1..BATCH as u32).for_each(|item| writer.write(item).unwrap());
        assert_eq!(first.join().unwrap(), BATCH);
        let second = gather();
        writer.write(0).unwrap();
        drop(writer);
        assert_eq!(second.join().unwrap(), 1);
        assert_eq!(shared.batch(never).len(), 0, "the end");
    }

    #[test]
    fn what_a_full_or_closed_queue_does_not_take_comes_back() {
        let (writer, batches, gate) = gated(2);
        occupy(&writer, &batches);
        assert_eq!([1, 2, 3].map(|item| writer.write(item)), [Ok(()), Ok(()), Err(3)]);
        drop(gate);
        writer.shut_down();
        assert_eq!(writer.write(4), Err(4));
        assert_eq!(batches.recv().unwrap(), [1, 2], "what it took is written");
    }

    #[test]
    fn a_panic_closes_the_queue_and_tells_of_all_that_was_in_it() {
        let ((told, lost), (began, begun), (gate, opened)) = (channel(), channel(), channel::<()>());
        let write = move |batch: &[u32]| {
            began.send(()).unwrap();
            let _ = opened.recv();
            assert!(batch.is_empty(), "this panics");
        };
        let writer = Writer::start("test", 10, write, move |left: &[u32]| told.send(left.to_vec()).unwrap()).unwrap();
        writer.write(0).unwrap();
        begun.recv().unwrap();
        (1..=2).for_each(|item| writer.write(item).unwrap());
        drop(gate);
        assert_eq!(lost.recv().unwrap(), [0, 1, 2]);
        assert_eq!(writer.write(3), Err(3));
        let ended = Instant::now();
        writer.shut_down();
        assert!(ended.elapsed() < PATIENCE, "nobody waits for a thread that is gone");
    }
}
