//! Mixtures of experts: choosing them, their products with batches of tokens, adding up what they say.

use super::gemm::{TILE, shared_packed, width};
use super::{Experts, MatVec, Mode, Part, Quant, at, check, launch, mat_vec_args};
use crate::args;
use crate::gpu::{Buffer, Gpu, Result, View};
use crate::weight::Weight;

/// Columns of a tile, by how many an expert has in the mean: most experts should need one tile, since each unpacks the weights anew.
fn tile(columns: usize, n_expert: usize) -> usize {
    if columns > 40 * n_expert { 128 } else { 64 }
}

/// Where the experts of `n` tokens are noted, and what is needed on the way.
#[derive(Clone, Copy, Debug)]
pub struct Chosen {
    /// `[n, n_expert]`: the router's products.
    pub logits: View,
    /// `[n, n_used]` u32, best first.
    pub ids: View,
    /// `[n, n_used]`
    pub weights: View,
    /// `[n]` u32: zeros, as they are again behind every call.
    pub arrived: View,
    /// Experts of a token.
    pub n_used: usize,
    /// How they are chosen.
    pub choice: Choice,
}

/// How the experts of a token are chosen, and what they count.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// Whether weights are sigmoids, each of its logit, and not a softmax over all.
    pub sigmoid: bool,
    /// `[n_expert]`: added to the weights where experts are chosen.
    pub bias: Option<View>,
    /// Groups of experts that lie side by side, 64 at most.
    pub n_group: usize,
    /// Groups that a token may use experts of: those whose two best have the largest sum.
    pub n_group_used: usize,
    /// Whether weights of a token are made to sum to one.
    pub norm: bool,
    /// Factor of the weights after that.
    pub scale: f32,
}

impl Choice {
    /// Softmax over all experts.
    pub const SOFTMAX: Self = Self {
        sigmoid: false,
        bias: None,
        n_group: 1,
        n_group_used: 1,
        norm: false,
        scale: 1.0,
    };
}

/// Chooses the experts of `n` tokens, x `[n, n_in]`: the best by their weights; equal ones by number.
///
/// # Errors
/// Those of the driver; quantized activations that are missing.
pub fn moe_router(
    gpu: &Gpu,
    (w, bias): (&Weight, Option<View>),
    x: View,
    quant: Option<Quant>,
    c: &Chosen,
    n: usize,
) -> Result<()> {
    let (n_expert, parts) = (w.n_row(), [(w, bias, c.logits)]);
    let call = MatVec {
        parts: &parts,
        x,
        quant,
        columns: n,
        per_input: 1,
        experts: None,
        mode: Mode::Store,
    };
    let (mut launch, m) = mat_vec_args(&call, n)?;
    check(c.arrived, n);
    launch.shared = n_expert as u32 * 4;
    gpu.launch(launch, &choice_args(m, c, n, n_expert))
}

/// Chooses the experts of `n` tokens by the `n_expert` products of a router that are there already, [`Chosen::logits`].
///
/// # Errors
/// Those of the driver.
pub fn moe_choose(gpu: &Gpu, c: &Chosen, n: usize, n_expert: usize) -> Result<()> {
    check(c.logits, n * n_expert);
    let mut m = args::MatVec::default();
    m.seg[0].out = c.logits.at;
    m.seg[0].n_out = n_expert as u32;
    let a = choice_args(m, c, n, n_expert);
    gpu.launch(launch([n, 1, 1], 32, n_expert * 4), &args::MoeChoose(a))
}

fn choice_args(m: args::MatVec, c: &Chosen, n: usize, n_expert: usize) -> args::MoeRouter {
    check(c.ids, n * c.n_used);
    check(c.weights, n * c.n_used);
    assert!(c.n_used <= n_expert);
    let o = c.choice;
    assert!((1..=64).contains(&o.n_group) && n_expert.is_multiple_of(o.n_group));
    let groups = o.n_group_used.min(o.n_group);
    assert!(groups > 0 && c.n_used <= n_expert / o.n_group * groups);
    if let Some(b) = o.bias {
        check(b, n_expert);
    }
    args::MoeRouter {
        m,
        ids: c.ids.at,
        weights: c.weights.at,
        arrived: c.arrived.at,
        bias: at(o.bias),
        n_used: c.n_used as u32,
        norm: u32::from(o.norm),
        sigmoid: u32::from(o.sigmoid),
        n_group: o.n_group as u32,
        n_group_used: groups as u32,
        scale: o.scale,
    }
}

