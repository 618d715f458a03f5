//! The shapes of published models.

use crate::error::{Error, NAME_MAX, Result, escape};

/// Which vocabulary a shape carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum VocabKind {
    /// ChatML tokens and template.
    Qwen,
    /// DeepSeek-R1's tokens, and a template that opens the thinking tag.
    R1Qwen,
    /// Llama 3's 256 special tokens and header template.
    Llama3,
    /// gpt-oss's tokens of messages and channels, and a template of plain messages.
    Harmony,
}

/// Dimensions and constants of a model, in ggml's words.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct Shape {
    pub name: &'static str,
    /// `qwen2`, `qwen3`, `qwen3moe`, `qwen35`, `seed_oss`, `glm4`, `olmo2`, `llama` or `gpt-oss`.
    pub arch: &'static str,
    pub n_layer: u32,
    pub n_embd: u32,
    pub n_ff: u32,
    pub n_head: u32,
    pub n_head_kv: u32,
    pub head_dim: u32,
    pub n_vocab: u32,
    pub n_ctx: u32,
    pub rope_freq_base: f32,
    pub norm_rms_eps: f32,
    /// The embeddings also serve as the output matrix.
    pub tied: bool,
    /// Factor of Llama 3's frequency scaling; the file then has `rope_freqs.weight`.
    pub rope_factor: Option<f32>,
    /// Factor of YaRN, and the context that the model had before.
    pub yarn: Option<(f32, u32)>,
    /// Experts, 0 for a dense model; `n_ff` is then their width.
    pub n_expert: u32,
    /// Experts that a token is sent to.
    pub n_expert_used: u32,
    /// Tokens that layers with a window see.
    pub window: Option<u32>,
    /// Key heads, value heads and their width of the delta nets that three layers of four are.
    pub delta: Option<[u32; 3]>,
    pub(super) vocab: VocabKind,
}

impl Shape {
    /// The shape called `name`.
    ///
    /// # Errors
    /// [`Error::Usage`] listing the names there are.
    pub fn parse(name: &str) -> Result<Self> {
        SHAPES
            .iter()
            .find(|s| s.name == name)
            .copied()
            .ok_or_else(|| {
                let names: Vec<_> = Self::names().collect();
                Error::usage(format!(
                    "unknown shape '{}', expected one of: {}",
                    escape(name, NAME_MAX),
                    names.join(" ")
                ))
            })
    }

    /// Names of all shapes.
    pub fn names() -> impl Iterator<Item = &'static str> {
        SHAPES.iter().map(|s| s.name)
    }
}

const QWEN2: Shape = Shape {
    name: "",
    arch: "qwen2",
    n_layer: 28,
    n_embd: 1536,
    n_ff: 8960,
    n_head: 12,
    n_head_kv: 2,
    head_dim: 128,
    n_vocab: 151_936,
    n_ctx: 32_768,
    rope_freq_base: 1e6,
    norm_rms_eps: 1e-6,
    tied: false,
    rope_factor: None,
    yarn: None,
    n_expert: 0,
    n_expert_used: 0,
    window: None,
    delta: None,
    vocab: VocabKind::Qwen,
};

const QWEN3: Shape = Shape {
    arch: "qwen3",
    n_head: 16,
    n_head_kv: 8,
    n_ctx: 40_960,
    tied: true,
    ..QWEN2
};

const QWEN35: Shape = Shape {
    arch: "qwen35",
    n_head: 16,
    n_head_kv: 4,
    head_dim: 256,
    n_vocab: 248_320,
    n_ctx: 262_144,
    rope_freq_base: 1e7,
    tied: true,
    delta: Some([16, 32, 128]),
    ..QWEN2
};

const LLAMA3: Shape = Shape {
    arch: "llama",
    n_head: 32,
    n_head_kv: 8,
    n_vocab: 128_256,
    n_ctx: 131_072,
    rope_freq_base: 500_000.0,
    norm_rms_eps: 1e-5,
    rope_factor: Some(8.0),
    vocab: VocabKind::Llama3,
    ..QWEN2
};

const GPT_OSS: Shape = Shape {
    arch: "gpt-oss",
    n_layer: 24,
    n_embd: 2880,
    n_ff: 2880,
    n_head: 64,
    n_head_kv: 8,
    head_dim: 64,
    n_vocab: 201_088,
    n_ctx: 131_072,
    rope_freq_base: 150_000.0,
    norm_rms_eps: 1e-5,
    yarn: Some((32.0, 4096)),
    n_expert: 32,
    n_expert_used: 4,
    window: Some(128),
    vocab: VocabKind::Harmony,
    ..QWEN2
};

const TINY: Shape = Shape {
    n_layer: 2,
    n_embd: 256,
    n_ff: 512,
    n_head: 4,
    n_head_kv: 2,
    head_dim: 64,
    n_vocab: 2_048,
    n_ctx: 4_096,
    ..QWEN3
};

