//! Hyper-parameters of a model, read from its metadata and checked.
//!
//! Keys are `<arch>.<name>` of the GGUF specification. Everything that sizes a buffer or divides something is checked here, so the
//! rest of the engine can trust it.

use super::RopeScaling;
use crate::backend::RopeMode;
use crate::error::Error;
use crate::gguf::{GgufFile, Value};
use crate::report;

/// Hyper-parameters, in ggml's words.
#[derive(Clone, Debug)]
pub struct HParams {
    /// `general.architecture`, one of [`super::NAMES`].
    pub arch: &'static str,
    /// Layers.
    pub n_layer: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Query heads.
    pub n_head: usize,
    /// Key and value heads; divides `n_head`.
    pub n_head_kv: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the feed-forward block (of an expert, with experts).
    pub n_ff: usize,
    /// Tokens of the vocabulary.
    pub n_vocab: usize,
    /// Positions that the model was trained on.
    pub n_ctx_train: u32,
    /// Epsilon of the RMS norms.
    pub eps: f32,
    /// Experts, 0 for a dense model.
    pub n_expert: usize,
    /// Experts that a token is sent to.
    pub n_expert_used: usize,
    /// Tokens that layers with a window see, the current one included; see [`HParams::window`].
    pub sliding_window: Option<u32>,
    /// Factor of the attention scores, usually `1 / sqrt(head_dim)`.
    pub attn_scale: f32,
    /// Elements of a head that rotate.
    pub n_rot: usize,
    /// Base of the rotary frequencies.
    pub rope_freq_base: f32,
    /// Scaling of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Which elements rotate together.
    pub rope_mode: RopeMode,
}

/// Row lengths that the tensors of a layer have.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Width of the residual stream.
    pub n_embd: usize,
    /// `n_head * head_dim`
    pub n_q: usize,
    /// `n_head_kv * head_dim`
    pub n_kv: usize,
    /// Width of the feed-forward block.
    pub n_ff: usize,
    /// Tokens of the vocabulary.
    pub n_vocab: usize,
}

/// Larger counts than any model has are refused before anything is allocated by them.
const MAX_DIM: u32 = 1 << 24;
const MAX_LAYERS: u32 = 1024;
const MAX_HEADS: u32 = 1 << 14;

