//! Latent attention: one key of a token for all heads, which begins with what values are made of.

use super::attention::{WIDE_BLOCK, WIDE_PAGES, WIDE_ROWS, combine, wide_shared};
use super::{
    Attention, Heads, Masses, Pairs, Parts, Quant, at, check, launch, piece, quantize_first,
    tier_args, warps,
};
use crate::args;
use crate::gpu::{CudaError, Gpu, Result, View};
use crate::weight::Weight;

/// The widest latent key, and the widest value in it.
pub const MAX_LATENT: [usize; 2] = [576, 512];

/// A matrix for each head.
#[derive(Clone, Copy, Debug)]
pub struct MulMatHeads<'a> {
    /// `[n_head, n_out, n_in]`
    pub w: &'a Weight,
    /// Heads.
    pub n_head: usize,
    /// `[n, n_head, width]`; each head begins with the `n_in` elements that are multiplied.
    pub x: View,
    /// Elements of a head of the input.
    pub width: usize,
    /// `[n, n_head, n_out + width - n_in]`: the product, then what the head has left, as it is.
    pub out: View,
    /// Room for one token's input quantized, `[n_head, n_in]`, where the format wants it.
    pub quant: Option<Quant>,
    /// Whether it is there already.
    pub fresh: bool,
}

/// Launches a product of heads with `n` tokens.
///
/// # Errors
/// Those of the driver; room for quantized activations that is missing.
pub fn mul_mat_heads(gpu: &Gpu, c: &MulMatHeads<'_>, n: usize) -> Result<()> {
    let (w, n_head, n_in) = (c.w, c.n_head, c.w.n_in());
    assert!(w.n_row().is_multiple_of(n_head) && n_in <= c.width);
    let (n_out, left) = (w.n_row() / n_head, c.width - n_in);
    let out_width = n_out + left;
    check(c.x, n * n_head * c.width);
    check(c.out, n * n_head * out_width);
    if n == 1 {
        let mut m = args::MatVec {
            xf: c.x.at,
            n_seg: 1,
            n_in: n_in as u32,
            per_input: 1,
            ..args::MatVec::default()
        };
        if w.wants_q8() {
            let Some(q) = c.quant else {
                let what = "quantized weights want quantized activations";
                return Err(CudaError(what.to_owned()));
            };
            match c.fresh {
                true => q.check(n_head * n_in),
                false => quantize_first(gpu, q, c.x, n_head, [n_in, c.width])?,
            }
            (m.xq, m.xds) = (q.q.at, q.ds.at);
        }
        m.seg[0] = args::Segment {
            w: w.view().at,
            row_bytes: w.row_bytes() as u64,
            expert_bytes: (w.row_bytes() * n_out) as u64,
            out: c.out.at,
            bias: 0,
            ty: w.ty().id(),
            n_out: n_out as u32,
        };
        let a = args::HeadsVec {
            m,
            x_next: c.width as u32,
            out_next: out_width as u32,
        };
        let block = 32 * warps(n_in.div_ceil(piece(w.ty()))) as u32;
        gpu.launch(launch([n_out.div_ceil(2), n_head, 1], block, 0), &a)?;
    } else {
        let a = args::MulMat {
            w: w.view().at,
            x: c.x.at,
            out: c.out.at,
            row_bytes: w.row_bytes() as u64,
            next_w: (w.row_bytes() * n_out) as u64,
            ty: w.ty().id(),
            n_in: n_in as u32,
            n_out: n_out as u32,
            n: n as u32,
            x_stride: (n_head * c.width) as u32,
            out_stride: (n_head * out_width) as u32,
            next_x: c.width as u32,
            next_out: out_width as u32,
            ..args::MulMat::default()
        };
        let tiles = |t: usize| n.div_ceil(t) * n_out.div_ceil(t);
        if n > 64 && tiles(128) * n_head >= gpu.info().n_sm as usize {
            let grid = [tiles(128), n_head, 1];
            gpu.launch(launch(grid, 256, 0), &args::MulMat128(a))?;
        } else {
            gpu.launch(launch([tiles(64), n_head, 1], 128, 0), &a)?;
        }
    }
    if left == 0 {
        return Ok(());
    }
    let a = args::CopyHeads {
        x: c.x.at,
        out: c.out.at,
        units: (n * n_head) as u32,
        x_next: c.width as u32,
        out_next: out_width as u32,
        x_at: n_in as u32,
        out_at: n_out as u32,
        n: left as u32,
    };
    let n_elem = n * n_head * left;
    gpu.launch(launch([n_elem.div_ceil(256), 1, 1], 256, 0), &a)
}

/// Rotation of what latent keys and their queries end with.
#[derive(Clone, Copy, Debug)]
pub struct RotateEnds {
    /// `[n, n_head, head_dim]`, changed in place.
    pub q: View,
    /// `[n, head_dim]`
    pub k: View,
    /// `[n, head_dim / 2, 2]` cosines and sines of queries and of keys, if there is a rotation; those of `n_rot` elements come first.
    pub rope: Option<[View; 2]>,
    /// Elements that rotate, the last ones; even.
    pub n_rot: usize,
    /// Which of them are pairs.
    pub pairs: Pairs,
    /// Keys in half precision, `[slots, PAGE, head_dim]`, and places in it, `[n]` u32. Without it keys are changed in place.
    pub store: Option<[View; 2]>,
}

