//! Which type each tensor gets: the mixes that published quantized files use.
//!
//! A mix gives more bits to the tensors that suffer most from losing them: the output matrix, and `attn_v` and
//! `ffn_down` of the first, last and every third layer. The rules are facts about published files, made with
//! llama.cpp's quantization tool without an importance matrix.

use lemma_quant::GgmlType;

use super::can_write;
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

/// What the rules ask about a model.
#[derive(Debug, Clone, Copy)]
pub struct Facts {
    /// Layers.
    pub n_layer: u32,
    /// Tensors of the role that `attn_v` has.
    pub n_attn_v: u32,
    /// Query heads for each key and value head, in the first layer.
    pub n_gqa: u32,
    /// Experts, 0 in a dense model.
    pub n_expert: u32,
    /// The embeddings also serve as the output matrix.
    pub tied: bool,
    /// There is an importance matrix.
    pub importance: bool,
    /// It is one of those of 70 billion weights whose `attn_v` is small enough to be given more bits.
    pub is_70b: bool,
    /// It is a model of `falcon`, which has rules of its own.
    pub is_falcon: bool,
}

impl Facts {
    /// Whether the rules know a shape as one of 70 billion weights.
    pub fn is_70b(arch: &str, n_layer: u32, n_head: u32, n_head_kv: u32) -> bool {
        match arch {
            "llama" => n_layer == 80 && n_head != n_head_kv,
            "qwen2" | "deci" => n_layer == 80,
            _ => false,
        }
    }
}

/// What the rules ask about a tensor.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// Name, such as `blk.0.attn_v.weight`.
    pub name: &'a str,
    /// Which one of its role it is, counted from 0: usually its layer.
    pub index: u32,
    /// Length of a row.
    pub n_in: u64,
    /// It holds several matrices, such as those of all experts.
    pub stacked: bool,
}

/// Name, `general.file_type`, type of most tensors.
const MIXES: &[(&str, u32, GgmlType)] = &[
    ("f32", 0, GgmlType::F32),
    ("f16", 1, GgmlType::F16),
    ("bf16", 32, GgmlType::BF16),
    ("q4_0", 2, GgmlType::Q4_0),
    ("q4_1", 3, GgmlType::Q4_1),
    ("q5_0", 8, GgmlType::Q5_0),
    ("q5_1", 9, GgmlType::Q5_1),
    ("q8_0", 7, GgmlType::Q8_0),
    ("q2_k", 10, GgmlType::Q2_K),
    ("q2_k_s", 21, GgmlType::Q2_K),
    ("q3_k_s", 11, GgmlType::Q3_K),
    ("q3_k_m", 12, GgmlType::Q3_K),
    ("q3_k_l", 13, GgmlType::Q3_K),
    ("q4_k_s", 14, GgmlType::Q4_K),
    ("q4_k_m", 15, GgmlType::Q4_K),
    ("q5_k_s", 16, GgmlType::Q5_K),
    ("q5_k_m", 17, GgmlType::Q5_K),
    ("q6_k", 18, GgmlType::Q6_K),
    ("iq1_s", 24, GgmlType::IQ1_S),
    ("iq1_m", 31, GgmlType::IQ1_M),
    ("iq2_xxs", 19, GgmlType::IQ2_XXS),
    ("iq2_xs", 20, GgmlType::IQ2_XS),
    ("iq2_s", 28, GgmlType::IQ2_XS),
    ("iq2_m", 29, GgmlType::IQ2_S),
    ("iq3_xxs", 23, GgmlType::IQ3_XXS),
    ("iq3_xs", 22, GgmlType::IQ3_S),
    ("iq3_s", 26, GgmlType::IQ3_S),
    ("iq3_m", 27, GgmlType::IQ3_S),
    ("iq4_nl", 25, GgmlType::IQ4_NL),
    ("iq4_xs", 30, GgmlType::IQ4_XS),
    ("tq1_0", 36, GgmlType::TQ1_0),
    ("tq2_0", 37, GgmlType::TQ2_0),
    (MXFP4_MOE, 38, GgmlType::MXFP4),
    ("mxfp4", 38, GgmlType::MXFP4),
    ("nvfp4", 39, GgmlType::NVFP4),
    ("q1_0", 40, GgmlType::Q1_0),
    ("q2_0", 41, GgmlType::Q2_0),
];

