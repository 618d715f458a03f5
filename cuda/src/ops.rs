//! One function for each kernel: checks the sizes of what it is given, chooses the geometry, launches.
//!
//! Views hold f32 unless said otherwise; shapes are written row by row, the last index running fastest.

mod attention;
mod conv;
mod delta;
mod draw;
mod elements;
mod experts;
mod gemm;
mod latent;
mod pages;
mod scan;

pub use attention::*;
pub use conv::*;
pub use delta::*;
pub use draw::*;
pub use elements::*;
pub use experts::*;
pub use gemm::*;
pub use latent::*;
pub use pages::*;
pub use scan::*;

use lemma_quant::GgmlType;

use crate::args;
use crate::gpu::{CudaError, Gpu, Launch, Result, View};
use crate::weight::Weight;

/// Activations quantized in blocks of 32.
#[derive(Clone, Copy, Debug)]
pub struct Quant {
    /// `[n, width]` int8.
    pub q: View,
    /// `[n, width / 32]` pairs of f32: scale, scale times sum.
    pub ds: View,
}

impl Quant {
    fn check(&self, n_elem: usize) {
        assert!(
            n_elem.is_multiple_of(32) && self.q.bytes() >= n_elem && self.ds.bytes() >= n_elem / 4
        );
    }
}

fn check(view: View, n_elem: usize) {
    assert!(
        view.bytes() >= n_elem * 4,
        "{} bytes for {n_elem} numbers",
        view.bytes()
    );
}

fn at(view: Option<View>) -> u64 {
    view.map_or(0, |v| v.at)
}

fn launch(grid: [usize; 3], block: u32, shared: usize) -> Launch {
    Launch {
        grid: grid.map(|n| u32::try_from(n).unwrap_or(u32::MAX)),
        block,
        shared: shared as u32,
        together: false,
    }
}

/// `out[i] = w[tokens[i]]`; `tokens` is `[n]` u32, every one below the rows of `w`.
///
/// # Errors
/// Those of the driver, as everywhere here.
pub fn embed(gpu: &Gpu, out: View, w: &Weight, tokens: View, n: usize) -> Result<()> {
    check(out, n * w.n_in());
    check(tokens, n);
    let a = args::Embed {
        w: w.view().at,
        tokens: tokens.at,
        out: out.at,
        row_bytes: w.row_bytes() as u64,
        ty: w.ty().id(),
        n_embd: w.n_in() as u32,
    };
    gpu.launch(launch([w.n_in().div_ceil(16 * 64), n, 1], 64, 0), &a)
}

/// Root-mean-square norm of `n` rows; behind `w` may be what is added then. `quant` gets the result once more, quantized.
///
/// # Errors
/// Those of the driver.
#[allow(clippy::too_many_arguments, reason = "operands of one kernel")]
pub fn rms_norm(
    gpu: &Gpu,
    out: View,
    x: View,
    w: View,
    quant: Option<Quant>,
    n: usize,
    width: usize,
    eps: f32,
) -> Result<()> {
    check(x, n * width);
    check(out, n * width);
    check(w, width);
    if let Some(q) = quant {
        q.check(n * width);
        assert!(width.is_multiple_of(32));
    }
    let rest = w.slice(width * 4, w.bytes() - width * 4);
    let a = args::RmsNorm {
        x: x.at,
        w: w.at,
        bias: at((rest.bytes() >= width * 4).then_some(rest)),
        out: out.at,
        q: at(quant.map(|q| q.q)),
        ds: at(quant.map(|q| q.ds)),
        width: width as u32,
        stride: width as u32,
        eps,
        pad: 0,
    };
    gpu.launch(launch([n, 1, 1], norm_block(width), 0), &a)
}

/// Root-mean-square norm of what `n` rows begin with, in place: x `[n, stride]`, of which as many elements as `w` has.
///
/// # Errors
/// Those of the driver.
pub fn rms_norm_first(
    gpu: &Gpu,
    x: View,
    w: View,
    n: usize,
    stride: usize,
    eps: f32,
) -> Result<()> {
    let width = w.bytes() / 4;
    check(x, n * stride);
    assert!(width <= stride);
    let a = args::RmsNorm {
        x: x.at,
        w: w.at,
        out: x.at,
        width: width as u32,
        stride: stride as u32,
        eps,
        ..args::RmsNorm::default()
    };
    gpu.launch(launch([n, 1, 1], norm_block(width), 0), &a)
}