/// Launches rotation and storing for `n` tokens.
///
/// # Errors
/// Those of the driver.
pub fn rotate_ends(gpu: &Gpu, h: Heads, c: &RotateEnds, n: usize) -> Result<()> {
    let d = h.head_dim;
    check(c.q, n * h.n_head * d);
    check(c.k, n * d);
    assert!(h.n_head_kv == 1 && d.is_multiple_of(2));
    assert!(c.n_rot.is_multiple_of(2) && c.n_rot <= d);
    for r in c.rope.iter().flatten() {
        check(*r, n * d);
    }
    if let Some([_, places]) = c.store {
        check(places, n);
    }
    let a = args::RotateEnds {
        q: c.q.at,
        k: c.k.at,
        rope_q: at(c.rope.map(|r| r[0])),
        rope_k: at(c.rope.map(|r| r[1])),
        pool: at(c.store.map(|s| s[0])),
        places: at(c.store.map(|s| s[1])),
        n_head: h.n_head as u32,
        head_dim: d as u32,
        n_rot: c.n_rot as u32,
        neox: c.pairs.code(),
    };
    let grid = [(h.n_head + 1).div_ceil(4), n, 1];
    gpu.launch(launch(grid, 128, 0), &a)
}

fn attend(
    gpu: &Gpu,
    h: Heads,
    dim_v: usize,
    c: &Attention,
    n: usize,
    splits: usize,
    a: args::LatentAttention,
) -> Result<()> {
    let d = h.head_dim;
    assert!(h.n_head_kv == 1 && d.is_multiple_of(2) && d <= MAX_LATENT[0]);
    assert!(dim_v <= d && dim_v <= MAX_LATENT[1]);
    assert!(c.window.is_none() && c.cap.is_none() && c.sinks.is_none());
    check(c.q, n * h.n_head * d);
    assert!(c.tiers[0].is_some(), "a first tier");
    c.tiers.iter().flatten().for_each(|t| t.check(h));
    check(c.n_pages, 1);
    check(c.pos, 1);
    let a = args::LatentAttention {
        q: c.q.at,
        pages: c.pages.at,
        n_pages: c.n_pages.at,
        pos: c.pos.at,
        tiers: tier_args(&c.tiers),
        n: n as u32,
        n_head: h.n_head as u32,
        head_dim: d as u32,
        head_dim_v: dim_v as u32,
        max_pages: (c.pages.bytes() / 8) as u32,
        scale: c.scale,
        ..a
    };
    let tiles = (n * h.n_head).div_ceil(WIDE_ROWS);
    gpu.launch(
        launch([tiles, splits, 1], WIDE_BLOCK, wide_shared(d, 1, 1)),
        &a,
    )
}

/// Attention of `n` tokens of a batch over latent keys, which begin with `dim_v` elements of values: out `[n, n_head, dim_v]`. Tiers have keys
/// and no values; there are no windows, bounds or sinks.
///
/// # Errors
/// Those of the driver.
pub fn attention_latent(
    gpu: &Gpu,
    out: View,
    h: Heads,
    dim_v: usize,
    c: &Attention,
    n: usize,
) -> Result<()> {
    check(out, n * h.n_head * dim_v);
    let a = args::LatentAttention {
        out: out.at,
        ..args::LatentAttention::default()
    };
    attend(gpu, h, dim_v, c, n, 1, a)
}

/// The same of one token, its pages split over blocks: out `[n_head, dim_v]`, once more quantized, and the pages' masses. Sums of `parts` are
/// `[n_head, splits, dim_v]`.
///
/// # Errors
/// Those of the driver.
#[allow(clippy::too_many_arguments, reason = "operands of two kernels")]
pub fn attention_latent_decode(
    gpu: &Gpu,
    out: View,
    quant: Option<Quant>,
    masses: Option<Masses>,
    h: Heads,
    dim_v: usize,
    c: &Attention,
    parts: &Parts,
) -> Result<()> {
    let max_pages = c.pages.bytes() / 8;
    check(out, h.n_head * dim_v);
    check(parts.sums, h.n_head * parts.splits * dim_v);
    check(parts.ml, h.n_head * parts.splits * 2);
    check(parts.page_ml, h.n_head * max_pages * 2);
    let a = args::LatentAttention {
        part: parts.sums.at,
        part_ml: parts.ml.at,
        page_ml: masses.map_or(0, |_| parts.page_ml.at),
        ..args::LatentAttention::default()
    };
    attend(gpu, h, dim_v, c, 1, parts.splits, a)?;
    let heads = Heads {
        head_dim: dim_v,
        ..h
    };
    combine(
        gpu,
        out,
        quant,
        masses,
        heads,
        c,
        parts,
        (parts.splits, false),
    )
}

/// Blocks that should share the pages, so that one token's attention occupies the device.
pub fn latent_splits(gpu: &Gpu, n_head: usize, max_pages: usize) -> usize {
    (2 * gpu.info().n_sm as usize)
        .div_ceil(n_head.div_ceil(WIDE_ROWS))
        .clamp(1, 64)
        .min(max_pages.div_ceil(WIDE_PAGES))
        .max(1)
}