impl HParams {
    /// Reads and checks the hyper-parameters of a file.
    ///
    /// # Errors
    /// [`Error::Malformed`] naming the key, [`Error::Unsupported`] for an architecture that is not in the table.
    pub fn read(file: &GgufFile) -> Result<Self, Error> {
        let found = file.meta().str("general.architecture")?;
        let Some(arch) = super::NAMES.iter().copied().find(|n| *n == found) else {
            return Err(super::unknown(file, found));
        };
        let k = Keys { file, arch };

        let n_layer = k.count("block_count", MAX_LAYERS)?;
        let n_embd = k.count("embedding_length", MAX_DIM)?;
        let n_head = k.count("attention.head_count", MAX_HEADS)?;
        let n_head_kv = k
            .optional_count("attention.head_count_kv", MAX_HEADS)?
            .unwrap_or(n_head);
        if n_head % n_head_kv != 0 {
            return Err(k.bad(
                "attention.head_count_kv",
                n_head_kv,
                format!("a divisor of head_count {n_head}"),
            ));
        }
        let head_dim = match k.optional_count("attention.key_length", MAX_DIM)? {
            Some(n) => n,
            None if n_embd % n_head == 0 => n_embd / n_head,
            None => {
                return Err(k.bad(
                    "attention.head_count",
                    n_head,
                    format!("a divisor of embedding_length {n_embd}"),
                ));
            }
        };
        if let Some(v) = k.optional_count("attention.value_length", MAX_DIM)?
            && v != head_dim
        {
            return Err(k.bad(
                "attention.value_length",
                v,
                format!("key_length {head_dim}"),
            ));
        }
        if n_head
            .checked_mul(head_dim)
            .is_none_or(|n| n > MAX_DIM as usize)
        {
            return Err(k.bad(
                "attention.key_length",
                head_dim,
                format!("at most {} for {n_head} heads", MAX_DIM as usize / n_head),
            ));
        }
        let n_rot = k
            .optional_count("rope.dimension_count", MAX_DIM)?
            .unwrap_or(head_dim);
        if n_rot != head_dim || n_rot % 2 != 0 {
            return Err(k.bad(
                "rope.dimension_count",
                n_rot,
                format!("the head width {head_dim} (attention.key_length, or embedding_length / head_count), an even number"),
            ));
        }
        let n_expert = k.optional("expert_count")?.unwrap_or(0);
        let n_expert_used = k.optional("expert_used_count")?.unwrap_or(0);
        if n_expert > 4096 || n_expert_used > n_expert || (n_expert > 0 && n_expert_used == 0) {
            return Err(k.bad(
                "expert_used_count",
                n_expert_used as usize,
                format!("1 to expert_count ({n_expert}, at most 4096)"),
            ));
        }
        let n_ff = if matches!(arch, "qwen3moe" | "gpt-oss") {
            k.expert_width(n_expert, n_expert_used)?
        } else {
            k.count("feed_forward_length", MAX_DIM)?
        };
        let sliding_window = if arch == "gpt-oss" {
            Some(k.count("attention.sliding_window", u32::MAX >> 1)? as u32)
        } else {
            None
        };
        let eps = k.positive("attention.layer_norm_rms_epsilon", None)?;
        let n_ctx_train = k.count("context_length", u32::MAX >> 1)? as u32;
        let attn_scale = match k.float("attention.scale")? {
            Some(s) if s != 0.0 && s.is_finite() => s,
            _ => 1.0 / (head_dim as f32).sqrt(),
        };
        let rope_freq_base = k.positive("rope.freq_base", Some(10_000.0))?;

        let embd = file.tensor("token_embd.weight").ok_or_else(|| {
            report::malformed(
                file.name(),
                "tensor token_embd.weight is missing",
                format!("a matrix of {n_embd} columns"),
            )
        })?;
        let n_vocab = embd.dims[1];
        if n_vocab == 0 || n_vocab > u64::from(MAX_DIM) {
            return Err(report::malformed(
                file.name(),
                format!("tensor token_embd.weight has {n_vocab} rows"),
                format!("1 to {MAX_DIM}"),
            ));
        }

        Ok(Self {
            arch,
            n_layer,
            n_embd,
            n_head,
            n_head_kv,
            head_dim,
            n_ff,
            n_vocab: n_vocab as usize,
            n_ctx_train,
            eps,
            n_expert: n_expert as usize,
            n_expert_used: n_expert_used as usize,
            sliding_window,
            attn_scale,
            n_rot,
            rope_freq_base,
            rope_scaling: k.rope_scaling(n_ctx_train)?,
            rope_mode: if arch == "llama" {
                RopeMode::Norm
            } else {
                RopeMode::Neox
            },
        })
    }

    /// Tokens that layer `il` sees, the current one included, if not all: every other layer, from the first on, has the window.
    pub fn window(&self, il: usize) -> Option<u32> {
        self.sliding_window.filter(|_| il.is_multiple_of(2))
    }

    /// Row lengths of the tensors.
    pub fn shape(&self) -> Shape {
        Shape {
            n_embd: self.n_embd,
            n_q: self.n_head * self.head_dim,
            n_kv: self.n_head_kv * self.head_dim,
            n_ff: self.n_ff,
            n_vocab: self.n_vocab,
        }
    }
}

