//! Hyper-parameters of a model, read from its metadata and checked.
//!
//! Keys are `<arch>.<name>` of the GGUF specification. What every architecture has is read here, what is its own by its file's
//! `hparams`. Everything that sizes a buffer or divides something is checked, so the rest of the engine can trust it.

use std::ops::Range;

use super::heads::Heads;
use super::keys::{Keys, MAX_DIM, MAX_HEADS, MAX_LAYERS};
use super::{DeltaNet, RopeParams, Routing, Sections, SelectiveSpace, ShortConv, StateSpace};
use crate::backend::{Activation, RopeMode};
use crate::error::Error;
use crate::gguf::GgufFile;
use crate::report;

/// Hyper-parameters, in ggml's words.
#[derive(Clone, Debug)]
pub struct HParams {
    /// `general.architecture`, one of [`super::NAMES`].
    pub arch: &'static str,
    /// Layers.
    pub n_layer: usize,
    /// Layers that a file has: fewer, where they are gone through several times.
    pub n_round: usize,
    /// Whether what such a round leaves is normed as the output is.
    pub norms_rounds: bool,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Query heads.
    pub n_head: usize,
    /// Key and value heads; divides `n_head` where all layers have the same heads, else the most of any.
    pub n_head_kv: usize,
    /// Width of a key, and of a query where it meets keys.
    pub head_dim: usize,
    /// Width of a value; another than that of keys in latent attention and where layers have heads of their own.
    pub head_dim_v: usize,
    /// Where keys and values of all heads are one latent vector.
    pub latent: Option<Latent>,
    /// Where some layers have a recurrent state in place of keys and values.
    pub delta: Option<DeltaNet>,
    /// Likewise, or beside them.
    pub ssm: Option<StateSpace>,
    /// Likewise.
    pub selective: Option<SelectiveSpace>,
    /// Likewise.
    pub short_conv: Option<ShortConv>,
    /// Width of the feed-forward block (of an expert, where there is nothing else).
    pub n_ff: usize,
    /// Width of an expert, 0 for a dense model.
    pub n_ff_exp: usize,
    /// Width of the experts that every token is sent to, together.
    pub n_ff_shexp: usize,
    /// Tokens of the vocabulary.
    pub n_vocab: usize,
    /// Positions that the model was trained on.
    pub n_ctx_train: u32,
    /// Those before its context was extended.
    pub n_ctx_orig: u32,
    /// Epsilon of the RMS norms.
    pub eps: f32,
    /// What a layer's feed-forward block makes of what goes up, in models without gates; empty in others.
    pub activations: Vec<Activation>,
    /// Experts, 0 for a dense model.
    pub n_expert: usize,
    /// Width of what experts read and give, where it is not that of the residual stream.
    pub n_expert_latent: Option<usize>,
    /// Whether their router is apart from them.
    pub routes_apart: bool,
    /// Experts that a token is sent to.
    pub n_expert_used: usize,
    /// How they are chosen.
    pub routing: Routing,
    /// Where queries and keys are normed, in architectures that leave it open.
    pub qk_norm: QkNorm,
    /// Factor of the attention scores, usually `1 / sqrt(head_dim)`.
    pub attn_scale: f32,
    /// Bound of the attention scores: they become `cap * tanh(score / cap)`.
    pub attn_softcap: Option<f32>,
    /// Bound of the logits, likewise.
    pub logit_softcap: Option<f32>,
    /// What the model needs that only the CPU has, in words for an error.
    pub cpu_only: Option<&'static str>,
    /// Factor of the embeddings.
    pub embedding_scale: f32,
    /// Factor of what a block adds to the residual stream.
    pub residual_scale: f32,
    /// Factor of the logits.
    pub logit_scale: f32,
    /// Elements of a head that rotate, the first ones.
    pub n_rot: usize,
    /// Whether these may be fewer than a head has.
    pub partial_rotary: bool,
    /// Which elements rotate together.
    pub rope_mode: RopeMode,
    /// M-RoPE: which pairs rotate by which coordinate.
    pub rope_sections: Option<Sections>,
    /// Whether norms take the mean off first, and may add something.
    pub centers: bool,
    /// Whether norms add something without taking the mean off.
    pub norms_add: bool,
    /// Whether what attention gives is gated.
    pub gates_attention: bool,
    /// Whether it is, by one number for each head.
    pub gates_heads: bool,
    /// Bounds of gates and of what goes up, of each layer: in experts, and in other blocks. None where it is zero, or empty.
    pub swiglu_clamp: [Vec<f32>; 2],
    /// Whether what feed-forward blocks give is normed before it is added, experts among them.
    pub norms_ffn: bool,
    /// How much larger queries of late positions are.
    pub temperature: Option<Temperature>,
    /// The same of [`Backend::heat`](crate::backend::Backend::heat), which is apart from rotation.
    pub heat: Option<Temperature>,
    /// Factor of what attention gives.
    pub value_scale: f32,
    /// Width of embeddings that tokens have for each layer, 0 where they have none.
    pub n_embd_layer: usize,
    /// What feed-forward blocks read.
    pub ffn_reads: FfnReads,
    /// Whether the gates of dense blocks are in one tensor with what goes up, before it.
    pub gate_in_up: bool,
    /// Bound of queries, keys and values, which are kept so near to zero.
    pub clamp_kqv: Option<f32>,
    /// Names of the norms before attention and before the feed-forward block.
    pub norm_names: [&'static str; 2],
    /// Whether norms have no weights.
    pub norms_plain: bool,
    /// Whether positions have embeddings, so that there are no others than [`HParams::n_ctx_train`].
    pub learns_positions: bool,
    /// Kinds of rotation; the first is what the common keys say.
    pub ropes: Vec<RopeParams>,
    /// What differs between layers, `[n_layer]`.
    pub layers: Vec<LayerParams>,
}

/// Where queries and keys are normed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Nowhere.
    None,
    /// Over each head.
    Heads,
    /// Over each head, after it has rotated.
    RotatedHeads,
    /// Over all heads together.
    Whole,
    /// Over each head, by weights of its own, with the mean taken off.
    Apart,
}

