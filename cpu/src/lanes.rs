//! Plain code that is compiled for every instruction set, written in the shape of vectors.
//!
//! Loops over arrays of [`LANES`] values become vector instructions of whatever width there is, and add up in the same
//! order everywhere.

#![allow(clippy::needless_range_loop, reason = "lanes are counted")]

/// Sums are kept in so many lanes, whatever the width of vectors.
pub(crate) const LANES: usize = 16;

/// Compiles a function for every instruction set: `fn name(args)` becomes `fn name(isa, args)`.
///
/// In the body, the constant `FMA` says whether there are fused instructions, for [`fma`].
macro_rules! multiversion {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block)*) => {$(
        $(#[$meta])*
        #[allow(clippy::too_many_arguments, reason = "one more than was written")]
        $vis fn $name(isa: $crate::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[allow(unused, clippy::extra_unused_type_parameters, reason = "not every body has fused instructions")]
            #[inline(always)]
            fn body<const FMA: bool>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $ty),*) $(-> $ret)? { body::<true>($($arg),*) }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
            fn avx512($($arg: $ty),*) $(-> $ret)? { body::<true>($($arg),*) }

            debug_assert!(isa.is_available());
            match isa {
                $crate::Isa::Scalar => body::<false>($($arg),*),
                // SAFETY: a set is only chosen where it is available; `Ops::new` has checked.
                #[cfg(target_arch = "x86_64")]
                $crate::Isa::Avx2 | $crate::Isa::AvxVnni => unsafe { avx2($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::Isa::Avx512 | $crate::Isa::Avx512Bf16 | $crate::Isa::Amx => unsafe { avx512($($arg),*) },
                #[cfg(not(target_arch = "x86_64"))]
                _ => body::<false>($($arg),*),
            }
        }
    )*};
}
pub(crate) use multiversion;

/// `a * b + c`, rounded once where there is an instruction for it.
#[inline(always)]
pub(crate) fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// The sum of all lanes, in the order in which vectors are folded.
#[inline(always)]
pub(crate) fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// `e^x` to about one unit in the last place, without branches. Below -104 it is zero, above 89 infinity.
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    // x = n ln 2 + r with |r| <= ln(2) / 2. Adding 1.5 * 2^23 leaves n in the low bits.
    const SHIFT: f32 = 12_582_912.0;
    let x = x.clamp(-104.0, 89.0);
    let t = fma::<FMA>(x, std::f32::consts::LOG2_E, SHIFT);
    let n = t - SHIFT;
    // ln 2 in two parts, of which the first times n is exact.
    let r = fma::<FMA>(n, -0.693_359_4, x);
    let r = fma::<FMA>(n, 2.121_944_4e-4, r);
    let p = fma::<FMA>(1.987_569_2e-4, r, 1.398_199_9e-3);
    let p = fma::<FMA>(p, r, 8.333_452e-3);
    let p = fma::<FMA>(p, r, 4.166_579_6e-2);
    let p = fma::<FMA>(p, r, 1.666_666_5e-1);
    let p = fma::<FMA>(p, r, 0.5);
    let p = fma::<FMA>(p, r * r, r) + 1.0;
    // 2^n in two factors: one alone would leave the range at both ends.
    let n = t.to_bits().wrapping_sub(SHIFT.to_bits()) as i32;
    let (a, b) = (n >> 1, n - (n >> 1));
    p * f32::from_bits(((a + 127) << 23) as u32) * f32::from_bits(((b + 127) << 23) as u32)
}

