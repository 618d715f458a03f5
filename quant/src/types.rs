//! The registry: every ggml tensor type, and what can be done with it.
//!
//! A format is added by writing its file and one line in the table below. Everything else (sizes, names,
//! conversions, the fallback of the kernel crates, tests) follows from that line.

use crate::block::{self, Block, Dot, Quantize};
use crate::float::*;
use crate::*;

/// Reads a row: bytes of whole blocks to values. Panics if the lengths do not agree.
pub type DequantizeRow = fn(&[u8], &mut [f32]);
/// Encodes a row: values to the bytes of whole blocks. Panics if the lengths do not agree.
pub type QuantizeRow = fn(&[f32], &mut [u8]);
/// Encodes one row, given the importance of each of its columns. Panics if the lengths do not agree.
pub type QuantizeRowWeighted = fn(&[f32], &[f32], &mut [u8]);
/// Dot product of `n` weights with `n` activations in the type's `vec_dot_type`. Panics if the lengths do
/// not agree.
pub type VecDot = fn(usize, &[u8], &[u8]) -> f32;

/// What is known about a type, and its scalar code.
#[derive(Clone, Copy, Debug)]
pub struct TypeTraits {
    /// The type.
    pub ty: GgmlType,
    /// Its name as ggml prints it.
    pub name: &'static str,
    /// Values in a block.
    pub block_size: usize,
    /// Bytes in a block.
    pub type_size: usize,
    /// The type that activations must have for `vec_dot`; the type itself where there is no `vec_dot`.
    pub vec_dot_type: GgmlType,
    /// Reads a row.
    pub dequantize_row: DequantizeRow,
    /// Encodes a row, if there is a quantizer.
    pub quantize_row: Option<QuantizeRow>,
    /// Encodes a row with an importance matrix's numbers, if there is a quantizer and weights come in the format.
    pub quantize_row_weighted: Option<QuantizeRowWeighted>,
    /// Multiplies a row with activations of type `vec_dot_type`.
    pub vec_dot: Option<VecDot>,
}

impl TypeTraits {
    /// Bits that a value takes, scales included.
    pub fn bits_per_value(&self) -> f64 {
        (8 * self.type_size) as f64 / self.block_size as f64
    }

    /// A format of blocks that weights come in: read, written and multiplied.
    const fn weights<B: Quantize + Dot>(ty: GgmlType, name: &'static str) -> Self {
        let mut t = Self::decode_only::<B>(ty, name);
        t.quantize_row = Some(block::quantize_row::<B>);
        t.quantize_row_weighted = Some(block::quantize_row_weighted::<B>);
        t
    }

    /// A format of blocks that weights come in, for which there is no quantizer here.
    const fn decode_only<B: Dot>(ty: GgmlType, name: &'static str) -> Self {
        const { assert!(B::LEN.is_multiple_of(B::Partner::LEN)) };
        let mut t = Self::plain(ty, name, size_of::<B>(), block::dequantize_row::<B>);
        t.block_size = B::LEN;
        t.vec_dot_type = B::Partner::TYPE;
        t.vec_dot = Some(block::vec_dot::<B>);
        t
    }

    /// A format of blocks that only activations take.
    const fn activations<B: Quantize>(ty: GgmlType, name: &'static str) -> Self {
        let mut t = Self::plain(ty, name, size_of::<B>(), block::dequantize_row::<B>);
        t.block_size = B::LEN;
        t.quantize_row = Some(block::quantize_row::<B>);
        t
    }

    /// Plain numbers that weights and activations come in.
    const fn float(
        ty: GgmlType,
        name: &'static str,
        size: usize,
        (dequantize, quantize, dot): (DequantizeRow, QuantizeRow, VecDot),
    ) -> Self {
        let mut t = Self::plain(ty, name, size, dequantize);
        t.quantize_row = Some(quantize);
        t.vec_dot = Some(dot);
        t
    }

    /// Plain numbers that can only be read.
    const fn plain(
        ty: GgmlType,
        name: &'static str,
        type_size: usize,
        dequantize_row: DequantizeRow,
    ) -> Self {
        Self {
            ty,
            name,
            block_size: 1,
            type_size,
            vec_dot_type: ty,
            dequantize_row,
            quantize_row: None,
            quantize_row_weighted: None,
            vec_dot: None,
        }
    }
}

