//! The operations that a step consists of.
//!
//! # Why these are safe to call
//!
//! Operations are methods of [`Pass`], which exists only within [`Ops::run`], once on each worker. The contract of a
//! step: **all workers call the same operations with the same arguments in the same order.** A forward pass keeps it
//! by being the same code on every worker, with control flow that depends on the model and the step alone. Debug
//! builds check it: each operation first compares its name and arguments among the workers.
//!
//! Given the contract, no two workers touch the same memory at the same time:
//!
//! * within an operation, a worker writes only its share of the outputs; shares are disjoint by construction
//!   ([`Worker::range`], `Worker::claim`);
//! * an operation reads no [`Shared`] buffer that it writes, except where a worker reads exactly the elements that
//!   it writes itself (in-place forms), which is said at each operation;
//! * every operation ends in a barrier, so what one writes the next may read;
//! * outside of a step a [`Shared`] is used by `&mut` only, and [`Ops::run`] takes `&mut self`, so two steps cannot
//!   share an `Ops`.
//!
//! # Scratch
//!
//! No operation allocates. What they need between their stages (quantized activations, partial results of
//! attention) lies in buffers that [`Ops::new`] sizes by [`Limits`].

mod attention;
mod bounds;
mod delta;
mod elementwise;
mod heads;
mod matmul;
mod moe;
mod pages;
mod products;
mod recurrent;
mod scan;
mod selective;

pub use attention::{Attention, Window};
pub use bounds::{Estimate, KeyBounds};
pub use delta::DeltaShape;
pub use elementwise::{Activation, RopeMode};
pub use moe::{Act, Gating, MoeBias, MoeFfn};
pub use recurrent::RecurrentState;
pub use scan::{Scan, ScanShape};
pub use selective::Selective;

use crate::{Isa, Shared, Team, Worker};
use std::cell::Cell;

/// The largest shapes that operations are called with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens in a batch.
    pub max_tokens: usize,
    /// The widest input of a matrix (`n_embd`, `n_ff`, `n_head * head_dim`).
    pub max_width: usize,
    /// Query heads.
    pub n_head: usize,
    /// Values in a key or value head.
    pub head_dim: usize,
    /// Pages that one call of attention reads.
    pub max_pages: usize,
    /// The widest input or output of a head that has a matrix of its own; 0 without.
    pub head_product: usize,
    /// Width of an expert's hidden layer; 0 without experts.
    pub n_ff_expert: usize,
    /// Width of the model, for the outputs of experts; 0 without experts.
    pub n_embd_expert: usize,
    /// Experts; 0 if there are none.
    pub n_expert: usize,
    /// Experts that a token uses.
    pub n_expert_used: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_tokens: 1,
            max_width: 256,
            n_head: 1,
            head_dim: 128,
            max_pages: 1,
            head_product: 0,
            n_ff_expert: 0,
            n_embd_expert: 0,
            n_expert: 0,
            n_expert_used: 0,
        }
    }
}

/// A team with the scratch memory of its operations.
pub struct Ops {
    team: Team,
    isa: Isa,
    limits: Limits,
    scratch: Scratch,
}

/// A worker's place in a step: the operations are methods of it. All workers must call the same ones.
pub struct Pass<'a> {
    w: &'a Worker<'a>,
    isa: Isa,
    limits: &'a Limits,
    scratch: &'a Scratch,
    /// Products so far in this step.
    n_products: Cell<usize>,
}

/// Memory for what operations keep between their stages.
struct Scratch {
    matmul: matmul::Scratch,
    attention: attention::Scratch,
    heads: heads::Scratch,
    moe: moe::Scratch,
    /// What each worker calls, compared in debug builds.
    #[cfg(debug_assertions)]
    calls: Vec<std::sync::atomic::AtomicU64>,
}

