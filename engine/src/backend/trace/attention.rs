//! Attention over the live pages, in plain loops.

use super::TracePass;
use super::math::{dot, softcap, softmax};
use crate::arch::Heads;
use crate::backend::Buf;
use crate::kv::Span;

impl TracePass {
    /// Masses of the pages that the heads of `table` see, by the bounds of their keys: `[heads, n_pages]`.
    fn bound_masses(&self, q: Buf, t: usize, il: usize, table: usize) -> Vec<f32> {
        let (d, group) = (self.hp.head_dim, self.hp.n_head / self.hp.n_head_kv);
        let mut masses = Vec::new();
        for h in (0..self.hp.n_head).filter(|h| self.table(il, h / group) == table) {
            let qh = &self.row(q, t)[h * d..][..d];
            let bound = |s: &Span| {
                let key = |row| {
                    let (region, at) = self.at(s.tier, il, h / group, s.slot, s.row + row);
                    &self.k[region][at..][..d]
                };
                let most = |i: usize| {
                    let products = (0..s.len).map(|row| f64::from(qh[i]) * f64::from(key(row)[i]));
                    products.fold(f64::NEG_INFINITY, f64::max)
                };
                (0..d).map(most).sum::<f64>() * f64::from(self.hp.attn_scale)
            };
            let mut bounds: Vec<f64> = self.tables[table].0.iter().map(bound).collect();
            softmax(&mut bounds);
            masses.extend(bounds.iter().map(|b| *b as f32));
        }
        masses
    }

    /// Whether each page of a table is attended, by its masses.
    fn choose(&self, table: usize, masses: &[f32]) -> Vec<bool> {
        let (forced, n) = &self.attends[table];
        let pages = forced.len();
        let value = |i: usize| {
            let heads = masses.chunks_exact(pages).map(|row| row[i]);
            heads.fold(if forced[i] { f32::INFINITY } else { 0.0 }, f32::max)
        };
        let mut order: Vec<usize> = (0..pages).collect();
        order.sort_by(|&a, &b| value(b).total_cmp(&value(a)).then(a.cmp(&b)));
        let mut keep = forced.clone();
        for &i in order.iter().take(n.unwrap_or(pages)) {
            keep[i] = true;
        }
        keep
    }

    /// What attention gives for one token, `[n_head * head_dim_v]`; it sees positions from `first` on. `il` is a layer of the pool.
    pub(super) fn attend(
        &mut self,
        q: Buf,
        t: usize,
        (il, first): (usize, u32),
        heads: Heads,
        sinks: Option<&[f32]>,
        out: &mut [f32],
    ) {
        let bounds = self.layout.bounds && self.n() == 1;
        let (d, group, dim_v) = (heads.dim, heads.n / heads.n_kv, heads.dim_v);
        let pos = self.pos + t as u32;
        for table in self.layout.tables_of(il) {
            self.masses[table].clear();
            if bounds {
                self.masses[table] = self.bound_masses(q, t, il, table);
            }
            self.attended[table] = if bounds {
                self.choose(table, &self.masses[table])
            } else {
                vec![true; self.tables[table].0.len()]
            };
        }
        for h in 0..heads.n {
            let kv = h / group;
            let table = self.table(il, kv);
            let qh = &self.row(q, t)[h * d..][..d];
            let mut scores = Vec::new();
            let mut at = Vec::new();
            for (i, s) in self.tables[table].0.iter().enumerate() {
                if !self.attended[table][i] {
                    continue;
                }
                for row in (0..s.len).filter(|row| (first..=pos).contains(&(s.first_pos + row))) {
                    let (region, base) = self.at(s.tier, il, kv, s.slot, s.row + row);
                    let product = dot(qh, &self.k[region][base..][..d]);
                    let score = f64::from(product) * f64::from(self.hp.attn_scale);
                    scores.push(softcap(score, self.hp.attn_softcap));
                    at.push((i, region, base));
                }
            }
            // A sink takes its part of the softmax and gives nothing.
            scores.extend(sinks.map(|s| f64::from(s[h])));
            softmax(&mut scores);
            let mut sum = vec![0.0f64; dim_v];
            let mut mass = vec![0.0; self.tables[table].0.len()];
            for (s, (i, region, base)) in scores.iter().zip(&at) {
                mass[*i] += *s as f32;
                for (acc, v) in sum.iter_mut().zip(self.value(*region, *base, dim_v)) {
                    *acc += s * f64::from(*v);
                }
            }
            if !bounds {
                self.masses[table].extend(mass);
            }
            for (o, s) in out[h * dim_v..][..dim_v].iter_mut().zip(sum) {
                *o = s as f32;
            }
        }
    }
}
