//! Random blocks of every type: quantized weights without quantizing.
//!
//! All bytes of a block are random, except its scales. With the scale at one, a sample of such blocks is read with the
//! type's own dequantizer to find the standard deviation it gives; dividing the wanted one by it is the scale. So a
//! type needs one line here: where its scales are ([`layout`]).
//!
//! The random bytes are a function of seed, tensor and position (a counter-based generator), so pieces can be made by any
//! number of threads in any order.

use half::{bf16, f16};
use lemma_quant::GgmlType;
use rayon::prelude::*;

use crate::error::{Error, Result};

/// Bytes of a piece, about; pieces are the unit of seeding, so this is part of what a seed means.
const PIECE_BYTES: usize = 1 << 20;
/// Pieces made at once, between writes.
const BATCH: usize = 16;
/// Blocks read to find the standard deviation of a type.
const SAMPLE: usize = 256;
/// Different scales within a tensor: 0.8 to 1.2 times the mean one.
const SCALES: usize = 16;

/// Where the scales of a block are.
#[derive(Debug, Clone, Copy)]
enum Layout {
    /// Plain numbers, no blocks.
    Plain,
    /// A half at byte `d`.
    Half { d: usize },
    /// A half at `d`, and another at `m` that is `ratio` times as large and centres the values on zero.
    HalfMin { d: usize, m: usize, ratio: f32 },
    /// Four nibbles of a half, in the high nibbles of bytes 49, 51, 53 and 55 (iq1_m).
    Nibbles,
    /// A whole byte-sized scale at each of the first `n` bytes, in the type's own code.
    Bytes { n: usize },
}

fn layout(ty: GgmlType) -> Result<Layout> {
    use Layout::*;
    Ok(match ty.name() {
        "f32" | "f16" | "bf16" => Plain,
        "q4_1" => HalfMin {
            d: 0,
            m: 2,
            ratio: -7.5,
        },
        "q5_1" => HalfMin {
            d: 0,
            m: 2,
            ratio: -15.5,
        },
        "q2_K" => HalfMin {
            d: 80,
            m: 82,
            ratio: 1.5,
        },
        "q4_K" => HalfMin {
            d: 0,
            m: 2,
            ratio: 7.5,
        },
        "q5_K" => HalfMin {
            d: 0,
            m: 2,
            ratio: 15.5,
        },
        "q3_K" => Half { d: 108 },
        "q6_K" => Half { d: 208 },
        "tq1_0" => Half { d: 52 },
        "tq2_0" => Half { d: 64 },
        "iq1_m" => Nibbles,
        "mxfp4" => Bytes { n: 1 },
        "nvfp4" => Bytes { n: 4 },
        "q4_0" | "q5_0" | "q8_0" | "q1_0" | "q2_0" | "iq1_s" | "iq2_xxs" | "iq2_xs" | "iq2_s"
        | "iq3_xxs" | "iq3_s" | "iq4_nl" | "iq4_xs" => Half { d: 0 },
        name => {
            return Err(Error::usage(format!(
                "'{name}' is not a type of weights, expected one"
            )));
        }
    })
}

/// Makes the scales and mins of the sub-blocks of a block equal, so that the mins centre the values.
fn pair_mins(ty: GgmlType, block: &mut [u8]) {
    match ty.name() {
        // Four bits of scale, four of min; the top bit keeps them from being tiny.
        "q2_K" => block[..16]
            .iter_mut()
            .for_each(|b| *b = (*b & 7 | 8) * 0x11),
        // Six bits of scale in bytes 0 to 3 and the low nibbles of 8 to 11, of min in 4 to 7 and the high nibbles; the
        // top two bits of each of the first eight belong to the sub-blocks of the last four.
        "q4_K" | "q5_K" => {
            let scales = &mut block[4..16];
            for i in 0..4 {
                scales[i] |= 0xa0;
                scales[i + 4] = scales[i];
                scales[i + 8] = (scales[i + 8] & 15) * 0x11;
            }
        }
        _ => {}
    }
}

/// Makes random data of one type, mean and standard deviation.
pub(super) struct Maker {
    ty: GgmlType,
    layout: Layout,
    mean: f32,
    std: f32,
    /// The scales to choose from (halves, or codes of a byte), and the mins that go with them.
    scales: [(u16, u16); SCALES],
}

impl Maker {
    /// A mean other than zero is possible for plain numbers only.
    ///
    /// # Errors
    /// [`Error::Usage`] if `ty` is not a type of weights.
    pub(super) fn new(ty: GgmlType, mean: f32, std: f32) -> Result<Self> {
        let mut maker = Self {
            ty,
            layout: layout(ty)?,
            mean,
            std,
            scales: [(0, 0); SCALES],
        };
        match maker.layout {
            Layout::Plain => {}
            Layout::Bytes { .. } => {
                let code = (0..=126_u16).chain([127]).min_by(|a, b| {
                    let error =
                        |code: u16| (maker.sample_rms([(code, 0); SCALES]) / std).ln().abs();
                    error(*a).total_cmp(&error(*b))
                });
                maker.scales = [(code.unwrap_or(0), 0); SCALES];
            }
            _ => {
                let unit = maker.sample_rms(maker.halves(1.0));
                maker.scales = maker.halves(std / unit);
            }
        }
        Ok(maker)
    }

