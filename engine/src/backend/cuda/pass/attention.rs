//! Attention as launches: what is stored, then what is looked at; and the products of heads that latent attention has.

use lemma_cuda::ops::{self, Attention, Masses, MulMatHeads, Parts, RotateEnds, Store};
use lemma_cuda::{View, Weight};

use super::super::super::Buf;
use super::{Done, Pass};

impl Pass {
    /// Rotates queries and keys, and stores keys and values of a layer of the pool.
    fn store(&mut self, [q, k, v]: [Buf; 3], il: usize) -> Done {
        let first = self.pool.first(il);
        let places = self.step_words(self.layout.places(il), self.n);
        if self.hp.latent.is_some() {
            let store = first.is_f16().then_some([first.k, places]);
            self.rotate_ends(q, k, store)?;
            return match store {
                Some(_) => Ok(()),
                None => ops::store_rows(
                    &self.gpu,
                    self.heads,
                    &first,
                    self.view(k),
                    None,
                    places,
                    self.n,
                ),
            };
        }
        if first.is_f16() {
            let store = Store {
                k: first.k,
                v: first.v,
                places,
            };
            self.rope_store(q, k, v, Some(store))?;
        } else {
            self.rope_store(q, k, v, None)?;
            let (k, v) = (self.view(k), Some(self.view(v)));
            ops::store_rows(&self.gpu, self.heads, &first, k, v, places, self.n)?;
        }
        Ok(())
    }

    pub(super) fn attend(
        &mut self,
        out: Buf,
        qkv: [Buf; 3],
        il: usize,
        sinks: Option<View>,
    ) -> Done {
        if self.pending.ffn.is_some() {
            self.flush()?;
        }
        let window = self.hp.layers[il].window;
        let il = self.hp.layer_of_pool(il);
        self.store(qkv, il)?;
        let call = Attention {
            q: self.view(qkv[0]),
            tiers: self.pool.tiers(il, self.tiered),
            pages: self.pool.table(il),
            n_pages: self.step_words(1 + il, 1),
            pos: self.step_words(0, 1),
            scale: self.hp.attn_scale,
            window,
            cap: self.hp.attn_softcap,
            sinks,
        };
        self.fresh[out as usize] = false;
        let (view, dim_v) = (self.view(out), self.hp.head_dim_v);
        let latent = self.hp.latent.is_some();
        if self.n > 1 {
            let (gpu, h, n) = (&self.gpu, self.heads, self.n);
            return match latent {
                true => ops::attention_latent(gpu, view, h, dim_v, &call, n),
                false => ops::attention(gpu, view, h, &call, n),
            };
        }
        let quant = self.quant(out).filter(|_| dim_v.is_multiple_of(32));
        let pool = &self.pool;
        let masses = self.wants_mass.then(|| Masses {
            w: pool
                .masses
                .view()
                .slice(il * pool.max_pages * 4, pool.max_pages * 4),
            mean: self.mean,
        });
        let parts = Parts {
            sums: pool.sums.view(),
            ml: pool.ml.view(),
            page_ml: pool.page_ml.view(),
            splits: pool.splits,
        };
        self.fresh[out as usize] = quant.is_some();
        let (gpu, h) = (&self.gpu, self.heads);
        match latent {
            true => ops::attention_latent_decode(gpu, view, quant, masses, h, dim_v, &call, &parts),
            false => ops::attention_decode(gpu, view, quant, masses, h, &call, &parts),
        }
    }

    /// Rotation that waits, of latent keys and their queries; keys go to the pool and to places in it.
    pub(super) fn rotate_ends(&mut self, q: Buf, k: Buf, store: Option<[View; 2]>) -> Done {
        let kind = self.pending.rope.take();
        let rotations = |table| self.step_words(self.layout.rope(table), self.n * self.hp.head_dim);
        let call = RotateEnds {
            q: self.view(q),
            k: self.view(k),
            rope: kind.map(|kind| [self.rope.of_queries(kind), kind].map(rotations)),
            n_rot: self.rope.n_rot,
            pairs: self.pairs(),
            store,
        };
        ops::rotate_ends(&self.gpu, self.heads, &call, self.n)
    }

    /// A matrix for each head.
    pub(super) fn head_products(&mut self, out: Buf, w: &Weight, x: Buf) -> Done {
        self.flush()?;
        self.fresh[out as usize] = false;
        let n_head = self.hp.n_head;
        let width = self.widths.get(x) / n_head;
        // What is quantized is what is multiplied: that of the whole buffer is something else where heads have more.
        let whole = width == w.n_in();
        let fresh = whole && self.fresh[x as usize];
        self.fresh[x as usize] &= whole;
        let call = MulMatHeads {
            w,
            n_head,
            x: self.view(x),
            width,
            out: self.view(out),
            quant: self.quant_room(x).filter(|_| w.n_in().is_multiple_of(32)),
            fresh,
        };
        ops::mul_mat_heads(&self.gpu, &call, self.n)
    }
}