/// Threads of a block that norms a row: one for eight elements, which stay in its registers.
fn norm_block(width: usize) -> u32 {
    width.div_ceil(8).next_multiple_of(32).clamp(32, 1024) as u32
}

/// Quantizes `n_elem` numbers, a multiple of 32.
///
/// # Errors
/// Those of the driver.
pub fn quantize(gpu: &Gpu, out: Quant, x: View, n_elem: usize) -> Result<()> {
    quantize_first(gpu, out, x, 1, [n_elem, n_elem])
}

/// Quantizes what `n` rows begin with: `width` elements, a multiple of 32, of rows of `stride`; the results lie side by side.
///
/// # Errors
/// Those of the driver.
pub fn quantize_first(
    gpu: &Gpu,
    out: Quant,
    x: View,
    n: usize,
    [width, stride]: [usize; 2],
) -> Result<()> {
    assert!(width.is_multiple_of(32) && width <= stride);
    check(x, n * stride);
    out.check(n * width);
    let n_block = n * width / 32;
    let a = args::Quantize {
        x: x.at,
        q: out.q.at,
        ds: out.ds.at,
        n_block: n_block as u64,
        per_row: (width / 32) as u32,
        stride: stride as u32,
    };
    gpu.launch(launch([n_block.div_ceil(4), 1, 1], 128, 0), &a)
}

/// What feed-forward blocks make of a gate and of what goes up beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Glu {
    /// `silu(gate) * up`
    Swiglu,
    /// `g * sigmoid(1.702 g) * (u + 1)`, where `g` is the gate, 7 at most, and `u` is `up`, within 7 of zero.
    SwigluOai,
    /// `gelu(gate) * up`, gelu by the tanh formula (arXiv 1606.08415).
    Geglu,
    /// `max(gate, 0) * up`
    Reglu,
}

/// `gate = glu(gate, up)`.
///
/// # Errors
/// Those of the driver.
pub fn glu(gpu: &Gpu, kind: Glu, gate: View, up: View, n_elem: usize) -> Result<()> {
    check(gate, n_elem);
    check(up, n_elem);
    let a = args::GateUp {
        gate: gate.at,
        up: up.at,
        n_elem: n_elem as u64,
        kind: kind as u32,
        pad: 0,
    };
    gpu.launch(launch([n_elem.div_ceil(256), 1, 1], 256, 0), &a)
}

/// What a mat-vec does with its results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Every matrix writes its own output.
    Store,
    /// Every matrix adds to its own output.
    Add,
    /// Every matrix writes `max(w x, 0)²` to its own output.
    ReluSqr,
    /// `out[0] = glu(w[0] x, w[1] x)` of two matrices of one format and shape.
    Gated(Glu),
}

impl Mode {
    /// As kernels have it.
    fn code(self) -> u32 {
        match self {
            Self::Store => 0,
            Self::Add => 1,
            Self::ReluSqr => 2,
            Self::Gated(kind) => 3 + kind as u32,
        }
    }

    fn is_gated(self) -> bool {
        matches!(self, Self::Gated(_))
    }
}

/// A matrix of a mat-vec: weights; bias `[rows]`, of experts `[experts, rows]`; output `[columns, rows]`.
pub type Part<'a> = (&'a Weight, Option<View>, View);

/// Chosen experts of a mat-vec over columns.
#[derive(Clone, Copy, Debug)]
pub struct Experts {
    /// `[columns]` u32.
    pub ids: View,
    /// Experts whose rows follow each other in each weight.
    pub n: usize,
}

/// Products of up to four matrices with columns of activations.
#[derive(Clone, Copy, Debug)]
pub struct MatVec<'a> {
    /// The matrices.
    pub parts: &'a [Part<'a>],
    /// `[columns / per_input, n_in]`
    pub x: View,
    /// The same quantized, where a format wants it.
    pub quant: Option<Quant>,
    /// Columns.
    pub columns: usize,
    /// Columns that share an input.
    pub per_input: usize,
    /// Expert of each column.
    pub experts: Option<Experts>,
    /// What is done with the results.
    pub mode: Mode,
}

