//! Weights as they lie in the file, and what kernels take for them.

use lemma_cpu::{Experts, Gating, Mat, MoeBias, MoeFfn, MulMat, Shared};
use lemma_quant::GgmlType;

use crate::backend::{self, Act, Activation, Linear, Moe, Tensor};
use crate::gguf::Bytes;

/// A weight of the CPU backend: where it lies in the file, or a small vector decoded once.
#[derive(Debug)]
pub enum CpuWeight {
    /// A matrix, used in place.
    Mat {
        /// How values are encoded.
        ty: GgmlType,
        /// Values in a row.
        n_in: usize,
        /// Rows.
        n_out: usize,
        /// The rows.
        bytes: Bytes,
    },
    /// A vector.
    Vec(Vec<f32>),
}

impl AsRef<CpuWeight> for CpuWeight {
    fn as_ref(&self) -> &CpuWeight {
        self
    }
}

impl CpuWeight {
    pub(in super::super) fn new(t: Tensor) -> Self {
        if t.vector {
            Self::Vec(t.to_f32())
        } else {
            Self::Mat {
                ty: t.ty,
                n_in: t.n_in,
                n_out: t.n_out,
                bytes: t.bytes,
            }
        }
    }

    pub(super) fn mat(&self) -> Mat<'_> {
        match self {
            Self::Mat {
                ty,
                n_in,
                n_out,
                bytes,
            } => Mat {
                ty: *ty,
                n_in: *n_in,
                n_out: *n_out,
                data: bytes,
            },
            Self::Vec(_) => unreachable!("bound as a matrix"),
        }
    }

    pub(super) fn experts(&self, n_expert: usize) -> Experts<'_> {
        let m = self.mat();
        Experts {
            ty: m.ty,
            n_in: m.n_in,
            n_out: m.n_out / n_expert,
            n_expert,
            first: 0,
            stride: m.n_out / n_expert,
            data: m.data,
        }
    }

    pub(super) fn vec(&self) -> &[f32] {
        match self {
            Self::Vec(v) => v,
            Self::Mat { .. } => unreachable!("bound as a vector"),
        }
    }
}

pub(super) fn product<'a>(
    out: &'a Shared<f32>,
    out_add: bool,
    w: &'a Linear<CpuWeight>,
) -> MulMat<'a> {
    MulMat {
        out,
        out_add,
        w: w.w.mat(),
        bias: w.bias.as_ref().map(CpuWeight::vec),
    }
}

/// A mixture of experts.
pub(in super::super) fn moe_ffn<'w, W: AsRef<CpuWeight>>(moe: &'w Moe<W>) -> MoeFfn<'w> {
    // Gates and what goes up may be the halves of one.
    let part = |w: &'w W, half| match moe.gates_and_ups {
        true => w.as_ref().experts(moe.n_expert).half(half),
        false => w.as_ref().experts(moe.n_expert),
    };
    MoeFfn {
        router: moe.gate_inp.as_ref().mat(),
        gate: moe.gate_exps.as_ref().map(|w| part(w, 0)),
        up: part(&moe.up_exps, 1),
        down: moe.down_exps.as_ref().experts(moe.n_expert),
        down_scale: (moe.down_exps_s.as_ref()).map(|s| s.as_ref().vec()),
        bias: moe.bias.as_ref().map(|b| MoeBias {
            router: b.gate_inp.as_ref().vec(),
            gate: b.gate_exps.as_ref().vec(),
            up: b.up_exps.as_ref().vec(),
            down: b.down_exps.as_ref().vec(),
        }),
        clamp: moe.clamp,
        act: match moe.act {
            Act::Geglu => lemma_cpu::Act::Geglu,
            Act::Swiglu => lemma_cpu::Act::Swiglu,
            Act::SwigluOai => lemma_cpu::Act::SwigluOai,
            Act::ReluSqr => lemma_cpu::Act::ReluSqr,
            Act::Reglu => lemma_cpu::Act::Reglu,
        },
        n_expert_used: moe.n_expert_used,
        gating: match moe.gating {
            backend::Gating::Softmax => Gating::Softmax,
            backend::Gating::Sigmoid => Gating::Sigmoid,
        },
        choice_bias: (moe.exp_probs_b.as_ref()).map(|b| b.as_ref().vec()),
        n_group: moe.n_group,
        n_group_used: moe.n_group_used,
        norm_topk: moe.norm_topk,
        weights_scale: moe.weights_scale,
        weighs_input: moe.weighs_input,
    }
}

/// The same in the words of the kernels.
pub(super) fn activation(by: Activation) -> lemma_cpu::Activation {
    match by {
        Activation::ReluSqr => lemma_cpu::Activation::ReluSqr,
        Activation::Gelu => lemma_cpu::Activation::Gelu,
        Activation::Xielu {
            alpha_n,
            alpha_p,
            beta,
            eps,
        } => lemma_cpu::Activation::Xielu {
            alpha_n,
            alpha_p,
            beta,
            eps,
        },
    }
}