multiversion! {
    /// `sum x[i] * y[i]`
    pub(crate) fn dot(x: &[f32], y: &[f32]) -> f32 {
        let mut sum = [0.0; LANES];
        let (x, x_rest) = x.as_chunks::<LANES>();
        let (y, y_rest) = y.as_chunks::<LANES>();
        for (x, y) in x.iter().zip(y) {
            for i in 0..LANES {
                sum[i] = fma::<FMA>(x[i], y[i], sum[i]);
            }
        }
        for (i, (x, y)) in x_rest.iter().zip(y_rest).enumerate() {
            sum[i] = fma::<FMA>(*x, *y, sum[i]);
        }
        fold(sum)
    }

    /// `x[i] = x[i] / sqrt(mean of squares + eps) * weight[i]`
    pub(crate) fn rms_norm(x: &mut [f32], weight: &[f32], eps: f32) {
        // Squares of f32 are exact in f64, and the sum is as good as exact.
        let mut sum = [0.0f64; LANES];
        let (chunks, rest) = x.as_chunks::<LANES>();
        for x in chunks {
            for i in 0..LANES {
                sum[i] += f64::from(x[i]) * f64::from(x[i]);
            }
        }
        for (i, x) in rest.iter().enumerate() {
            sum[i] += f64::from(*x) * f64::from(*x);
        }
        let mean = (sum.iter().sum::<f64>() / x.len() as f64) as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        for (x, w) in x.iter_mut().zip(weight) {
            *x = *x * scale * *w;
        }
    }

    /// `x[i] -= mean`
    pub(crate) fn center(x: &mut [f32]) {
        // In f64 the sum is as good as exact.
        let mut sum = [0.0f64; LANES];
        let (chunks, rest) = x.as_chunks::<LANES>();
        for x in chunks {
            for i in 0..LANES {
                sum[i] += f64::from(x[i]);
            }
        }
        for (i, x) in rest.iter().enumerate() {
            sum[i] += f64::from(*x);
        }
        let mean = (sum.iter().sum::<f64>() / x.len() as f64) as f32;
        for x in x {
            *x -= mean;
        }
    }

    /// `gate[i] = silu(gate[i]) * up[i]`
    pub(crate) fn swiglu(gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = *g / (1.0 + exp::<FMA>(-*g)) * *u;
        }
    }

    /// `x[i] *= sigmoid(gate[i])`
    pub(crate) fn sigmoid_mul(x: &mut [f32], gate: &[f32]) {
        for (x, g) in x.iter_mut().zip(gate) {
            *x /= 1.0 + exp::<FMA>(-*g);
        }
    }

    /// `x[i] = x[i] / sqrt(sum of squares + eps)`
    pub(crate) fn l2_norm(x: &mut [f32], eps: f32) {
        let mut sum = [0.0f64; LANES];
        let (chunks, rest) = x.as_chunks::<LANES>();
        for x in chunks {
            for i in 0..LANES {
                sum[i] += f64::from(x[i]) * f64::from(x[i]);
            }
        }
        for (i, x) in rest.iter().enumerate() {
            sum[i] += f64::from(*x) * f64::from(*x);
        }
        let scale = 1.0 / (sum.iter().sum::<f64>() as f32 + eps).sqrt();
        for x in x {
            *x *= scale;
        }
    }

    /// A causal convolution of [`LANES`] channels along the rows, and `silu` of it, in place. `past`: the inputs of before, the oldest first;
    /// the last ones in the end. `taps`: weights of each row of `past`, and of the row itself. `bias` is added before the `silu`.
    pub(crate) fn conv_silu(
        x: Columns,
        past: &mut [[f32; LANES]],
        taps: &[[f32; LANES]],
        bias: &[f32; LANES],
    ) {
        for t in 0..x.n_rows {
            // SAFETY: promised when `x` was made.
            let x = unsafe { &mut *x.start.add(t * x.stride).cast::<[f32; LANES]>() };
            let (mut sum, now) = (*bias, *x);
            for (x, w) in past.iter().chain([&now]).zip(taps) {
                for i in 0..LANES {
                    sum[i] = fma::<FMA>(x[i], w[i], sum[i]);
                }
            }
            for i in 0..LANES {
                x[i] = sum[i] / (1.0 + exp::<FMA>(-sum[i]));
            }
            past.copy_within(1.., 0);
            if let Some(last) = past.last_mut() {
                *last = now;
            }
        }
    }

    /// A causal convolution of [`LANES`] channels of `b * x` along the rows, times `c`, in place of `x`. `past` and `taps` are those of
    /// [`conv_silu`].
    pub(crate) fn short_conv(
        x: Columns,
        gates: [Columns; 2],
        past: &mut [[f32; LANES]],
        taps: &[[f32; LANES]],
    ) {
        let row = |of: Columns, t: usize| of.start.wrapping_add(t * of.stride).cast::<[f32; LANES]>();
        for t in 0..x.n_rows {
            // SAFETY: promised when these were made.
            let (x, b, c) = unsafe { (&mut *row(x, t), *row(gates[0], t), *row(gates[1], t)) };
            let (mut sum, mut now) = ([0.0; LANES], [0.0; LANES]);
            for i in 0..LANES {
                now[i] = b[i] * x[i];
            }
            for (x, w) in past.iter().chain([&now]).zip(taps) {
                for i in 0..LANES {
                    sum[i] = fma::<FMA>(x[i], w[i], sum[i]);
                }
            }
            for i in 0..LANES {
                x[i] = c[i] * sum[i];
            }
            past.copy_within(1.., 0);
            if let Some(last) = past.last_mut() {
                *last = now;
            }
        }
    }

    /// `x[i] = ln(1 + e^(x[i] + bias[i]))`
    pub(crate) fn softplus(x: &mut [f32], bias: &[f32]) {
        for (x, bias) in x.iter_mut().zip(bias) {
            let y = *x + *bias;
            // For large numbers the logarithm is the number.
            *x = if y > 20.0 { y } else { y.exp().ln_1p() };
        }
    }

    /// `gate[i] = min(silu(gate[i]), most) * up[i]`, `up[i]` within `most` of zero.
    pub(crate) fn swiglu_clamped(gate: &mut [f32], up: &[f32], most: f32) {
        for (g, u) in gate.iter_mut().zip(up) {
            let silu = *g / (1.0 + exp::<FMA>(-*g));
            *g = silu.min(most) * u.clamp(-most, most);
        }
    }

    /// `gate[i] = g * sigmoid(1.702 g) * (u + 1)`, `g` at most 7 and `u` within 7 of zero: what gpt-oss has for `swiglu`.
    pub(crate) fn swiglu_oai(gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            let (x, u) = (g.min(7.0), u.clamp(-7.0, 7.0));
            *g = x / (1.0 + exp::<FMA>(-1.702 * x)) * (u + 1.0);
        }
    }

    /// `x[i] = gelu(x[i])` by the tanh formula.
    pub(crate) fn gelu(x: &mut [f32]) {
        for x in x {
            *x = gelu_one::<FMA>(*x);
        }
    }

    /// `gate[i] = gelu(gate[i]) * up[i]`
    pub(crate) fn geglu(gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = gelu_one::<FMA>(*g) * *u;
        }
    }

    /// `gate[i] = max(gate[i], 0) * up[i]`
    pub(crate) fn reglu(gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = g.max(0.0) * *u;
        }
    }

    /// `x[i] = max(x[i], 0)²`
    pub(crate) fn relu_sqr(x: &mut [f32]) {
        for x in x {
            let y = x.max(0.0);
            *x = y * y;
        }
    }

    /// xIELU with its parameters `alpha_n`, `alpha_p`, `beta`, `eps`.
    pub(crate) fn xielu(x: &mut [f32], by: [f32; 4]) {
        let [alpha_n, alpha_p, beta, eps] = by;
        for x in x {
            let below = alpha_n * (exp::<FMA>(x.min(eps)) - 1.0 - *x);
            let above = alpha_p * *x * *x;
            *x = (if *x > 0.0 { above } else { below }) + beta * *x;
        }
    }

    /// `x[i] += y[i]`
    pub(crate) fn add(x: &mut [f32], y: &[f32]) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += *y;
        }
    }

    /// `x[i] += a * y[i]`
    pub(crate) fn add_scaled(x: &mut [f32], y: &[f32], a: f32) {
        for (x, y) in x.iter_mut().zip(y) {
            *x = fma::<FMA>(a, *y, *x);
        }
    }

    /// `x[i] *= a`
    pub(crate) fn scale(x: &mut [f32], a: f32) {
        for x in x {
            *x *= a;
        }
    }

    /// `x[i]` within `most` of zero.
    pub(crate) fn clamp(x: &mut [f32], most: f32) {
        for x in x {
            *x = x.clamp(-most, most);
        }
    }

    /// `x[i] = cap * tanh(x[i] / cap)`
    pub(crate) fn softcap(x: &mut [f32], cap: f32) {
        for x in x {
            *x = cap * tanh::<FMA>(*x / cap);
        }
    }
}

