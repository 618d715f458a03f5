//! Memory of attention.

use super::ROWS;
use crate::attend::{BLOCK, CHUNK, Chunk, SPAN};
use crate::lanes::LANES;
use crate::ops::Limits;
use crate::{PAGE, Shared};

pub(crate) struct Scratch {
    /// What chunks contribute to one token: `[chunks, n_head]` of a row's state.
    pub(super) partial: Shared<f32>,
    /// Largest logits of their chunks, and sums relative to them, of every page: `[n_head, 2, max_pages]`.
    pub(super) page_stats: Shared<f32>,
    /// Decoded keys and values, queries, and states of rows, for each worker.
    pub(super) worker: Shared<f32>,
}

impl Scratch {
    pub(crate) fn new(limits: &Limits, nth: usize) -> Self {
        let [partial, page_stats, worker] = Self::lens(limits, nth);
        Self {
            partial: Shared::zeroed(partial),
            page_stats: Shared::zeroed(page_stats),
            worker: Shared::zeroed(worker),
        }
    }

    pub(crate) fn size(limits: &Limits, nth: usize) -> usize {
        Self::lens(limits, nth).iter().sum::<usize>() * size_of::<f32>()
    }

    fn lens(limits: &Limits, nth: usize) -> [usize; 3] {
        [
            limits.max_pages.div_ceil(CHUNK) * limits.n_head * (LANES + Self::dim(limits)),
            limits.n_head * limits.max_pages * 2,
            nth * Self::worker_len(limits),
        ]
    }

    /// Keys and values of a page, then what [`Memory::new`] takes for each row.
    pub(super) fn worker_len(limits: &Limits) -> usize {
        let dim = Self::dim(limits);
        let rounded = dim / 2 + dim / 4 + 3 * dim.div_ceil(BLOCK) + 1;
        let row = 4 * dim + SPAN + CHUNK + 4 + rounded;
        let rows = (ROWS + limits.n_head) * row;
        (2 * PAGE * dim + rows).next_multiple_of(LANES)
    }

    pub(super) fn dim(limits: &Limits) -> usize {
        limits.head_dim.next_multiple_of(LANES)
    }
}

/// What some rows have learned from all chunks so far: see [`Chunk`].
pub(super) struct State<'a> {
    pub(super) max: &'a mut [f32],
    pub(super) sum: &'a mut [f32],
    pub(super) acc: &'a mut [f32],
}

/// A worker's memory.
pub(super) struct Memory<'a> {
    pub(super) k: &'a mut [f32],
    pub(super) v: &'a mut [f32],
    /// See `Queries`.
    pub(super) q: &'a mut [f32],
    pub(super) most: &'a mut [f32],
    /// See `Rounded`.
    pub(super) quads: &'a mut [f32],
    pub(super) bytes: &'a mut [f32],
    pub(super) blocks: &'a mut [f32],
    pub(super) step: &'a mut [f32],
    pub(super) chunk: Chunk<'a>,
    pub(super) total: State<'a>,
}

impl<'a> Memory<'a> {
    pub(super) fn new(memory: &'a mut [f32], n: usize, dim_k: usize, dim_v: usize) -> Self {
        let mut rest = memory;
        let mut take = |len: usize| rest.split_off_mut(..len).expect("sized by the limits");
        // What vectors are read from begins with a cache line, so that none crosses two of them.
        let (k, v) = (take(PAGE * dim_k), take(PAGE * dim_v));
        let [q, most] = [take(n * dim_k), take(n * dim_k)];
        let (logits, page_sum) = (take(n * SPAN), take(n * CHUNK));
        let [acc, total] = [take(n * dim_v), take(n * dim_v)];
        Self {
            k,
            v,
            q,
            most,
            chunk: Chunk {
                logits,
                page_sum,
                max: take(n),
                sum: take(n),
                acc,
            },
            total: State {
                max: take(n),
                sum: take(n),
                acc: total,
            },
            quads: take(n * dim_k / 2),
            bytes: take(n * dim_k / 4),
            blocks: take(3 * n * (dim_k / BLOCK)),
            step: take(n),
        }
    }
}