/// What a feed-forward block reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FfnReads {
    /// The residual stream with what attention gives, normed.
    After,
    /// What attention reads.
    Same,
    /// What attention finds, by a norm of its own.
    Beside,
}

/// Queries at position `p` are multiplied with `1 + scale * ln(1 + floor((p + offset) / n_floor))`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Temperature {
    /// How fast they grow.
    pub scale: f32,
    /// Positions of a step; at least 1.
    pub n_floor: u32,
    /// Positions that `p` is said to be further than it is.
    pub offset: u32,
}

/// Latent attention (DeepSeek-V2, arXiv 2405.04434): all heads share one key, [`HParams::head_dim`] wide, that begins with what values
/// are made of, [`HParams::head_dim_v`] wide, and ends with what rotates. Matrices of the heads stand between it and these widths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Latent {
    /// Width of what queries are made of; 0 where they come from the residual stream.
    pub q_lora: usize,
    /// Width of a query of a head, before it is brought to the width of keys; its last `n_rot` elements rotate.
    pub head_dim: usize,
    /// Width of a value of a head.
    pub head_dim_v: usize,
    /// Width of the latent vector: `head_dim_v` of [`HParams`].
    pub kv_lora: usize,
}

impl Latent {
    /// The widest input or output of a head's matrix.
    pub fn widest_product(&self) -> usize {
        self.head_dim.max(self.head_dim_v).max(self.kv_lora)
    }
}

/// What a layer keeps of the tokens before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Past {
    /// Keys and values in pages: the number of the layer in the pool, which counts these layers alone.
    Pages(usize),
    /// A recurrent state of fixed size: its number.
    State(usize),
    /// Both.
    #[allow(missing_docs)]
    Both { pages: usize, state: usize },
    /// Nothing: it does not look back.
    Nothing,
}

impl Past {
    /// The number in the pool of a layer that has pages.
    pub fn pages(self) -> Option<usize> {
        match self {
            Self::Pages(pages) | Self::Both { pages, .. } => Some(pages),
            Self::State(_) | Self::Nothing => None,
        }
    }

    /// The number of the state of a layer that has one.
    pub fn state(self) -> Option<usize> {
        match self {
            Self::State(state) | Self::Both { state, .. } => Some(state),
            Self::Pages(_) | Self::Nothing => None,
        }
    }
}

/// What is a layer's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerParams {
    /// What it keeps of the tokens before.
    pub past: Past,
    /// Tokens that it sees, the current one included, if not all.
    pub window: Option<u32>,
    /// Tokens of a part of the text that it does not look beyond, if there are parts.
    pub chunk: Option<u32>,
    /// Its kind of rotation, of [`HParams::ropes`]; `None` where nothing rotates.
    pub rope: Option<usize>,
    /// Its heads, where layers are not alike.
    pub heads: Option<Heads>,
    /// Whether it looks at the pages of an earlier layer and has no keys and values of its own.
    pub borrows: bool,
}

