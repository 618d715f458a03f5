//! Which type each tensor gets: the mixes that published quantized files use.
//!
//! A mix gives more bits to the tensors that suffer most from losing them: the output matrix, and `attn_v` and
//! `ffn_down` of the first, last and every third layer. The rules are facts about published files, made with
//! llama.cpp's quantization tool without an importance matrix.

use lemma_quant::GgmlType;

use super::shape::Shape;
use crate::error::{Error, NAME_MAX, Result, escape};

/// A mix of types, or one type for all.
#[derive(Debug, Clone, Copy)]
pub struct Recipe {
    /// Name as a command line gives it.
    pub name: &'static str,
    /// Value of `general.file_type`.
    pub file_type: u32,
    base: GgmlType,
    /// All matrices get `base`, as far as their rows allow.
    pure: bool,
    /// But for those that are not experts', where there are experts: these stay at eight bits.
    for_experts: bool,
}

/// Name, `general.file_type`, type of most tensors.
const MIXES: &[(&str, u32, &str)] = &[
    ("f32", 0, "f32"),
    ("f16", 1, "f16"),
    ("bf16", 32, "bf16"),
    ("q4_0", 2, "q4_0"),
    ("q4_1", 3, "q4_1"),
    ("q5_0", 8, "q5_0"),
    ("q5_1", 9, "q5_1"),
    ("q8_0", 7, "q8_0"),
    ("q2_k", 10, "q2_K"),
    ("q2_k_s", 21, "q2_K"),
    ("q3_k_s", 11, "q3_K"),
    ("q3_k_m", 12, "q3_K"),
    ("q3_k_l", 13, "q3_K"),
    ("q4_k_s", 14, "q4_K"),
    ("q4_k_m", 15, "q4_K"),
    ("q5_k_s", 16, "q5_K"),
    ("q5_k_m", 17, "q5_K"),
    ("q6_k", 18, "q6_K"),
    ("iq1_s", 24, "iq1_s"),
    ("iq1_m", 31, "iq1_m"),
    ("iq2_xxs", 19, "iq2_xxs"),
    ("iq2_xs", 20, "iq2_xs"),
    ("iq2_s", 28, "iq2_xs"),
    ("iq2_m", 29, "iq2_s"),
    ("iq3_xxs", 23, "iq3_xxs"),
    ("iq3_s", 26, "iq3_s"),
    ("iq3_m", 27, "iq3_s"),
    ("iq4_nl", 25, "iq4_nl"),
    ("iq4_xs", 30, "iq4_xs"),
    ("tq1_0", 36, "tq1_0"),
    ("tq2_0", 37, "tq2_0"),
    ("mxfp4", 38, "mxfp4"),
    ("nvfp4", 39, "nvfp4"),
    ("q1_0", 40, "q1_0"),
    ("q2_0", 41, "q2_0"),
];

/// Prefix of names that ask for one type everywhere, such as `pure:q4_K`.
const PURE: &str = "pure:";

impl Recipe {
    /// The mix called `name`, in any case; `pure:TYPE` is one ggml type for all matrices.
    ///
    /// # Errors
    /// [`Error::Usage`] listing the names there are, or saying that this build lacks the type.
    pub fn parse(name: &str) -> Result<Self> {
        let lower = name.to_ascii_lowercase();
        if let Some(ty) = lower.strip_prefix(PURE) {
            let base = type_named(ty)?;
            let same = MIXES.iter().find(|m| m.2.eq_ignore_ascii_case(ty));
            return Ok(Self {
                name: base.name(),
                file_type: same.map_or(0, |m| m.1),
                base,
                pure: true,
                for_experts: false,
            });
        }
        let Some((name, file_type, base)) = MIXES.iter().find(|m| m.0 == lower) else {
            let names: Vec<_> = Self::names().collect();
            return Err(Error::usage(format!(
                "unknown type '{}', expected {PURE}TYPE or one of: {}",
                escape(name, NAME_MAX),
                names.join(" ")
            )));
        };
        let base = type_named(base)?;
        // These exist for experts or for trained models only; on a dense shape they mean every matrix.
        let pure = matches!(*name, "f32" | "f16" | "bf16" | "mxfp4" | "nvfp4" | "q1_0");
        Ok(Self {
            name,
            file_type: *file_type,
            base,
            pure,
            for_experts: matches!(*name, "mxfp4" | "nvfp4"),
        })
    }

