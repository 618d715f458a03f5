//! Block formats of every ggml tensor type.
//!
//! A quantized tensor is a sequence of *blocks*: some 32 to 256 values that share a scale, packed into a fixed
//! number of bytes. There is one file per format here. It says how the bytes are laid out, and has the struct
//! that mirrors them, plain code that turns blocks into values and back, and a dot product with quantized
//! activations. Nothing in this crate is fast but the quantizers' searches for scales; it is what the kernels are
//! measured against, and what serves a format until somebody writes a kernel for it.
//!
//! # Finding the way
//!
//! * [`GgmlType`] names a type; [`GgmlType::traits`] gives its sizes and its scalar code as plain functions over
//!   bytes. The table in `types.rs` has one line per type and is the only list of formats there is.
//! * [`Block`], [`Quantize`] and [`Dot`] are what a format implements for its struct.
//! * [`num`] has the number encodings that occur inside blocks.
//!
//! * [`pages`] has formats of our own, for pages of a cache of keys and values.
//!
//! # Two families
//!
//! Formats of 32 values (`q4_0` … `q8_0`) have one scale. Formats of 256 values (the "k" and "i" ones) are
//! super-blocks: a half-precision scale for the whole and small integer scales for parts of 16 or 32 values,
//! which cost fewer bits and follow the weights more closely. The "i" formats of three bits and less replace
//! values by indices into a table of good patterns.
//!
//! A product of weights and activations is computed in integers: activations are quantized to 8 bits first, to
//! `q8_0` or `q8_1` for formats of 32 values and to `q8_K` for those of 256 ([`TypeTraits::vec_dot_type`]). The sums
//! inside a block are exact, only scaling and adding up blocks round.
//!
//! # Alignment
//!
//! All structs have alignment 1. Rows of a memory-mapped file begin anywhere (a block of `mxfp4` has 17 bytes), and so a
//! cast from bytes can fail for no reason but a wrong length.
//!
//! # Exactness
//!
//! Reading is bit-exact to ggml: the float operations are the same in the same order. Quantizers follow ggml's
//! searches, with an importance matrix or without, and give its bytes for ordinary values; where ggml's result is
//! undefined (NaN, infinities, overflowing scales) they saturate. The "i" formats of three bits and less can be read
//! and multiplied, but there are no quantizers for them here.

#![forbid(unsafe_code)]

mod bits;
mod block;
pub mod float;
pub mod grids;
mod iq;
pub mod iq1_m;
pub mod iq1_s;
pub mod iq2_s;
pub mod iq2_xs;
pub mod iq2_xxs;
pub mod iq3_s;
pub mod iq3_xxs;
pub mod iq4_nl;
pub mod iq4_xs;
mod k_scales;
pub mod mxfp4;
pub mod num;
pub mod nvfp4;
pub mod pages;
pub mod q1_0;
pub mod q2_0;
pub mod q2_k;
pub mod q3_k;
pub mod q4_0;
pub mod q4_1;
pub mod q4_k;
pub mod q5_0;
pub mod q5_1;
pub mod q5_k;
pub mod q6_k;
pub mod q8_0;
pub mod q8_1;
pub mod q8_k;
mod search;
pub mod tq1_0;
pub mod tq2_0;
mod types;

pub use block::{
    Block, Dot, Quantize, blocks, dequantize_row, quantize_row, quantize_row_weighted, vec_dot,
};
pub use iq1_m::BlockIQ1M;
pub use iq1_s::BlockIQ1S;
pub use iq2_s::BlockIQ2S;
pub use iq2_xs::BlockIQ2XS;
pub use iq2_xxs::BlockIQ2XXS;
pub use iq3_s::BlockIQ3S;
pub use iq3_xxs::BlockIQ3XXS;
pub use iq4_nl::BlockIQ4NL;
pub use iq4_xs::BlockIQ4XS;
pub use k_scales::unpack_k_scales;
pub use mxfp4::BlockMXFP4;
pub use num::{BF16, F16};
pub use nvfp4::BlockNVFP4;
pub use q1_0::BlockQ1_0;
pub use q2_0::BlockQ2_0;
pub use q2_k::BlockQ2K;
pub use q3_k::BlockQ3K;
pub use q4_0::BlockQ4_0;
pub use q4_1::BlockQ4_1;
pub use q4_k::BlockQ4K;
pub use q5_0::BlockQ5_0;
pub use q5_1::BlockQ5_1;
pub use q5_k::BlockQ5K;
pub use q6_k::BlockQ6K;
pub use q8_0::BlockQ8_0;
pub use q8_1::BlockQ8_1;
pub use q8_k::{BlockQ8K, QK_K};
pub use tq1_0::BlockTQ1_0;
pub use tq2_0::BlockTQ2_0;
pub use types::{
    DequantizeRow, GgmlType, QuantizeRow, QuantizeRowWeighted, TypeTraits, UnknownType, VecDot,
};