/// `out[n, rows] = sum over the chosen experts of weight * (w x + bias)`, added to what is there if `add`: x `[n, n_used, n_in]`, weights and
/// experts `[n, n_used]`.
///
/// # Errors
/// Those of the driver; quantized activations that are missing.
pub fn moe_down(
    gpu: &Gpu,
    (w, bias): (&Weight, Option<View>),
    x: (View, Option<Quant>),
    (out, add): (View, bool),
    weights: View,
    experts: Experts,
    (n, n_used): (usize, usize),
) -> Result<()> {
    check(weights, n * n_used);
    // A mat-vec of all columns, but for what becomes of its results.
    let call = MatVec {
        parts: &[(w, bias, out)],
        x: x.0,
        quant: x.1,
        columns: n * n_used,
        per_input: 1,
        experts: Some(experts),
        mode: Mode::Add,
    };
    let (mut launch, m) = mat_vec_args(&call, n)?;
    launch.grid[1] = n as u32;
    let a = args::MoeDown {
        m,
        weights: weights.at,
        n_used: n_used as u32,
        add: u32::from(add),
    };
    gpu.launch(launch, &a)
}

/// Room for sorting the columns of a batch by expert, and for their activations in f16. A column is a pair of token and chosen expert.
pub struct Grouped {
    /// `[columns]` u32
    order: Buffer,
    /// `[n_expert + 1]` u32
    first: Buffer,
    /// `[n_expert + 1]` u32
    first_tile: Buffer,
    /// `[tiles]` u32
    tile_expert: Buffer,
    /// `[columns, width]` f16
    x: Buffer,
    n_expert: usize,
    columns: usize,
}

/// In which order columns lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Columns {
    /// As they were given; so many share an input.
    Given(usize),
    /// By expert.
    Sorted,
}

impl Grouped {
    /// Columns that one call takes at most: rows of a grid.
    pub const MAX_COLUMNS: usize = 32768;
    /// Rows of an expert's matrix at most: tiles of them are rows of a grid too.
    pub const MAX_ROWS: usize = 65535 * TILE;

    /// Columns from which tensor cores are faster than a mat-vec for each column (measured on an H200, 32 and 128 experts).
    pub fn min_columns(n_expert: usize) -> usize {
        3 * n_expert
    }

    /// Room for so many columns of at most `n_in` elements.
    ///
    /// # Errors
    /// When the device has none.
    pub fn new(gpu: &Gpu, columns: usize, n_expert: usize, n_in: usize) -> Result<Self> {
        assert!(columns <= Self::MAX_COLUMNS, "{columns} columns");
        Ok(Self {
            order: gpu.alloc(columns * 4)?,
            first: gpu.alloc((n_expert + 1) * 4)?,
            first_tile: gpu.alloc((n_expert + 1) * 4)?,
            tile_expert: gpu.alloc(tiles(columns, n_expert, 64) * 4)?,
            x: gpu.alloc(columns * width(n_in) * 2)?,
            n_expert,
            columns,
        })
    }