/// Reads `<arch>.<name>` keys.
struct Keys<'a> {
    file: &'a GgufFile,
    arch: &'static str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    fn bad(&self, name: &str, found: impl std::fmt::Display, expected: String) -> Error {
        self.file.meta().invalid(&self.key(name), found, &expected)
    }

    /// A number, or an array in which every layer has the same number.
    fn optional(&self, name: &str) -> Result<Option<u32>, Error> {
        let key = self.key(name);
        let meta = self.file.meta();
        let n = match meta.get(&key) {
            Some(Value::Array(a)) => a.len(),
            _ => return meta.opt_u32(&key),
        };
        let all = meta.opt_u32_per_layer(&key, n)?.unwrap_or_default();
        match all.first() {
            Some(first) if all.iter().all(|n| n == first) => Ok(Some(*first)),
            _ => Err(report::unsupported(
                self.file.name(),
                format!("key {key} differs between layers"),
                "the same number in every layer",
            )),
        }
    }

    fn optional_count(&self, name: &str, max: u32) -> Result<Option<usize>, Error> {
        match self.optional(name)? {
            None => Ok(None),
            Some(n) if n >= 1 && n <= max => Ok(Some(n as usize)),
            Some(n) => Err(self.bad(name, n, format!("1 to {max}"))),
        }
    }

    fn count(&self, name: &str, max: u32) -> Result<usize, Error> {
        self.optional_count(name, max)?
            .ok_or_else(|| self.file.meta().missing(&self.key(name), "a number"))
    }

    fn float(&self, name: &str) -> Result<Option<f32>, Error> {
        self.file.meta().opt_f32(&self.key(name))
    }

    fn positive(&self, name: &str, default: Option<f32>) -> Result<f32, Error> {
        match self.float(name)?.or(default) {
            Some(x) if x.is_finite() && x > 0.0 => Ok(x),
            Some(x) => Err(self.bad(name, x, "a positive number".to_owned())),
            None => Err(self
                .file
                .meta()
                .missing(&self.key(name), "a positive number")),
        }
    }

    /// Width of an expert, in architectures that have nothing but experts.
    fn expert_width(&self, n_expert: u32, n_expert_used: u32) -> Result<usize, Error> {
        if n_expert == 0 {
            return Err(self.bad("expert_count", 0, "1 to 4096".to_owned()));
        }
        if let Some(s) = self.float("expert_weights_scale")?
            && s != 0.0
            && s != 1.0
        {
            return Err(self.bad("expert_weights_scale", s, "1".to_owned()));
        }
        match self.optional_count("expert_feed_forward_length", MAX_DIM)? {
            Some(n) => Ok(n),
            // Together the experts of a token are as wide as the block says.
            None => {
                Ok((self.count("feed_forward_length", MAX_DIM)? / n_expert_used as usize).max(1))
            }
        }
    }

    fn rope_scaling(&self, n_ctx_train: u32) -> Result<RopeScaling, Error> {
        let kind = self
            .file
            .meta()
            .opt_str(&self.key("rope.scaling.type"))?
            .unwrap_or("linear");
        // Old files have `rope.scale_linear` instead.
        let factor = match self.float("rope.scaling.factor")? {
            Some(f) => Some(("rope.scaling.factor", f)),
            None => self
                .float("rope.scale_linear")?
                .map(|f| ("rope.scale_linear", f)),
        };
        let factor = match factor {
            None => 1.0,
            Some((_, 0.0)) => 1.0,
            Some((_, f)) if f.is_finite() && f > 0.0 => f,
            Some((name, f)) => return Err(self.bad(name, f, "a positive number".to_owned())),
        };
        match kind {
            "none" => Ok(RopeScaling::None),
            "linear" if factor == 1.0 => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor }),
            "yarn" => {
                let n_ctx_orig = match self.optional("rope.scaling.original_context_length")? {
                    None | Some(0) => n_ctx_train,
                    Some(n) => n,
                };
                // ggml multiplies by 1 + 0.1 ln(factor) inside the rotation and the loader cancels it, so what is left is
                // the plain YaRN magnitude, or its ratio when the model states an exponent for all dimensions.
                let mscale = |m: f32| {
                    if factor <= 1.0 {
                        1.0
                    } else {
                        0.1 * m * factor.ln() + 1.0
                    }
                };
                let log_mul = self
                    .float("rope.scaling.yarn_log_multiplier")?
                    .unwrap_or(0.0);
                let ext_factor = self
                    .float("rope.scaling.yarn_ext_factor")?
                    .filter(|f| *f >= 0.0)
                    .unwrap_or(1.0);
                let magnitude = match (ext_factor, log_mul) {
                    (0.0, _) => 1.0,
                    (_, 0.0) => mscale(1.0),
                    (_, all) => mscale(1.0) / mscale(all),
                };
                Ok(RopeScaling::Yarn {
                    factor,
                    n_ctx_orig,
                    ext_factor,
                    beta_fast: self.float("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                    beta_slow: self.float("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                    magnitude: magnitude * self.float("rope.scaling.attn_factor")?.unwrap_or(1.0),
                })
            }
            other => Err(report::unsupported(
                self.file.name(),
                format!("key {} is {:?}", self.key("rope.scaling.type"), other),
                "none, linear or yarn",
            )),
        }
    }
}
