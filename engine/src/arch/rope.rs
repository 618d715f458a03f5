//! Rotary position embedding: the table of cosines and sines for the positions of a pass.
//!
//! Frequencies follow ggml's `rope_ext`: `theta_i = pos * base^(-2i / n_rot) / factor_i`, scaled linearly or by YaRN (arXiv
//! 2309.00071). Frequencies are kept in f64, because at position 100,000 an f32 angle is off by a hundredth of a radian.

use lemma_quant::GgmlType;

use super::{HParams, Temperature};
use crate::backend::RopeMode;
use crate::error::Error;
use crate::gguf::GgufFile;
use crate::report;

const ROPE_FREQS: &str = "rope_freqs.weight";

/// How positions beyond the original context are squeezed in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every angle divided by a factor.
    Linear {
        /// `rope.scaling.factor`
        factor: f32,
    },
    /// Low frequencies interpolated, high ones kept, magnitudes corrected (YaRN).
    Yarn {
        /// `rope.scaling.factor`
        factor: f32,
        /// Weight of the extrapolated part (1).
        ext_factor: f32,
        /// Rotations at which extrapolation is full (32).
        beta_fast: f32,
        /// Rotations at which interpolation is full (1).
        beta_slow: f32,
    },
}

/// How many pairs rotate by each of the four coordinates of a position (M-RoPE). Those of text are its position three times, and zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sections {
    /// Pairs of each; not all zero.
    pub pairs: [usize; 4],
    /// Whether the first three take turns; otherwise all follow one another.
    pub take_turns: bool,
}

/// A kind of rotation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeParams {
    /// Base of the frequencies.
    pub freq_base: f32,
    /// Scaling of the frequencies.
    pub scaling: RopeScaling,
    /// Magnitude that multiplies cosines and sines.
    pub magnitude: f32,
    /// Elements of a head that rotate, where they are not those that all layers have.
    pub n_rot: Option<usize>,
    /// Whether the divisors that a file may have are for others.
    pub undivided: bool,
}

impl RopeParams {
    /// Rotation that nothing was done to.
    pub(super) fn plain(freq_base: f32) -> Self {
        Self {
            freq_base,
            scaling: RopeScaling::None,
            magnitude: 1.0,
            n_rot: None,
            undivided: false,
        }
    }
}

/// Frequencies of a model.
#[derive(Clone, Debug)]
pub struct Rope {
    /// Which elements rotate together.
    pub mode: RopeMode,
    /// Elements of a head that rotate at most.
    pub n_rot: usize,
    kinds: Vec<Frequencies>,
    temperature: Option<Temperature>,
}

/// Frequencies of one kind of rotation.
#[derive(Clone, Debug)]
struct Frequencies {
    /// Radians per position of each pair, `[n_rot / 2]`.
    freq: Vec<f64>,
    magnitude: f64,
}

impl Rope {
    /// Frequencies from the hyper-parameters and the optional divisors of `rope_freqs`, `[n_rot / 2]`.
    pub fn new(hp: &HParams, factors: Option<&[f32]>) -> Self {
        Self {
            mode: hp.rope_mode,
            n_rot: hp.n_rot,
            kinds: (hp.ropes.iter())
                .map(|r| Frequencies::new(hp, r, factors.filter(|_| !r.undivided)))
                .collect(),
            temperature: hp.temperature,
        }
    }

    /// Frequencies of a file's model in a context of `n_ctx` positions, with its divisors where it has them: `rope_freqs`, or
    /// `rope_factors_long` where the context is longer than the model had it before it was extended, else `rope_factors_short`
    /// (longrope).
    ///
    /// # Errors
    /// [`Error::Malformed`] for divisors of another shape or type, or that are not positive.
    pub fn from_file(hp: &HParams, file: &GgufFile, n_ctx: usize) -> Result<Self, Error> {
        let name = match n_ctx > hp.n_ctx_orig as usize {
            _ if file.tensor(ROPE_FREQS).is_some() => ROPE_FREQS,
            true => "rope_factors_long.weight",
            false => "rope_factors_short.weight",
        };
        let Some(t) = file.tensor(name) else {
            return Ok(Self::new(hp, None));
        };
        let half = hp.n_rot / 2;
        if t.ty != GgmlType::F32 || t.dims != [half as u64, 1, 1, 1] {
            let found = format!(
                "tensor {name} has type {} and shape {:?}",
                t.ty.name(),
                t.shape()
            );
            return Err(report::malformed(
                file.name(),
                found,
                format!("f32 [{half}]"),
            ));
        }
        let mut factors = vec![0.0; half];
        (t.ty.traits().dequantize_row)(t.data, &mut factors);
        if let Some(bad) = factors.iter().find(|f| !f.is_finite() || **f <= 0.0) {
            return Err(report::malformed(
                file.name(),
                format!("tensor {name} holds {bad}"),
                "positive numbers",
            ));
        }
        Ok(Self::new(hp, Some(&factors)))
    }

