//! Architectures: hyper-parameters, tensors and forward pass, a file each.
//!
//! To add one: a file with `hparams`, which reads what is its own, and `Model<W>` with its `bind` and its `forward`, which may be those of
//! [`decoder`] or of another that it is built like; and a line in [`archs!`] below.

mod afmoe;
mod apertus;
mod arcee;
mod arctic;
mod bailingmoe;
mod bailingmoe2;
mod bind;
mod bitnet;
mod chatglm;
mod cohere2;
mod cohere2moe;
mod command_r;
mod dbrx;
mod deci;
mod decoder;
mod deepseek;
mod deepseek2;
mod dots1;
mod ernie4_5;
mod ernie4_5_moe;
mod exaone;
mod exaone4;
mod exaone_moe;
mod falcon;
mod falcon_h1;
mod ffn;
mod gemma;
mod gemma2;
mod gemma3;
mod gemma4;
mod glm4;
mod glm4moe;
mod gpt2;
mod gpt_oss;
mod gptneox;
mod granite;
mod granite_swa;
mod granitehybrid;
mod granitemoe;
mod grok;
mod heads;
mod hparams;
mod hunyuan_dense;
mod hunyuan_moe;
mod hy_v3;
mod internlm2;
mod jamba;
mod keys;
mod kimi_linear;
mod lfm2;
mod lfm2moe;
mod llama;
mod llama4;
mod maincoder;
mod mamba2;
mod mellum;
mod mimo2;
mod minicpm;
mod minicpm3;
mod minimax_m2;
mod mistral3;
mod mistral4;
mod nanbeige;
mod nemotron;
mod nemotron_h;
mod nemotron_h_moe;
mod olmo;
mod olmo2;
mod olmoe;
mod pangu_embed;
mod phi3;
mod phimoe;
mod plamo3;
mod qwen2;
mod qwen2moe;
mod qwen2vl;
mod qwen3;
mod qwen35;
mod qwen35moe;
mod qwen3moe;
mod qwen3next;
mod qwen3vl;
mod qwen3vlmoe;
mod recurrent;
mod rope;
mod routing;
mod seed_oss;
mod smallthinker;
mod smollm3;
mod stablelm;
mod starcoder;
mod starcoder2;
mod step35;

use bind::Layers;
pub use bind::{Binder, Shape};
pub use heads::Heads;
pub use hparams::{FfnReads, HParams, Latent, LayerParams, Past, QkNorm, Temperature};
pub use recurrent::{DeltaNet, SelectiveSpace, ShortConv, StateShape, StateSpace};
pub use rope::{Rope, RopeParams, RopeScaling, Sections};
pub use routing::Routing;

use self::keys::Keys;
use crate::backend::{Backend, Buf};
use crate::error::Error;
use crate::gguf::GgufFile;
use crate::report;

