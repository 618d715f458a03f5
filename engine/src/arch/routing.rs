//! How a mixture of experts chooses: what its router makes of its products, and which layers have experts at all.

use super::HParams;
use super::keys::{Keys, MAX_DIM};
use crate::backend::Gating;
use crate::error::Error;

/// How experts are chosen and weighted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Routing {
    /// From the router's products to weights of experts.
    pub gating: Gating,
    /// Groups of experts that lie side by side.
    pub n_group: usize,
    /// Groups that a token may use experts of.
    pub n_group_used: usize,
    /// Whether the weights of the chosen are made to sum to one.
    pub norm_topk: bool,
    /// Factor of the weights after that.
    pub weights_scale: f32,
    /// Factor of what the experts give that every token is sent to.
    pub shared_scale: f32,
    /// Whether something is added to the weights where experts are chosen.
    pub is_biased: bool,
    /// First layers that have a dense block in place of experts.
    pub n_dense: usize,
    /// Of so many layers the last has experts, beginning with the first; the others have a dense block.
    pub step: usize,
    /// Whether a gate says how much is taken of the experts that every token is sent to.
    pub gates_shared: bool,
    /// Whether weights are factors of what experts read, not of what they give.
    pub weighs_input: bool,
}

/// The first layer that has a router.
pub(super) fn first_router(k: &Keys<'_>, hp: &HParams) -> usize {
    let has_router = |il: &usize| k.has_tensor(*il, "ffn_gate_inp.weight");
    (0..hp.n_layer).find(has_router).unwrap_or(hp.n_layer)
}

impl Routing {
    /// Softmax over all experts, the best few made to sum to one.
    pub const SOFTMAX: Self = Self {
        gating: Gating::Softmax,
        n_group: 1,
        n_group_used: 1,
        norm_topk: true,
        weights_scale: 1.0,
        shared_scale: 1.0,
        is_biased: false,
        n_dense: 0,
        step: 1,
        gates_shared: false,
        weighs_input: false,
    };

    /// Whether layer `il` has experts, in a model that has some.
    pub(super) fn has_experts(&self, il: usize) -> bool {
        il >= self.n_dense && (il + 1).is_multiple_of(self.step)
    }

    /// [`Routing::read`] of files that do not say which layers have no router, nor whether experts have biases: tensors do.
    pub(super) fn of_tensors(k: &Keys<'_>, hp: &HParams) -> Result<Self, Error> {
        Ok(Self {
            n_dense: first_router(k, hp),
            is_biased: (0..hp.n_layer).any(|il| k.has_tensor(il, "exp_probs_b.bias")),
            ..Self::read(k, hp, Gating::Sigmoid)?
        })
    }

    /// What the keys of models built like DeepSeek's say, and `unsaid` where they do not say how products become weights.
    pub(super) fn read(k: &Keys<'_>, hp: &HParams, unsaid: Gating) -> Result<Self, Error> {
        let gating = match k.optional("expert_gating_func")?.unwrap_or(0) {
            0 => unsaid,
            1 => Gating::Softmax,
            2 => Gating::Sigmoid,
            f => {
                return Err(k.bad(
                    "expert_gating_func",
                    f,
                    "1 (softmax) or 2 (sigmoid)".to_owned(),
                ));
            }
        };
        let n_group = k.optional("expert_group_count")?.unwrap_or(0).max(1) as usize;
        if n_group > 64 || !hp.n_expert.is_multiple_of(n_group) {
            let expected = format!("a divisor of expert_count {}, at most 64", hp.n_expert);
            return Err(k.bad("expert_group_count", n_group, expected));
        }
        let n_group_used = match k.optional("expert_group_used_count")?.unwrap_or(0) as usize {
            _ if n_group == 1 => 1,
            n if n <= n_group && n * (hp.n_expert / n_group) >= hp.n_expert_used => n,
            n => {
                let expected = format!(
                    "groups with {} experts, {n_group} at most",
                    hp.n_expert_used
                );
                return Err(k.bad("expert_group_used_count", n, expected));
            }
        };
        let weights_scale = match k.float("expert_weights_scale")?.unwrap_or(0.0) {
            0.0 => 1.0,
            s if s.is_finite() => s,
            s => return Err(k.bad("expert_weights_scale", s, "a number".to_owned())),
        };
        let n_dense = k.optional("leading_dense_block_count")?.unwrap_or(0) as usize;
        if n_dense < hp.n_layer && hp.n_expert == 0 {
            return Err(k.bad("expert_count", 0, "1 to 4096".to_owned()));
        }
        Ok(Self {
            gating,
            n_group,
            n_group_used,
            norm_topk: k.flag("expert_weights_norm")?.unwrap_or(false),
            weights_scale,
            shared_scale: 1.0,
            is_biased: (n_dense..hp.n_layer).any(|il| {
                ["exp_probs_b.bias", "exp_probs_b"].map(|n| k.has_tensor(il, n)) != [false; 2]
            }),
            n_dense,
            ..Self::SOFTMAX
        })
    }
}

/// Width of an expert in a model that has dense layers too.
pub(super) fn expert_width(k: &Keys<'_>) -> Result<usize, Error> {
    k.count("expert_feed_forward_length", MAX_DIM)
}

/// Width of the experts that every token is sent to, together: as many as the file says, each `width` wide.
pub(super) fn shared_width(k: &Keys<'_>, width: usize) -> Result<usize, Error> {
    let n = k.optional("expert_shared_count")?.unwrap_or(0) as usize;
    match width.checked_mul(n) {
        Some(all) if all <= MAX_DIM as usize => Ok(all),
        _ => {
            let expected = format!("at most {}", MAX_DIM as usize / width);
            Err(k.bad("expert_shared_count", n, expected))
        }
    }
}
