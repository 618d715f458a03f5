//! The line that says how far a run is: repainted on a terminal, written once a minute elsewhere if asked for with -v.

use std::time::{Duration, Instant};

use crate::out;
use crate::term::{Style, Term};

pub(super) struct Progress {
    term: Term,
    verbose: bool,
    start: Instant,
    painted: Instant,
    /// Work in tokens, as estimated beforehand.
    total: f64,
    done: f64,
    jobs: (usize, usize),
}

impl Progress {
    /// `total` is the work in tokens, `n` the number of jobs.
    pub(super) fn new(term: Term, verbose: bool, total: f64, n: usize) -> Self {
        let now = Instant::now();
        Self {
            term,
            verbose,
            start: now,
            painted: now.checked_sub(Duration::from_secs(3600)).unwrap_or(now),
            total,
            done: 0.0,
            jobs: (0, n),
        }
    }

    /// A job of `work` estimated tokens is done.
    pub(super) fn done(&mut self, work: f64) {
        self.done += work;
        self.jobs.0 += 1;
    }

    /// Paints, if it is time to. `what` says what is running.
    pub(super) fn paint(&mut self, what: &str) {
        let redraws = self.term.can_redraw();
        let every = if redraws {
            Duration::from_millis(200)
        } else {
            Duration::from_secs(60)
        };
        if !(redraws || self.verbose) || self.painted.elapsed() < every {
            return;
        }
        self.painted = Instant::now();
        let (i, n) = self.jobs;
        let eta = self
            .eta()
            .map_or(String::new(), |s| format!(" · {} left", span(s)));
        let line = format!("{what} {i}/{n}{eta}");
        if redraws {
            out::transient(&self.term, &line, Style::default());
        } else {
            out::note(&line);
        }
    }

    /// Removes the line.
    pub(super) fn clear(&self) {
        out::erase(&self.term);
    }

    /// Seconds that are left, once there is something to go by.
    fn eta(&self) -> Option<f64> {
        let spent = self.start.elapsed().as_secs_f64();
        (self.jobs.0 >= 2 && self.done > 0.0)
            .then(|| spent * (self.total - self.done).max(0.0) / self.done)
    }
}

/// `7,530` seconds as people say it.
fn span(seconds: f64) -> String {
    let s = seconds.round() as u64;
    match s {
        0..=99 => format!("{s} s"),
        100..=5999 => format!("{} min", s.div_ceil(60)),
        _ => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans() {
        assert_eq!(
            (span(12.4), span(100.0), span(7530.0)),
            ("12 s".into(), "2 min".into(), "2 h 05 min".into())
        );
    }
}
