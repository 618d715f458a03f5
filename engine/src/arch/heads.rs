//! Heads of models whose layers are not alike: more of them in some layers than in others, or wider ones, and layers that look at the keys
//! and values of an earlier one.

use super::hparams::HParams;
use super::keys::{Keys, MAX_DIM};
use crate::error::Error;

/// How many heads a layer has, and how wide they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub n: usize,
    /// Key and value heads; divides `n`.
    pub n_kv: usize,
    /// Width of a query and a key.
    pub dim: usize,
    /// Width of a value.
    pub dim_v: usize,
}

impl Heads {
    /// Width of all queries, side by side.
    pub fn n_q(&self) -> usize {
        self.n * self.dim
    }

    /// Width of all keys.
    pub fn n_k(&self) -> usize {
        self.n_kv * self.dim
    }

    /// Width of all values.
    pub fn n_v(&self) -> usize {
        self.n_kv * self.dim_v
    }

    /// Width of what attention gives.
    pub fn n_att(&self) -> usize {
        self.n * self.dim_v
    }
}

impl HParams {
    /// The heads of layer `il`.
    pub fn heads(&self, il: usize) -> Heads {
        self.layers[il].heads.unwrap_or(Heads {
            n: self.n_head,
            n_kv: self.n_head_kv,
            dim: self.head_dim,
            dim_v: self.head_dim_v,
        })
    }

    /// The heads of the last layer that looks at layer `n` of the pool.
    pub fn heads_of_pool(&self, n: usize) -> Heads {
        let looks = |il: &usize| self.layers[*il].past.pages() == Some(n);
        let last = (0..self.n_layer).rev().find(looks);
        self.heads(last.unwrap_or(0))
    }

    /// Whether layers have heads of their own.
    pub fn has_unlike_heads(&self) -> bool {
        self.layers.iter().any(|l| l.heads.is_some())
    }

    /// The largest number that `of` says of the heads of a layer.
    pub fn widest(&self, of: impl Fn(Heads) -> usize) -> usize {
        let all = (0..self.n_layer).map(|il| of(self.heads(il)));
        all.max().unwrap_or(0)
    }

    /// How many heads each layer has; all are as wide as the model says.
    pub(super) fn counted_heads(&self, k: &Keys<'_>) -> Result<Vec<Heads>, Error> {
        let n = k.layer_counts("attention.head_count", self.n_layer)?;
        let n_kv = k.layer_counts("attention.head_count_kv", self.n_layer)?;
        let heads = |(n, n_kv): (&u32, &u32)| Heads {
            n: *n as usize,
            n_kv: *n_kv as usize,
            dim: self.head_dim,
            dim_v: self.head_dim_v,
        };
        Ok(n.iter().zip(&n_kv).map(heads).collect())
    }

    /// Gives layers that attend heads of their own, `heads`, if they differ. What is said of all becomes the largest of each.
    pub(super) fn unlike_heads(&mut self, k: &Keys<'_>, heads: &[Heads]) -> Result<(), Error> {
        let attends = |il: &usize| self.layers[*il].past.pages().is_some();
        let attending: Vec<usize> = (0..self.n_layer).filter(attends).collect();
        for &il in &attending {
            let h = &heads[il];
            if h.n_kv == 0 || !h.n.is_multiple_of(h.n_kv) || h.n == 0 {
                let expected = format!("a divisor of the {} heads of layer {il}", h.n);
                return Err(k.bad("attention.head_count_kv", h.n_kv, expected));
            }
            let most = MAX_DIM as usize / h.n;
            if h.dim.max(h.dim_v) > most {
                let expected = format!("at most {most} for {} heads", h.n);
                return Err(k.bad("attention.key_length", h.dim.max(h.dim_v), expected));
            }
        }
        let all = || attending.iter().map(|il| heads[*il]);
        let largest = |of: fn(Heads) -> usize| all().map(of).max().unwrap_or(0);
        (self.n_head, self.n_head_kv) = (largest(|h| h.n), largest(|h| h.n_kv));
        (self.head_dim, self.head_dim_v) = (largest(|h| h.dim), largest(|h| h.dim_v));
        let alike = all().zip(all().skip(1)).all(|(a, b)| a == b);
        if !alike || self.head_dim != self.head_dim_v {
            for &il in &attending {
                self.layers[il].heads = Some(heads[il]);
            }
            self.cpu_only = Some("layers of different heads");
        }
        Ok(())
    }

    /// Whether what rotates fits heads that are not alike.
    pub(super) fn check_rotation(&self, k: &Keys<'_>) -> Result<(), Error> {
        // Tables are made of every kind, whether a layer rotates so or not.
        for kind in &self.ropes {
            let (n_rot, most) = (kind.n_rot.unwrap_or(self.n_rot), self.head_dim);
            if n_rot > most {
                let expected = format!("at most the head width {most}");
                return Err(k.bad("rope.dimension_count", n_rot, expected));
            }
        }
        for (il, l) in self.layers.iter().enumerate() {
            let Some(kind) = l.rope else { continue };
            let (n_rot, dim) = (
                self.ropes[kind].n_rot.unwrap_or(self.n_rot),
                self.heads(il).dim,
            );
            if n_rot % 2 != 0 || n_rot > dim {
                let expected =
                    format!("an even number, at most the head width {dim} of layer {il}");
                return Err(k.bad("rope.dimension_count", n_rot, expected));
            }
        }
        Ok(())
    }
}
