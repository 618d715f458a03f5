//! Phases of attention, and of what comes of the pages' masses.

use super::{BLOCK, Builder, MAX_D, UNIT};
use crate::args::{self, Matrix, Phase};
use crate::gpu::{Buffer, View};
use crate::ops::{Attention, Heads, RopeStore, Tiers, only_f16};

/// Bytes of `AttendShared`.
const ATTEND_SHARED: usize = UNIT * (MAX_D + 4) * 4 + 2 * MAX_D * 2 + 16 * UNIT * 8 + 2 * 16 * 4;
/// Bytes of `Shown`, the scores of pages that are all f16, behind that.
const SHOWN: usize = 2 * 8 * 32 * 16;

/// Maximum and sum of exponentials.
pub(super) struct Memory {
    /// Of each layer's heads: `[n_layer, n_head, 2]`
    pub(super) head_ml: Buffer,
    /// Of their pages, if they are weighed: `[n_layer, n_head, max_pages, 2]`
    pub(super) page_ml: Buffer,
}

/// What norms of queries and keys are over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Norms {
    /// Each head: weights are `[head_dim]`.
    #[default]
    Heads,
    /// Each head once it has rotated.
    RotatedHeads,
    /// All heads together: weights are `[n_head, head_dim]` and `[n_head_kv, head_dim]`.
    AllHeads,
}

/// How a layer attends.
#[derive(Clone, Copy, Debug)]
pub struct Attend {
    /// The layer.
    pub il: usize,
    /// Which of the rotations its heads go through, if they do.
    pub rope: usize,
    /// What norms are over.
    pub norms: Norms,
    /// Leave what [`Builder::weigh`] wants.
    pub weighed: bool,
}

impl Builder {
    /// Norms of queries and keys, rotation, storing and attention of a layer.
    pub fn attend(&mut self, at: Attend, out: View, call: &RopeStore, c: &Attention) {
        let Attend { il, weighed, .. } = at;
        let Some(store) = call.store else {
            return self.refuse("attention that stores nothing");
        };
        self.want(c.cap.is_none(), || "soft caps of attention".to_owned());
        self.any |= c.window.is_some() || c.sinks.is_some() || at.norms != Norms::Heads;
        assert!(at.rope < self.shape.n_rope || call.rope.is_none());
        assert!(
            c.sinks
                .is_none_or(|s| s.bytes() >= self.shape.heads.n_head * 4)
        );
        let Heads {
            n_head,
            n_head_kv,
            head_dim: d,
        } = self.shape.heads;
        assert!(c.q.bytes() >= n_head * d * 4 && out.bytes() >= n_head * d * 4);
        assert!(call.k.bytes() >= n_head_kv * d * 4 && call.v.bytes() >= n_head_kv * d * 4);
        for (norm, n) in [(call.q_norm, n_head), (call.k_norm, n_head_kv)] {
            let all = if at.norms == Norms::AllHeads { n } else { 1 };
            assert!(norm.is_none_or(|(w, _)| w.bytes() >= all * d * 4));
        }
        let layer = n_head * if weighed { self.shape.max_pages } else { 0 };
        if self.memory.is_none() {
            let n = self.shape.n_layer;
            let room = |n: usize| self.gpu.alloc(n * 8);
            match room(n * n_head).and_then(|h| Ok((h, room(n * layer)?))) {
                Ok((head_ml, page_ml)) => self.memory = Some(Memory { head_ml, page_ml }),
                Err(e) => self.refuse(&e.0),
            }
        }
        let (Some(memory), true) = (&self.memory, il < self.shape.n_layer) else {
            return;
        };
        // All pages but the last are full.
        let most_pages = c.window.map_or(u32::MAX, |w| {
            1 + w.saturating_sub(1).div_ceil(crate::PAGE as u32)
        });
        self.reach[il] = most_pages;
        let head_ml = memory.head_ml.view().slice(il * n_head * 8, n_head * 8);
        let page_ml = memory.page_ml.view().slice(il * layer * 8, layer * 8);
        // What is left of 256 KiB is the first-level cache, which keys and values of f16 come through: a step of only those takes no more.
        let all = if only_f16(&c.tiers) {
            SHOWN
        } else {
            // Keys of a page, then sums, of each warp.
            let sums = UNIT.min(n_head / n_head_kv) * (d + 1) * 4;
            let warp = sums.max(crate::PAGE * if d == 64 { 128 } else { 256 });
            BLOCK as usize / 32 * warp.next_multiple_of(16)
        };
        self.shared = self.shared.max(ATTEND_SHARED + all);
        let kv = n_head_kv * d * 4;
        let phase = Phase {
            q: self.read(c.q, n_head * d * 4),
            k: self.read(call.k, kv),
            v: self.read(call.v, kv),
            q_norm: call.q_norm.map_or(0, |n| n.0.at),
            k_norm: call.k_norm.map_or(0, |n| n.0.at),
            eps_q: call.q_norm.map_or(0.0, |n| n.1),
            eps_k: call.k_norm.map_or(0.0, |n| n.1),
            rope: call.rope.map_or(0, |_| 1 + at.rope as u32),
            normed: at.norms as u32,
            m: self.tiers(&c.tiers),
            pool_k: store.k.at,
            pool_v: store.v.at,
            pages: c.pages.at,
            layer: il as u32,
            out: self.write(out, n_head * d * 4),
            page_ml: if weighed { page_ml.at } else { 0 },
            head_ml: head_ml.at,
            sinks: c.sinks.map_or(0, |s| s.at),
            window: c.bounds().0,
            most_pages,
            kind: 2,
            ..Phase::default()
        };
        self.phases.push(phase);
    }

    /// The tiers after the first, as a phase of attention has them.
    fn tiers(&mut self, tiers: &Tiers) -> [Matrix; 3] {
        self.want(tiers[0].is_some_and(|t| t.is_f16()), || {
            "a pool whose first tier is not f16".to_owned()
        });
        self.tiered |= !only_f16(tiers);
        [1, 2, 3].map(|i| {
            let t = tiers[i].map_or(args::Tier::default(), |t| t.args());
            Matrix {
                w: t.k,
                bias: t.v,
                ty: t.ty_k,
                n_out: t.ty_v,
                ..Matrix::default()
            }
        })
    }

    /// Masses of the pages of every layer: `[n_layer, max_pages]`.
    pub fn weigh(&mut self, mass: View) {
        let (Some(memory), n) = (&self.memory, self.shape.n_layer) else {
            return;
        };
        assert!(mass.bytes() >= n * self.shape.max_pages * 4);
        if let Some(last) = self.phases.iter_mut().rfind(|p| p.kind == 2) {
            last.arrive = 1;
        }
        let phase = Phase {
            page_ml: memory.page_ml.view().at,
            head_ml: memory.head_ml.view().at,
            mass: mass.at,
            n_in: n as u32,
            kind: 3,
            ..Phase::default()
        };
        self.phases.push(phase);
    }
}