macro_rules! archs {
    ($($name:literal => $module:ident::$variant:ident),* $(,)?) => {
        /// Names of the architectures (`general.architecture`) that can be run.
        pub const NAMES: &[&str] = &[$($name),*];

        /// Reads the hyper-parameters that are an architecture's own.
        fn hparams(k: &Keys<'_>, hp: &mut HParams) -> Result<(), Error> {
            match hp.arch {
                $($name => $module::hparams(k, hp),)*
                _ => Err(unknown(k.file, hp.arch)),
            }
        }

        /// A model of one of the architectures, its weights bound to a backend.
        #[derive(Debug)]
        pub enum ArchModel<W> {
            $(#[doc = concat!("`", $name, "`")] $variant($module::Model<W>)),*
        }

        impl<W> ArchModel<W> {
            /// Binds the tensors of a file.
            ///
            /// # Errors
            /// [`Error::Malformed`] for a missing tensor or one of another shape, naming it; whatever binding a tensor yields.
            pub fn bind(hp: &HParams, b: &mut Binder<'_, W>) -> Result<Self, Error> {
                match hp.arch {
                    $($name => Ok(Self::$variant($module::Model::bind(hp, b)?)),)*
                    _ => Err(unknown(b.file(), hp.arch)),
                }
            }

            /// Runs the pass.
            pub fn forward<B: Backend<Weight = W>>(&self, b: &mut B) {
                match self {
                    $(Self::$variant(m) => m.forward(b)),*
                }
            }
        }
    };
}

archs! {
    "llama" => llama::Llama,
    "qwen2" => qwen2::Qwen2,
    "qwen3" => qwen3::Qwen3,
    "qwen3moe" => qwen3moe::Qwen3Moe,
    "qwen35" => qwen35::Qwen35,
    "qwen35moe" => qwen35moe::Qwen35Moe,
    "gpt-oss" => gpt_oss::GptOss,
    "phi3" => phi3::Phi3,
    "glm4" => glm4::Glm4,
    "granite" => granite::Granite,
    "olmo2" => olmo2::Olmo2,
    "smollm3" => smollm3::SmolLm3,
    "gemma2" => gemma2::Gemma2,
    "gemma3" => gemma3::Gemma3,
    "gemma4" => gemma4::Gemma4,
    "mimo2" => mimo2::MiMo2,
    "step35" => step35::Step35,
    "nanbeige" => nanbeige::Nanbeige,
    "jamba" => jamba::Jamba,
    "kimi-linear" => kimi_linear::KimiLinear,
    "qwen2vl" => qwen2vl::Qwen2Vl,
    "mistral4" => mistral4::Mistral4,
    "granite_swa" => granite_swa::GraniteSwa,
    "cohere2moe" => cohere2moe::Cohere2Moe,
    "phimoe" => phimoe::PhiMoe,
    "mellum" => mellum::Mellum,
    "maincoder" => maincoder::Maincoder,
    "pangu-embedded" => pangu_embed::PanguEmbed,
    "deepseek2" => deepseek2::DeepSeek2,
    "seed_oss" => seed_oss::SeedOss,
    "qwen3vl" => qwen3vl::Qwen3Vl,
    "qwen3vlmoe" => qwen3vlmoe::Qwen3VlMoe,
    "qwen3next" => qwen3next::Qwen3Next,
    "glm4moe" => glm4moe::Glm4Moe,
    "exaone4" => exaone4::Exaone4,
    "ernie4_5" => ernie4_5::Ernie45,
    "ernie4_5-moe" => ernie4_5_moe::Ernie45Moe,
    "hunyuan-dense" => hunyuan_dense::HunyuanDense,
    "hunyuan-moe" => hunyuan_moe::HunyuanMoe,
    "mistral3" => mistral3::Mistral3,
    "minimax-m2" => minimax_m2::MiniMaxM2,
    "bailingmoe2" => bailingmoe2::BailingMoe2,
    "granitemoe" => granitemoe::GraniteMoe,
    "qwen2moe" => qwen2moe::Qwen2Moe,
    "olmoe" => olmoe::Olmoe,
    "exaone" => exaone::Exaone,
    "dots1" => dots1::Dots1,
    "cohere2" => cohere2::Cohere2,
    "exaone-moe" => exaone_moe::ExaoneMoe,
    "hy_v3" => hy_v3::HyV3,
    "bailingmoe" => bailingmoe::BailingMoe,
    "deepseek" => deepseek::DeepSeek,
    "minicpm" => minicpm::MiniCpm,
    "afmoe" => afmoe::AfMoe,
    "arcee" => arcee::Arcee,
    "apertus" => apertus::Apertus,
    "lfm2" => lfm2::Lfm2,
    "lfm2moe" => lfm2moe::Lfm2Moe,
    "nemotron_h" => nemotron_h::NemotronH,
    "nemotron_h_moe" => nemotron_h_moe::NemotronHMoe,
    "granitehybrid" => granitehybrid::GraniteHybrid,
    "falcon-h1" => falcon_h1::FalconH1,
    "internlm2" => internlm2::InternLm2,
    "gemma" => gemma::Gemma,
    "command-r" => command_r::CommandR,
    "stablelm" => stablelm::StableLm,
    "starcoder2" => starcoder2::StarCoder2,
    "nemotron" => nemotron::Nemotron,
    "deci" => deci::Deci,
    "olmo" => olmo::Olmo,
    "chatglm" => chatglm::ChatGlm,
    "dbrx" => dbrx::Dbrx,
    "falcon" => falcon::Falcon,
    "gptneox" => gptneox::GptNeoX,
    "llama4" => llama4::Llama4,
    "minicpm3" => minicpm3::MiniCpm3,
    "bitnet" => bitnet::BitNet,
    "grok" => grok::Grok,
    "arctic" => arctic::Arctic,
    "starcoder" => starcoder::StarCoder,
    "gpt2" => gpt2::Gpt2,
    "plamo3" => plamo3::PlaMo3,
    "smallthinker" => smallthinker::SmallThinker,
}

/// The error for an architecture that is not in the table.
pub(crate) fn unknown(file: &GgufFile, arch: &str) -> Error {
    report::unsupported(
        file.name(),
        format!("general.architecture is {arch:?}"),
        format!("one of {}", NAMES.join(", ")),
    )
}

/// Widths of the buffers of a pass, in elements per token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Widths([usize; Buf::ALL.len()]);

impl Widths {
    /// Widths that the hyper-parameters call for.
    pub fn of(hp: &HParams) -> Self {
        Self(Buf::ALL.map(|b| match b {
            Buf::X | Buf::Xn => hp.n_embd,
            Buf::Q => hp.widest(|h| h.n_q()),
            Buf::Att => hp.widest(|h| h.n_att()),
            Buf::K => hp.widest(|h| h.n_k()),
            Buf::V if hp.latent.is_some() => 0,
            Buf::V => hp.widest(|h| h.n_v()),
            Buf::Gate | Buf::Up => hp.n_ff,
            Buf::Ql => hp.latent.map_or(0, |l| l.q_lora),
            Buf::Qh => hp.latent.map_or(0, |l| hp.n_head * l.head_dim),
            Buf::Vh => hp.latent.map_or(0, |l| hp.n_head * l.head_dim_v),
            Buf::GateSh | Buf::UpSh => hp.n_ff_shexp,
            Buf::Qg if hp.latent.is_some() => 0,
            Buf::Qg => hp.delta.map_or(0, |_| 2 * hp.n_head * hp.head_dim),
            Buf::Ag if hp.gates_heads => hp.widest(|h| h.n),
            Buf::Ag if hp.gates_attention => hp.n_head * hp.head_dim,
            Buf::Ag => 0,
            Buf::Y if hp.norms_ffn => hp.n_embd,
            Buf::Y if hp.routes_apart => hp.n_expert_latent.unwrap_or(hp.n_embd),
            Buf::Y => 0,
            Buf::Route if hp.routes_apart => hp.n_expert,
            Buf::Route => 0,
            Buf::Lat => hp.n_expert_latent.unwrap_or(0),
            Buf::Le | Buf::Li => hp.n_layer * hp.n_embd_layer,
            Buf::Lp | Buf::Lg => hp.n_embd_layer,
            Buf::Qkv => hp.state().map_or(0, |s| s.width),
            Buf::Dt | Buf::Sb if hp.delta.is_some_and(|d| d.apart) => {
                hp.delta.map_or(0, |d| d.head_dim)
            }
            Buf::Dt => hp.selective.map_or(0, |s| s.dt_rank),
            Buf::Sb | Buf::Sc => hp.selective.map_or(0, |s| s.d_state),
            Buf::Dn | Buf::Z | Buf::Alpha if hp.selective.is_some() => {
                hp.selective.map_or(0, |s| s.n_inner)
            }
            Buf::Dn | Buf::Z => match (hp.delta, hp.ssm, hp.short_conv) {
                (Some(d), ..) => d.n_v(),
                (_, Some(s), _) => s.n_inner(),
                (.., c) => c.map_or(0, |c| c.width),
            },
            Buf::Share => usize::from(hp.n_ff_shexp > 0 && hp.routing.gates_shared),
            Buf::Alpha if hp.ssm.is_some() => hp.ssm.map_or(0, |s| s.n_head),
            Buf::Alpha if hp.delta.is_some_and(|d| d.apart) => hp.delta.map_or(0, |d| d.n_v()),
            Buf::Alpha | Buf::Beta => hp.delta.map_or(0, |d| d.n_head_v),
        }))
    }

    /// The widest input of a matrix.
    pub fn widest_input(&self, hp: &HParams) -> usize {
        // Head by head, latent attention is not.
        let apart = |b: &Buf| match b {
            Buf::Q | Buf::Qh | Buf::Att => hp.latent.is_some(),
            Buf::Qkv => hp.selective.is_none(),
            Buf::Qg | Buf::Le | Buf::Li => true,
            _ => false,
        };
        let inputs = Buf::ALL.into_iter().filter(|b| !apart(b));
        let widest = inputs.map(|b| self.get(b)).max().unwrap_or(0);
        widest
            .max(hp.n_ff_exp)
            .max(hp.latent.map_or(0, |l| l.widest_product()))
    }

    /// Elements per token of a buffer.
    pub fn get(&self, b: Buf) -> usize {
        self.0[b as usize]
    }
}

#[cfg(test)]
mod tests;
