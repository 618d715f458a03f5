//! Where keys and values of the reference lie, and how pages move.

use lemma_quant::pages::KvType;

use super::TracePass;
use super::math::store;
use crate::kv::{Demoted, PAGE};

impl TracePass {
    /// The value that belongs to the key at an element of a region, `[dim_v]`.
    pub(super) fn value(&self, region: usize, at: usize, dim_v: usize) -> &[f32] {
        let pool = if self.hp.latent.is_some() {
            &self.k
        } else {
            &self.v
        };
        &pool[region][at..][..dim_v]
    }

    /// Where head `kv` of layer `il` has row `row` of a block of a tier: region, and element in it.
    pub(super) fn at(
        &self,
        tier: u8,
        il: usize,
        kv: usize,
        block: u32,
        row: u32,
    ) -> (usize, usize) {
        let (tier, region) = (usize::from(tier), self.layout.region_of(il));
        let heads = self.layout.region(tier, region).n_head_kv;
        let head = if heads == 1 { 0 } else { kv };
        let dim = self.hp.head_dim.max(self.hp.head_dim_v);
        let at = ((block as usize * PAGE + row as usize) * heads + head) * dim;
        (tier * self.layout.n_regions() + region, at)
    }

    /// Copies a page to a lower tier, through its types, and the one that takes its place.
    pub(super) fn demote(&mut self, d: &Demoted) {
        let types = self.layout.tiers[usize::from(d.tier) - 1].stored;
        let to = (d.tier, d.slot);
        let types = Some([types.ty_k, types.ty_v]);
        self.move_page((d.il, d.group), (d.page.tier, d.page.slot), to, types);
        if let Some(h) = d.heir {
            self.move_page((h.il, h.group), (0, h.slot), (0, d.page.slot), None);
        }
    }

    /// Copies a page of a table from one slot of a tier to another, through types of keys and values or as it is.
    fn move_page(
        &mut self,
        (il, group): (usize, usize),
        from: (u8, u32),
        to: (u8, u32),
        types: Option<[KvType; 2]>,
    ) {
        let (dim, page) = (self.hp.head_dim, self.layout.page as u32);
        let table = il * self.layout.groups + group;
        let heads = (0..self.hp.n_head_kv).filter(|&kv| self.table(il, kv) == table);
        for kv in heads.collect::<Vec<_>>() {
            let rows = |(tier, slot)| -> Vec<_> {
                let places = (0..page).map(|row| self.layout.place(slot, row));
                places
                    .map(|p| self.at(tier, il, kv, p.slot, p.row))
                    .collect()
            };
            let (old, new) = (rows(from), rows(to));
            let parts = if self.hp.latent.is_some() { 1 } else { 2 };
            let pools = [&mut self.k, &mut self.v].into_iter().enumerate();
            for (part, pool) in pools.take(parts) {
                let values = old
                    .iter()
                    .map(|&(from, at)| pool[from][at..][..dim].to_vec());
                let mut values: Vec<_> = values.collect();
                if let Some(types) = types {
                    values
                        .chunks_mut(PAGE)
                        .for_each(|rows| store(types[part], rows));
                }
                for (values, &(to, at)) in values.iter().zip(&new) {
                    pool[to][at..][..dim].copy_from_slice(values);
                }
            }
        }
    }
}
