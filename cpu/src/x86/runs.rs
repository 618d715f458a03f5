//! Some rows of a product with one token, in the order in which they are read.

use super::Rows;
use super::ahead::{Reach, prefetch};
use crate::kernels::{first_rows, run};
use std::arch::x86_64::*;

/// Rows as four runs beside each other: the processor sees four places from which memory is read in order for long, and reads
/// ahead by itself. Rows that are neighbours would be places that end again soon.
pub(super) struct Runs {
    /// Where the runs begin, and end.
    starts: [*const u8; 4],
    ends: [*const u8; 4],
    /// From the end of a run to the place that is read next.
    jumps: [usize; 4],
    /// The number of the first row of each.
    first: [usize; 4],
    /// Which run is read ahead in.
    turn: usize,
    reach: Reach,
}

impl Runs {
    /// `n` rows.
    pub(super) fn new(job: &Rows<'_>, n: usize) -> Self {
        let len = run(n);
        let first = first_rows(n);
        let starts = first.map(|row| job.w.as_ptr().wrapping_add(row * job.row_size));
        let ends = starts.map(|p| p.wrapping_add(len * job.row_size));
        Self {
            starts,
            ends,
            jumps: std::array::from_fn(|r| {
                let next = job.next.at.wrapping_add(r * job.next.stride);
                if job.next.at.is_null() {
                    0
                } else {
                    next.addr().wrapping_sub(ends[r].addr())
                }
            }),
            first,
            turn: 0,
            reach: Reach::get(),
        }
    }

    /// What is `at` bytes from the starts of all runs. Begins to read what will be there the next four times, for one of them:
    /// `4 n` bytes.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn at(&mut self, at: usize, n: usize) -> [*const u8; 4] {
        let turn = self.turn % 4;
        self.turn += 1;
        let mut ahead = self.starts[turn].wrapping_add(at + self.reach.runs);
        if ahead >= self.ends[turn] {
            ahead = ahead.wrapping_add(self.jumps[turn]);
        }
        prefetch(self.reach.near, ahead, 4 * n);
        self.starts.map(|p| p.wrapping_add(at))
    }

    /// Writes the results of row `i` of each run.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn store(&self, i: usize, acc: __m128, out: &mut [f32]) {
        let mut four = [0.0; 4];
        // SAFETY: four values.
        unsafe { _mm_storeu_ps(four.as_mut_ptr(), acc) };
        for (first, value) in self.first.iter().zip(four) {
            out[first + i] = value;
        }
    }
}