impl LayerParams {
    /// The oldest position that a token at `pos` sees.
    pub fn oldest(&self, pos: u32) -> u32 {
        let of_window = self.window.map_or(0, |w| (pos + 1).saturating_sub(w));
        of_window.max(self.chunk.map_or(0, |c| pos - pos % c))
    }
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
        let n_head = k
            .of_layers("attention.head_count", MAX_HEADS)?
            .ok_or_else(|| k.missing("attention.head_count"))?;
        let n_head_kv = k
            .of_layers("attention.head_count_kv", MAX_HEADS)?
            .unwrap_or(n_head);
        if n_head % n_head_kv != 0 && !k.is_unlike() {
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
        let head_dim_v = k.optional_count("attention.value_length", MAX_DIM)?;
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
        let n_expert = k.optional("expert_count")?.unwrap_or(0);
        let n_expert_used = k.optional("expert_used_count")?.unwrap_or(0);
        if n_expert > 4096 || n_expert_used > n_expert || (n_expert > 0 && n_expert_used == 0) {
            return Err(k.bad(
                "expert_used_count",
                n_expert_used as usize,
                format!("1 to expert_count ({n_expert}, at most 4096)"),
            ));
        }
        let n_ff = k.of_layers("feed_forward_length", MAX_DIM)?;
        // Norms that take the mean off call it differently.
        let (eps, mean_eps) = (
            "attention.layer_norm_rms_epsilon",
            "attention.layer_norm_epsilon",
        );
        let eps = match arch {
            "cohere2" | "cohere2moe" | "command-r" | "stablelm" | "starcoder2" | "nemotron"
            | "olmo" | "dbrx" | "falcon" | "gptneox" | "starcoder" | "gpt2" => mean_eps,
            "nemotron_h" | "nemotron_h_moe" if !k.has(eps) => mean_eps,
            _ => eps,
        };
        let eps = k.positive(eps, None)?;
        let n_ctx_train = k.count("context_length", u32::MAX >> 1)? as u32;
        let attn_scale = match k.float("attention.scale")? {
            Some(s) if s != 0.0 && s.is_finite() => s,
            _ => 1.0 / (head_dim as f32).sqrt(),
        };
        let n_ctx_orig = match k.optional("rope.scaling.original_context_length")? {
            None | Some(0) => n_ctx_train,
            Some(n) => n,
        };

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

        let mut hp = Self {
            arch,
            n_layer,
            n_round: n_layer,
            norms_rounds: false,
            n_embd,
            n_head,
            n_head_kv,
            head_dim,
            head_dim_v: head_dim_v.unwrap_or(head_dim),
            latent: None,
            delta: None,
            ssm: None,
            selective: None,
            short_conv: None,
            // Zero stands for none until the architecture has had its say.
            n_ff: n_ff.unwrap_or(0),
            n_ff_exp: 0,
            n_ff_shexp: 0,
            n_vocab: n_vocab as usize,
            n_ctx_train,
            n_ctx_orig,
            eps,
            activations: Vec::new(),
            n_expert: n_expert as usize,
            n_expert_latent: None,
            routes_apart: false,
            n_expert_used: n_expert_used as usize,
            routing: Routing::SOFTMAX,
            qk_norm: QkNorm::None,
            attn_scale,
            attn_softcap: None,
            logit_softcap: None,
            cpu_only: None,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logit_scale: 1.0,
            n_rot,
            partial_rotary: false,
            rope_mode: RopeMode::Norm,
            rope_sections: None,
            centers: false,
            norms_add: false,
            gates_attention: false,
            gates_heads: false,
            swiglu_clamp: [Vec::new(), Vec::new()],
            norms_ffn: false,
            temperature: None,
            heat: None,
            value_scale: 1.0,
            n_embd_layer: 0,
            ffn_reads: FfnReads::After,
            gate_in_up: false,
            clamp_kqv: None,
            norm_names: ["attn_norm", "ffn_norm"],
            norms_plain: false,
            learns_positions: false,
            ropes: vec![k.rope()?],
            layers: (0..n_layer)
                .map(|il| LayerParams {
                    past: Past::Pages(il),
                    window: None,
                    chunk: None,
                    rope: Some(0),
                    heads: None,
                    borrows: false,
                })
                .collect(),
        };
        hp.without_guessing_layers(&k)?;
        super::hparams(&k, &mut hp)?;
        let in_one = |il| k.has_tensor(il, "ffn_gate_up_exps.weight");
        if hp.cpu_only.is_none() && (0..hp.n_layer).any(in_one) {
            hp.cpu_only = Some("experts whose gates and what goes up are one tensor");
        }
        if hp.n_ff == 0 {
            return Err(k.missing("feed_forward_length"));
        }
        if hp.n_expert > 0 && hp.n_ff_exp == 0 {
            hp.n_ff_exp = hp.n_ff;
        }
        let head_dim = hp.head_dim;
        let unlike = hp.has_unlike_heads();
        if unlike || hp.ropes.iter().any(|r| r.n_rot.is_some()) {
            hp.check_rotation(&k)?;
        }
        if unlike {
            return Ok(hp);
        }
        if hp.head_dim_v != head_dim && hp.latent.is_none() {
            return Err(k.bad(
                "attention.value_length",
                hp.head_dim_v,
                format!("key_length {head_dim}"),
            ));
        }
        let rotates = hp.layers.iter().any(|l| l.rope.is_some());
        if !rotates && hp.latent.is_some() {
            // It is as wide as what would.
        } else if !rotates {
            // What the file says of it means nothing.
            hp.n_rot = head_dim - head_dim % 2;
        } else if n_rot % 2 != 0 || n_rot > head_dim || (n_rot < head_dim && !hp.partial_rotary) {
            let most = if hp.partial_rotary { "at most " } else { "" };
            return Err(k.bad(
                "rope.dimension_count",
                n_rot,
                format!("{most}the head width {head_dim} (attention.key_length, or embedding_length / head_count), an even number"),
            ));
        }
        Ok(hp)
    }

