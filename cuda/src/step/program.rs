//! A step in device memory, to be run any number of times.

use crate::args::{self, Words};
use crate::gpu::{Buffer, Gpu, Launch, Mark, Pinned, Result, View};

/// What differs between steps.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// Position of the token.
    pub pos: u32,
    /// The token; `None` for the one with the largest logit of the launch before ([`Builder::best`](super::Builder::best)).
    pub token: Option<u32>,
    /// Live pages of each layer.
    pub n_pages: &'a [u32],
    /// Slot times page size plus row of the token in each layer.
    pub places: &'a [u32],
    /// `[n_rope, head_dim / 2, 2]` cosines and sines.
    pub rope: &'a [f32],
}

/// Clocks of a phase.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clocks {
    /// Until blocks had its input, mean over the blocks.
    pub wait: f64,
    /// Those of the block that waited least: since all have it at nearly the same time, the one that was through with the phase before last.
    pub least: f64,
    /// That blocks worked behind that, mean.
    pub work: f64,
}

/// A step in device memory.
pub struct Program {
    pub(super) gpu: Gpu,
    /// For either set of places.
    pub(super) args: [args::Step; 2],
    /// Launches so far.
    pub(super) launches: u32,
    /// Pages may be of any tier.
    pub(super) tiered: bool,
    /// There is what only some models have.
    pub(super) any: bool,
    pub(super) launch: Launch,
    /// What the last launch was given.
    pub(super) words: Words,
    /// The token with the largest logit, for the next launch and for the host, of launches of either set.
    pub(super) best: Buffer,
    pub(super) told: Pinned,
    /// Behind the last launch of either set.
    pub(super) done: [Mark; 2],
    pub(super) _buffers: Vec<Buffer>,
}

impl Program {
    /// Runs the last step once more and says what took how long, for each phase.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn trace(&mut self) -> Result<Vec<Clocks>> {
        let (n, blocks) = (self.args[0].n_phase as usize, self.launch.grid[0] as usize);
        let clocks = self.gpu.alloc(n * 2 * blocks * 8)?;
        let args = args::Step {
            trace: clocks.view().at,
            ..self.next(false)
        };
        self.start(args)?;
        let bytes = self.gpu.read(clocks.view())?;
        let word = |b: &[u8]| b.iter().rev().fold(0, |n, &b| n << 8 | i64::from(b));
        let clocks: Vec<i64> = bytes.chunks_exact(8).map(word).collect();
        let at = |k: usize| clocks[k * blocks..][..blocks].iter();
        // The end of a phase is the beginning of the next.
        let between = |from: usize, to: usize| at(from).zip(at(to)).map(|(a, b)| (b - a) as f64);
        let mean = |from: usize, to: usize| between(from, to).sum::<f64>() / blocks as f64;
        let phase = |p: usize| {
            let before = (2 * p).saturating_sub(1);
            Clocks {
                wait: mean(before, 2 * p),
                least: between(before, 2 * p).fold(f64::INFINITY, f64::min),
                work: mean(2 * p, 2 * p + 1),
            }
        };
        Ok((0..n).map(phase).collect())
    }

    /// The arguments of the next launch.
    fn next(&mut self, follow: bool) -> args::Step {
        let (turn, set) = (self.launches, self.next_set());
        self.launches = turn.wrapping_add(1);
        let best = self.best.view().at + 4 * (1 - set) as u64;
        args::Step {
            turn: turn
                .wrapping_mul(self.args[set].n_phase + 1)
                .wrapping_add(1),
            follows: if follow { best } else { 0 },
            words: self.words,
            ..self.args[set]
        }
    }

    /// Which of the pairs of buffers the next launch writes to: 0 or 1, in turn.
    pub fn next_set(&self) -> usize {
        self.launches as usize % 2
    }

    /// Asks for a step.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn run(&mut self, of: &Inputs<'_>) -> Result<()> {
        let n = self.args[0].n_layer as usize;
        assert!(of.n_pages.len() == n && of.places.len() == n);
        assert_eq!(2 + 2 * n + of.rope.len(), self.args[0].n_words as usize);
        let words = &mut self.words.0;
        (words[0], words[1]) = (of.pos, of.token.unwrap_or(0));
        words[2..][..n].copy_from_slice(of.n_pages);
        words[2 + n..][..n].copy_from_slice(of.places);
        for (w, x) in words[2 + 2 * n..].iter_mut().zip(of.rope) {
            *w = x.to_bits();
        }
        let set = self.next_set();
        let args = self.next(of.token.is_none());
        self.start(args)?;
        self.done[set].set()
    }

    /// Asks for the last step once more.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn repeat(&mut self) -> Result<()> {
        let args = self.next(false);
        self.start(args)
    }

    fn start(&self, args: args::Step) -> Result<()> {
        match (self.any, self.tiered) {
            (false, false) => self.gpu.launch(self.launch, &args),
            (false, true) => self.gpu.launch(self.launch, &args::StepTiers(args)),
            (true, false) => self.gpu.launch(self.launch, &args::StepAny(args)),
            (true, true) => self.gpu.launch(self.launch, &args::StepAnyTiers(args)),
        }
    }

    /// Waits for the last launch of a set.
    ///
    /// # Errors
    /// What went wrong on the device in the meantime.
    pub fn wait(&self, set: usize) -> Result<()> {
        self.done[set].wait()
    }

    /// Where the next launch behind the last of a set finds its token if it is given none: what writes there is asked for between the two,
    /// and [`Program::mark`] follows.
    pub fn next_token(&self, set: usize) -> View {
        self.best.view().slice(4 * set, 4)
    }

    /// What has been asked for since the last launch of a set belongs to that launch: [`Program::wait`] waits for it too.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn mark(&self, set: usize) -> Result<()> {
        self.done[set].set()
    }

    /// The token with the largest logit, the first of them, of the last launch of a set, which must be [done](Self::wait). `None` if there
    /// is no number among the logits, or nobody asked.
    pub fn best(&self, set: usize) -> Option<u32> {
        Some(self.told.word(set)).filter(|&t| t != u32::MAX)
    }
}
