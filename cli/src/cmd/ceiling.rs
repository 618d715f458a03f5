//! How fast this machine reads memory: the ceiling of decoding.
//!
//! A decode step reads every weight once and does little with it, so tokens a second cannot exceed bytes a second divided by the
//! bytes of the weights. Measured as the best of several passes in which each thread adds up its own part of a buffer much
//! larger than the caches.

use std::hint::black_box;
use std::time::Instant;

/// 512 MiB of words.
const WORDS: usize = 64 << 20;
const PASSES: usize = 6;

/// Bytes a second, read by `n_threads` at once.
pub(crate) fn read_bandwidth(n_threads: usize) -> f64 {
    // Written, not only reserved: pages of zeros would all be the same one.
    let buffer: Vec<u64> = (0..WORDS as u64).collect();
    let part = WORDS.div_ceil(n_threads.max(1));
    let mut best = f64::INFINITY;
    for _ in 0..PASSES {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for chunk in buffer.chunks(part) {
                scope.spawn(move || black_box(sum(chunk)));
            }
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    (WORDS * size_of::<u64>()) as f64 / best
}

/// Sixteen independent sums, so that the additions never wait for each other.
fn sum(words: &[u64]) -> u64 {
    let mut lanes = [0u64; 16];
    for w in words.chunks_exact(16) {
        for (lane, x) in lanes.iter_mut().zip(w) {
            *lane = lane.wrapping_add(*x);
        }
    }
    lanes.into_iter().fold(0, u64::wrapping_add)
}