/// [`LANES`] columns of some rows that nobody else touches.
#[derive(Clone, Copy)]
pub(crate) struct Columns {
    start: *mut f32,
    stride: usize,
    n_rows: usize,
}

impl Columns {
    /// # Safety
    /// From `start`, for as long as this value is used, `n_rows` times [`LANES`] values are valid that are `stride`
    /// apart, and only the caller touches them.
    pub(crate) unsafe fn new(start: *mut f32, stride: usize, n_rows: usize) -> Self {
        Self {
            start,
            stride,
            n_rows,
        }
    }
}

multiversion! {
    /// Writes rows of sums, or adds them.
    pub(crate) fn store_tile(
        to: Columns,
        sums: &[[f32; LANES]],
        bias: Option<&[f32; LANES]>,
        add: bool,
    ) {
        for (t, sums) in sums.iter().enumerate().take(to.n_rows) {
            // SAFETY: promised when `to` was made.
            let out = unsafe { &mut *to.start.add(t * to.stride).cast::<[f32; LANES]>() };
            let mut sums = *sums;
            if let Some(bias) = bias {
                for i in 0..LANES {
                    sums[i] += bias[i];
                }
            }
            if add {
                for i in 0..LANES {
                    sums[i] += out[i];
                }
            }
            *out = sums;
        }
    }
}

