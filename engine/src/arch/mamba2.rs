//! Mamba-2 (arXiv 2405.21060): the block that looks back in layers with a state space.

use super::{Binder, HParams, StateSpace};
use crate::backend::{Backend, Buf::*, Linear, Scan};
use crate::error::Error;

/// Weights of the block.
#[derive(Debug)]
pub(super) struct Mamba2<W> {
    shape: StateSpace,
    /// Gates, what goes through the convolution, and step sizes.
    ssm_in: [Linear<W>; 3],
    ssm_conv1d: W,
    scan: Scan<W>,
    /// Over each group of heads.
    ssm_norm: Option<W>,
    /// What follows the block.
    pub(super) ssm_out: Linear<W>,
}

impl<W> Mamba2<W> {
    /// The block of a layer. Some models have no norm behind the gates.
    pub(super) fn bind(hp: &HParams, b: &mut Binder<'_, W>) -> Result<Self, Error> {
        let Some(s) = hp.ssm else {
            unreachable!("the architecture has state spaces");
        };
        let (inner, xbc, n_head) = (s.n_inner(), s.n_xbc(), s.n_head);
        let groups = [inner / s.n_group, s.n_group];
        Ok(Self {
            shape: s,
            ssm_in: b.fused("ssm_in", hp.n_embd, [inner, xbc, n_head])?,
            ssm_conv1d: b.conv1d_biased("ssm_conv1d", s.d_conv, xbc)?,
            scan: Scan {
                a: b.table("ssm_a", &[1, n_head])?,
                dt: b.plain_vector("ssm_dt.bias", n_head)?,
                d: b.table("ssm_d", &[1, n_head])?,
            },
            ssm_norm: match b.has("ssm_norm") {
                true => Some(b.table("ssm_norm.weight", &groups)?),
                false => None,
            },
            ssm_out: b.linear("ssm_out", inner, hp.n_embd)?,
        })
    }

    /// `Z = block(Xn)`, of which `ssm_out` is to be taken.
    pub(super) fn forward<B: Backend<Weight = W>>(&self, b: &mut B, il: usize, eps: f32) {
        let [z, xbc, dt] = &self.ssm_in;
        b.mul_mats([(Z, z), (Qkv, xbc), (Alpha, dt)], Xn);
        b.note("z", il, Z);
        b.ssm_conv(Qkv, &self.ssm_conv1d, il);
        b.note("xBC", il, Qkv);
        b.ssm_scan(Dn, [Qkv, Alpha], &self.scan, il);
        b.note("mamba2_y_add_d", il, Dn);
        b.swiglu(Z, Dn);
        if let Some(norm) = &self.ssm_norm {
            b.rms_norm_groups(Z, norm, self.shape.n_group, eps);
        }
        b.note("mamba2_normed", il, Z);
    }
}
