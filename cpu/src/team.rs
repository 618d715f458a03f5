//! The worker team: one broadcast per step, barriers between operations.
//!
//! A step of a model is some hundred operations of a few microseconds each. Handing each of them to a thread pool costs
//! more than the operation; so the pool is asked once, every worker runs the whole step, and within it takes
//! its share of every operation and waits for the others at a [`Worker::barrier`].

use crate::barrier::{Barrier, OtherWorkerPanicked};
use crate::crew::Crew;
use std::any::Any;
use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Threads that run a step together. The thread that calls [`Team::run`] is one of them.
pub struct Team {
    /// The other threads; none in a team of one, and under Miri.
    pool: Option<rayon::ThreadPool>,
    barrier: Barrier,
    n_threads: usize,
    crew: Mutex<Crew>,
    busy: AtomicBool,
}

/// A thread of a team within [`Team::run`].
pub struct Worker<'a> {
    barrier: &'a Barrier,
    ith: usize,
    nth: usize,
    /// How many shares this worker has taken since the last barrier, by [`Worker::claim`].
    claimed: Cell<bool>,
    /// A worker is bound to its thread.
    not_send: PhantomData<*const ()>,
}

impl Team {
    /// A team of `n_threads` (at least 1), the calling thread included.
    ///
    /// # Panics
    /// If the system refuses to start a thread.
    pub fn new(n_threads: usize) -> Self {
        Self::try_new(n_threads).expect("worker threads can be started")
    }

    /// [`Team::new`] on a system that may refuse.
    ///
    /// # Errors
    /// Why a thread cannot be started; none is left then.
    pub fn try_new(n_threads: usize) -> Result<Self, rayon::ThreadPoolBuildError> {
        let n_threads = n_threads.max(1);
        // What rayon does inside, Miri does not accept; it is not what there is to check here.
        let pool = (n_threads > 1 && !cfg!(miri)).then(|| {
            rayon::ThreadPoolBuilder::new()
                .num_threads(n_threads - 1)
                .thread_name(|i| format!("lemma-worker-{}", i + 1))
                .build()
        });
        Ok(Self {
            pool: pool.transpose()?,
            barrier: Barrier::default(),
            n_threads,
            crew: Mutex::new(Crew::new(n_threads)),
            busy: AtomicBool::new(false),
        })
    }

    /// Number of workers.
    pub fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// Runs `step` once on every worker at the same time, and returns when all have finished.
    ///
    /// # Panics
    /// If a worker panics: the others are let out of their barriers, and the first panic goes on here. If the team is
    /// already running a step.
    pub fn run<F: Fn(&Worker<'_>) + Sync>(&self, step: F) {
        self.run_with(self.n_threads, step);
    }

    /// Like [`Team::run`], but leaves workers out while other programs keep them from their cores (see `crew.rs`).
    /// `work` says how much there is to do in comparison with other steps: tokens, for example.
    ///
    /// # Panics
    /// As [`Team::run`].
    pub fn run_some<F: Fn(&Worker<'_>) + Sync>(&self, work: usize, step: F) {
        let crew = || self.crew.lock().unwrap_or_else(PoisonError::into_inner);
        let size = crew().size();
        let start = Instant::now();
        self.run_with(size, step);
        crew().learn(start.elapsed(), self.barrier.waited(), work);
    }

    fn run_with<F: Fn(&Worker<'_>) + Sync>(&self, nth: usize, step: F) {
        assert!(
            !self.busy.swap(true, Ordering::Acquire),
            "a team runs one step at a time"
        );
        self.barrier.reset(nth);
        let panic: Mutex<Option<Box<dyn Any + Send>>> = Mutex::new(None);
        let work = &|ith: usize| {
            let worker = Worker {
                barrier: &self.barrier,
                ith,
                nth,
                claimed: Cell::new(false),
                not_send: PhantomData,
            };
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| step(&worker))) {
                if !payload.is::<OtherWorkerPanicked>()
                    && let Ok(mut first) = panic.lock()
                {
                    first.get_or_insert(payload);
                }
                self.barrier.poison();
            }
        };
        match &self.pool {
            _ if nth == 1 => work(0),
            None => std::thread::scope(|scope| {
                for ith in 1..nth {
                    scope.spawn(move || work(ith));
                }
                work(0);
            }),
            Some(pool) if nth == self.n_threads => pool.in_place_scope(|scope| {
                scope.spawn_broadcast(|_, context| work(context.index() + 1));
                work(0);
            }),
            // Whichever threads are first: there are enough of them for a worker each.
            Some(pool) => pool.in_place_scope(|scope| {
                for ith in 1..nth {
                    scope.spawn(move |_| work(ith));
                }
                work(0);
            }),
        }
        self.busy.store(false, Ordering::Release);
        if let Some(payload) = panic.into_inner().unwrap_or_default() {
            resume_unwind(payload);
        }
    }
}