    /// Sorts columns by their experts, `[columns]` u32, for the calls that follow.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn sort(&self, gpu: &Gpu, ids: View, columns: usize) -> Result<()> {
        check(ids, columns);
        assert!(columns <= self.columns, "{columns} columns");
        let a = args::MoeSort {
            ids: ids.at,
            order: self.order.view().at,
            first: self.first.view().at,
            first_tile: self.first_tile.view().at,
            tile_expert: self.tile_expert.view().at,
            n: columns as u32,
            n_expert: self.n_expert as u32,
            tile: tile(columns, self.n_expert) as u32,
            pad: 0,
        };
        gpu.launch(launch([1, 1, 1], 256, self.n_expert * 4), &a)
    }

    /// Products of each column with the rows of its expert, both rounded to f16: weights and biases of all experts, one after the other. Outputs are
    /// `[columns, rows]`, in the order `to` (of which none share an input).
    ///
    /// # Errors
    /// Those of the driver.
    #[allow(clippy::too_many_arguments, reason = "operands of one product")]
    pub fn mul_mats(
        &self,
        gpu: &Gpu,
        parts: &[Part<'_>],
        x: View,
        columns: usize,
        from: Columns,
        to: Columns,
    ) -> Result<()> {
        let n_in = parts[0].0.n_in();
        let width = width(n_in);
        let (order, per_input) = match from {
            Columns::Given(per_input) => (self.order.view().at, per_input),
            Columns::Sorted => (0, 1),
        };
        check(x, columns.div_ceil(per_input) * n_in);
        assert!(self.x.view().bytes() >= columns * width * 2 && columns <= self.columns);
        let a = args::ToHalf {
            x: x.at,
            out: self.x.view().at,
            order,
            n_in: n_in as u32,
            width: width as u32,
            per_input: per_input as u32,
            pad: 0,
        };
        let grid = [width.div_ceil(8 * 128), columns, 1];
        gpu.launch(launch(grid, 128, 0), &a)?;
        for part in parts {
            assert_eq!(part.0.n_in(), n_in);
            self.mul_mat(gpu, part, columns, to)?;
        }
        Ok(())
    }

    fn mul_mat(
        &self,
        gpu: &Gpu,
        &(w, bias, out): &Part<'_>,
        columns: usize,
        to: Columns,
    ) -> Result<()> {
        let n_out = w.n_row() / self.n_expert;
        check(out, columns * n_out);
        if let Some(b) = bias {
            check(b, w.n_row());
        }
        let a = args::MulMatExperts {
            w: w.view().at,
            x: self.x.view().at,
            order: match to {
                Columns::Given(_) => self.order.view().at,
                Columns::Sorted => 0,
            },
            first: self.first.view().at,
            first_tile: self.first_tile.view().at,
            tile_expert: self.tile_expert.view().at,
            bias: at(bias),
            out: out.at,
            row_bytes: w.row_bytes() as u64,
            ty: w.ty().id(),
            n_in: w.n_in() as u32,
            width: width(w.n_in()) as u32,
            n_out: n_out as u32,
            n_expert: self.n_expert as u32,
            pad: 0,
        };
        let tile = tile(columns, self.n_expert);
        let grid = [tiles(columns, self.n_expert, tile), n_out.div_ceil(TILE), 1];
        let launch = launch(grid, 256, shared_packed(tile));
        match (tile, gpu.has_group_products()) {
            (64, true) => gpu.launch(launch, &args::MulMatExpertsHopper(a)),
            (64, false) => gpu.launch(launch, &a),
            (_, true) => gpu.launch(launch, &args::MulMatExperts128Hopper(a)),
            (_, false) => gpu.launch(launch, &args::MulMatExperts128(a)),
        }
    }
}

/// Tiles of so many columns that those of some experts have at most.
fn tiles(columns: usize, n_expert: usize, tile: usize) -> usize {
    columns / tile + n_expert.min(columns)
}

/// `out[n, width] = sum over n_used of weights * y[n, n_used, width]`, added to what is there if `add`.
///
/// # Errors
/// Those of the driver.
pub fn moe_sum(
    gpu: &Gpu,
    (out, add): (View, bool),
    y: View,
    weights: View,
    n: usize,
    n_used: usize,
    width: usize,
) -> Result<()> {
    check(out, n * width);
    check(y, n * n_used * width);
    check(weights, n * n_used);
    let a = args::MoeSum {
        y: y.at,
        weights: weights.at,
        acc: out.at,
        n_used: n_used as u32,
        width: width as u32,
        add: u32::from(add),
        pad: 0,
    };
    gpu.launch(launch([width.div_ceil(128), n, 1], 128, 0), &a)
}
