//! The verbs of a forward pass, and the backends that run them.
//!
//! An [architecture](crate::arch) is a list of verbs over named buffers. A backend gives the verbs their meaning:
//!
//! * [`cpu`]: every worker of a team runs the same pass, each verb takes its share of the rows and ends in a barrier;
//! * [`trace`]: scalar f32 reference that keeps every named intermediate, the oracle of the others;
//! * CUDA: the pass is recorded once as a graph and replayed;
//! * a model that a GPU cannot hold is divided between the two: its first layers run on the CPU.
//!
//! What changes from step to step — tokens, positions, page tables, places of keys and values — is data of the backend, set before
//! the pass by [`Runner::run`], never an argument of a verb: a verb can be recorded once and replayed. Nothing in a pass waits for the
//! host. Shapes were checked when the weights were bound, so verbs do not fail.

pub mod cpu;
#[cfg(any(feature = "cuda", feature = "cuda-emulate"))]
pub mod cuda;
#[cfg(any(feature = "cuda", feature = "cuda-emulate"))]
pub mod offload;
pub mod trace;

pub use lemma_cuda::{DeviceInfo, Devices, devices};

use lemma_quant::GgmlType;

use crate::error::Error;
use crate::gguf::Bytes;
use crate::kv::{Cache, Layout};
use crate::sampling::{self, Candidate, Choice};

/// Names of the activation buffers. All are `[n_tokens, width]` f32, row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Buf {
    /// Residual stream, `n_embd`.
    X,
    /// Normalised input of a block, `n_embd`.
    Xn,
    /// Queries, `n_head * head_dim`.
    Q,
    /// Keys, `n_head_kv * head_dim`.
    K,
    /// Values, `n_head_kv * head_dim_v`; nothing where they are in the keys.
    V,
    /// Attention output before its projection, `n_head * head_dim_v`.
    Att,
    /// Gate of the feed-forward block, then its product with [`Buf::Up`]; `n_ff`.
    Gate,
    /// Up projection, `n_ff`.
    Up,
    /// Latent attention: what queries are made of, `q_lora`.
    Ql,
    /// Latent attention: queries that do not know of latent keys yet, `n_head * head_dim` of [`Latent`](crate::arch::Latent).
    Qh,
    /// Latent attention: output in the width of values, `n_head * head_dim_v` of [`Latent`](crate::arch::Latent).
    Vh,
    /// Gate of shared experts, then its product with [`Buf::UpSh`]; `n_ff_shexp`.
    GateSh,
    /// Up projection of shared experts, `n_ff_shexp`.
    UpSh,
    /// Queries and what gates the output of attention, head by head side by side; `2 * n_head * head_dim`.
    Qg,
    /// Gate of the output of attention, `n_head * head_dim`.
    Ag,
    /// What goes through a convolution. Gated delta net: queries, keys and values of all its heads, one after the other; `n_qkv` of
    /// [`DeltaNet`](crate::arch::DeltaNet). State space: `x`, `b` and `c`; `n_xbc` of [`StateSpace`](crate::arch::StateSpace). Gated short
    /// convolution: `n_embd`.
    Qkv,
    /// What is read from a state: `n_v` of [`DeltaNet`](crate::arch::DeltaNet), `n_inner` of [`StateSpace`](crate::arch::StateSpace). Gated
    /// short convolution: its second gate, `n_embd`.
    Dn,
    /// Gate of that, then their product; as wide. Gated short convolution: its first gate.
    Z,
    /// Gated delta net: what is kept of the state, `n_head_v` of [`DeltaNet`](crate::arch::DeltaNet), or `n_v` where it is said for each element
    /// of a key. State space: step sizes, `n_head` of
    /// [`StateSpace`](crate::arch::StateSpace).
    Alpha,
    /// Gated delta net: how much of a correction is made, as wide.
    Beta,
    /// How much of the shared experts is taken, 1.
    Share,
    /// What a feed-forward block gives, where it is normed before it is added and has experts, `n_embd`; what experts give where they have a
    /// buffer of their own, as wide as they are.
    Y,
    /// Products of a router that are made apart from the experts, `n_expert`.
    Route,
    /// What experts read, where it is of another width than the residual stream.
    Lat,
    /// Embeddings of a token for each layer, `n_layer * n_embd_layer`.
    Le,
    /// What layers take in of these and of the residual stream, as wide.
    Li,
    /// The part of a layer of that, `n_embd_layer`.
    Lp,
    /// How much of it is taken, as wide.
    Lg,
    /// Selective state space: what step sizes are made of, `dt_rank` of [`SelectiveSpace`](crate::arch::SelectiveSpace). Delta net: what is made
    /// into what it keeps for each element, `head_dim`.
    Dt,
    /// What it is written with, `d_state`. Delta net: what gates are made of, `head_dim`.
    Sb,
    /// What it is read with, as wide.
    Sc,
}

