//! Plain numbers: `f32`, `f16`, `bf16`, `f64` and the integers, one value a "block".
//!
//! Only `f32`, `f16` and `bf16` occur as weights. The dot products sum in double precision: they are the yardstick of
//! the kernels, and a long row summed in single precision would be off by more than the kernels may be.

use crate::num::{BF16, F16, F32Le};
use bytemuck::Pod;

/// Views `bytes` as `n` elements.
fn elements<T: Pod>(bytes: &[u8], n: usize) -> &[T] {
    const { assert!(align_of::<T>() == 1) };
    assert!(
        n.checked_mul(size_of::<T>()) == Some(bytes.len()),
        "{n} elements of {} bytes, but {} bytes are given",
        size_of::<T>(),
        bytes.len()
    );
    bytemuck::cast_slice(bytes)
}

fn elements_mut<T: Pod>(bytes: &mut [u8], n: usize) -> &mut [T] {
    const { assert!(align_of::<T>() == 1) };
    assert!(
        n.checked_mul(size_of::<T>()) == Some(bytes.len()),
        "{n} elements of {} bytes, but {} bytes are given",
        size_of::<T>(),
        bytes.len()
    );
    bytemuck::cast_slice_mut(bytes)
}

macro_rules! weights {
    ($what:literal, $t:ty, $get:path, $put:path, $dequantize:ident, $quantize:ident, $dot:ident) => {
        #[doc = concat!("Reads a row of `", $what, "`.\n\n# Panics\nIf the lengths do not agree.")]
        pub fn $dequantize(x: &[u8], y: &mut [f32]) {
            for (x, y) in elements::<$t>(x, y.len()).iter().zip(y) {
                *y = $get(*x);
            }
        }

        #[doc = concat!("Rounds a row to `", $what, "`.\n\n# Panics\nIf the lengths do not agree.")]
        pub fn $quantize(x: &[f32], y: &mut [u8]) {
            for (x, y) in x.iter().zip(elements_mut::<$t>(y, x.len())) {
                *y = $put(*x);
            }
        }

        #[doc = concat!("Dot product of two rows of `", $what, "`.\n\n# Panics\nIf the lengths do not agree.")]
        pub fn $dot(n: usize, w: &[u8], x: &[u8]) -> f32 {
            // Eight sums, because one would wait for itself at every addition.
            let mut sums = [0.0; 8];
            let runs = elements::<$t>(w, n).chunks(8).zip(elements::<$t>(x, n).chunks(8));
            for (w, x) in runs {
                for ((sum, w), x) in sums.iter_mut().zip(w).zip(x) {
                    *sum += f64::from($get(*w)) * f64::from($get(*x));
                }
            }
            sums.iter().sum::<f64>() as f32
        }
    };
}

weights!(
    "f32",
    F32Le,
    F32Le::get,
    F32Le::new,
    dequantize_row_f32,
    quantize_row_f32,
    vec_dot_f32
);
weights!(
    "f16",
    F16,
    F16::to_f32,
    F16::from_f32,
    dequantize_row_f16,
    quantize_row_f16,
    vec_dot_f16
);
weights!(
    "bf16",
    BF16,
    BF16::to_f32,
    BF16::from_f32,
    dequantize_row_bf16,
    quantize_row_bf16,
    vec_dot_bf16
);

macro_rules! read_only {
    ($($t:ident $f:ident),*) => {$(
        #[doc = concat!("Reads a row of `", stringify!($t), "`, rounding to `f32`.\n\n# Panics\nIf the lengths do not agree.")]
        pub fn $f(x: &[u8], y: &mut [f32]) {
            for (x, y) in elements::<[u8; size_of::<$t>()]>(x, y.len()).iter().zip(y) {
                *y = $t::from_le_bytes(*x) as f32;
            }
        }
    )*};
}

read_only!(i8 dequantize_row_i8, i16 dequantize_row_i16, i32 dequantize_row_i32, i64 dequantize_row_i64, f64 dequantize_row_f64);
