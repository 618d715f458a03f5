//! What the machine can do at most: the yardsticks for kernels that are bound by memory, and for those that are not.

#![allow(clippy::needless_range_loop, reason = "lanes are counted")]

use crate::lanes::multiversion;
use crate::{Isa, Shared, Team, kernels};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

/// Bytes that a worker reads at a time, so that one that is slowed down does not hold up the others.
const PART: usize = 1 << 18;

/// Numbers between two looks ahead, and how far those go.
const PIECE: usize = 256;
const AHEAD: usize = 4 << 10;

/// How fast `team` reads memory, in 10^9 bytes per second: the best of several passes over a buffer of `bytes`.
///
/// The buffer should be several times as large as the caches. It is read in the way weights are, in order and by all
/// workers, and nothing is computed but a checksum.
pub fn read_gbps(team: &Team, bytes: usize) -> f64 {
    let isa = Isa::detect();
    let n = (bytes / size_of::<u32>()).next_multiple_of(PART / size_of::<u32>());
    let mut buffer = Shared::<u32>::zeroed(n);
    // Zero pages are all the same memory until they are written to.
    for (i, x) in buffer.as_mut_slice().iter_mut().enumerate() {
        *x = i as u32;
    }
    let mut best = 0.0f64;
    for _ in 0..5 {
        let start = Instant::now();
        team.run(|w| {
            let mut sum = 0;
            let mut parts = w.claim(n, PART / size_of::<u32>()).peekable();
            while let Some(part) = parts.next() {
                // SAFETY: nobody writes.
                let part = unsafe { buffer.slice(part) };
                let next = parts.peek().map(|p| buffer.as_ptr().wrapping_add(p.start));
                for (i, piece) in part.chunks(PIECE).enumerate() {
                    let ahead = i * PIECE + AHEAD;
                    let ahead = match ahead.checked_sub(part.len()) {
                        None => Some(part[ahead..].as_ptr().cast_mut()),
                        Some(over) => next.map(|n| n.wrapping_add(over)),
                    };
                    if let Some(ahead) = ahead {
                        kernels::prefetch(isa, ahead.cast(), size_of_val(piece));
                    }
                    sum ^= checksum(isa, piece);
                }
            }
            std::hint::black_box(sum);
        });
        let seconds = start.elapsed().as_secs_f64().max(1e-9);
        best = best.max((n * size_of::<u32>()) as f64 / seconds * 1e-9);
    }
    best
}

/// What products are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbers {
    /// Bytes, added up in 32 bits (with AVX2 not at all).
    Bytes,
    /// f32, fused.
    Floats,
    /// Pairs of bf16, added up in f32; f32 in sets that have no such instruction.
    Pairs,
}

/// How fast the arithmetic units of `team` are in a loop over registers alone, in 10^9 operations per second (a product and
/// its sum are two): the best of several runs. 0 for [`Isa::Scalar`], which has no such loop.
///
/// # Panics
/// If this machine does not have `isa`.
pub fn peak_gops(team: &Team, isa: Isa, numbers: Numbers) -> f64 {
    assert!(isa.is_available(), "{isa} is not available on this machine");
    let rounds = if isa == Isa::Amx && numbers == Numbers::Bytes {
        100_000
    } else {
        1_000_000
    };
    let mut best = 0.0f64;
    for _ in 0..5 {
        let operations = AtomicU64::new(0);
        let start = Instant::now();
        team.run(|_| {
            operations.fetch_add(kernels::peak(isa, numbers, rounds), Relaxed);
        });
        let seconds = start.elapsed().as_secs_f64().max(1e-9);
        best = best.max(operations.into_inner() as f64 / seconds * 1e-9);
    }
    best
}

multiversion! {
    fn checksum(x: &[u32]) -> u32 {
        let mut sum = [0; 64];
        for x in x.as_chunks::<64>().0 {
            for i in 0..64 {
                sum[i] ^= x[i];
            }
        }
        sum.iter().fold(0, |a, b| a ^ b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_something() {
        let bytes = if cfg!(miri) { 1 << 10 } else { 1 << 24 };
        assert!(read_gbps(&Team::new(2), bytes) > 0.0);
        for isa in Isa::available().filter(|isa| *isa != Isa::Scalar) {
            for numbers in [Numbers::Bytes, Numbers::Floats, Numbers::Pairs] {
                assert!(
                    peak_gops(&Team::new(2), isa, numbers) > 1.0,
                    "{isa} {numbers:?}"
                );
            }
        }
    }
}