impl Buf {
    /// Every buffer, in the order of their discriminants.
    pub const ALL: [Buf; 31] = [
        Buf::X,
        Buf::Xn,
        Buf::Q,
        Buf::K,
        Buf::V,
        Buf::Att,
        Buf::Gate,
        Buf::Up,
        Buf::Ql,
        Buf::Qh,
        Buf::Vh,
        Buf::GateSh,
        Buf::UpSh,
        Buf::Qg,
        Buf::Ag,
        Buf::Qkv,
        Buf::Dn,
        Buf::Z,
        Buf::Alpha,
        Buf::Beta,
        Buf::Share,
        Buf::Y,
        Buf::Route,
        Buf::Lat,
        Buf::Le,
        Buf::Li,
        Buf::Lp,
        Buf::Lg,
        Buf::Dt,
        Buf::Sb,
        Buf::Sc,
    ];
}

/// A matrix with an optional bias.
#[derive(Debug)]
pub struct Linear<W> {
    /// `[n_out, n_in]` in ggml's row order.
    pub w: W,
    /// `[n_out]`.
    pub bias: Option<W>,
}

/// What tokens are to a model at first.
#[derive(Debug)]
pub struct Embedding<W> {
    /// `[n_vocab, n_embd]`; nothing in a part of a model that does not begin it.
    pub w: Option<W>,
    /// Factor of its rows.
    pub scale: f32,
    /// What positions are, which is added then: `[n_ctx_train, n_embd]`.
    pub positions: Option<W>,
}

/// Experts of a mixture-of-experts block.
#[derive(Debug)]
pub struct Moe<W> {
    /// Router, `[n_expert, n_embd]`.
    pub gate_inp: W,
    /// `[n_expert, n_ff, n_embd]`, of experts that have gates.
    pub gate_exps: Option<W>,
    /// `[n_expert, n_ff, n_embd]`.
    pub up_exps: W,
    /// Whether gates and what goes up are one tensor, `[n_expert, 2 * n_ff, n_embd]`, that both names stand for: gates come first.
    pub gates_and_ups: bool,
    /// `[n_expert, n_embd, n_ff]`.
    pub down_exps: W,
    /// Factors of what experts give, `[n_expert]`.
    pub down_exps_s: Option<W>,
    /// Experts.
    pub n_expert: usize,
    /// Experts that a token is sent to.
    pub n_expert_used: usize,
    /// Width of an expert.
    pub n_ff: usize,
    /// From the router's products to weights of experts.
    pub gating: Gating,
    /// Added to the weights where experts are chosen, but not to what they count: `[n_expert]`.
    pub exp_probs_b: Option<W>,
    /// Groups of experts that lie side by side.
    pub n_group: usize,
    /// Groups that a token may use experts of: those whose two best experts have the largest sum.
    pub n_group_used: usize,
    /// Whether the chosen experts' weights are made to sum to one.
    pub norm_topk: bool,
    /// Factor of the weights after that.
    pub weights_scale: f32,
    /// Whether weights are factors of what experts read, not of what they give.
    pub weighs_input: bool,
    /// The bound of [`Backend::swiglu_clamped`], for experts that have one.
    pub clamp: Option<f32>,
    /// What is added to the products, for experts that have it.
    pub bias: Option<MoeBias<W>>,
    /// What an expert makes of its gate and what goes up.
    pub act: Act,
}