/// Other names of mixes.
const ALIASES: &[(&str, &str)] = &[("q3_k", "q3_k_m"), ("q4_k", "q4_k_m"), ("q5_k", "q5_k_m")];

/// The mix that is `q8_0` but for experts, whether there are any or not.
const MXFP4_MOE: &str = "mxfp4_moe";

/// Prefix of names that ask for one type everywhere, such as `pure:q4_K`.
const PURE: &str = "pure:";

impl Recipe {
    /// The mix called `name`, in any case, or numbered so in `general.file_type`; `pure:TYPE` is one ggml type for all matrices.
    ///
    /// # Errors
    /// [`Error::Usage`] listing the names there are, or saying that this build lacks the type.
    pub fn parse(name: &str) -> Result<Self> {
        let lower = name.to_ascii_lowercase();
        if let Some(ty) = lower.strip_prefix(PURE) {
            let base: GgmlType = ty.parse().map_err(|_| {
                Error::usage(format!(
                    "type '{}' is not in this build",
                    escape(ty, NAME_MAX)
                ))
            })?;
            let same = MIXES.iter().find(|m| m.2 == base);
            return Ok(Self {
                name: base.name(),
                file_type: same.map_or(0, |m| m.1),
                base,
                pure: true,
                for_experts: false,
            });
        }
        let number = lower.parse::<u32>().ok();
        let alias = ALIASES.iter().find(|a| a.0 == lower);
        let lower = alias.map_or(&*lower, |a| a.1);
        let found = MIXES.iter().find(|m| m.0 == lower || number == Some(m.1));
        let Some(&(name, file_type, base)) = found else {
            let names: Vec<_> = Self::names().collect();
            return Err(Error::usage(format!(
                "unknown type '{}', expected {PURE}TYPE or one of: {}",
                escape(name, NAME_MAX),
                names.join(" ")
            )));
        };
        // These exist for experts or for trained models only; on a dense shape they mean every matrix.
        let pure = matches!(name, "f32" | "f16" | "bf16" | "mxfp4" | "nvfp4" | "q1_0");
        Ok(Self {
            name,
            file_type,
            base,
            pure,
            for_experts: matches!(name, "mxfp4" | "nvfp4" | MXFP4_MOE),
        })
    }

