//! Spreads a kernel over a few threads, when that pays.
//!
//! The caller works too, and waits only for workers that have joined in: one that sleeps, or that the machine has no
//! core for at the moment, delays nobody. (A barrier that waits for every worker makes a step ten times slower as soon
//! as anything else wants a core.)

#![allow(unsafe_code)] // Workers borrow the caller's closure while it waits for them; no safe type says that.

use candle_core::{Result, bail};
use std::{
    cell::{Cell, UnsafeCell},
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

/// Below this many multiply-adds waking a second thread costs more than it saves (a few microseconds).
const WORTH_SHARING: usize = 200_000;

/// How often a worker looks for work before it sleeps: about 0.1 ms. Longer than the gap between two kernels of a step,
/// too short to show on an idle machine.
const SPINS_MAX: u32 = 4_000;

thread_local! {
    static POOL: Cell<Option<Pool>> = const { Cell::new(None) };
}

/// How many threads kernels called from this thread may use, itself included. 1 keeps them on it.
pub(crate) fn use_threads(threads: usize) -> std::io::Result<()> {
    POOL.set(if threads > 1 { Some(Pool::new(threads - 1)?) } else { None });
    Ok(())
}

/// Calls `each` on disjoint ranges that cover `0..items`. `work`: multiply-adds in total, roughly; `grain`: the least
/// number of items that are worth a call.
pub(crate) fn share(items: usize, grain: usize, work: usize, each: impl Fn(Range<usize>) + Sync) -> Result<()> {
    // Taken out, so that a kernel within a kernel would find none and stay on its thread.
    let pool = if work < WORTH_SHARING { None } else { POOL.take() };
    let Some(pool) = pool else {
        each(0..items);
        return Ok(());
    };
    // Several portions each, so that a thread that comes late takes fewer.
    let portion = items.div_ceil(4 * (pool.workers.len() + 1)).max(grain);
    let next = AtomicUsize::new(0);
    let panicked = AtomicBool::new(false);
    let work = || {
        loop {
            let start = next.fetch_add(portion, Ordering::Relaxed);
            if start >= items {
                break;
            }
            let range = start..items.min(start + portion);
            if catch_unwind(AssertUnwindSafe(|| each(range))).is_err() {
                panicked.store(true, Ordering::Relaxed);
            }
        }
    };
    // Whatever happens, the pool goes back: losing it would leave the engine on one thread for good.
    let ran = catch_unwind(AssertUnwindSafe(|| pool.run(&work)));
    POOL.set(Some(pool));
    if ran.is_err() || panicked.into_inner() {
        bail!("a kernel panicked");
    }
    Ok(())
}

/// Calls `each(index, part)` for every run of `part_len` numbers in `out`, on threads of its own: for work that takes
/// long and is done once, as packing weights. A panic comes through.
pub(crate) fn fill_on_threads<T: Send>(out: &mut [T], part_len: usize, each: impl Fn(usize, &mut [T]) + Sync) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let parts = (out.len() / part_len.max(1)).div_ceil(threads).max(1);
    let each = &each;
    std::thread::scope(|scope| {
        for (share, out) in out.chunks_mut((parts * part_len).max(1)).enumerate() {
            scope.spawn(move || {
                for (i, part) in out.chunks_mut(part_len).enumerate() {
                    each(share * parts + i, part);
                }
            });
        }
    });
}

struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Number of the job · `JOB`, `OPEN` while workers may join it, and how many are in it.
    state: AtomicU64,
    job: UnsafeCell<Job>,
    stop: AtomicBool,
}

/// How to call the job's closure, and where it is.
type Job = (unsafe fn(*const ()), *const ());

const OPEN: u64 = 1 << 31;
const JOB: u64 = 1 << 32;

// SAFETY: `job` is written only while the job is closed and empty, and read only by workers that are counted in it.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in it is only followed while its owner waits in `Pool::run`.
unsafe impl Send for Shared {}

impl Pool {
    fn new(workers: usize) -> std::io::Result<Pool> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new((|_| {}, std::ptr::null())),
            stop: AtomicBool::new(false),
        });
        let mut pool = Pool { shared, workers: Vec::with_capacity(workers) };
        for n in 0..workers {
            let shared = Arc::clone(&pool.shared);
            let worker = std::thread::Builder::new().name(format!("kernel-{n}")).spawn(move || shared.work())?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Runs `work` here and on every worker that joins in before it is done here. `work` must not panic on a worker.
    fn run<F: Fn() + Sync>(&self, work: &F) {
        /// # Safety
        /// `data` is a live `F`.
        unsafe fn call<F: Fn()>(data: *const ()) {
            // SAFETY: the caller's promise.
            unsafe { (*data.cast::<F>())() }
        }
        let closed = self.shared.state.load(Ordering::Relaxed);
        // SAFETY: the last job is closed and empty (`Close` saw to that), so nobody reads the cell; and there is one
        // caller, because a pool belongs to one thread and is taken out of its place while it runs.
        unsafe { *self.shared.job.get() = (call::<F>, std::ptr::from_ref(work).cast()) };
        // The job's number wraps; a worker that sees its last one come round again only sits that job out.
        self.shared.state.store(closed.wrapping_add(JOB) | OPEN, Ordering::Release);
        // Closes and waits also if `work` panics here: the workers must be out before the closure is gone.
        let _close = Close(&self.shared);
        for worker in &self.workers {
            worker.thread().unpark();
        }
        work();
    }
}

struct Close<'a>(&'a Shared);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while self.0.state.load(Ordering::Acquire) & (OPEN - 1) != 0 {
            spins += 1;
            // A worker that lost its core needs ours.
            if spins.is_multiple_of(256) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

impl Shared {
    fn work(&self) {
        let (mut last, mut spins) = (0, 0);
        while !self.stop.load(Ordering::Relaxed) {
            let state = self.state.load(Ordering::Relaxed);
            if state & OPEN != 0 && state / JOB != last {
                if self.state.compare_exchange(state, state + 1, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                    last = state / JOB;
                    // SAFETY: counted in, so the cell is not written and the closure is alive until we are counted out.
                    unsafe {
                        let (call, data) = *self.job.get();
                        call(data);
                    }
                    self.state.fetch_sub(1, Ordering::Release);
                }
                spins = 0;
            } else if spins < SPINS_MAX {
                spins += 1;
                std::hint::spin_loop();
            } else {
                // A wake-up that came before this is not lost: it makes `park` return at once.
                std::thread::park();
                spins = 0;
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{WORTH_SHARING, share, use_threads};
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn every_item_is_worked_on_once_whatever_the_workers_do() {
        for threads in [1, 2, 5] {
            use_threads(threads).expect("threads");
            for round in 0..2_000 {
                let items = 1 + round % 97;
                let counts: Vec<AtomicU32> = (0..items).map(|_| AtomicU32::new(0)).collect();
                let done = share(items, 1 + round % 5, WORTH_SHARING, |range| {
                    range.for_each(|item| {
                        counts[item].fetch_add(1, Ordering::Relaxed);
                    });
                });
                assert!(done.is_ok());
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_kernel_that_panics_is_an_error_and_the_pool_lives_on() {
        use_threads(3).expect("threads");
        for _ in 0..20 {
            let bad = share(64, 1, WORTH_SHARING, |range| assert!(!range.contains(&33), "told to"));
            assert!(bad.is_err());
            assert!(share(64, 1, WORTH_SHARING, |_| {}).is_ok());
        }
    }
}