/// Biases of a mixture-of-experts block.
#[derive(Debug)]
pub struct MoeBias<W> {
    /// `[n_expert]`
    pub gate_inp: W,
    /// `[n_expert, n_ff]`
    pub gate_exps: W,
    /// `[n_expert, n_ff]`
    pub up_exps: W,
    /// `[n_expert, n_embd]`
    pub down_exps: W,
}

/// Weights of a state space (Mamba-2), `[n_head]` each.
#[derive(Debug)]
pub struct Scan<W> {
    /// How fast a head forgets; negative.
    pub a: W,
    /// Added to its step size.
    pub dt: W,
    /// How much of its own input it passes on.
    pub d: W,
}

/// Weights of a selective state space (Mamba).
#[derive(Debug)]
pub struct Selective<W> {
    /// How fast each number of a channel is forgotten; negative: `[d_state, n_inner]`.
    pub a: W,
    /// How much of its own input a channel passes on: `[n_inner]`.
    pub d: W,
}

/// How the products of a router become weights of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gating {
    /// Softmax over all experts.
    Softmax,
    /// A sigmoid of each.
    Sigmoid,
}

/// Activation of an expert; `gate` and `up` are its two products, or `up` the only one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// `max(up, 0)²`, of experts without gates.
    ReluSqr,
    /// `gelu(gate) * up`
    Geglu,
    /// `max(gate, 0) * up`
    Reglu,
    /// `silu(gate) * up`
    Swiglu,
    /// `g * sigmoid(1.702 g) * (u + 1)`, where `g` is the gate, 7 at most, and `u` is `up`, within 7 of zero: ggml's `swiglu_oai`.
    SwigluOai,
}

/// What a feed-forward block without a gate makes of each element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `max(x, 0)²`
    ReluSqr,
    /// GELU by the tanh formula (arXiv 1606.08415).
    Gelu,
    /// `alpha_p x² + beta x` where x is positive, elsewhere `alpha_n (exp(min(x, eps)) - 1 - x) + beta x`.
    #[allow(missing_docs)]
    Xielu {
        alpha_n: f32,
        alpha_p: f32,
        beta: f32,
        eps: f32,
    },
}

/// Which elements of a head rotate together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeMode {
    /// Neighbours, `(2i, 2i + 1)`: ggml's NORM.
    Norm,
    /// Halves, `(i, i + n_rot / 2)`: ggml's NEOX.
    Neox,
}

/// The verbs of a forward pass.
///
/// `n` below is the number of tokens of the pass; every buffer named is `[n, width]`.
pub trait Backend {
    /// A bound weight.
    type Weight;

    /// `out[i] = scale * w[token[i]] (+ positions[pos[i]])`; rows of the embedding matrices. Without the first, `out` is what another part of
    /// the model has left.
    fn embed(&mut self, out: Buf, e: &Embedding<Self::Weight>);

    /// `out = x / rms(x) * w` over each row, `rms(x) = sqrt(mean(x²) + eps)`. Behind `w` comes what is added then, if there is something.
    fn rms_norm(&mut self, out: Buf, x: Buf, w: &Self::Weight, eps: f32);

    /// In place over each head of `x`, `[n, n_head, head_dim]`; `w` is `[head_dim]`.
    fn rms_norm_heads(&mut self, x: Buf, w: &Self::Weight, eps: f32);

    /// In place over each of `n_group` parts of the rows of `x`, with one part of `w` for each.
    fn rms_norm_groups(&mut self, x: Buf, w: &Self::Weight, n_group: usize, eps: f32);

    /// In place over what each row of `x` begins with, as many elements as `w` has.
    fn rms_norm_first(&mut self, x: Buf, w: &Self::Weight, eps: f32);