    /// Elements of a head that rotate by a table.
    pub fn n_rot_of(&self, table: usize) -> usize {
        2 * self.kinds[table % self.kinds.len()].freq.len()
    }

    /// The table that queries rotate by, where keys do by that of `kind`.
    pub fn of_queries(&self, kind: usize) -> usize {
        match self.temperature {
            Some(_) => kind + self.kinds.len(),
            None => kind,
        }
    }

    /// Writes cosine and sine pairs of a table for consecutive positions: `out` is `[n_tokens, width / 2, 2]`, where `width`
    /// is at least `n_rot`; pairs beyond that stay where they are.
    pub fn fill(&self, table: usize, pos: u32, n_tokens: usize, width: usize, out: &mut [f32]) {
        // Nothing rotates in models that were never told how.
        if width == 0 {
            return;
        }
        let n_kinds = self.kinds.len();
        let Frequencies { freq, magnitude } = &self.kinds[table % n_kinds];
        let temperature = self.temperature.filter(|_| table >= n_kinds);
        for (t, row) in out.chunks_exact_mut(width).take(n_tokens).enumerate() {
            let p = f64::from(pos + t as u32);
            let magnitude = magnitude * temperature.map_or(1.0, |t| t.at(p));
            for pair in row[2 * freq.len()..].chunks_exact_mut(2) {
                pair.copy_from_slice(&[1.0, 0.0]);
            }
            for (pair, f) in row.chunks_exact_mut(2).zip(freq) {
                let (sin, cos) = (p * f).sin_cos();
                pair[0] = (cos * magnitude) as f32;
                pair[1] = (sin * magnitude) as f32;
            }
        }
    }
}

impl Frequencies {
    fn new(hp: &HParams, rope: &RopeParams, factors: Option<&[f32]>) -> Self {
        let base = f64::from(rope.freq_base);
        let n_rot = rope.n_rot.unwrap_or(hp.n_rot);
        let freq = (0..n_rot / 2)
            .map(|i| {
                if hp.rope_sections.is_some_and(|s| is_still(i, s)) {
                    return 0.0;
                }
                let extrapolated = base.powf(-2.0 * i as f64 / n_rot as f64)
                    / factors.map_or(1.0, |f| f64::from(f[i]));
                match rope.scaling {
                    RopeScaling::None => extrapolated,
                    RopeScaling::Linear { factor } => extrapolated / f64::from(factor),
                    RopeScaling::Yarn {
                        factor,
                        ext_factor,
                        beta_fast,
                        beta_slow,
                    } => {
                        let dim = |beta: f32| {
                            let turns = f64::from(hp.n_ctx_orig)
                                / (f64::from(beta) * 2.0 * std::f64::consts::PI);
                            n_rot as f64 * turns.ln() / (2.0 * base.ln())
                        };
                        let low = dim(beta_fast).floor().max(0.0);
                        let high = dim(beta_slow).ceil().min(n_rot as f64 - 1.0);
                        let y = (i as f64 - low) / (high - low).max(0.001);
                        let mix = (1.0 - y.clamp(0.0, 1.0)) * f64::from(ext_factor);
                        extrapolated / f64::from(factor) * (1.0 - mix) + extrapolated * mix
                    }
                }
            })
            .collect();
        Self {
            freq,
            magnitude: f64::from(rope.magnitude),
        }
    }
}

impl Temperature {
    /// The factor of a query at position `p`.
    pub(crate) fn at(&self, p: f64) -> f64 {
        let steps = ((p + f64::from(self.offset)) / f64::from(self.n_floor)).floor();
        1.0 + f64::from(self.scale) * (1.0 + steps).ln()
    }
}

/// Whether pair `i` rotates by the fourth coordinate, which is zero in text. Where the other three take turns, each has so many turns as
/// its section says.
fn is_still(i: usize, s: Sections) -> bool {
    let i = i % s.pairs.iter().sum::<usize>();
    match s.take_turns {
        true => i >= 3 * s.pairs[i % 3],
        false => i >= s.pairs[..3].iter().sum(),
    }
}