macro_rules! registry {
    ($($id:literal $ty:ident $name:literal $make:ident $(<$block:ty>)? $(($($arg:expr),*))?;)*) => {
        /// A tensor type, numbered as in GGUF files.
        #[allow(non_camel_case_types, reason = "these are ggml's names")]
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum GgmlType {
            $(#[doc = concat!("`", $name, "`")] $ty = $id,)*
        }

        impl GgmlType {
            /// All types, by number.
            pub const ALL: &'static [Self] = &[$(Self::$ty),*];

            /// The type with this number; numbers of removed and unknown types give `None`.
            pub const fn from_id(id: u32) -> Option<Self> {
                match id {
                    $($id => Some(Self::$ty),)*
                    _ => None,
                }
            }

            /// What is known about the type, and its scalar code.
            pub const fn traits(self) -> &'static TypeTraits {
                match self {
                    $(Self::$ty => {
                        const T: TypeTraits =
                            TypeTraits::$make $(::<$block>)? (GgmlType::$ty, $name $($(, $arg)*)?);
                        &T
                    })*
                }
            }
        }
    };
}

registry! {
//  id  type     name       what it can do, and the block or the numbers it consists of
    0   F32      "f32"      float (4, (dequantize_row_f32, quantize_row_f32, vec_dot_f32));
    1   F16      "f16"      float (2, (dequantize_row_f16, quantize_row_f16, vec_dot_f16));
    2   Q4_0     "q4_0"     weights <BlockQ4_0>;
    3   Q4_1     "q4_1"     weights <BlockQ4_1>;
    6   Q5_0     "q5_0"     weights <BlockQ5_0>;
    7   Q5_1     "q5_1"     weights <BlockQ5_1>;
    8   Q8_0     "q8_0"     weights <BlockQ8_0>;
    9   Q8_1     "q8_1"     activations <BlockQ8_1>;
    10  Q2_K     "q2_K"     weights <BlockQ2K>;
    11  Q3_K     "q3_K"     weights <BlockQ3K>;
    12  Q4_K     "q4_K"     weights <BlockQ4K>;
    13  Q5_K     "q5_K"     weights <BlockQ5K>;
    14  Q6_K     "q6_K"     weights <BlockQ6K>;
    15  Q8_K     "q8_K"     activations <BlockQ8K>;
    16  IQ2_XXS  "iq2_xxs"  decode_only <BlockIQ2XXS>;
    17  IQ2_XS   "iq2_xs"   decode_only <BlockIQ2XS>;
    18  IQ3_XXS  "iq3_xxs"  decode_only <BlockIQ3XXS>;
    19  IQ1_S    "iq1_s"    decode_only <BlockIQ1S>;
    20  IQ4_NL   "iq4_nl"   weights <BlockIQ4NL>;
    21  IQ3_S    "iq3_s"    decode_only <BlockIQ3S>;
    22  IQ2_S    "iq2_s"    decode_only <BlockIQ2S>;
    23  IQ4_XS   "iq4_xs"   weights <BlockIQ4XS>;
    24  I8       "i8"       plain (1, dequantize_row_i8);
    25  I16      "i16"      plain (2, dequantize_row_i16);
    26  I32      "i32"      plain (4, dequantize_row_i32);
    27  I64      "i64"      plain (8, dequantize_row_i64);
    28  F64      "f64"      plain (8, dequantize_row_f64);
    29  IQ1_M    "iq1_m"    decode_only <BlockIQ1M>;
    30  BF16     "bf16"     float (2, (dequantize_row_bf16, quantize_row_bf16, vec_dot_bf16));
    34  TQ1_0    "tq1_0"    weights <BlockTQ1_0>;
    35  TQ2_0    "tq2_0"    weights <BlockTQ2_0>;
    39  MXFP4    "mxfp4"    weights <BlockMXFP4>;
    40  NVFP4    "nvfp4"    weights <BlockNVFP4>;
    41  Q1_0     "q1_0"     weights <BlockQ1_0>;
    42  Q2_0     "q2_0"     weights <BlockQ2_0>;
}