    /// `out_i = w_i x (+ bias_i)` for several matrices with one input.
    fn mul_mats<const N: usize>(&mut self, outs: [(Buf, &Linear<Self::Weight>); N], x: Buf);

    /// A matrix for each head, `w`: `[n_head, n_out, n_in]`. `out = w_h x` of the first `n_in` elements of each head of `x`; behind it
    /// comes what the head has left, as it is.
    fn mul_mat_heads(&mut self, out: Buf, w: &Self::Weight, x: Buf);

    /// `acc += w x (+ bias)`.
    fn mul_mat_add(&mut self, acc: Buf, w: &Linear<Self::Weight>, x: Buf);

    /// `acc += x`
    fn add(&mut self, acc: Buf, x: Buf);

    /// `x *= factor`
    fn scale(&mut self, x: Buf, factor: f32);

    /// Every element of `x` within `most` of zero: what is beyond becomes that.
    fn clamp(&mut self, x: Buf, most: f32);

    /// `x -= mean(x)` of each row.
    fn center(&mut self, x: Buf);

    /// The same over each head of `x`, `head_dim` wide.
    fn center_heads(&mut self, x: Buf);

    /// Each row of `x` times the [`HParams::heat`](crate::arch::HParams::heat) of its position.
    fn heat(&mut self, x: Buf);

    /// `out` = part `i` of the `n` parts, all as wide, that each row of `x` has side by side.
    fn part(&mut self, out: Buf, x: Buf, i: usize, n: usize);

    /// Part `i` of the `n` parts, all as wide as `x`, that each row of `out` has side by side = `x`.
    fn place(&mut self, out: Buf, x: Buf, i: usize, n: usize);

    /// Rotates queries and keys by the positions of the pass, as layer `il` does: the first elements of each head, or, of latent keys and
    /// their queries, the last. Queries grow with their position where [`HParams::temperature`](crate::arch::HParams::temperature) says so.
    fn rope(&mut self, q: Buf, k: Buf, il: usize);

    /// `qkv`: queries, keys and values (which are not looked at where they are in the keys). Stores keys and values of the pass in their
    /// slots of layer `il`, attends over the live pages up to each token's position, and leaves the page masses of the last token if the
    /// policy wants them. A layer with a window ([`LayerParams::window`](crate::arch::LayerParams::window)) sees so many tokens, the token
    /// itself included. `sinks`, `[n_head]`: a score of each head that takes part in the softmax and has no value. Scores are bounded by
    /// [`HParams::attn_softcap`](crate::arch::HParams::attn_softcap).
    fn attention(&mut self, out: Buf, qkv: [Buf; 3], il: usize, sinks: Option<&Self::Weight>);

    /// Takes apart what heads of `x` have side by side, two parts of the same width: the first go to one buffer, the second to the other.
    fn split_heads(&mut self, outs: [Buf; 2], x: Buf);

    /// `x *= sigmoid(gate)`; a gate that is narrower than `x` has one element for several of `x` that lie side by side.
    fn sigmoid_mul(&mut self, x: Buf, gate: Buf);

    /// A causal convolution along the tokens, every element of a row by itself, and `silu` of the result, in place. `w`: `[d_conv, width]`,
    /// the oldest token first, and behind it what is added to each element, if there is something. Inputs of before the pass come from the
    /// state of layer `il`, which keeps the last ones.
    fn ssm_conv(&mut self, x: Buf, w: &Self::Weight, il: usize);

    /// A gated short convolution, in place: `x = c * conv(b * x)`, `conv` that of [`Backend::ssm_conv`] without its `silu`.
    fn short_conv(&mut self, x: Buf, bc: [Buf; 2], w: &Self::Weight, il: usize);

    /// The scan of a state space (Mamba-2, arXiv 2405.21060), token by token: `S = exp(a dt) S + dt x bᵀ; out = S c + d x`, where `S` is the
    /// state of layer `il`, a matrix for each head, and zero before position 0. `xbc`: [`Buf::Qkv`]; `dt`: step sizes, of which a softplus
    /// is taken first.
    fn ssm_scan(&mut self, out: Buf, xbc_dt: [Buf; 2], w: &Scan<Self::Weight>, il: usize);

