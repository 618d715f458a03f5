//! The pool: how its tiers store keys and values, what is written to them, and pages that move between them.

use lemma_quant::GgmlType;
use lemma_quant::pages::{KvType, TILE};

use super::{Heads, at, check, launch};
use crate::PAGE;
use crate::args;
use crate::gpu::{Buffer, Gpu, Result, View};

/// Tiers of a pool at most.
pub const MAX_TIERS: usize = args::MAX_TIERS;

/// Where the tier of a page is in an entry of a page table: above its slot.
const TIER_SHIFT: u32 = 30;

/// Keys and values of a layer in a tier, page after page as `kernels/pages.cuh` says.
#[derive(Clone, Copy, Debug)]
pub struct Tier {
    /// Keys: `[slots]` pages of all key and value heads.
    pub k: View,
    /// Values likewise.
    pub v: View,
    /// How keys are stored.
    pub ty_k: KvType,
    /// How values are stored.
    pub ty_v: KvType,
}

/// The tiers of a layer.
pub type Tiers = [Option<Tier>; MAX_TIERS];

impl Tier {
    /// Keys and values in half precision, `[slots, PAGE, n_head_kv, head_dim]`.
    pub fn f16(k: View, v: View) -> Self {
        let ty = GgmlType::F16.into();
        Self {
            k,
            v,
            ty_k: ty,
            ty_v: ty,
        }
    }

    /// A pool with no other tier.
    pub fn alone(self) -> Tiers {
        let mut tiers = [None; MAX_TIERS];
        tiers[0] = Some(self);
        tiers
    }

    /// Whether both are in half precision.
    pub fn is_f16(&self) -> bool {
        let f16 = KvType::from(GgmlType::F16);
        self.ty_k == f16 && self.ty_v == f16
    }

    pub(crate) fn args(&self) -> args::Tier {
        args::Tier {
            k: self.k.at,
            v: self.v.at,
            ty_k: id(self.ty_k),
            ty_v: id(self.ty_v),
        }
    }

    /// Panics if it is not made of whole pages of heads that its types can hold.
    pub(super) fn check(&self, h: Heads) {
        for (view, ty) in [(self.k, self.ty_k), (self.v, self.ty_v)] {
            let page = page_bytes(ty, h).expect("a type that the pool can hold");
            assert!(view.bytes().is_multiple_of(page));
        }
        let ty_v_only = self.ty_k != KvType::V2 && self.ty_v != KvType::K4;
        assert!(
            ty_v_only,
            "formats of keys hold keys, those of values values"
        );
    }
}

/// As kernels name it.
fn id(ty: KvType) -> u32 {
    match ty {
        KvType::Rows(ty) => ty.id(),
        KvType::K4 => 256,
        KvType::V2 => 257,
    }
}

/// Bytes of the keys or of the values of a page, all heads together. `None` for types that have no kernels, and for heads that are not whole
/// blocks.
pub fn page_bytes(ty: KvType, h: Heads) -> Option<usize> {
    let known = match ty {
        KvType::Rows(ty) => matches!(ty, GgmlType::F16 | GgmlType::Q8_0 | GgmlType::Q4_0),
        KvType::K4 | KvType::V2 => true,
    };
    let head = ty.page_size(h.head_dim).filter(|_| known)?;
    Some(head * h.n_head_kv)
}

/// The slot of a page and its tier, as page tables and moves have them.
///
/// # Panics
/// If there is no such tier, or the slot is beyond 30 bits.
pub fn slot_of(tier: u8, slot: u32) -> u32 {
    assert!(usize::from(tier) < MAX_TIERS && slot >> TIER_SHIFT == 0);
    u32::from(tier) << TIER_SHIFT | slot
}

/// What [`slot_of`] was made of.
pub fn tier_and_slot(slot: u32) -> (u8, u32) {
    ((slot >> TIER_SHIFT) as u8, slot & ((1 << TIER_SHIFT) - 1))
}

/// Whether the kernels for f16 alone serve these tiers.
pub(crate) fn only_f16(tiers: &Tiers) -> bool {
    tiers[0].is_some_and(|t| t.is_f16()) && tiers[1..].iter().all(Option::is_none)
}

pub(crate) fn tier_args(tiers: &Tiers) -> [args::Tier; MAX_TIERS] {
    tiers.map(|t| t.map_or(args::Tier::default(), |t| t.args()))
}

/// Stores keys and values of `n` tokens, `[n, n_head_kv, head_dim]`, in a tier of rows, or keys alone where there are no values; `places` is `[n]` u32, slot times page size plus row.
///
/// # Errors
/// Those of the driver.
pub fn store_rows(
    gpu: &Gpu,
    h: Heads,
    tier: &Tier,
    k: View,
    v: Option<View>,
    places: View,
    n: usize,
) -> Result<()> {
    tier.check(h);
    assert!(h.head_dim.is_multiple_of(TILE));
    assert!(tier.ty_k.rows().is_some() && tier.ty_v.rows().is_some());
    for x in v.iter().chain(&[k]) {
        check(*x, n * h.n_head_kv * h.head_dim);
    }
    let n_part = 1 + usize::from(v.is_some());
    check(places, n);
    let a = args::StoreRows {
        k: k.at,
        v: at(v),
        places: places.at,
        tier: tier.args(),
        n_head_kv: h.n_head_kv as u32,
        head_dim: h.head_dim as u32,
        n_part: n_part as u32,
        pad: 0,
    };
    let blocks = n_part * h.n_head_kv * h.head_dim / TILE;
    gpu.launch(launch([blocks.div_ceil(4), n, 1], 128, 0), &a)
}

/// The tiers of each region of a pool, for [`move_pages`].
#[derive(Debug)]
pub struct TierTable {
    table: Buffer,
}

impl TierTable {
    /// # Errors
    /// Those of the driver.
    pub fn new(gpu: &Gpu, h: Heads, regions: &[Tiers]) -> Result<Self> {
        let mut bytes = Vec::new();
        for tiers in regions {
            tiers.iter().flatten().for_each(|t| t.check(h));
            for t in tier_args(tiers) {
                bytes.extend([t.k, t.v].iter().flat_map(|at| at.to_le_bytes()));
                bytes.extend([t.ty_k, t.ty_v].iter().flat_map(|ty| ty.to_le_bytes()));
            }
        }
        Ok(Self {
            table: gpu.buffer_of(&bytes)?,
        })
    }
}

/// Moves pages, storing them anew where the type is another: `moves` is `[n, 4]` u32, region, from and to (each as [`slot_of`] says), and
/// nothing. No page may move to where another one comes from or goes to. `n_part` is 2, or 1 for keys alone.
///
/// # Errors
/// Those of the driver.
pub fn move_pages(
    gpu: &Gpu,
    h: Heads,
    tiers: &TierTable,
    moves: View,
    n: usize,
    n_part: usize,
) -> Result<()> {
    assert!((1..=2).contains(&n_part));
    check(moves, 4 * n);
    assert!(h.head_dim.is_multiple_of(TILE));
    let a = args::MovePages {
        tiers: tiers.table.view().at,
        moves: moves.at,
        n_head_kv: h.n_head_kv as u32,
        head_dim: h.head_dim as u32,
    };
    let tiles = h.n_head_kv * h.head_dim / TILE;
    gpu.launch(launch([n, tiles, n_part], 32, 0), &a)
}

const _: () = assert!(PAGE == lemma_quant::pages::PAGE);
