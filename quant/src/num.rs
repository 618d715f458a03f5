//! The scalar encodings that occur inside blocks.
//!
//! Every type here is a byte array with alignment 1, so that a block struct built from them has alignment 1
//! too and a cast from the bytes of a memory-mapped file cannot fail. All are little-endian, as GGUF is.
//!
//! The half-precision conversions are plain integer and float arithmetic. `half::f16::to_f32` would ask the
//! processor for its features on every call, and the hardware instruction is only within reach of code
//! compiled for it, which kernel crates have and this one does not.

use bytemuck::{Pod, Zeroable};

/// IEEE 754 binary16, the scale of most formats.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct F16(pub [u8; 2]);

impl F16 {
    /// From the 16 bits of the number.
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits.to_le_bytes())
    }

    /// The 16 bits of the number.
    pub const fn to_bits(self) -> u16 {
        u16::from_le_bytes(self.0)
    }

    /// Rounds to nearest, ties to even; what is too large becomes infinite.
    #[inline]
    pub fn from_f32(x: f32) -> Self {
        Self::from_bits(f32_to_f16(x))
    }

    /// Exact. NaN stays NaN.
    #[inline]
    pub fn to_f32(self) -> f32 {
        f16_to_f32(self.to_bits())
    }
}

/// Bfloat16: the upper half of a binary32.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct BF16(pub [u8; 2]);

impl BF16 {
    /// Rounds to nearest, ties to even; NaN becomes a quiet NaN.
    #[inline]
    pub fn from_f32(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = if x.is_nan() {
            // Rounding could carry a NaN's payload away and leave an infinity.
            (bits >> 16) | 0x40
        } else {
            (bits + 0x7fff + ((bits >> 16) & 1)) >> 16
        };
        Self((rounded as u16).to_le_bytes())
    }

    /// Exact.
    #[inline]
    pub fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes(self.0)) << 16)
    }
}

macro_rules! little_endian {
    ($(#[$doc:meta])* $name:ident, $inner:ty, $n:literal) => {
        $(#[$doc])*
        #[repr(transparent)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
        pub struct $name(pub [u8; $n]);

        impl $name {
            /// Stores `v`.
            #[inline]
            pub const fn new(v: $inner) -> Self {
                Self(v.to_le_bytes())
            }

            /// The stored number.
            #[inline]
            pub const fn get(self) -> $inner {
                <$inner>::from_le_bytes(self.0)
            }
        }
    };
}

little_endian!(
    /// A binary32 at any address.
    F32Le, f32, 4
);
little_endian!(
    /// A signed 16-bit integer at any address.
    I16Le, i16, 2
);
little_endian!(
    /// An unsigned 16-bit integer at any address.
    U16Le, u16, 2
);

/// Converts the bits of a binary16, without branches and without passing through subnormal binary32 numbers,
/// so that it also holds on threads that flush those to zero.
#[inline]
pub fn f16_to_f32(h: u16) -> f32 {
    const EXP: u32 = 0x7c00 << 13;
    const REBIAS: u32 = (127 - 15) << 23;
    let sign = u32::from(h & 0x8000) << 16;
    let em = u32::from(h & 0x7fff) << 13;
    let normal = em + REBIAS;
    // Infinity and NaN: the exponent has to become 255, twice the shift of a normal number.
    let special = normal + REBIAS;
    // Subnormal: give it a leading one, then subtract that again; the subtraction normalises.
    let subnormal =
        (f32::from_bits(normal + (1 << 23)) - f32::from_bits(REBIAS + (1 << 23))).to_bits();
    let exp = em & EXP;
    let bits = if exp == 0 { subnormal } else { normal };
    let bits = if exp == EXP { special } else { bits };
    f32::from_bits(bits | sign)
}

/// Rounds to the bits of the nearest binary16, ties to even.
#[inline]
pub fn f32_to_f16(x: f32) -> u16 {
    // Adding 0.5 leaves a sum whose last place is 2^-24, the step of subnormal binary16 numbers: the addition
    // rounds just where it should.
    const HALF: u32 = 126 << 23;
    let sign = (x.to_bits() >> 16) as u16 & 0x8000;
    let a = x.to_bits() & 0x7fff_ffff;
    let subnormal = (f32::from_bits(a) + f32::from_bits(HALF))
        .to_bits()
        .wrapping_sub(HALF);
    let odd = (a >> 13) & 1;
    let normal = a.wrapping_sub(112 << 23).wrapping_add(0xfff + odd) >> 13;
    let special = if a > 0x7f80_0000 { 0x7e00 } else { 0x7c00 };
    let bits = if a < 113 << 23 { subnormal } else { normal };
    let bits = if a >= 143 << 23 { special } else { bits };
    sign | bits as u16
}

/// Half of the E8M0 number `e`, `2^(e - 128)`: E2M1 tables here hold doubled values, this takes it back.
/// The NaN encoding 255 is read as a number, as ggml does.
#[inline]
pub const fn e8m0_half_to_f32(e: u8) -> f32 {
    // The two smallest are subnormal.
    f32::from_bits(if e < 2 {
        0x0020_0000 << e
    } else {
        (e as u32 - 1) << 23
    })
}

/// Half of the unsigned E4M3 number `x` (bias 7), for the same reason as [`e8m0_half_to_f32`].
/// NaN (0x7f) is read as zero and the sign bit is ignored, as ggml does.
#[inline]
pub fn ue4m3_half_to_f32(x: u8) -> f32 {
    if x == 0x7f {
        return 0.0;
    }
    let exp = u32::from(x >> 3) & 0xf;
    let man = u32::from(x) & 7;
    if exp == 0 {
        man as f32 * (1.0 / 1024.0)
    } else {
        // Exponent exp - 8: one less than the bias of 7 says, for the halving.
        f32::from_bits(((exp + 127 - 8) << 23) | (man << 20))
    }
}

/// Rounds to unsigned E4M3, half up; negative numbers and NaN become zero, large ones 448.
#[inline]
pub fn f32_to_ue4m3(x: f32) -> u8 {
    const MAX: u8 = 0x7e;
    if x.is_nan() || x <= 0.0 {
        return 0;
    }
    if x < 1.0 / 64.0 {
        // Subnormal: multiples of 2^-9.
        return ((x * 512.0 + 0.5) as u8).min(7);
    }
    // Keep four mantissa bits, round the last one away; a carry runs into the exponent, as it should.
    let code = ((x.to_bits() >> 19) + 1) >> 1;
    let code = code - ((127 - 7) << 3);
    if code >= 15 << 3 { MAX } else { code as u8 }
}

/// Rounds to the nearest integer, ties to even; beyond +-4194303 it saturates, NaN gives 0.
#[inline]
pub(crate) fn nearest_int(x: f32) -> i32 {
    // At 1.5 * 2^23 a float's last place is one: the sum is rounded to an integer in its low mantissa bits.
    const MAGIC: f32 = 12_582_912.0;
    let v = x.clamp(-4_194_303.0, 4_194_303.0) + MAGIC;
    (v.to_bits() & 0x007f_ffff) as i32 - 0x0040_0000
}

/// Rounds to the nearest integer, ties away from zero (`f32::round` without the library call); NaN gives 0.
#[inline]
pub(crate) fn round_away(x: f32) -> i32 {
    // The largest float below one half: with 0.5 itself, 0.49999997 would come out as 1.
    (x + 0.499_999_97_f32.copysign(x)) as i32
}

/// The value of largest magnitude, with its sign; the first one of equals, 0 for an empty or all-NaN slice.
#[inline]
pub(crate) fn max_by_abs(x: &[f32]) -> f32 {
    x.iter()
        .fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m })
}

