//! The barrier between operations: spins, then yields, then sleeps.
//!
//! Operations of a step are a few microseconds apart, so waiting has to cost nanoseconds when every worker has a core of
//! its own. When the machine is oversubscribed, the worker that is waited for may not be running at all, and
//! spinning would keep it from doing so: after a short while a waiting worker offers its core, and in the end it sleeps.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Tries before the core is offered to others: about 20 µs.
const SPINS: u32 = if cfg!(miri) { 1 } else { 600 };
/// Offers before sleeping: some hundred microseconds if nobody wants the core.
const YIELDS: u32 = if cfg!(miri) { 1 } else { 400 };

/// Keeps what different threads write apart, so that a write of one does not take the cache line from the other.
#[repr(align(128))]
#[derive(Default)]
struct Apart<T>(T);

#[derive(Default)]
pub(crate) struct Barrier {
    /// How many take part.
    n: AtomicUsize,
    /// How many have arrived.
    arrived: Apart<AtomicUsize>,
    /// How often the barrier has opened.
    generation: Apart<AtomicU32>,
    /// A worker has panicked and will not come any more.
    poisoned: AtomicBool,
    /// How many sleep, or are about to.
    sleepers: AtomicUsize,
    /// Nanoseconds that workers have waited beyond a short while, all together, since the last reset.
    waited: AtomicU64,
    /// The next share of the work between two barriers; see `claim`.
    next: Apart<AtomicUsize>,
    lock: Mutex<()>,
    wake: Condvar,
}

/// What a worker panics with when another one did first: the first panic is the one to report.
pub(crate) struct OtherWorkerPanicked;

impl Barrier {
    /// Makes the barrier as new, for `n` workers. Nobody may be waiting.
    pub(crate) fn reset(&self, n: usize) {
        self.n.store(n, Ordering::Relaxed);
        self.waited.store(0, Ordering::Relaxed);
        self.arrived.0.store(0, Ordering::Relaxed);
        self.next.0.store(0, Ordering::Relaxed);
        self.poisoned.store(false, Ordering::Relaxed);
    }

    /// Returns when all `n` workers have called it. What they wrote before is visible to all after.
    ///
    /// Panics with [`OtherWorkerPanicked`] when one of them cannot come.
    pub(crate) fn wait(&self) {
        let generation = self.generation.0.load(Ordering::Relaxed);
        if self.arrived.0.fetch_add(1, Ordering::AcqRel) + 1 == self.n.load(Ordering::Relaxed) {
            self.arrived.0.store(0, Ordering::Relaxed);
            self.next.0.store(0, Ordering::Relaxed);
            self.open();
            return;
        }
        for _ in 0..SPINS {
            if self.is_open(generation) {
                return;
            }
            std::hint::spin_loop();
        }
        let start = Instant::now();
        let opened = (0..YIELDS).any(|_| {
            std::thread::yield_now();
            self.is_open(generation)
        });
        if !opened {
            self.sleep(generation);
        }
        let waited = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.waited.fetch_add(waited, Ordering::Relaxed);
    }

    /// How long a worker has waited beyond a short while since the last reset, on average of those who may.
    pub(crate) fn waited(&self) -> Duration {
        let others = self.n.load(Ordering::Relaxed).saturating_sub(1).max(1) as u64;
        Duration::from_nanos(self.waited.load(Ordering::Relaxed) / others)
    }

    /// Forgets claims; for a worker who is alone and waits for nobody.
    pub(crate) fn next_phase(&self) {
        self.next.0.store(0, Ordering::Relaxed);
    }

    fn is_open(&self, generation: u32) -> bool {
        self.check_poison();
        self.generation.0.load(Ordering::Acquire) != generation
    }

    /// Takes a number that no other worker gets before the next barrier: 0, 1, 2 …
    pub(crate) fn claim(&self) -> usize {
        self.next.0.fetch_add(1, Ordering::Relaxed)
    }

    /// Lets everybody go on, into a panic, because the caller will not come any more.
    pub(crate) fn poison(&self) {
        self.poisoned.store(true, Ordering::SeqCst);
        drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
        self.wake.notify_all();
    }

    fn open(&self) {
        // SeqCst here and in `sleep`: either we see the sleeper, or it sees the new generation.
        self.generation.0.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.wake.notify_all();
        }
    }

    #[cold]
    fn sleep(&self, generation: u32) {
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while self.generation.0.load(Ordering::SeqCst) == generation
            && !self.poisoned.load(Ordering::SeqCst)
        {
            guard = self
                .wake
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
        drop(guard);
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        if self.generation.0.load(Ordering::SeqCst) == generation {
            self.check_poison();
        }
    }

    fn check_poison(&self) {
        if self.poisoned.load(Ordering::Relaxed) {
            std::panic::resume_unwind(Box::new(OtherWorkerPanicked));
        }
    }
}