    /// Gives layers a window, and lets those rotate in their own way, if it is another than that of the others.
    pub(super) fn windows(&mut self, window: u32, layers: &[bool], rope: RopeParams) {
        if self.ropes[0] != rope {
            self.ropes.push(rope);
        }
        for (l, _) in self.layers.iter_mut().zip(layers).filter(|(_, has)| **has) {
            l.window = Some(window);
            l.rope = Some(self.ropes.len() - 1);
        }
    }

    /// Feed-forward blocks without gates.
    pub(super) fn without_gates(&mut self, activations: Vec<Activation>) {
        self.activations = activations;
    }

    /// Norms that take the mean off first.
    pub(super) fn centered_norms(&mut self) {
        self.centers = true;
    }

    /// Gives layers a window, and lets no others rotate.
    pub(super) fn rotate_in_windows(&mut self, window: u32, layers: &[bool]) {
        for (l, has_window) in self.layers.iter_mut().zip(layers) {
            match has_window {
                true => l.window = Some(window),
                false => l.rope = None,
            }
        }
    }

    /// Leaves out the last layers of files that have some which guess further tokens.
    fn without_guessing_layers(&mut self, k: &Keys<'_>) -> Result<(), Error> {
        let n_block = self.n_layer;
        let n_guess = k.optional("nextn_predict_layers")?.unwrap_or(0) as usize;
        if n_guess >= n_block {
            let expected = format!("less than block_count {n_block}");
            return Err(k.bad("nextn_predict_layers", n_guess, expected));
        }
        self.n_layer -= n_guess;
        self.n_round = self.n_layer;
        self.layers.truncate(self.n_layer);
        Ok(())
    }

    /// Goes through the layers `n` times.
    pub(super) fn repeat_layers(&mut self, n: usize) {
        self.n_layer = n * self.n_round;
        let of = |il: usize| LayerParams {
            past: Past::Pages(il),
            ..self.layers[il % self.n_round]
        };
        self.layers = (0..self.n_layer).map(of).collect();
    }

    /// Tables of cosines and sines: one of each kind of rotation, and where queries grow with their position another of each.
    pub fn n_rope_tables(&self) -> usize {
        self.ropes.len() * (1 + usize::from(self.temperature.is_some()))
    }

    /// Layers that have pages in the pool.
    pub fn n_layer_kv(&self) -> usize {
        let all = self.layers.iter();
        all.filter(|l| l.past.pages().is_some() && !l.borrows)
            .count()
    }

    /// The number of layer `il` in the pool.
    ///
    /// # Panics
    /// If it has no pages: no forward pass asks for attention there.
    pub fn layer_of_pool(&self, il: usize) -> usize {
        match self.layers[il].past.pages() {
            Some(n) => n,
            None => unreachable!("layer {il} has no pages"),
        }
    }

    /// Of layers that lie side by side, those that have pages, as the pool counts them.
    pub fn layers_of_pool(&self, layers: &Range<usize>) -> Range<usize> {
        // A layer that looks at the pages of an earlier one has its number.
        let before = |il: usize| {
            let numbers = self.layers[..il].iter().filter_map(|l| l.past.pages());
            numbers.max().map_or(0, |n| n + 1)
        };
        before(layers.start)..before(layers.end)
    }

    /// The first element of a head that rotates: latent keys rotate at their end.
    pub fn rope_from(&self) -> usize {
        match self.latent {
            Some(_) => self.head_dim - self.n_rot,
            None => 0,
        }
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