    /// Names of all mixes.
    pub fn names() -> impl Iterator<Item = &'static str> {
        MIXES.iter().map(|m| m.0)
    }

    /// Names of the mixes whose main type can be written.
    pub fn writable() -> impl Iterator<Item = &'static str> {
        MIXES.iter().filter(|m| can_write(m.2)).map(|m| m.0)
    }

    /// The type of most matrices.
    pub fn base(&self) -> GgmlType {
        self.base
    }

    /// The same with one type for all matrices.
    #[must_use]
    pub fn into_pure(self) -> Self {
        Self {
            pure: true,
            for_experts: false,
            ..self
        }
    }

    /// The type of a matrix if its rows are whole blocks of it; [`fallback`] says what else.
    pub fn type_of(&self, t: &Place<'_>, m: &Facts) -> GgmlType {
        let experts = m.n_expert > 0 || self.name == MXFP4_MOE;
        if self.for_experts && experts {
            return match t.stacked {
                true => self.base,
                false => GgmlType::Q8_0,
            };
        }
        match self.pure {
            true => self.base,
            false => self.mixed(t, m),
        }
    }

    fn mixed(&self, t: &Place<'_>, m: &Facts) -> GgmlType {
        use GgmlType::*;
        let (mix, base, i, n) = (self.name, self.base, t.index, m.n_layer);
        let low_bit = mix.starts_with("iq1") || mix.starts_with("iq2");
        // First and last eighth of the layers and every third between.
        let more_bits = |i: u32, n: u32| i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2;
        let gqa_4 = m.n_gqa >= 4;
        let experts_8 = m.n_expert == 8;
        let role = match Role::of(t.name) {
            Role::TokenEmbd if m.tied => Role::Output,
            role => role,
        };
        match role {
            Role::Output => match mix {
                _ if m.is_falcon || !t.n_in.is_multiple_of(base.block_size() as u64) => Q8_0,
                "q8_0" => Q8_0,
                "iq3_xxs" => Q5_K,
                _ if low_bit => Q5_K,
                _ => Q6_K,
            },
            Role::TokenEmbd => match mix {
                "iq2_xxs" | "iq2_xs" | "iq1_s" | "iq1_m" => Q2_K,
                "iq2_s" | "iq2_m" | "iq3_xxs" => IQ3_S,
                "tq1_0" | "tq2_0" | "q2_0" => Q4_K,
                _ => base,
            },
            Role::AttnV if low_bit => match mix {
                _ if gqa_4 || m.n_expert >= 4 => Q4_K,
                "iq2_s" | "iq2_m" => IQ3_S,
                _ => Q2_K,
            },
            // Small beside the experts.
            Role::AttnV if experts_8 => Q8_0,
            Role::AttnV => {
                let ty = match mix {
                    "q2_k" if gqa_4 => Q4_K,
                    "q2_k" => Q3_K,
                    "q2_k_s" | "iq3_xxs" | "iq3_xs" | "iq3_s" if gqa_4 => Q4_K,
                    "iq3_xxs" => IQ3_S,
                    "iq3_m" => Q4_K,
                    "q3_k_m" if i < 2 => Q5_K,
                    "q3_k_m" => Q4_K,
                    "q3_k_l" => Q5_K,
                    "iq4_nl" | "iq4_xs" if gqa_4 => Q5_K,
                    "q4_k_m" | "q5_k_m" if more_bits(i, m.n_attn_v) => Q6_K,
                    "q4_k_s" if i < 4 => Q5_K,
                    _ => base,
                };
                match ty {
                    Q3_K | Q4_K if m.is_70b => Q5_K,
                    ty => ty,
                }
            }
            Role::AttnK if experts_8 && low_bit => Q4_K,
            Role::AttnK if experts_8 => Q8_0,
            Role::AttnK | Role::AttnQ => match mix {
                "iq3_xs" => IQ3_XXS,
                "iq3_xxs" => IQ2_S,
                _ => base,
            },

            Role::FfnDown if m.is_falcon && mix.starts_with("q3_k_") => match mix {
                "q3_k_m" if i < n / 16 => Q5_K,
                "q3_k_m" if more_bits(i, n) => Q4_K,
                "q3_k_l" => Q4_K,
                _ => base,
            },
            Role::FfnDown if m.is_falcon && mix.starts_with("q4_k_") => match mix {
                "q4_k_m" if i < n / 16 => Q6_K,
                "q4_k_m" if more_bits(i, n) => Q5_K,
                _ => base,
            },
            Role::FfnDown => match mix {
                "iq2_s" | "iq2_m" if i < n / 8 => IQ3_S,
                _ if low_bit && i < n / 8 => Q2_K,
                "q2_k" => Q3_K,
                "q2_k_s" | "iq3_m" | "iq3_xxs" if i < n / 8 => Q4_K,
                "iq3_m" if experts_8 && more_bits(i, n) => Q4_K,
                "iq3_xxs" => Q3_K,
                "q3_k_m" if i < n / 16 => Q5_K,
                "q3_k_m" => Q4_K,
                "q3_k_l" => Q5_K,
                "q4_k_m" | "q5_k_m" if more_bits(i, n) => Q6_K,
                "iq4_nl" | "iq4_xs" if m.importance => base,
                "iq4_nl" | "iq4_xs" | "q4_k_s" if i < n / 8 => Q5_K,
                "q4_0" if m.importance && i < n / 8 => Q4_1,
                "q5_0" if m.importance && i < n / 8 => Q5_1,
                _ => base,
            },
            Role::AttnOutput if m.is_falcon && !low_bit => match mix {
                "q3_k_l" => Q4_K,
                _ => base,
            },
            Role::AttnOutput if experts_8 => match mix {
                "q2_k" | "iq3_xs" | "iq3_xxs" | "q3_k_s" | "q3_k_m" | "iq4_nl" | "q4_k_s"
                | "q4_k_m" | "iq3_s" | "iq3_m" | "iq4_xs" => Q5_K,
                _ if low_bit => Q5_K,
                _ => base,
            },
            Role::AttnOutput => match mix {
                "iq1_s" | "iq1_m" => IQ2_XXS,
                "iq2_s" | "iq2_m" | "iq3_xxs" => IQ3_S,
                "q2_k" => Q3_K,
                "q3_k_m" | "iq3_m" => Q4_K,
                "q3_k_l" => Q5_K,
                _ => base,
            },
            Role::FfnUpGate if mix == "iq3_xs" && (n / 8..7 * n / 8).contains(&i) => IQ3_XXS,
            Role::FfnUpGate | Role::Other => base,
        }
    }
}