    /// The scan of a selective state space (Mamba, arXiv 2312.00752), token by token and for each channel: `s_j = exp(a_j dt) s_j + dt x b_j;
    /// out = Σ s_j c_j + d x`, where `s` is the state of layer `il`, zero before position 0. `x_dt_bc`: what went through the convolution, step
    /// sizes, of which a softplus is taken first, and what the state is written and read with.
    fn selective_scan(
        &mut self,
        out: Buf,
        x_dt_bc: [Buf; 4],
        w: &Selective<Self::Weight>,
        il: usize,
    );

    /// `x / sqrt(|x|² + eps)`, in place over each of the `n_head` heads of `head_dim` elements that rows of `x` begin with.
    fn l2_norm_first(&mut self, x: Buf, n_head: usize, head_dim: usize, eps: f32);

    /// The gates of a delta net, in place: `alpha = exp(a * softplus(alpha + dt))`, `beta = sigmoid(beta)`. `a` and `dt` are as wide as `alpha`.
    fn delta_gates(&mut self, alpha: Buf, beta: Buf, a: &Self::Weight, dt: &Self::Weight);

    /// The gated delta rule (arXiv 2412.06464, section 3), token by token: `S = alpha S; S += beta (v - S k) kᵀ; out = S q / sqrt(head_dim)`, where `S`
    /// is the state of layer `il`, a matrix for each value head, and zero before position 0; where each element of a key is forgotten in its own
    /// measure (arXiv 2510.26692), `alpha` is a diagonal matrix that `S` is multiplied with. `qkv`: queries, keys and values of
    /// [`Buf::Qkv`]; `[alpha, beta]`: what [`Backend::delta_gates`] leaves.
    fn gated_delta_net(&mut self, out: Buf, qkv: Buf, gates: [Buf; 2], il: usize);

    /// `gate = silu(gate) * up`.
    fn swiglu(&mut self, gate: Buf, up: Buf);

    /// `gate = min(silu(gate), clamp) * up`, where `up` is kept within `clamp` of zero.
    fn swiglu_clamped(&mut self, gate: Buf, up: Buf, clamp: f32);

    /// `gate = gelu(gate) * up`, gelu by the tanh formula (arXiv 1606.08415).
    fn geglu(&mut self, gate: Buf, up: Buf);

    /// Every element by itself, in place.
    fn activate(&mut self, x: Buf, by: Activation);

    /// `acc += experts(x)`, each token through its best experts.
    fn moe_ffn(&mut self, acc: Buf, x: Buf, moe: &Moe<Self::Weight>);

    /// `out = experts(x)`, chosen by products of a router that are there already: `x_route`. These are used up.
    fn moe_ffn_routed(&mut self, out: Buf, x_route: [Buf; 2], moe: &Moe<Self::Weight>);

    /// Logits of the tokens whose output is wanted: `w rms_norm(x)`, times [`HParams::logit_scale`](crate::arch::HParams::logit_scale), bounded
    /// by [`HParams::logit_softcap`](crate::arch::HParams::logit_softcap).
    fn output(&mut self, w: &Linear<Self::Weight>, norm: &Self::Weight, x: Buf, eps: f32);

    /// Tells a tracing backend what a buffer holds at this point; `name` as ggml's callbacks name it.
    #[inline(always)]
    fn note(&mut self, name: &'static str, il: usize, buf: Buf) {
        let _ = (name, il, buf);
    }
}

/// Which logits a pass leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outputs {
    /// None: the middle of a prompt.
    None,
    /// Of the last token.
    Last,
    /// Of every token.
    All,
}

/// A tensor to be bound by a backend; it keeps its file mapped.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Type of its elements.
    pub ty: GgmlType,
    /// Elements of a row.
    pub n_in: usize,
    /// Rows, of all experts together for a tensor of experts.
    pub n_out: usize,
    /// Whether it is a vector: a norm, a bias.
    pub vector: bool,
    /// The layer whose experts it belongs to, or to the choice of them.
    pub experts_of: Option<usize>,
    /// Its data, row after row.
    pub bytes: Bytes,
}

