//! Hand-written CPU kernels and the worker team.
//!
//! * [`Isa`] is the instruction set that kernels use, chosen at run time; [`Isa::Scalar`] always exists.
//! * [`Team`] runs a step on all cores: every worker executes the same operations and takes its share of each.
//! * [`Ops`] has the scratch memory for the operations, which are methods of [`Pass`], the token that a worker
//!   holds within [`Ops::run`].
//! * [`Mat`] names a weight in its GGUF layout, [`Shared`] is a buffer of activations, [`KvLayer`] a pool of pages.
//!
//! Results do not depend on the number of threads: work is partitioned over independent outputs, and sums are taken in
//! an order that the shapes alone decide.

mod activations;
mod attend;
mod barrier;
pub mod ceiling;
mod crew;
mod decode;
mod float;
mod isa;
mod kernels;
mod kv;
mod lanes;
mod ops;
mod shared;
mod simd;
mod team;
mod tensor;
mod words;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use isa::Isa;
pub use kv::{KvLayer, KvShape, Move, PAGE, PageRef, Place};
pub use ops::{
    Act, Activation, Attention, DeltaShape, Estimate, Gating, KeyBounds, Limits, MoeBias, MoeFfn,
    Ops, Pass, RecurrentState, RopeMode, Scan, ScanShape, Selective, Window,
};
pub use shared::{OutOfMemory, Shared, allocating};
pub use team::{Team, Worker, default_threads};
pub use tensor::{Experts, Mat, MulMat};