/// What a tensor is for, as far as the rules care.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Role {
    Output,
    TokenEmbd,
    AttnQ,
    AttnK,
    /// `attn_v`, and what holds it together with others.
    AttnV,
    AttnOutput,
    FfnUpGate,
    FfnDown,
    Other,
}

impl Role {
    /// The role that a name stands for.
    pub(super) fn of(name: &str) -> Self {
        const INNER: &[(&str, Role)] = &[
            ("attn_qkv.weight", Role::AttnV),
            ("attn_kv_b.weight", Role::AttnV),
            ("attn_v.weight", Role::AttnV),
            ("attn_k.weight", Role::AttnK),
            ("attn_q.weight", Role::AttnQ),
            ("attn_output.weight", Role::AttnOutput),
            ("ffn_up", Role::FfnUpGate),
            ("ffn_gate", Role::FfnUpGate),
            ("ffn_down", Role::FfnDown),
        ];
        match name {
            "output.weight" => Role::Output,
            "token_embd.weight" | "per_layer_token_embd.weight" => Role::TokenEmbd,
            _ => INNER
                .iter()
                .find(|(part, _)| name.contains(part))
                .map_or(Role::Other, |(_, role)| *role),
        }
    }
}

/// What a type turns into where rows of `n_in` values are not whole blocks of it; `None` if nothing is known that would do.
pub fn fallback(ty: GgmlType, n_in: u64) -> Option<GgmlType> {
    use GgmlType::*;
    let fits = |ty: GgmlType| n_in.is_multiple_of(ty.block_size() as u64);
    if fits(ty) {
        return Some(ty);
    }
    let smaller = match ty {
        Q4_K => Q5_0,
        Q5_K => Q5_1,
        Q6_K => Q8_0,
        Q2_0 | Q2_K | Q3_K | TQ1_0 | TQ2_0 => Q4_0,
        IQ1_S | IQ1_M | IQ2_XXS | IQ2_XS | IQ2_S | IQ3_XXS | IQ3_S | IQ4_XS => IQ4_NL,
        _ => return None,
    };
    Some(if fits(smaller) { smaller } else { F16 })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DENSE: Facts = Facts {
        n_layer: 32,
        n_attn_v: 32,
        n_gqa: 4,
        n_expert: 0,
        tied: false,
        importance: false,
        is_70b: false,
        is_falcon: false,
    };

    fn types(mix: &str, part: &str, m: &Facts) -> Vec<GgmlType> {
        let recipe = Recipe::parse(mix).unwrap();
        (0..m.n_layer)
            .map(|index| {
                let name = format!("blk.{index}.{part}.weight");
                let place = Place {
                    name: &name,
                    index,
                    n_in: 4096,
                    stacked: part.ends_with("_exps"),
                };
                recipe.type_of(&place, m)
            })
            .collect()
    }

    #[test]
    fn falcon_has_rules_of_its_own() {
        use GgmlType::*;
        let falcon = Facts {
            is_falcon: true,
            ..DENSE
        };
        let down = |mix| types(mix, "ffn_down", &falcon);
        assert_eq!(down("q3_k_m")[..5], [Q5_K, Q5_K, Q4_K, Q4_K, Q3_K]);
        assert_eq!(down("q4_k_m")[..5], [Q6_K, Q6_K, Q5_K, Q5_K, Q4_K]);
        assert_eq!(down("q4_k_s"), [Q4_K; 32]);
        assert_eq!(down("q3_k_l"), [Q4_K; 32]);
        assert_eq!(down("q5_k_m"), types("q5_k_m", "ffn_down", &DENSE));
        let output = |mix| types(mix, "attn_output", &falcon)[0];
        let all = ["q2_k", "q3_k_m", "q3_k_l", "q4_k_m", "iq2_s"].map(output);
        assert_eq!(all, [Q2_K, Q3_K, Q4_K, Q4_K, IQ3_S]);
        let place = Place {
            name: "output.weight",
            index: 0,
            n_in: 4096,
            stacked: false,
        };
        let recipe = Recipe::parse("q4_k_m").unwrap();
        assert_eq!(recipe.type_of(&place, &falcon), Q8_0);
        assert_eq!(recipe.type_of(&place, &DENSE), Q6_K);
    }

    #[test]
    fn names_aliases_and_numbers() {
        for (given, name) in [
            ("Q4_K_M", "q4_k_m"),
            ("q4_k", "q4_k_m"),
            ("Q3_K", "q3_k_m"),
            ("15", "q4_k_m"),
            ("38", "mxfp4_moe"),
            ("pure:Q4_K", "q4_K"),
        ] {
            assert_eq!(Recipe::parse(given).unwrap().name, name);
        }
        assert!(Recipe::parse("q9").is_err() && Recipe::parse("99").is_err());
        assert!(Recipe::writable().any(|n| n == "iq4_xs"));
        assert!(!Recipe::writable().any(|n| n == "iq2_xxs"));
    }

    #[test]
    fn layers_get_what_published_files_have() {
        use GgmlType::*;
        let first = |mix, part| types(mix, part, &DENSE)[0];
        let last = |mix, part| *types(mix, part, &DENSE).last().unwrap();
        assert_eq!(types("q4_k_s", "attn_v", &DENSE)[3..5], [Q5_K, Q4_K]);
        assert_eq!(types("q4_k_s", "ffn_down", &DENSE)[3..5], [Q5_K, Q4_K]);
        assert_eq!(types("q3_k_m", "attn_v", &DENSE)[1..3], [Q5_K, Q4_K]);
        assert_eq!(types("q3_k_m", "ffn_down", &DENSE)[1..3], [Q5_K, Q4_K]);
        assert_eq!(
            (first("iq4_xs", "attn_v"), last("iq4_xs", "ffn_down")),
            (Q5_K, IQ4_XS)
        );
        assert_eq!(
            (first("q2_k", "attn_v"), first("q2_k", "attn_output")),
            (Q4_K, Q3_K)
        );
        assert_eq!(first("q5_k_m", "attn_qkv"), Q6_K);
        assert_eq!(first("q6_k", "attn_v"), Q6_K);
    }

    #[test]
    fn eight_experts_and_seventy_billion() {
        use GgmlType::*;
        let mixtral = Facts {
            n_expert: 8,
            ..DENSE
        };
        assert_eq!(types("q4_k_m", "attn_v", &mixtral), [Q8_0; 32]);
        assert_eq!(types("q4_k_m", "attn_k", &mixtral), [Q8_0; 32]);
        assert_eq!(types("q4_k_m", "attn_output", &mixtral), [Q5_K; 32]);
        assert_eq!(
            types("q4_k_m", "ffn_down_exps", &mixtral)[3..5],
            [Q6_K, Q4_K]
        );
        assert_eq!(types("mxfp4_moe", "ffn_up_exps", &mixtral), [MXFP4; 32]);
        assert_eq!(types("mxfp4_moe", "attn_q", &DENSE), [Q8_0; 32]);
        let measured = Facts {
            importance: true,
            ..DENSE
        };
        assert_eq!(types("q4_0", "ffn_down", &measured)[3..5], [Q4_1, Q4_0]);
        assert_eq!(types("q5_0", "ffn_down", &measured)[3..5], [Q5_1, Q5_0]);
        assert_eq!(types("iq4_xs", "ffn_down", &measured), [IQ4_XS; 32]);
        assert_eq!(types("q4_0", "ffn_down", &DENSE), [Q4_0; 32]);
        let large = Facts {
            is_70b: true,
            ..DENSE
        };
        assert_eq!(types("q4_k_m", "attn_v", &large)[3..5], [Q6_K, Q5_K]);
    }

    #[test]
    fn rows_that_do_not_fit() {
        use GgmlType::*;
        assert_eq!(fallback(Q4_K, 256), Some(Q4_K));
        assert_eq!(fallback(Q4_K, 96), Some(Q5_0));
        assert_eq!(fallback(IQ4_XS, 96), Some(IQ4_NL));
        assert_eq!(fallback(Q6_K, 72), Some(F16));
        assert_eq!(fallback(Q8_0, 72), None);
    }
}