/// Elements that a lane takes at once.
fn piece(ty: GgmlType) -> usize {
    match ty {
        GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => 8,
        GgmlType::IQ4_XS => 32,
        _ if ty.block_size() == 32 => 32,
        _ => 64,
    }
}

/// Warps of the kernel that a multiprocessor has room for.
const MAT_VEC_WARPS: u32 = 16;

/// Warps that share a row of so many pieces: few idle lanes, at most eight.
fn warps(pieces: usize) -> usize {
    let exact = pieces.div_ceil(32).max(1);
    if exact <= 8 {
        return exact;
    }
    (4..=8)
        .min_by_key(|w| pieces.div_ceil(32 * w) * w)
        .unwrap_or(8)
}

/// Launches a mat-vec.
///
/// # Errors
/// Those of the driver; quantized activations that are missing.
pub fn mat_vec(gpu: &Gpu, m: &MatVec<'_>) -> Result<()> {
    let (mut launch, a) = mat_vec_args(m, m.columns)?;
    if launch.grid.contains(&0) {
        return Ok(());
    }
    // Warps share a row only where there are too few rows for all that are resident, whatever the number of columns: sums are added up in the
    // same order for any. Blocks have as many pairs of rows as the others, or one less.
    let pairs = launch.grid[0];
    let room = gpu.info().n_sm * MAT_VEC_WARPS;
    let warps = (room / pairs).clamp(1, launch.block / 32);
    launch.block = 32 * warps;
    let blocks = (room / warps / m.columns as u32).max(1);
    launch.grid[0] = pairs.div_ceil(pairs.div_ceil(blocks));
    gpu.launch(launch, &a)
}

/// A mat-vec's arguments and geometry; outputs have `results` rows.
fn mat_vec_args(m: &MatVec<'_>, results: usize) -> Result<(Launch, args::MatVec)> {
    let n_in = m.parts[0].0.n_in();
    let n_expert = m.experts.map_or(1, |e| e.n);
    let inputs = m.columns.div_ceil(m.per_input);
    let rows_of = |w: &Weight| w.n_row() / n_expert;
    check(m.x, inputs * n_in);
    if let Some(e) = m.experts {
        check(e.ids, m.columns);
    }
    let mut a = args::MatVec {
        xf: m.x.at,
        ids: at(m.experts.map(|e| e.ids)),
        n_seg: m.parts.len() as u32,
        n_in: n_in as u32,
        mode: m.mode.code(),
        per_input: m.per_input as u32,
        ..args::MatVec::default()
    };
    if let Some(q) = m.quant {
        q.check(inputs * n_in);
        (a.xq, a.xds) = (q.q.at, q.ds.at);
    } else if m.parts.iter().any(|p| p.0.wants_q8()) {
        return Err(CudaError(
            "quantized weights want quantized activations".to_owned(),
        ));
    }
    let mut blocks = 0;
    for (i, &(w, bias, out)) in m.parts.iter().enumerate() {
        assert_eq!(w.n_in(), n_in);
        if !m.mode.is_gated() || i == 0 {
            check(out, results * rows_of(w));
        }
        if let Some(b) = bias {
            check(b, w.n_row());
        }
        blocks += rows_of(w).div_ceil(2);
        a.seg[i] = args::Segment {
            w: w.view().at,
            row_bytes: w.row_bytes() as u64,
            expert_bytes: (w.row_bytes() * rows_of(w)) as u64,
            out: out.at,
            bias: at(bias),
            ty: w.ty().id(),
            n_out: rows_of(w) as u32,
        };
    }
    if m.mode.is_gated() {
        let [(g, ..), (u, ..)] = m.parts else {
            panic!("two matrices")
        };
        assert_eq!((g.ty(), g.n_row()), (u.ty(), u.n_row()));
        blocks = rows_of(g);
    }
    let pieces = m
        .parts
        .iter()
        .map(|p| n_in.div_ceil(piece(p.0.ty())))
        .max()
        .unwrap_or(1);
    let block = 32 * warps(pieces) as u32;
    Ok((launch([blocks, m.columns, 1], block, 0), a))
}