    /// Names of all mixes.
    pub fn names() -> impl Iterator<Item = &'static str> {
        MIXES.iter().map(|m| m.0)
    }

    /// The type of the matrix `name` in layer `il`, with rows of `n_in` values.
    ///
    /// # Errors
    /// [`Error::Usage`] if this build lacks the type.
    pub(super) fn type_of(&self, name: &str, il: u32, s: &Shape, n_in: u64) -> Result<GgmlType> {
        // A router decides what everything else is worth; published files never quantize it.
        if name.contains("ffn_gate_inp") {
            return type_named("f32");
        }
        let wanted = if self.for_experts && s.n_expert > 0 && !name.contains("_exps") {
            type_named("q8_0")?
        } else if self.pure {
            self.base
        } else {
            type_named(self.mixed(name, il, s, n_in))?
        };
        fallback(wanted, n_in)
    }

    fn mixed(&self, name: &str, il: u32, s: &Shape, n_in: u64) -> &'static str {
        let n = s.n_layer;
        let base = self.base.name();
        let mix = self.name;
        let low_bit = mix.starts_with("iq1") || mix.starts_with("iq2");
        // First and last eighth of the layers and every third between.
        let more_bits = il < n / 8 || il >= 7 * n / 8 || (il - n / 8) % 3 == 2;
        let gqa_4 = s.n_head / s.n_head_kv >= 4;
        let part = name
            .strip_suffix(".weight")
            .unwrap_or(name)
            .rsplit('.')
            .next()
            .unwrap_or(name);
        match part {
            "output" | "token_embd" if part == "output" || s.tied => match mix {
                _ if !n_in.is_multiple_of(self.base.block_size() as u64) => "q8_0",
                "q8_0" => "q8_0",
                "iq3_xxs" => "q5_K",
                _ if low_bit => "q5_K",
                _ => "q6_K",
            },
            "token_embd" => match mix {
                "iq2_xxs" | "iq2_xs" | "iq1_s" | "iq1_m" => "q2_K",
                "iq2_s" | "iq2_m" | "iq3_xxs" => "iq3_s",
                "tq1_0" | "tq2_0" | "q2_0" => "q4_K",
                _ => base,
            },
            "attn_v" => match mix {
                _ if low_bit && gqa_4 => "q4_K",
                "iq2_s" | "iq2_m" => "iq3_s",
                _ if low_bit => "q2_K",
                "q2_k" if gqa_4 => "q4_K",
                "q2_k" => "q3_K",
                "q2_k_s" | "iq3_xxs" | "iq3_s" if gqa_4 => "q4_K",
                "iq3_xxs" => "iq3_s",
                "iq3_m" => "q4_K",
                "q3_k_m" if il < 2 => "q5_K",
                "q3_k_m" => "q4_K",
                "q3_k_l" => "q5_K",
                "iq4_nl" | "iq4_xs" if gqa_4 => "q5_K",
                "q4_k_m" | "q5_k_m" if more_bits => "q6_K",
                "q4_k_s" if il < 4 => "q5_K",
                _ => base,
            },
            "ffn_down" | "ffn_down_exps" => match mix {
                "iq2_s" | "iq2_m" if il < n / 8 => "iq3_s",
                _ if low_bit && il < n / 8 => "q2_K",
                "q2_k" => "q3_K",
                "q2_k_s" | "iq3_m" if il < n / 8 => "q4_K",
                "iq3_xxs" if il < n / 8 => "q4_K",
                "iq3_xxs" => "q3_K",
                "q3_k_m" if il < n / 16 => "q5_K",
                "q3_k_m" => "q4_K",
                "q3_k_l" => "q5_K",
                "q4_k_m" | "q5_k_m" if more_bits => "q6_K",
                "iq4_nl" | "iq4_xs" | "q4_k_s" if il < n / 8 => "q5_K",
                _ => base,
            },
            "attn_output" => match mix {
                "iq1_s" | "iq1_m" => "iq2_xxs",
                "iq2_s" | "iq2_m" | "iq3_xxs" => "iq3_s",
                "q2_k" => "q3_K",
                "q3_k_m" | "iq3_m" => "q4_K",
                "q3_k_l" => "q5_K",
                _ => base,
            },
            "attn_q" | "attn_k" if mix == "iq3_xxs" => "iq2_s",
            _ => base,
        }
    }
}

fn type_named(name: &str) -> Result<GgmlType> {
    name.parse().map_err(|_| {
        Error::usage(format!(
            "type '{}' is not in this build",
            escape(name, NAME_MAX)
        ))
    })
}

/// What a type turns into where rows are not a multiple of its block.
fn fallback(ty: GgmlType, n_in: u64) -> Result<GgmlType> {
    let fits = |ty: GgmlType| n_in.is_multiple_of(ty.block_size() as u64);
    if fits(ty) {
        return Ok(ty);
    }
    let smaller = match ty.name() {
        "q4_K" => "q5_0",
        "q5_K" => "q5_1",
        "q6_K" => "q8_0",
        name if name.starts_with("iq") => "iq4_nl",
        _ => "q4_0",
    };
    let smaller = type_named(smaller)?;
    Ok(if fits(smaller) {
        smaller
    } else {
        GgmlType::F16
    })
}