impl Scratch {
    fn new(limits: &Limits, nth: usize) -> Self {
        Self {
            matmul: matmul::Scratch::new(limits, nth),
            attention: attention::Scratch::new(limits, nth),
            heads: heads::Scratch::new(limits),
            moe: moe::Scratch::new(limits),
            #[cfg(debug_assertions)]
            calls: (0..nth).map(|_| Default::default()).collect(),
        }
    }
}

impl Ops {
    /// Operations on `team` with kernels for `isa`.
    ///
    /// # Panics
    /// If this machine does not have `isa`.
    pub fn new(team: Team, isa: Isa, limits: Limits) -> Self {
        assert!(isa.is_available(), "{isa} is not available on this machine");
        let scratch = Scratch::new(&limits, team.n_threads());
        Self {
            team,
            isa,
            limits,
            scratch,
        }
    }

    /// The workers.
    pub fn team(&self) -> &Team {
        &self.team
    }

    /// The instruction set of the kernels.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The shapes that there is room for.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Makes room for other shapes; what products had learned about the order of weights is forgotten.
    pub fn set_limits(&mut self, limits: Limits) {
        self.scratch = Scratch::new(&limits, self.team.n_threads());
        self.limits = limits;
    }

    /// Bytes of scratch memory that operations of these limits take, all workers together.
    pub fn scratch_size(limits: &Limits, n_threads: usize) -> usize {
        matmul::Scratch::size(limits, n_threads)
            + attention::Scratch::size(limits, n_threads)
            + heads::Scratch::size(limits)
            + moe::Scratch::size(limits)
    }

    /// Runs a step: `step` once on every worker. It must call the same operations on each of them.
    ///
    /// # Panics
    /// If a worker panics, with its panic.
    pub fn run<F: Fn(&Pass<'_>) + Sync>(&mut self, step: F) {
        self.team.run(|w| step(&self.pass(w)));
    }

    /// Like [`Ops::run`], for steps whose `work` (tokens) is comparable: leaves workers out while other programs keep them
    /// from their cores. Results are the same.
    ///
    /// # Panics
    /// As [`Ops::run`].
    pub fn run_some<F: Fn(&Pass<'_>) + Sync>(&mut self, work: usize, step: F) {
        self.team.run_some(work, |w| step(&self.pass(w)));
    }

    fn pass<'a>(&'a self, w: &'a Worker<'a>) -> Pass<'a> {
        Pass {
            w,
            isa: self.isa,
            limits: &self.limits,
            scratch: &self.scratch,
            n_products: Cell::new(0),
        }
    }
}

impl Pass<'_> {
    /// The number of this worker, for what one worker alone does (timing, say). Operations are called by all.
    pub fn ith(&self) -> usize {
        self.w.ith()
    }

    /// The number of workers.
    pub fn nth(&self) -> usize {
        self.w.nth()
    }

    /// Waits for all workers.
    pub fn barrier(&self) {
        self.w.barrier();
    }

    /// Checks in debug builds that all workers call the same operation with the same arguments.
    #[inline]
    fn check(&self, name: &'static str, arguments: &[usize]) {
        #[cfg(debug_assertions)]
        {
            use std::hash::{DefaultHasher, Hash, Hasher};
            use std::sync::atomic::Ordering::Relaxed;
            let mut hasher = DefaultHasher::new();
            (name, arguments).hash(&mut hasher);
            let call = hasher.finish();
            self.scratch.calls[self.ith()].store(call, Relaxed);
            self.barrier();
            let calls = &self.scratch.calls[..self.nth()];
            let all_agree = calls.iter().all(|c| c.load(Relaxed) == call);
            self.barrier();
            assert!(all_agree, "workers disagree at {name}{arguments:?}");
        }
        #[cfg(not(debug_assertions))]
        let _ = (name, arguments);
    }
}

/// The address of a buffer, to compare arguments among workers.
fn id<T: crate::shared::Plain>(buffer: &Shared<T>) -> usize {
    buffer.as_ptr() as usize
}