/// `x/2 (1 + tanh u) = x / (1 + e^-2u)` with `u = sqrt(2/pi) (x + 0.044715 x^3)`.
#[inline(always)]
fn gelu_one<const FMA: bool>(x: f32) -> f32 {
    const SQRT_2_OVER_PI: f32 = 0.797_884_6;
    let u = SQRT_2_OVER_PI * x * (1.0 + 0.044_715 * x * x);
    x / (1.0 + exp::<FMA>(-2.0 * u))
}

/// `tanh x`; exact in the limit of small `x`, where the quotient of exponentials would cancel.
#[inline(always)]
pub(crate) fn tanh<const FMA: bool>(x: f32) -> f32 {
    let a = x.abs();
    let e = exp::<FMA>(-2.0 * a);
    let large = (1.0 - e) / (1.0 + e);
    // Odd polynomial below 0.625 (Cephes).
    let z = x * x;
    let p = fma::<FMA>(-5.704_988e-3, z, 2.063_909e-2);
    let p = fma::<FMA>(p, z, -5.373_971_6e-2);
    let p = fma::<FMA>(p, z, 1.333_144_2e-1);
    let p = fma::<FMA>(p, z, -3.333_328e-1);
    let small = fma::<FMA>(p * z, a, a);
    (if a < 0.625 { small } else { large }).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[test]
    fn exp_and_tanh_are_accurate() {
        // Miri rounds what the library computes at random.
        let steps = if cfg!(miri) { 0 } else { 200_000 };
        for i in 0..steps {
            let x = -86.0 + 174.0 * (i as f32) / steps as f32;
            let want = f64::from(x).exp();
            for got in [exp::<false>(x), exp::<true>(x)] {
                let error = ((f64::from(got) - want) / want).abs();
                assert!(error < 1.7e-7, "exp {x}: {got} {want} {error}");
            }
            let x = x / 30.0;
            let want = f64::from(x).tanh();
            for got in [tanh::<false>(x), tanh::<true>(x)] {
                assert!(
                    (f64::from(got) - want).abs() < 2e-7 * want.abs().max(1e-3),
                    "tanh {x}"
                );
            }
        }
        assert_eq!(exp::<true>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<true>(-1e30), 0.0);
        assert_eq!(exp::<true>(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp::<true>(0.0), 1.0);
        assert!((exp::<true>(-100.0) - 3.8e-44).abs() < 2e-45);
    }

    #[test]
    fn sets_agree() {
        let x: Vec<f32> = (0..133).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let w: Vec<f32> = (0..133).map(|i| (i as f32 * 0.71).cos()).collect();
        let exact: f64 = x
            .iter()
            .zip(&w)
            .map(|(x, w)| f64::from(*x) * f64::from(*w))
            .sum();
        for isa in Isa::available() {
            assert!((f64::from(dot(isa, &x, &w)) - exact).abs() < 1e-5);
            let mut y = x.clone();
            rms_norm(isa, &mut y, &w, 1e-6);
            let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / 133.0;
            for i in 0..133 {
                let want = f64::from(x[i]) / (mean + 1e-6).sqrt() * f64::from(w[i]);
                assert!((f64::from(y[i]) - want).abs() < 3e-7 * want.abs().max(0.1));
            }
            let (mut s, mut g, mut o) = (x.clone(), x.clone(), x.clone());
            swiglu(isa, &mut s, &w);
            swiglu_oai(isa, &mut o, &w);
            geglu(isa, &mut g, &w);
            for i in 0..133 {
                let (x, w) = (f64::from(x[i]), f64::from(w[i]));
                assert!((f64::from(s[i]) - x / (1.0 + (-x).exp()) * w).abs() < 1e-6);
                let (most, up) = (x.min(7.0), w.clamp(-7.0, 7.0) + 1.0);
                let want = most / (1.0 + (-1.702 * most).exp()) * up;
                assert!((f64::from(o[i]) - want).abs() < 1e-5 * want.abs().max(1.0));
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
                assert!((f64::from(g[i]) - 0.5 * x * (1.0 + u.tanh()) * w).abs() < 1e-6);
            }
        }
    }
}
