//! Vectors of f32 of any width, for kernels that are the same on all instruction sets.

/// Operations on vectors of an instruction set.
///
/// # Safety
/// Every function asks for the instruction set; those with pointers ask for `N` valid values.
pub(crate) unsafe trait Simd {
    /// Lanes of a vector; divides 16.
    const N: usize;
    /// A vector.
    type V: Copy;
    /// A vector of unsigned 32-bit numbers.
    type U: Copy;
    /// What is left of four vectors that are to be summed up.
    type Fours: Copy;

    /// The same number in all lanes.
    ///
    /// # Safety
    /// The instruction set is available.
    unsafe fn splat(a: f32) -> Self::V;
    /// Reads lanes.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn load(p: *const f32) -> Self::V;
    /// Writes lanes.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn store(p: *mut f32, v: Self::V);
    /// Reads half-precision lanes.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn load_f16(p: *const u16) -> Self::V;
    /// Reads bfloat16 lanes.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn load_bf16(p: *const u16) -> Self::V;
    /// Reads 32-bit numbers.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn load_u32(p: *const u32) -> Self::U;
    /// The `BITS` bits from `shift` on as numbers; four bits at most.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn code<const BITS: u32>(v: Self::U, shift: u32) -> Self::V;
    /// `a + b`
    ///
    /// # Safety
    /// See the trait.
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`
    ///
    /// # Safety
    /// See the trait.
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`
    ///
    /// # Safety
    /// See the trait.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger ones.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The sum of all lanes.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn sum(v: Self::V) -> f32;
    /// The largest of all lanes.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn largest(v: Self::V) -> f32;
    /// Adds up the lanes of four vectors as far as costs little.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn fours(v: [Self::V; 4]) -> Self::Fours;
    /// Adds up the rest: the sums of all lanes of 16 vectors.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn sums(fours: [Self::Fours; 4], to: &mut [f32; 16]);
    /// Begins to read `p`, which may be anywhere.
    fn prefetch(p: *const u8);
    /// `e^x` for `x <= 0`; less than 1e-38 becomes zero.
    ///
    /// # Safety
    /// See the trait.
    unsafe fn exp(x: Self::V) -> Self::V;
}

/// Plain Rust, a vector of one.
pub(crate) struct Plain;

// SAFETY: no instructions are needed.
unsafe impl Simd for Plain {
    const N: usize = 1;
    type V = f32;
    type U = u32;
    type Fours = [f32; 4];

    #[inline(always)]
    unsafe fn splat(a: f32) -> f32 {
        a
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> f32 {
        // SAFETY: by the caller.
        unsafe { p.read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: f32) {
        // SAFETY: by the caller.
        unsafe { *p = v }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> f32 {
        // SAFETY: by the caller.
        lemma_quant::num::f16_to_f32(unsafe { p.read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> f32 {
        // SAFETY: by the caller.
        f32::from_bits(u32::from(unsafe { p.read_unaligned() }) << 16)
    }
    #[inline(always)]
    unsafe fn load_u32(p: *const u32) -> u32 {
        // SAFETY: by the caller.
        unsafe { p.read_unaligned() }
    }
    #[inline(always)]
    unsafe fn code<const BITS: u32>(v: u32, shift: u32) -> f32 {
        (v >> shift & ((1 << BITS) - 1)) as f32
    }
    #[inline(always)]
    unsafe fn add(a: f32, b: f32) -> f32 {
        a + b
    }
    #[inline(always)]
    unsafe fn mul(a: f32, b: f32) -> f32 {
        a * b
    }
    #[inline(always)]
    unsafe fn fma(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
    #[inline(always)]
    unsafe fn max(a: f32, b: f32) -> f32 {
        a.max(b)
    }
    #[inline(always)]
    unsafe fn sum(v: f32) -> f32 {
        v
    }
    #[inline(always)]
    unsafe fn largest(v: f32) -> f32 {
        v
    }
    #[inline(always)]
    unsafe fn fours(v: [f32; 4]) -> [f32; 4] {
        v
    }
    #[inline(always)]
    unsafe fn sums(fours: [[f32; 4]; 4], to: &mut [f32; 16]) {
        to.copy_from_slice(fours.as_flattened());
    }
    #[inline(always)]
    fn prefetch(_: *const u8) {}
    #[inline(always)]
    unsafe fn exp(x: f32) -> f32 {
        if x < -87.3 { 0.0 } else { x.exp() }
    }
}

/// The same code for every instruction set: `fn name(args)` with a vector type `S`, or with one for whole numbers beside it, becomes
/// `fn name(isa, args)`.
macro_rules! for_isa {
    ($($(#[$meta:meta])* $vis:vis unsafe fn $name:ident<S $(, $words:ident)?>($($arg:ident: $ty:ty),* $(,)?) $body:ident;)*) => {$(
        $crate::simd::for_isa! {
            @one ($(#[$meta])* $vis) $name, ($($arg: $ty),*), $body, ($($words)?)
        }
    )*};
    // Sums of floating-point products have no use for what AVX-VNNI adds.
    (@one $head:tt $name:ident, $args:tt, $body:ident, ()) => {
        $crate::simd::for_isa! {
            @all $head $name, $args,
            $body::<$crate::x86::Avx2>, "avx2,fma,f16c",
            $body::<$crate::x86::Avx2>, "avx2,fma,f16c",
            $body::<$crate::x86::Avx512>,
            $body::<$crate::simd::Plain>
        }
    };
    (@one $head:tt $name:ident, $args:tt, $body:ident, (W)) => {
        $crate::simd::for_isa! {
            @all $head $name, $args,
            $body::<$crate::x86::Avx2, $crate::x86::WordsAvx2>, "avx2,fma,f16c",
            $body::<$crate::x86::Avx2, $crate::x86::WordsAvxVnni>, "avx2,fma,f16c,avxvnni",
            $body::<$crate::x86::Avx512, $crate::x86::Words512>,
            $body::<$crate::simd::Plain, $crate::words::Block>
        }
    };
    (@all ($(#[$meta:meta])* $vis:vis) $name:ident, ($($arg:ident: $ty:ty),*),
        $avx2:expr, $avx2_has:literal, $vnni:expr, $vnni_has:literal, $avx512:expr, $plain:expr) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments, reason = "one more than was written")]
        $vis unsafe fn $name(isa: $crate::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = $avx2_has)]
            unsafe fn avx2($($arg: $ty),*) {
                // SAFETY: by the caller.
                unsafe { $avx2($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = $vnni_has)]
            unsafe fn avx_vnni($($arg: $ty),*) {
                // SAFETY: by the caller.
                unsafe { $vnni($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
            unsafe fn avx512($($arg: $ty),*) {
                // SAFETY: by the caller.
                unsafe { $avx512($($arg),*) }
            }
            debug_assert!(isa.is_available());
            // SAFETY: a set is only chosen where it is available; `Ops::new` has checked. The rest is by the caller.
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    $crate::Isa::Avx2 => avx2($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::Isa::AvxVnni => avx_vnni($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::Isa::Avx512 | $crate::Isa::Avx512Bf16 | $crate::Isa::Amx => avx512($($arg),*),
                    _ => $plain($($arg),*),
                }
            }
        }
    };
}
pub(crate) use for_isa;
