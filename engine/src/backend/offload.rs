//! A model that is divided: its first layers run on the CPU, the others and the output on a GPU that could not hold all of them.
//!
//! Layers are divided, and nothing else is: a token's residual stream crosses the bus once, `n_embd` numbers. Both sides have a pool of the whole
//! layout, so that the books of the pool need not know about it; of its slots each reads and writes those of its own layers only, and
//! memory on the CPU is taken when a slot is first written. While the GPU works on a batch of a prompt, the CPU begins with the next.

use std::ops::Range;

use super::cpu::CpuRunner;
use super::cuda::CudaRunner;
use super::{Outputs, Runner};
use crate::error::Error;
use crate::kv::{Cache, Layout};
use crate::sampling::{Candidate, Choice};

/// A model on both.
pub struct OffloadRunner {
    front: CpuRunner,
    back: CudaRunner,
    /// The layers that are on the GPU.
    layers: Range<usize>,
}

impl OffloadRunner {
    /// Puts together what was bound of one file in two parts: `layers` are those of `back`, and `front` has the ones before.
    pub fn new(front: CpuRunner, back: CudaRunner, layers: Range<usize>) -> Self {
        Self {
            front,
            back,
            layers,
        }
    }
}

impl Runner for OffloadRunner {
    fn run(&mut self, tokens: &[u32], cache: &mut Cache, outputs: Outputs) -> Result<(), Error> {
        self.front.run(tokens, cache, Outputs::None)?;
        self.back
            .run_behind(self.front.rows(), tokens, cache, outputs)
    }

    fn logits(&mut self) -> &[f32] {
        self.back.logits()
    }

    fn best(&mut self) -> Option<u32> {
        self.back.best()
    }

    fn top(&mut self, k: usize, out: &mut Vec<Candidate>) {
        self.back.top(k, out);
    }

    fn follow(&mut self, choice: Choice) {
        self.back.follow(choice);
    }

    fn save_state(&mut self) {
        self.front.save_state();
        self.back.save_state();
    }

    fn restore_state(&mut self) {
        self.front.restore_state();
        self.back.restore_state();
    }

    fn grow(&mut self, layout: &Layout) -> Result<(), Error> {
        // The GPU is more likely to have no room.
        self.back.grow(layout)?;
        self.front.grow(layout)
    }

    fn pool_bytes(&self, layout: &Layout) -> u64 {
        self.back.pool_bytes(layout)
    }

    fn describe(&self) -> String {
        let (first, n) = (self.layers.start, self.layers.len());
        format!(
            "{} for {first} layer{}, {} for {n} and the output",
            self.front.describe(),
            if first == 1 { "" } else { "s" },
            self.back.describe()
        )
    }
}