/// Published models, then the small ones of tests. Taken from the models' own `config.json`.
const SHAPES: &[Shape] = &[
    Shape {
        name: "r1-distill-qwen-1.5b",
        n_ctx: 131_072,
        rope_freq_base: 1e4,
        vocab: VocabKind::R1Qwen,
        ..QWEN2
    },
    Shape {
        name: "qwen2.5-0.5b",
        n_layer: 24,
        n_embd: 896,
        n_ff: 4864,
        n_head: 14,
        head_dim: 64,
        tied: true,
        ..QWEN2
    },
    Shape {
        name: "qwen2.5-7b",
        n_embd: 3584,
        n_ff: 18_944,
        n_head: 28,
        n_head_kv: 4,
        n_vocab: 152_064,
        ..QWEN2
    },
    Shape {
        name: "qwen3-0.6b",
        n_embd: 1024,
        n_ff: 3072,
        ..QWEN3
    },
    Shape {
        name: "qwen3-1.7b",
        n_embd: 2048,
        n_ff: 6144,
        ..QWEN3
    },
    Shape {
        name: "qwen3-4b",
        n_layer: 36,
        n_embd: 2560,
        n_ff: 9728,
        n_head: 32,
        ..QWEN3
    },
    Shape {
        name: "qwen3-8b",
        n_layer: 36,
        n_embd: 4096,
        n_ff: 12_288,
        n_head: 32,
        tied: false,
        ..QWEN3
    },
    Shape {
        name: "qwen3-30b-a3b",
        arch: "qwen3moe",
        n_layer: 48,
        n_embd: 2048,
        n_ff: 768,
        n_head: 32,
        n_head_kv: 4,
        n_expert: 128,
        n_expert_used: 8,
        tied: false,
        ..QWEN3
    },
    Shape {
        name: "qwen3.5-4b",
        n_layer: 32,
        n_embd: 2560,
        n_ff: 9216,
        ..QWEN35
    },
    Shape {
        name: "seed-oss-36b",
        arch: "seed_oss",
        n_layer: 64,
        n_embd: 5120,
        n_ff: 27_648,
        n_head: 80,
        n_head_kv: 8,
        n_vocab: 155_136,
        n_ctx: 524_288,
        rope_freq_base: 1e7,
        ..QWEN2
    },
    Shape {
        name: "glm-z1-9b",
        arch: "glm4",
        n_layer: 40,
        n_embd: 4096,
        n_ff: 13_696,
        n_head: 32,
        n_vocab: 151_552,
        rope_freq_base: 1e4,
        norm_rms_eps: 1e-5,
        ..QWEN2
    },
    Shape {
        name: "olmo-3-7b",
        arch: "olmo2",
        n_layer: 32,
        n_embd: 4096,
        n_ff: 11_008,
        n_head: 32,
        n_head_kv: 32,
        n_vocab: 100_278,
        n_ctx: 65_536,
        rope_freq_base: 500_000.0,
        yarn: Some((8.0, 8192)),
        window: Some(4096),
        ..QWEN2
    },
    Shape {
        name: "llama-3.2-1b",
        n_layer: 16,
        n_embd: 2048,
        n_ff: 8192,
        head_dim: 64,
        tied: true,
        rope_factor: Some(32.0),
        ..LLAMA3
    },
    Shape {
        name: "llama-3.1-8b",
        n_layer: 32,
        n_embd: 4096,
        n_ff: 14_336,
        ..LLAMA3
    },
    Shape {
        name: "gpt-oss-20b",
        ..GPT_OSS
    },
    Shape {
        name: "gpt-oss-120b",
        n_layer: 36,
        n_expert: 128,
        ..GPT_OSS
    },
    Shape {
        name: "tiny",
        ..TINY
    },
    Shape {
        name: "tiny-long",
        n_ctx: 1 << 20,
        ..TINY
    },
    Shape {
        name: "tiny-qwen2",
        arch: "qwen2",
        tied: false,
        ..TINY
    },
    Shape {
        name: "tiny-qwen35",
        n_layer: 4,
        n_embd: 256,
        n_ff: 512,
        n_head: 4,
        n_head_kv: 2,
        head_dim: 64,
        n_vocab: 2_048,
        n_ctx: 4_096,
        delta: Some([2, 4, 32]),
        ..QWEN35
    },
    Shape {
        name: "tiny-glm4",
        arch: "glm4",
        tied: false,
        ..TINY
    },
    Shape {
        name: "tiny-olmo2",
        arch: "olmo2",
        tied: false,
        yarn: Some((8.0, 512)),
        window: Some(32),
        ..TINY
    },
    Shape {
        name: "tiny-llama",
        arch: "llama",
        tied: false,
        rope_factor: Some(8.0),
        vocab: VocabKind::Llama3,
        ..TINY
    },
    Shape {
        name: "tiny-gpt-oss",
        arch: "gpt-oss",
        n_ff: 256,
        tied: false,
        yarn: Some((8.0, 512)),
        n_expert: 8,
        n_expert_used: 2,
        window: Some(32),
        vocab: VocabKind::Harmony,
        ..TINY
    },
];
