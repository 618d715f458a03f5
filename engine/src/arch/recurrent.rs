//! Layers that keep a state of fixed size: delta nets, state spaces and gated short convolutions.

use super::hparams::{HParams, Past};
use super::keys::{Keys, MAX_DIM, MAX_HEADS};
use crate::error::Error;

/// Most tokens that a convolution may see.
pub(super) const MAX_CONV: u32 = 8;

/// What a layer keeps in place of keys and values, or beside them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateShape {
    /// Channels of its convolution; a multiple of 16.
    pub width: usize,
    /// Tokens that the convolution sees, the current one included: 2 to 8.
    pub d_conv: usize,
    /// Numbers of its matrices.
    pub n: usize,
}

impl StateShape {
    /// Numbers of all: the inputs of the convolution before the current one, and the matrices.
    pub fn n_all(&self) -> usize {
        (self.d_conv - 1) * self.width + self.n
    }
}

/// Gated delta net (arXiv 2412.06464): a layer's memory is a matrix for each value head, which a token first makes forget and then
/// corrects. Queries, keys and values go through a short causal convolution before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaNet {
    /// Heads of queries and keys.
    pub n_head_k: usize,
    /// Heads of values; a multiple of `n_head_k`.
    pub n_head_v: usize,
    /// Width of a query, a key and a value; a multiple of 16.
    pub head_dim: usize,
    /// Tokens that the convolution sees, the current one included.
    pub d_conv: usize,
    /// Whether value heads of a key head lie side by side; otherwise value head `h` goes with key head `h % n_head_k`.
    pub side_by_side: bool,
    /// Whether each element of a key is forgotten in its own measure.
    pub apart: bool,
}

impl DeltaNet {
    /// The key head of value head `h`.
    pub fn head_k(&self, h: usize) -> usize {
        match self.side_by_side {
            true => h / (self.n_head_v / self.n_head_k),
            false => h % self.n_head_k,
        }
    }

    /// Width of queries, keys and values of all heads, side by side.
    pub fn n_qkv(&self) -> usize {
        (2 * self.n_head_k + self.n_head_v) * self.head_dim
    }

    /// Width of the values of all heads.
    pub fn n_v(&self) -> usize {
        self.n_head_v * self.head_dim
    }

    /// Numbers that a layer keeps: the inputs of the convolution before the current one, and the matrices.
    pub fn state_len(&self) -> usize {
        (self.d_conv - 1) * self.n_qkv() + self.n_v() * self.head_dim
    }
}

/// State space (Mamba-2, arXiv 2405.21060): a layer's memory is a matrix for each head, of which a token makes it forget some, evenly, before it
/// adds its own. What goes in goes through a short causal convolution before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateSpace {
    /// Heads.
    pub n_head: usize,
    /// Width of a head; a multiple of 16.
    pub head_dim: usize,
    /// Groups of heads that lie side by side and share what they write with and what they read with.
    pub n_group: usize,
    /// Width of these; a multiple of 8.
    pub d_state: usize,
    /// Tokens that the convolution sees, the current one included.
    pub d_conv: usize,
}

impl StateSpace {
    /// Width of all heads, side by side.
    pub fn n_inner(&self) -> usize {
        self.n_head * self.head_dim
    }

    /// Width of what goes through the convolution: all heads, and two vectors of each group.
    pub fn n_xbc(&self) -> usize {
        self.n_inner() + 2 * self.n_group * self.d_state
    }

    pub(super) fn read(k: &Keys<'_>) -> Result<Self, Error> {
        let inner = k.count("ssm.inner_size", MAX_DIM)?;
        let n_head = k.count("ssm.time_step_rank", MAX_HEADS)?;
        if !inner.is_multiple_of(n_head) || !(inner / n_head).is_multiple_of(16) {
            let expected = format!("a multiple of 16 times time_step_rank {n_head}");
            return Err(k.bad("ssm.inner_size", inner, expected));
        }
        let s = Self {
            n_head,
            head_dim: inner / n_head,
            n_group: k.count("ssm.group_count", MAX_HEADS)?,
            d_state: k.count("ssm.state_size", MAX_DIM)?,
            d_conv: d_conv(k, "ssm.conv_kernel")?,
        };
        if !n_head.is_multiple_of(s.n_group) {
            let expected = format!("a divisor of time_step_rank {n_head}");
            return Err(k.bad("ssm.group_count", s.n_group, expected));
        }
        if !s.d_state.is_multiple_of(8) {
            return Err(k.bad("ssm.state_size", s.d_state, "a multiple of 8".to_owned()));
        }
        // All factors are bounded, so the products do not overflow.
        let most = MAX_DIM as usize;
        if s.n_xbc() > most || inner * s.d_state > 16 * most {
            let expected = format!("a state of {} numbers at most", 16 * most);
            return Err(k.bad("ssm.state_size", s.d_state, expected));
        }
        Ok(s)
    }
}

/// Selective state space (Mamba, arXiv 2312.00752): a layer's memory is a few numbers for each channel, of which a token makes it forget each in its own
/// measure, before it adds its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelectiveSpace {
    /// Channels; a multiple of 16.
    pub n_inner: usize,
    /// Numbers of each.
    pub d_state: usize,
    /// Width of what step sizes are made of.
    pub dt_rank: usize,
    /// Tokens that the convolution sees, the current one included.
    pub d_conv: usize,
}