impl GgmlType {
    /// The number of the type in GGUF files.
    pub const fn id(self) -> u32 {
        self as u32
    }

    /// The name as ggml prints it.
    pub const fn name(self) -> &'static str {
        self.traits().name
    }

    /// Values in a block.
    pub const fn block_size(self) -> usize {
        self.traits().block_size
    }

    /// Bytes in a block.
    pub const fn type_size(self) -> usize {
        self.traits().type_size
    }

    /// Bytes that `n` values take; `None` if they are no whole number of blocks or their size overflows.
    pub const fn row_size(self, n: usize) -> Option<usize> {
        if n.is_multiple_of(self.block_size()) {
            (n / self.block_size()).checked_mul(self.type_size())
        } else {
            None
        }
    }
}

impl std::fmt::Display for GgmlType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// The name given is not that of a type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownType(String);

impl std::fmt::Display for UnknownType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "unknown tensor type '{}'", self.0)
    }
}

impl std::error::Error for UnknownType {}

impl std::str::FromStr for GgmlType {
    type Err = UnknownType;

    /// Takes names as ggml prints them, in upper or lower case.
    fn from_str(s: &str) -> Result<Self, UnknownType> {
        let found = Self::ALL.iter().find(|t| t.name().eq_ignore_ascii_case(s));
        found.copied().ok_or_else(|| UnknownType(s.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_found_by_number_and_name() {
        for &ty in GgmlType::ALL {
            assert_eq!(ty.traits().ty, ty);
            assert_eq!(GgmlType::from_id(ty.id()), Some(ty));
            assert_eq!(ty.name().parse(), Ok(ty));
            assert_eq!(ty.name().to_uppercase().parse(), Ok(ty));
        }
        assert!(GgmlType::ALL.is_sorted());
        // Removed from ggml, and not invented yet.
        for id in [4, 5, 31, 32, 33, 36, 37, 38, 43, u32::MAX] {
            assert_eq!(GgmlType::from_id(id), None);
        }
        let error = "q4_k_m".parse::<GgmlType>().expect_err("a file type");
        assert_eq!(error.to_string(), "unknown tensor type 'q4_k_m'");
        assert_eq!(format!("{:>6}", GgmlType::Q4_K), "  q4_K");
    }

    #[test]
    fn partners_are_consistent() {
        for &ty in GgmlType::ALL {
            let t = ty.traits();
            let partner = t.vec_dot_type.traits();
            assert!(t.block_size.is_multiple_of(partner.block_size), "{ty}");
            if t.vec_dot.is_some() {
                assert!(partner.quantize_row.is_some(), "{ty}");
            }
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(GgmlType::Q4_K.row_size(4096), Some(16 * 144));
        assert_eq!(GgmlType::MXFP4.row_size(64), Some(34));
        assert_eq!(GgmlType::Q4_K.row_size(128), None);
        assert_eq!(GgmlType::F32.row_size(usize::MAX), None);
        assert_eq!(GgmlType::Q8_K.row_size(usize::MAX - 255), None);
        assert_eq!(GgmlType::Q6_K.row_size(0), Some(0));
        assert_eq!(GgmlType::Q6_K.traits().bits_per_value(), 6.5625);
    }

    #[test]
    #[should_panic(expected = "q4_K: 100 values are no whole number of blocks of 256")]
    fn part_of_a_block_is_refused() {
        (GgmlType::Q4_K.traits().dequantize_row)(&[0; 144], &mut [0.0; 100]);
    }

    #[test]
    #[should_panic(expected = "q8_0: 64 values take 68 bytes, not 67")]
    fn a_wrong_length_is_refused() {
        (GgmlType::Q8_0.traits().dequantize_row)(&[0; 67], &mut [0.0; 64]);
    }

    #[test]
    fn plain_numbers_are_read() {
        let mut y = [0.0; 2];
        (GgmlType::I16.traits().dequantize_row)(&[0xff, 0xff, 0, 1], &mut y);
        assert_eq!(y, [-1.0, 256.0]);
        let bytes: Vec<u8> = [1.5f64, -2.0]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        (GgmlType::F64.traits().dequantize_row)(&bytes, &mut y);
        assert_eq!(y, [1.5, -2.0]);
    }
}