    /// Scales around `d`.
    fn halves(&self, d: f32) -> [(u16, u16); SCALES] {
        std::array::from_fn(|i| {
            let d = f16::from_f32(d * (0.8 + 0.4 * i as f32 / (SCALES - 1) as f32));
            let ratio = if let Layout::HalfMin { ratio, .. } = self.layout {
                ratio
            } else {
                0.0
            };
            (d.to_bits(), f16::from_f32(ratio * d.to_f32()).to_bits())
        })
    }

    /// Root mean square of blocks with these scales; infinite if some value is.
    fn sample_rms(&self, scales: [(u16, u16); SCALES]) -> f32 {
        let mut bytes = vec![0; SAMPLE * self.ty.type_size()];
        Self { scales, ..*self }.piece(1, &mut bytes);
        let mut values = vec![0.0; SAMPLE * self.ty.block_size()];
        (self.ty.traits().dequantize_row)(&bytes, &mut values);
        let sum: f64 = values.iter().map(|v| f64::from(*v).powi(2)).sum();
        let rms = (sum / values.len() as f64).sqrt() as f32;
        if rms.is_finite() { rms } else { f32::INFINITY }
    }

    /// Gives `n` values (whole blocks) in pieces to `write`, in order.
    pub(super) fn stream(
        &self,
        n: u64,
        seed: u64,
        write: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let n_bytes = n / self.ty.block_size() as u64 * self.ty.type_size() as u64;
        let piece = (PIECE_BYTES / self.ty.type_size() * self.ty.type_size()) as u64;
        let mut at = 0;
        let mut buf = Vec::new();
        while at < n_bytes {
            let len = (piece * BATCH as u64).min(n_bytes - at);
            buf.resize(len as usize, 0);
            let first = at / piece;
            buf.par_chunks_mut(piece as usize)
                .enumerate()
                .for_each(|(i, bytes)| self.piece(mix_seed(seed, first + i as u64), bytes));
            write(&buf)?;
            at += len;
        }
        Ok(())
    }

    /// Fills `bytes`, whole blocks, from one seed.
    fn piece(&self, seed: u64, bytes: &mut [u8]) {
        let mut rng = Counter(seed);
        match self.ty {
            GgmlType::F32 => bytes
                .chunks_exact_mut(4)
                .for_each(|b| b.copy_from_slice(&self.number(&mut rng).to_le_bytes())),
            GgmlType::F16 => bytes.chunks_exact_mut(2).for_each(|b| {
                b.copy_from_slice(&f16::from_f32(self.number(&mut rng)).to_le_bytes())
            }),
            GgmlType::BF16 => bytes.chunks_exact_mut(2).for_each(|b| {
                b.copy_from_slice(&bf16::from_f32(self.number(&mut rng)).to_le_bytes())
            }),
            _ => {
                for b in bytes.chunks_mut(8) {
                    b.copy_from_slice(&rng.next().to_le_bytes()[..b.len()]);
                }
                self.set_scales(&mut rng, bytes);
            }
        }
    }

    fn number(&self, rng: &mut Counter) -> f32 {
        // The sum of four uniform numbers is close enough to a gaussian for weights, and needs no logarithm.
        let bits = rng.next();
        let sum: u32 = (0..4).map(|i| (bits >> (16 * i)) as u32 & 0xffff).sum();
        let unit = (sum as f32 / 65_535.0 - 2.0) * 1.732_050_8;
        self.mean + self.std * unit
    }

    fn set_scales(&self, rng: &mut Counter, bytes: &mut [u8]) {
        let mins = matches!(self.ty.name(), "q2_K" | "q4_K" | "q5_K");
        let mut bits = 0;
        for (i, block) in bytes.chunks_exact_mut(self.ty.type_size()).enumerate() {
            if i % 16 == 0 {
                bits = rng.next();
            }
            let (d, m) = self.scales[bits as usize % SCALES];
            bits >>= 4;
            match self.layout {
                Layout::Plain => {}
                Layout::Half { d: at } => block[at..at + 2].copy_from_slice(&d.to_le_bytes()),
                Layout::HalfMin { d: at, m: at_m, .. } => {
                    block[at..at + 2].copy_from_slice(&d.to_le_bytes());
                    block[at_m..at_m + 2].copy_from_slice(&m.to_le_bytes());
                }
                Layout::Nibbles => {
                    for k in 0..4 {
                        let b = &mut block[49 + 2 * k];
                        *b = *b & 15 | ((d >> (4 * k)) as u8 & 15) << 4;
                    }
                }
                Layout::Bytes { n } => block[..n].fill(d as u8),
            }
            if mins {
                pair_mins(self.ty, block);
            }
        }
    }
}

/// Random numbers as a function of a seed and a counter that is added to it (the output function is that of wyrand).
struct Counter(u64);

impl Counter {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0xa076_1d64_78bd_642f);
        let product = u128::from(self.0) * u128::from(self.0 ^ 0xe703_7ed1_a0b4_28db);
        (product >> 64) as u64 ^ product as u64
    }
}

/// A seed for item `i` of what `seed` stands for (the finalizer of splitmix64).
pub(super) fn mix_seed(seed: u64, i: u64) -> u64 {
    let mut z = seed ^ i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