impl SelectiveSpace {
    pub(super) fn read(k: &Keys<'_>) -> Result<Self, Error> {
        let s = Self {
            n_inner: k.count("ssm.inner_size", MAX_DIM)?,
            d_state: k.count("ssm.state_size", MAX_DIM)?,
            dt_rank: k.count("ssm.time_step_rank", MAX_DIM)?,
            d_conv: d_conv(k, "ssm.conv_kernel")?,
        };
        if !s.n_inner.is_multiple_of(16) {
            return Err(k.bad("ssm.inner_size", s.n_inner, "a multiple of 16".to_owned()));
        }
        // Both factors are bounded, so the product does not overflow.
        let most = 16 * MAX_DIM as usize;
        if s.n_inner * s.d_state > most {
            let expected = format!("a state of {most} numbers at most");
            return Err(k.bad("ssm.state_size", s.d_state, expected));
        }
        Ok(s)
    }
}

/// Gated short convolution (LFM2, arXiv 2511.23404): every channel of the residual stream by itself, between two gates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShortConv {
    /// Channels; a multiple of 16.
    pub width: usize,
    /// Tokens that it sees, the current one included.
    pub d_conv: usize,
}

impl ShortConv {
    pub(super) fn read(k: &Keys<'_>, width: usize) -> Result<Self, Error> {
        if !width.is_multiple_of(16) {
            return Err(k.bad("embedding_length", width, "a multiple of 16".to_owned()));
        }
        let d_conv = d_conv(k, "shortconv.l_cache")?;
        Ok(Self { width, d_conv })
    }
}

/// Tokens that a convolution sees.
pub(super) fn d_conv(k: &Keys<'_>, name: &str) -> Result<usize, Error> {
    match k.count(name, MAX_CONV)? {
        1 => Err(k.bad(name, 1, format!("2 to {MAX_CONV}"))),
        n => Ok(n),
    }
}

impl HParams {
    /// Layers that have key and value heads have pages, all others a state.
    pub(super) fn keep_by_heads(&mut self, k: &Keys<'_>) -> Result<(), Error> {
        let name = "attention.head_count_kv";
        let n_head_kv = k.layer_counts(name, self.n_layer)?;
        self.keep(k, name, n_head_kv.iter().map(|n| [*n > 0, *n == 0]))
    }

    /// Says of each layer whether it has pages and whether it has a state, as the key `name` has it, and numbers them.
    pub(super) fn keep(
        &mut self,
        k: &Keys<'_>,
        name: &str,
        layers: impl Iterator<Item = [bool; 2]>,
    ) -> Result<(), Error> {
        let (mut n_pages, mut n_states) = (0, 0);
        let next = |n: &mut usize| {
            *n += 1;
            *n - 1
        };
        for (l, has) in self.layers.iter_mut().zip(layers) {
            l.past = match has {
                [false, false] => Past::Nothing,
                [true, false] => Past::Pages(next(&mut n_pages)),
                [false, true] => Past::State(next(&mut n_states)),
                [true, true] => Past::Both {
                    pages: next(&mut n_pages),
                    state: next(&mut n_states),
                },
            };
        }
        // Pools are made of at least one layer.
        if n_pages == 0 {
            let found = format!("such that none of {} layers attends", self.n_layer);
            return Err(k.bad(name, found, "some that do".to_owned()));
        }
        Ok(())
    }

    /// What a layer with a state keeps, in models that have some.
    pub fn state(&self) -> Option<StateShape> {
        let delta = self.delta.map(|d| StateShape {
            width: d.n_qkv(),
            d_conv: d.d_conv,
            n: d.n_v() * d.head_dim,
        });
        let ssm = self.ssm.map(|s| StateShape {
            width: s.n_xbc(),
            d_conv: s.d_conv,
            n: s.n_inner() * s.d_state,
        });
        let conv = self.short_conv.map(|c| StateShape {
            width: c.width,
            d_conv: c.d_conv,
            n: 0,
        });
        let selective = self.selective.map(|s| StateShape {
            width: s.n_inner,
            d_conv: s.d_conv,
            n: s.n_inner * s.d_state,
        });
        delta.or(ssm).or(selective).or(conv)
    }

    /// Layers that have a recurrent state.
    pub fn n_layer_state(&self) -> usize {
        let all = self.layers.iter();
        all.filter(|l| l.past.state().is_some()).count()
    }

    /// The number of the state of layer `il`.
    ///
    /// # Panics
    /// If it has none: no forward pass asks for it there.
    pub fn layer_of_state(&self, il: usize) -> usize {
        match self.layers[il].past.state() {
            Some(n) => n,
            None => unreachable!("layer {il} has no recurrent state"),
        }
    }

    /// Bytes of the recurrent states of a sequence, and of the copy of them that it may go back to.
    pub fn state_bytes(&self) -> u64 {
        let layer = self.state().map_or(0, |s| s.n_all());
        (2 * self.n_layer_state() * layer * size_of::<f32>()) as u64
    }
}