impl Worker<'_> {
    /// The number of this worker, from 0.
    pub fn ith(&self) -> usize {
        self.ith
    }

    /// The number of workers.
    pub fn nth(&self) -> usize {
        self.nth
    }

    /// Returns when all workers have called it; what they wrote before is visible to all after.
    pub fn barrier(&self) {
        self.claimed.set(false);
        if self.nth > 1 {
            self.barrier.wait();
        } else {
            self.barrier.next_phase();
        }
    }

    /// This worker's share of `0..n`: contiguous, beginning and (but for the last) ending at multiples of `align`.
    pub fn range(&self, n: usize, align: usize) -> Range<usize> {
        let align = align.max(1);
        let parts = n.div_ceil(align);
        let edge = |i: usize| (parts * i / self.nth * align).min(n);
        edge(self.ith)..edge(self.ith + 1)
    }

    /// Shares of `0..n` of `size` items that workers take as they get to it, until the next barrier; the last share
    /// may be smaller. For work that is slower on some cores than on others. Once between two barriers.
    ///
    /// A worker's first share is the one of its own number.
    pub(crate) fn claim(&self, n: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
        debug_assert!(
            !self.claimed.replace(true),
            "one claim between two barriers"
        );
        let size = size.max(1);
        let mut first = Some(self.ith);
        std::iter::from_fn(move || {
            let i = first
                .take()
                .unwrap_or_else(|| self.nth + self.barrier.claim());
            let start = i.checked_mul(size)?;
            (start < n).then(|| start..(start + size).min(n))
        })
        .fuse()
    }
}

/// The number of workers to use when nobody says otherwise: physical cores that this process may use.
pub fn default_threads() -> usize {
    // Respects the scheduler's affinity mask and the quota of the control group.
    let logical = std::thread::available_parallelism().map_or(1, |n| n.get());
    physical_cores()
        .map_or(logical, |cores| cores.min(logical))
        .max(1)
}

/// Physical cores among the logical ones that are online, from sysfs.
fn physical_cores() -> Option<usize> {
    let mut cores = std::collections::BTreeSet::new();
    for entry in std::fs::read_dir("/sys/devices/system/cpu").ok()? {
        let path = entry.ok()?.path();
        let siblings = path.join("topology/thread_siblings_list");
        if let Ok(list) = std::fs::read_to_string(siblings) {
            cores.insert(list.trim().to_owned());
        }
    }
    (!cores.is_empty()).then_some(cores.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn ranges_cover_everything_once() {
        for nth in 1..7 {
            let team = Team::new(nth);
            for (n, align) in [(0, 1), (1, 1), (5, 4), (64, 16), (70, 16), (1000, 32)] {
                let seen: Vec<_> = (0..n).map(|_| AtomicUsize::new(0)).collect();
                team.run(|w| {
                    let range = w.range(n, align);
                    assert!(range.is_empty() || range.start.is_multiple_of(align));
                    for i in range {
                        seen[i].fetch_add(1, Ordering::Relaxed);
                    }
                    w.barrier();
                    for range in w.claim(n, align) {
                        for i in range {
                            seen[i].fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
                assert!(seen.iter().all(|s| s.load(Ordering::Relaxed) == 2));
            }
        }
    }

    #[test]
    fn barriers_order_writes() {
        let rounds = if cfg!(miri) { 20 } else { 20_000 };
        for nth in [1, 2, 3, 5, 8] {
            let team = Team::new(nth);
            let cells: Vec<_> = (0..nth).map(|_| AtomicUsize::new(0)).collect();
            team.run(|w| {
                for round in 1..=rounds / nth {
                    cells[w.ith()].store(round, Ordering::Relaxed);
                    w.barrier();
                    assert!(cells.iter().all(|c| c.load(Ordering::Relaxed) == round));
                    w.barrier();
                }
            });
        }
    }

    #[test]
    fn slow_worker_is_waited_for_asleep() {
        let team = Team::new(3);
        team.run(|w| {
            if w.ith() == 1 && !cfg!(miri) {
                std::thread::sleep(std::time::Duration::from_millis(30));
            }
            w.barrier();
            w.barrier();
        });
    }

    #[test]
    fn a_worker_that_is_kept_away_is_left_out() {
        let team = Team::new(2);
        let crew = AtomicUsize::new(0);
        let steps = if cfg!(miri) { 1 } else { 20 };
        for _ in 0..steps {
            team.run_some(1, |w| {
                crew.store(w.nth(), Ordering::Relaxed);
                if w.ith() == 1 && !cfg!(miri) {
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
                w.barrier();
            });
        }
        assert!(cfg!(miri) || crew.into_inner() == 1);
    }

    #[test]
    fn a_panic_goes_through_and_the_team_stays_usable() {
        let team = Team::new(3);
        for culprit in 0..3 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                team.run(|w| {
                    w.barrier();
                    if w.ith() == culprit {
                        resume_unwind(Box::new("broken"));
                    }
                    w.barrier();
                    w.barrier();
                });
            }));
            assert_eq!(result.unwrap_err().downcast_ref::<&str>(), Some(&"broken"));
            let count = AtomicUsize::new(0);
            team.run(|w| {
                w.barrier();
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.into_inner(), 3);
        }
    }

    #[test]
    fn a_step_within_a_step_is_refused() {
        let team = Team::new(2);
        let result = catch_unwind(AssertUnwindSafe(|| team.run(|_| team.run(|_| ()))));
        assert!(result.is_err());
        team.run(|w| w.barrier());
    }

    #[test]
    fn default_is_sane() {
        assert!((1..=4096).contains(&default_threads()));
    }
}