/// Shape of the heads of a layer.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Query heads.
    pub n_head: usize,
    /// Key and value heads; divides `n_head`.
    pub n_head_kv: usize,
    /// Elements of a head, even, at most [`MAX_HEAD_DIM`].
    pub head_dim: usize,
}

/// The widest head that the attention kernel takes.
pub const MAX_HEAD_DIM: usize = 256;

/// Norm over heads, rotation, storing.
#[derive(Clone, Copy, Debug)]
pub struct RopeStore {
    /// `[n, n_head, head_dim]`, changed in place.
    pub q: View,
    /// `[n, n_head_kv, head_dim]`
    pub k: View,
    /// `[n, n_head_kv, head_dim]`
    pub v: View,
    /// `[head_dim]` and epsilon, if queries are normed.
    pub q_norm: Option<(View, f32)>,
    /// The same for keys.
    pub k_norm: Option<(View, f32)>,
    /// `[n, head_dim / 2, 2]` cosines and sines of queries and of keys, if there is a rotation; usually the same.
    pub rope: Option<[View; 2]>,
    /// Which elements are pairs.
    pub pairs: Pairs,
    /// Where keys and values go. Without it keys are changed in place.
    pub store: Option<Store>,
}

/// Which elements of a head rotate together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairs {
    /// Neighbours.
    Neighbours,
    /// Element `i` and that so many behind it; those behind both halves stay as they are. Not 0, and at most half of a head.
    Halves(usize),
}

impl Pairs {
    /// As kernels have it.
    pub(crate) fn code(self) -> u32 {
        match self {
            Self::Neighbours => 0,
            Self::Halves(n) => n as u32,
        }
    }
}

/// The pool of a layer and places in it.
#[derive(Clone, Copy, Debug)]
pub struct Store {
    /// `[slots, PAGE, n_head_kv, head_dim]` f16.
    pub k: View,
    /// The same for values.
    pub v: View,
    /// `[n]` u32, `slot * PAGE + row`, inside the pool.
    pub places: View,
}

/// Launches norm, rotation and storing for `n` tokens.
///
/// # Errors
/// Those of the driver.
pub fn rope_store(gpu: &Gpu, h: Heads, c: &RopeStore, n: usize) -> Result<()> {
    let d = h.head_dim;
    check(c.q, n * h.n_head * d);
    check(c.k, n * h.n_head_kv * d);
    check(c.v, n * h.n_head_kv * d);
    assert!(d.is_multiple_of(2) && d <= MAX_HEAD_DIM && c.pairs.code() as usize <= d / 2);
    for (w, _) in c.q_norm.iter().chain(&c.k_norm) {
        check(*w, d);
    }
    for r in c.rope.iter().flatten() {
        check(*r, n * d);
    }
    if let Some(s) = c.store {
        check(s.places, n);
    }
    let a = args::RopeStore {
        q: c.q.at,
        k: c.k.at,
        v: c.v.at,
        q_norm: at(c.q_norm.map(|w| w.0)),
        k_norm: at(c.k_norm.map(|w| w.0)),
        rope_q: at(c.rope.map(|r| r[0])),
        rope_k: at(c.rope.map(|r| r[1])),
        pool_k: at(c.store.map(|s| s.k)),
        pool_v: at(c.store.map(|s| s.v)),
        places: at(c.store.map(|s| s.places)),
        n_head: h.n_head as u32,
        n_head_kv: h.n_head_kv as u32,
        head_dim: d as u32,
        neox: c.pairs.code(),
        eps_q: c.q_norm.map_or(0.0, |w| w.1),
        eps_k: c.k_norm.map_or(0.0, |w| w.1),
    };
    gpu.launch(
        launch([(h.n_head + 2 * h.n_head_kv).div_ceil(4), n, 1], 128, 0),
        &a,
    )
}

/// Reads all of a view and drops it: what the ceiling of decoding is measured with. `out` is `[1]`.
///
/// # Errors
/// Those of the driver.
pub fn read_all(gpu: &Gpu, src: View, out: View) -> Result<()> {
    check(out, 1);
    let a = args::ReadAll {
        src: src.at,
        out: out.at,
        n: (src.bytes() / 16) as u64,
    };
    gpu.launch(launch([gpu.info().n_sm as usize * 8, 1, 1], 256, 0), &a)
}
