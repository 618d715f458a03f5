//! How many workers of a team take part in a step.
//!
//! All of them, as long as each has a core. When other programs want the cores, some worker is always off its core, and at every
//! barrier the rest wait for the system to bring it back: on a small model two workers beside one busy program are several times
//! slower than one alone. So when steps mostly wait, fewer workers take part, down to one, which waits for nobody; now
//! and then the larger crew is tried again. Results do not depend on the number of workers, so nobody notices but the clock.

use std::time::Duration;

/// Steps in a row that mostly wait before the crew is made smaller, and steps of a trial.
const STEPS: u32 = 6;
/// Time between trials of a larger crew: at first, and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(150), Duration::from_secs(3));

/// The size of the crew, and what it was learned from.
#[derive(Debug)]
pub(crate) struct Crew {
    /// All workers.
    all: usize,
    /// Those that take part now.
    size: usize,
    /// Steps in a row that mostly waited.
    waits: u32,
    /// Time that has passed since the crew was made smaller, and how long it stays so.
    since: Duration,
    pause: Duration,
    /// Time for a unit of work, the shortest of late.
    usual: f64,
    /// The same with half the crew, when that was last tried.
    half: f64,
    /// Steps that are left of the trial of a larger crew.
    trial: Option<u32>,
}

impl Crew {
    pub(crate) fn new(all: usize) -> Self {
        Self {
            all,
            size: all,
            waits: 0,
            since: Duration::ZERO,
            pause: PAUSES.0,
            usual: f64::INFINITY,
            half: f64::INFINITY,
            trial: None,
        }
    }

    /// Workers for the next step.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// Learns from a step: how long it took, how much of that some worker waited for others beyond the usual, and how
    /// much work it was (tokens, say; only compared with other steps).
    pub(crate) fn learn(&mut self, took: Duration, waited: Duration, work: usize) {
        let unit = took.as_secs_f64() / work.max(1) as f64;
        // Old values count for less and less: caches fill, contexts grow.
        self.usual = (1.02 * self.usual).min(unit);
        if let Some(left) = self.trial {
            self.trial = (left > 1).then(|| left - 1);
            if left == 1 {
                if self.usual < 0.95 * self.half {
                    self.pause = PAUSES.0;
                } else {
                    self.shrink();
                    self.pause = (2 * self.pause).min(PAUSES.1);
                }
            }
            return;
        }
        self.waits = if 2 * waited > took { self.waits + 1 } else { 0 };
        if self.waits >= STEPS && self.size > 1 {
            // Some wait and are still worth it.
            if self.usual >= 0.95 * self.half || self.half.is_infinite() {
                self.shrink();
            }
            self.waits = 0;
        }
        if self.size < self.all {
            self.since += took;
            if self.since >= self.pause {
                self.half = self.usual;
                self.resize((2 * self.size).min(self.all));
                self.trial = Some(STEPS);
            }
        }
    }

    fn shrink(&mut self) {
        self.half = f64::INFINITY;
        self.resize(self.size.div_ceil(2));
    }

    fn resize(&mut self, size: usize) {
        self.size = size;
        self.waits = 0;
        self.since = Duration::ZERO;
        self.usual = f64::INFINITY;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Runs steps until `time` has passed on a machine where a crew of `n` takes `took(n)` and waits `waited(n)`; the share of the
    /// time that each size had.
    fn run(
        crew: &mut Crew,
        time: Duration,
        machine: &dyn Fn(usize) -> (Duration, Duration),
    ) -> Vec<f64> {
        let mut share = vec![0.0; crew.all + 1];
        let mut passed = Duration::ZERO;
        while passed < time {
            let n = crew.size();
            let (took, waited) = machine(n);
            crew.learn(took, waited, 1);
            passed += took;
            share[n] += took.as_secs_f64() / time.as_secs_f64();
        }
        share
    }

    #[test]
    fn a_quiet_machine_keeps_everybody() {
        let mut crew = Crew::new(8);
        let share = run(&mut crew, 1000 * MS, &|n| (8 * MS / n as u32, MS / 10));
        assert!(share[8] > 0.99);
    }

    #[test]
    fn a_busy_machine_is_left_to_one_and_tried_again() {
        let mut crew = Crew::new(2);
        // Two workers wait most of the time and are slower than one.
        let busy = |n| {
            if n == 1 {
                (MS, Duration::ZERO)
            } else {
                (6 * MS, 5 * MS)
            }
        };
        let share = run(&mut crew, 20_000 * MS, &busy);
        assert!(share[1] > 0.95, "{share:?}");
        assert!(share[2] > 0.0);
        // The other program ends.
        let quiet = |n| (2 * MS / n as u32, Duration::ZERO);
        let share = run(&mut crew, 4000 * MS, &quiet);
        assert!(share[2] > 0.2, "{share:?}");
        assert_eq!(crew.size(), 2);
    }

    #[test]
    fn waiting_that_pays_is_not_ended_for_good() {
        let mut crew = Crew::new(4);
        // Everybody waits a lot, but more workers are faster all the same.
        let machine = |n: usize| (12 * MS / n as u32, 8 * MS / n as u32);
        let share = run(&mut crew, 10_000 * MS, &machine);
        assert!(share[1] < 0.5, "{share:?}");
    }

    #[test]
    fn work_is_taken_into_account() {
        let mut crew = Crew::new(2);
        for _ in 0..STEPS {
            crew.learn(6 * MS, 5 * MS, 1);
        }
        assert_eq!(crew.size(), 1);
        // Batches of many tokens take longer; a trial with single tokens is not better for that.
        while crew.trial.is_none() {
            crew.learn(100 * MS, Duration::ZERO, 100);
        }
        for _ in 0..STEPS {
            assert_eq!(crew.size(), 2);
            crew.learn(5 * MS, 4 * MS, 1);
        }
        assert_eq!(crew.size(), 1);
    }
}