impl Tensor {
    /// The rows `at .. at + n` of a matrix, or so many elements of a vector.
    pub fn part(&self, at: usize, n: usize) -> Self {
        let all = if self.vector { self.n_in } else { self.n_out };
        let each = self.bytes.len() / all;
        let bytes = self.bytes.slice(at * each..(at + n) * each);
        let part = self.clone();
        match self.vector {
            true => Self {
                n_in: n,
                bytes,
                ..part
            },
            false => Self {
                n_out: n,
                bytes,
                ..part
            },
        }
    }

    /// Bytes of its data, also where that has not been read.
    pub fn n_bytes(&self) -> usize {
        self.ty
            .row_size(self.n_in)
            .map_or(0, |row| row * self.n_out)
    }

    /// Row `i`, dequantized into `out`, `[n_in]`.
    pub fn dequantize_row(&self, i: usize, out: &mut [f32]) {
        let size = self.bytes.len() / self.n_out;
        (self.ty.traits().dequantize_row)(&self.bytes[i * size..][..size], out);
    }

    /// The whole of a small tensor, dequantized.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.n_in * self.n_out];
        for (i, row) in out.chunks_exact_mut(self.n_in).enumerate() {
            self.dequantize_row(i, row);
        }
        out
    }
}

/// What memory can do at most, in bytes a second: the yardstick of decoding, which reads all weights for a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceiling {
    /// Reads by whatever runs the passes.
    pub read: f64,
    /// Copies within a device's memory, both directions together.
    pub copy: Option<f64>,
}

/// A loaded model on a device: runs passes over batches of tokens.
///
/// The only interface that sessions use; one implementation for each backend.
pub trait Runner: Send {
    /// Processes `tokens`, which `cache` has just been given places for ([`Cache::begin`]), and lets the cache take the page masses
    /// when the pass is a single token.
    ///
    /// # Errors
    /// [`Error`] of the device. CPU passes do not fail.
    fn run(&mut self, tokens: &[u32], cache: &mut Cache, outputs: Outputs) -> Result<(), Error>;

    /// Logits of the last pass, `[n_outputs, n_vocab]`.
    fn logits(&mut self) -> &[f32];

    /// The token with the largest logit of the last pass, the first of them; `None` if none is a number. The pass was one of
    /// [`Outputs::Last`].
    fn best(&mut self) -> Option<u32> {
        sampling::best(self.logits())
    }

    /// The `k` tokens with the largest logits of the last pass, as [`sampling::top`] puts them in order. The pass was one of [`Outputs::Last`].
    fn top(&mut self, k: usize, out: &mut Vec<Candidate>) {
        sampling::top(self.logits(), k, out);
    }

    /// How the token behind the coming step will be chosen, as far as the caller knows. A device may begin the step of that token ahead of
    /// time then; other tokens are computed all the same, only later.
    fn follow(&mut self, choice: Choice) {
        let _ = choice;
    }

    /// Keeps a copy of the recurrent states as they are, for [`Runner::restore_state`]. Models without have nothing to keep.
    fn save_state(&mut self) {}

    /// Brings back the states of the last [`Runner::save_state`].
    fn restore_state(&mut self) {}

    /// Enlarges the KV pool to `layout`, which differs from that of before in its number of slots.
    ///
    /// # Errors
    /// [`Error::Memory`] when the device cannot hold it.
    fn grow(&mut self, layout: &Layout) -> Result<(), Error>;

    /// Bytes of a pool of this layout.
    fn pool_bytes(&self, layout: &Layout) -> u64;

    /// How fast the memory is that weights lie in; nothing where it is not one memory, or nobody has measured it.
    ///
    /// # Errors
    /// [`Error`] of the device.
    fn ceiling(&mut self) -> Result<Option<Ceiling>, Error> {
        Ok(None)
    }

    /// One line for the log: what runs the passes.
    fn describe(&self) -> String;
}