/// `1 / d`, or 0 where that has no meaning.
#[inline]
pub(crate) fn recip_or_zero(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All bit patterns of a 16-bit number; few of them under Miri, which is slow.
    fn patterns() -> impl Iterator<Item = u16> {
        (0..=u16::MAX).step_by(if cfg!(miri) { 997 } else { 1 })
    }

    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
    }

    #[test]
    fn every_f16_reads_as_half_reads_it() {
        for bits in patterns() {
            let (ours, theirs) = (f16_to_f32(bits), half::f16::from_bits(bits).to_f32());
            assert!(same(ours, theirs), "{bits:#06x}: {ours:e}, {theirs:e}");
        }
    }

    #[test]
    fn f16_and_bf16_round_as_half_rounds() {
        // Each number of 16 bits, the midpoint above it, and their neighbours.
        for bits in patterns() {
            for f in [
                half::f16::from_bits(bits).to_f32(),
                half::bf16::from_bits(bits).to_f32(),
            ] {
                for middle in [0u32, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001] {
                    let x = f32::from_bits(f.to_bits().wrapping_add(middle));
                    if x.is_nan() {
                        assert!(F16::from_f32(x).to_f32().is_nan());
                        assert!(BF16::from_f32(x).to_f32().is_nan());
                        continue;
                    }
                    assert_eq!(f32_to_f16(x), half::f16::from_f32(x).to_bits(), "{x:e}");
                    let bf16 = u16::from_le_bytes(BF16::from_f32(x).0);
                    assert_eq!(bf16, half::bf16::from_f32(x).to_bits(), "{x:e}");
                }
            }
        }
    }

    #[test]
    fn small_floats_survive_a_round_trip() {
        // From 0x78 on the exponent is 15, which the encoder leaves out but for the largest number.
        for code in (0..0x78).chain([0x7e]) {
            assert_eq!(f32_to_ue4m3(2.0 * ue4m3_half_to_f32(code)), code);
        }
        assert_eq!(2.0 * ue4m3_half_to_f32(0x7e), 448.0);
        assert_eq!(2.0 * ue4m3_half_to_f32(0x38), 1.0);
        assert_eq!(f32_to_ue4m3(f32::INFINITY), 0x7e);
        assert_eq!(f32_to_ue4m3(f32::NAN), 0);
        assert_eq!(f32_to_ue4m3(-1.0), 0);
        for e in 0..=255u8 {
            let exact = 2f64.powi(i32::from(e) - 128);
            assert_eq!(f64::from(e8m0_half_to_f32(e)), exact);
        }
    }

    #[test]
    fn integers_round_as_in_the_library() {
        for i in (-40_000..40_000).step_by(if cfg!(miri) { 977 } else { 1 }) {
            for x in [
                i as f32 / 256.0,
                i as f32 / 2.0,
                (i as f32 / 2.0).next_down(),
            ] {
                assert_eq!(nearest_int(x), x.round_ties_even() as i32, "{x}");
                assert_eq!(round_away(x), x.round() as i32, "{x}");
            }
        }
        assert_eq!(nearest_int(f32::INFINITY), 4_194_303);
        assert_eq!(nearest_int(f32::NEG_INFINITY), -4_194_303);
        assert_eq!(nearest_int(f32::NAN), 0);
        assert_eq!(round_away(f32::NAN), 0);
        assert_eq!(round_away(0.5f32.next_down()), 0);
    }
}
