//! A pool with live pages in any tiers, and attention over it in double precision.

use lemma_cuda::ops::{self, Heads, Tier, Tiers};
use lemma_cuda::{Buffer, Gpu, PAGE};
use lemma_quant::pages::KvType::{self, K4, V2};

use super::Rng;
use super::pages::{F16, Q4_0, Q8_0, Stored, stored};

/// Pools: types of keys and values of each tier.
pub const POOLS: [&[[KvType; 2]]; 6] = [
    &[[F16; 2]],
    &[[F16; 2], [Q8_0; 2], [K4, V2]],
    &[[F16; 2], [Q8_0, Q4_0], [Q4_0; 2]],
    &[[Q8_0; 2]],
    &[[Q4_0; 2], [K4, V2]],
    &[[F16, Q8_0], [K4, Q8_0], [K4, V2]],
];

/// How queries and keys become weights of values.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    pub scale: f32,
    pub window: Option<u32>,
    pub cap: Option<f32>,
    /// `[n_head]`, or nothing.
    pub sinks: Vec<f32>,
}

impl Rules {
    /// A factor of the scores and nothing else.
    pub fn scaled(scale: f32) -> Self {
        Self {
            scale,
            ..Self::default()
        }
    }
}

/// Whether heads of this shape can be stored so: all but f16 wants whole blocks.
pub fn fits(types: &[[KvType; 2]], h: Heads) -> bool {
    types == POOLS[0] || h.head_dim.is_multiple_of(32)
}

/// A pool with random keys and values, some pages of it live.
pub struct Pool {
    /// Keys and values of each tier.
    pub parts: Vec<[Stored; 2]>,
    /// Tier, slot and first position, in position order.
    pub pages: Vec<(u8, u32, u32)>,
    pub buffers: Vec<[Buffer; 2]>,
    pub tiers: Tiers,
}

impl Pool {
    /// `n` live pages in shuffled slots of any tiers, the last in the first; holes in the positions between them; nothing written behind the
    /// last position.
    pub fn new(
        gpu: &Gpu,
        rng: &mut Rng,
        h: Heads,
        types: &[[KvType; 2]],
        n: usize,
        last_rows: usize,
    ) -> Self {
        let (slots, width) = (n + 3, h.n_head_kv * h.head_dim);
        let mut part = |ty: KvType| {
            let mut values = rng.normals(slots * PAGE * width);
            // Some channels are larger than others, and some much smaller.
            for (i, v) in values.iter_mut().enumerate() {
                *v *= [1.0, 1.0, 2.0, 1.0, 1e-5][i % h.head_dim % 5];
            }
            stored(ty, h, values)
        };
        let mut parts: Vec<_> = types.iter().map(|types| types.map(&mut part)).collect();
        let mut free = vec![(0..slots as u32).collect::<Vec<_>>(); types.len()];
        let mut first = 0;
        let pages: Vec<_> = (0..n)
            .map(|i| {
                let tier = if i + 1 < n { rng.below(types.len()) } else { 0 };
                let slots = &mut free[tier];
                let slot = slots.swap_remove(rng.below(slots.len()));
                if i > 0 {
                    first += PAGE as u32 * (1 + rng.below(3) as u32);
                }
                (tier as u8, slot, first)
            })
            .collect();
        let last = pages[n - 1].1 as usize;
        for (part, ty) in parts[0].iter_mut().zip(types[0]) {
            part.poison(ty, h, last, last_rows);
        }
        let bytes = |part: &Stored| gpu.buffer_of(&part.bytes).expect("upload");
        let buffers: Vec<_> = parts.iter().map(|p| p.each_ref().map(bytes)).collect();
        let mut tiers = [None; ops::MAX_TIERS];
        for ((tier, [k, v]), [ty_k, ty_v]) in tiers.iter_mut().zip(&buffers).zip(types) {
            *tier = Some(Tier {
                k: k.view(),
                v: v.view(),
                ty_k: *ty_k,
                ty_v: *ty_v,
            });
        }
        Self {
            parts,
            pages,
            buffers,
            tiers,
        }
    }

    /// Leaves no holes between the positions of the last `n` pages.
    pub fn close_up(&mut self, n: usize) {
        let n_pages = self.pages.len();
        for i in n_pages.saturating_sub(n)..n_pages {
            // Behind all others: positions grow by three pages at most.
            self.pages[i].2 = ((3 * n_pages + i) * PAGE) as u32;
        }
    }

    /// As kernels read it.
    pub fn table(&self) -> Vec<u32> {
        let entry = |&(tier, slot, first): &(u8, u32, u32)| [ops::slot_of(tier, slot), first];
        self.pages.iter().flat_map(entry).collect()
    }

    /// Output of one token at `pos`, and masses `[n_head][pages]`.
    pub fn reference(
        &self,
        h: Heads,
        q: &[f32],
        pos: u32,
        rules: &Rules,
    ) -> (Vec<f64>, Vec<Vec<f64>>) {
        let (d, group) = (h.head_dim, h.n_head / h.n_head_kv);
        let (mut out, mut masses) = (Vec::new(), Vec::new());
        for head in 0..h.n_head {
            let q = &q[head * d..][..d];
            let mut seen = Vec::new();
            for (i, &(tier, slot, first)) in self.pages.iter().enumerate() {
                let [k, v] = &self.parts[usize::from(tier)];
                for row in 0..PAGE {
                    let key = first + row as u32;
                    if key <= pos && pos - key < rules.window.unwrap_or(u32::MAX) {
                        let at = ((slot as usize * PAGE + row) * h.n_head_kv + head / group) * d;
                        let dot: f64 = q
                            .iter()
                            .zip(&k.values[at..][..d])
                            .map(|(a, b)| f64::from(*a) * f64::from(*b))
                            .sum();
                        let score = dot * f64::from(rules.scale);
                        let capped = rules.cap.map(f64::from).map(|c| c * (score / c).tanh());
                        seen.push((i, &v.values[at..][..d], capped.unwrap_or(score)));
                    }
                }
            }
            let sink = (rules.sinks.get(head)).map_or(f64::NEG_INFINITY, |s| f64::from(*s));
            let max = seen.iter().map(|s| s.2).fold(sink, f64::max);
            let sum: f64 = seen.iter().map(|s| (s.2 - max).exp()).sum();
            let sum = sum + (sink - max).exp();
            let mut o = vec![0.0; d];
            let mut mass = vec![0.0; self.pages.len()];
            for (i, v, s) in seen {
                let p = (s - max).exp() / sum;
                mass[i] += p;
                for (o, v) in o.iter_mut().zip(v) {
                    *o += p * f64::from(*v);
                }
            }
            out.extend(o);
            masses.push(mass);
        }
        (out, masses)
    }
}
