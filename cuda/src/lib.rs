//! Hand-written CUDA kernels and the host side that launches them.
//!
//! The kernels (`kernels/*.cu`) are compiled by nvcc at build time and embedded; the driver is loaded when it is first needed, so a
//! program built with the feature `cuda` starts on machines that have none: [`devices`] then says why nothing was found.
//!
//! ```text
//! devices()            what is there, without touching anything that is not
//! Gpu::open            a device: buffers, launches, recorded graphs      gpu.rs over driver.rs (cudarc) or emulator.rs
//! Uploader, Weight     matrices in device memory                         weight.rs; layouts in types.rs and kernels/types.cuh
//! step::*              a whole decode step in one launch                 step.rs; kernels/step.cu
//! ops::*               one function for each kernel: checks, geometry    ops.rs; arguments in args.rs
//! ```
//!
//! With the feature `emulate` the same kernels, compiled as C++, run on the CPU through the same functions ([`Gpu::emulated`]): every
//! kernel, its launch geometry and its arguments can be tested where there is no GPU.

#[cfg(any(feature = "cuda", feature = "emulate"))]
mod args;
#[cfg(any(feature = "cuda", feature = "emulate"))]
mod ceiling;
mod devices;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(feature = "emulate")]
mod emulator;
#[cfg(any(feature = "cuda", feature = "emulate"))]
mod gpu;
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub mod ops;
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub mod step;
#[cfg(any(feature = "cuda", feature = "emulate"))]
mod stretch;
#[cfg(any(feature = "cuda", feature = "emulate"))]
mod types;
#[cfg(any(feature = "cuda", feature = "emulate"))]
mod weight;

#[cfg(any(feature = "cuda", feature = "emulate"))]
pub use ceiling::{Ceiling, ceiling};
pub use devices::{DeviceInfo, Devices, devices};
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub use gpu::{Buffer, CudaError, Gpu, Graph, Mark, Pinned, View};
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub use stretch::Stretch;
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub use types::{has_kernels, row_bytes};
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub use weight::{Source, Uploader, Weight};

/// Tokens in a page of the KV pool.
pub const PAGE: usize = 16;
