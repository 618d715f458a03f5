//! A tile of rows with many tokens.
//!
//! Sixteen rows are unpacked to bytes once, 256 columns at a time, and lie so that a vector holds four columns of each
//! row. Multiplying it with four columns of a token, repeated in all lanes, adds to sixteen results at once, one for
//! each row: no lanes have to be folded in the end. Eight tokens share the loads of weights.

use super::gemm_256::{avx_vnni, avx2};
use super::gemm_avx512 as avx512;
use super::patterns::{self, Batch};
use super::ternary;
use super::{TilesFn, UnpackFn};
use super::{iq4_nl, iq4_xs, mxfp4, q2_k, q3_k, q4_0, q4_k, q5_0, q5_k, q6_k, q8_0};
use crate::Isa;
use lemma_quant::GgmlType;

/// What is needed for batches of a type.
pub(super) fn kernel(ty: GgmlType, isa: Isa) -> Option<(UnpackFn, TilesFn)> {
    match isa {
        Isa::Scalar => None,
        Isa::Avx2 => avx2(ty),
        Isa::AvxVnni => avx_vnni(ty),
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => avx512(ty),
    }
}

/// Unpacking and multiplying, by type.
macro_rules! kernels {
    ($isa:ident, $($ty:ident: $format:ty, $mul:expr;)*) => {
        fn $isa(ty: GgmlType) -> Option<(UnpackFn, TilesFn)> {
            use $isa::{mul_32, mul_256, unpack};
            Some(match ty {
                $(GgmlType::$ty => (unpack::<$format>, $mul),)*
                _ => return None,
            })
        }
    };
}

/// Where products are added up in 32 bits at once.
macro_rules! fused {
    ($isa:ident) => {
        kernels! {
            $isa,
            Q4_0: q4_0::Q4_0, mul_32::<4, false>;
            Q4_1: q4_0::Q4_1, mul_32::<NONE, true>;
            Q5_0: q5_0::Q5_0, mul_32::<3, false>;
            Q5_1: q5_0::Q5_1, mul_32::<NONE, true>;
            Q8_0: q8_0::Q8_0, mul_32::<0, false>;
            IQ4_NL: iq4_nl::IQ4NL, mul_32::<0, false>;
            MXFP4: mxfp4::MXFP4, mul_32::<3, false>;
            Q2_K: q2_k::Q2K, mul_256::<16, true>;
            Q3_K: q3_k::Q3K, mul_256::<16, false>;
            Q4_K: q4_k::Q4K, mul_256::<32, true>;
            Q5_K: q5_k::Q5K, mul_256::<32, true>;
            Q6_K: q6_k::Q6K, mul_256::<16, false>;
            IQ4_XS: iq4_xs::IQ4XS, mul_256::<32, false>;
            IQ2_XXS: Batch<patterns::IQ2XXS>, mul_256::<32, false>;
            IQ2_XS: Batch<patterns::IQ2XS>, mul_256::<16, false>;
            IQ2_S: Batch<patterns::IQ2S>, mul_256::<16, false>;
            IQ3_XXS: Batch<patterns::IQ3XXS>, mul_256::<32, false>;
            IQ3_S: Batch<patterns::IQ3S>, mul_256::<32, false>;
            IQ1_S: Batch<patterns::IQ1S>, mul_256::<32, false>;
            IQ1_M: Batch<patterns::IQ1M>, mul_256::<16, false>;
            TQ1_0: Batch<ternary::TQ1_0>, mul_256::<32, false>;
            TQ2_0: Batch<ternary::TQ2_0>, mul_256::<32, false>;
        }
    };
}
fused!(avx512);
fused!(avx_vnni);

// Next to last: how many products of four columns fit 16 bits, or none if signs are needed.
kernels! {
    avx2,
    Q4_0: q4_0::Q4_0, mul_32::<4, 8, false>;
    Q4_1: q4_0::Q4_1, mul_32::<NONE, 8, true>;
    Q5_0: q5_0::Q5_0, mul_32::<3, 4, false>;
    Q5_1: q5_0::Q5_1, mul_32::<NONE, 4, true>;
    Q8_0: q8_0::Q8_0, mul_32::<NONE, 0, false>;
    IQ4_NL: iq4_nl::IQ4NL, mul_32::<NONE, 0, false>;
    MXFP4: mxfp4::MXFP4, mul_32::<3, 4, false>;
    Q2_K: q2_k::Q2K, mul_256::<16, 4, true>;
    Q3_K: q3_k::Q3K, mul_256::<16, 4, false>;
    Q4_K: q4_k::Q4K, mul_256::<32, 8, true>;
    Q5_K: q5_k::Q5K, mul_256::<32, 4, true>;
    Q6_K: q6_k::Q6K, mul_256::<16, 2, false>;
    IQ4_XS: iq4_xs::IQ4XS, mul_256::<32, 0, false>;
    IQ2_XXS: Batch<patterns::IQ2XXS>, mul_256::<32, 0, false>;
    IQ2_XS: Batch<patterns::IQ2XS>, mul_256::<16, 0, false>;
    IQ2_S: Batch<patterns::IQ2S>, mul_256::<16, 0, false>;
    IQ3_XXS: Batch<patterns::IQ3XXS>, mul_256::<32, 0, false>;
    IQ3_S: Batch<patterns::IQ3S>, mul_256::<32, 0, false>;
    IQ1_S: Batch<patterns::IQ1S>, mul_256::<32, 0, false>;
    IQ1_M: Batch<patterns::IQ1M>, mul_256::<16, 0, false>;
    TQ1_0: Batch<ternary::TQ1_0>, mul_256::<32, 0, false>;
    TQ2_0: Batch<ternary::TQ2_0>, mul_256::<32, 0, false>;
}

/// No offset. Otherwise quants were made unsigned by adding 128, shifted right by this; activations come with their sums times
/// as much.
pub(super) const NONE: u32 = 32;

/// A kernel for each count of tokens up to 8.
macro_rules! for_tokens {
    ($f:ident::<$($g:tt),*>, $n:expr, $($arg:expr),*) => {
        match $n {
            1 => $f::<1, $($g),*>($($arg),*),
            2 => $f::<2, $($g),*>($($arg),*),
            3 => $f::<3, $($g),*>($($arg),*),
            4 => $f::<4, $($g),*>($($arg),*),
            5 => $f::<5, $($g),*>($($arg),*),
            6 => $f::<6, $($g),*>($($arg),*),
            7 => $f::<7, $($g),*>($($arg),*),
            _ => $f::<8, $($g),*>($($arg),*),
        }
    };
}
pub(super) use for_tokens;
