//! Products with batches of tokens.

use super::{Part, at, check, launch};
use crate::args;
use crate::gpu::{Buffer, Gpu, Result, View};
use crate::weight::Weight;

/// Bytes of unpacked weights that are multiplied at once. Enough tiles to occupy the device matter more than what the L2 cache holds.
const PANEL: usize = 128 << 20;
/// Tokens and rows of a tile, and elements of a step.
pub(super) const TILE: usize = 128;
pub(super) const STEP: usize = 64;
/// Shared memory of a block: three steps of both factors.
const SHARED: usize = 3 * 2 * TILE * STEP * 2;

/// Shared memory of a block that unpacks weights itself and has `tile` tokens: two steps of weights, three of tokens.
pub(super) fn shared_packed(tile: usize) -> usize {
    (2 * TILE + 3 * tile) * STEP * 2
}

/// `out (+)= x w^T (+ bias)` for `n` tokens: x `[n, n_in]`, out `[n, rows]`.
///
/// # Errors
/// Those of the driver.
pub fn mul_mat(
    gpu: &Gpu,
    out: View,
    w: &Weight,
    bias: Option<View>,
    x: View,
    n: usize,
    add: bool,
) -> Result<()> {
    let (n_in, n_out) = (w.n_in(), w.n_row());
    check(x, n * n_in);
    check(out, n * n_out);
    if let Some(b) = bias {
        check(b, n_out);
    }
    let a = args::MulMat {
        w: w.view().at,
        x: x.at,
        out: out.at,
        bias: at(bias),
        row_bytes: w.row_bytes() as u64,
        ty: w.ty().id(),
        n_in: n_in as u32,
        n_out: n_out as u32,
        n: n as u32,
        add: u32::from(add),
        x_stride: n_in as u32,
        out_stride: n_out as u32,
        ..args::MulMat::default()
    };
    let tiles = |t: usize| n.div_ceil(t) * n_out.div_ceil(t);
    // Large tiles read less; they pay once there are enough of them to occupy the device.
    if n > 64 && tiles(128) >= gpu.info().n_sm as usize {
        gpu.launch(launch([tiles(128), 1, 1], 256, 0), &args::MulMat128(a))
    } else {
        gpu.launch(launch([tiles(64), 1, 1], 128, 0), &a)
    }
}

/// Room for weights and activations in f16.
pub struct Half {
    pub(super) w: Buffer,
    x: Buffer,
}

pub(super) fn width(n_in: usize) -> usize {
    n_in.next_multiple_of(STEP)
}

/// Unpacks rows to f16.
fn unpack(gpu: &Gpu, a: &args::Unpack) -> Result<()> {
    let (width, rows) = (a.width as usize, a.n_row as usize);
    let block = if width < 4096 { 64 } else { 256 };
    let grid = [width.div_ceil(16 * block), rows, 1];
    gpu.launch(launch(grid, block as u32, 0), a)
}

impl Half {
    /// Tokens of a batch that is multiplied this way: any batch.
    pub const MIN_TOKENS: usize = 2;
    /// Tokens of a small batch at most: one tile.
    const SMALL: usize = 128;

    /// Room for `n` tokens of at most `n_in` elements.
    ///
    /// # Errors
    /// When the device has none.
    pub fn new(gpu: &Gpu, n: usize, n_in: usize) -> Result<Self> {
        Ok(Self {
            w: gpu.alloc(PANEL.max(TILE * width(n_in) * 2))?,
            x: gpu.alloc(n * width(n_in) * 2)?,
        })
    }

    /// Bytes of that room.
    pub fn bytes(n: usize, n_in: usize) -> usize {
        PANEL.max(TILE * width(n_in) * 2) + n * width(n_in) * 2
    }

    /// Products of several matrices with `n` tokens, both rounded to f16: x `[n, n_in]`, outputs `[n, rows]`; with `add`, added to them.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn mul_mats(
        &self,
        gpu: &Gpu,
        parts: &[Part<'_>],
        x: View,
        n: usize,
        add: bool,
    ) -> Result<()> {
        let n_in = parts[0].0.n_in();
        let width = width(n_in);
        check(x, n * n_in);
        assert!(self.x.view().bytes() >= n * width * 2);
        let a = args::ToHalf {
            x: x.at,
            out: self.x.view().at,
            n_in: n_in as u32,
            width: width as u32,
            ..args::ToHalf::default()
        };
        gpu.launch(launch([width.div_ceil(8 * 128), n, 1], 128, 0), &a)?;
        let fits = |p: &Part<'_>| n * p.0.n_row() * 4 <= self.w.view().bytes();
        if n <= Self::SMALL && parts.iter().all(fits) {
            for part in parts {
                self.multiply_small(gpu, part, width, n, add)?;
            }
            return Ok(());
        }
        let room = (self.w.view().bytes() / (width * 2)).min(65535) / TILE * TILE;
        let mut waiting: Vec<args::PartF16> = Vec::new();
        let mut used = 0;
        for &(w, bias, out) in parts {
            assert_eq!(w.n_in(), n_in);
            let n_out = w.n_row();
            check(out, n * n_out);
            if let Some(b) = bias {
                check(b, n_out);
            }
            for first in (0..n_out).step_by(room) {
                let rows = room.min(n_out - first);
                if used + rows > room || waiting.len() == 3 {
                    self.multiply(gpu, &waiting, width, n, add)?;
                    waiting.clear();
                    used = 0;
                }
                let a = args::Unpack {
                    w: w.view().at + (first * w.row_bytes()) as u64,
                    out: self.w.view().at + (used * width * 2) as u64,
                    row_bytes: w.row_bytes() as u64,
                    ty: w.ty().id(),
                    n_in: n_in as u32,
                    width: width as u32,
                    n_row: rows as u32,
                };
                unpack(gpu, &a)?;
                waiting.push(args::PartF16 {
                    out: out.at + first as u64 * 4,
                    bias: bias.map_or(0, |b| b.at + first as u64 * 4),
                    n_out: rows as u32,
                    stride: n_out as u32,
                });
                used += rows.next_multiple_of(TILE);
            }
        }
        self.multiply(gpu, &waiting, width, n, add)
    }

    /// The product of a small batch, whose activations are there, with packed weights.
    fn multiply_small(
        &self,
        gpu: &Gpu,
        &(w, bias, out): &Part<'_>,
        width: usize,
        n: usize,
        add: bool,
    ) -> Result<()> {
        let n_out = w.n_row();
        assert_eq!(w.n_in().next_multiple_of(STEP), width);
        check(out, n * n_out);
        if let Some(b) = bias {
            check(b, n_out);
        }
        let (tiles, steps) = (n_out.div_ceil(TILE), width / STEP);
        let room = self.w.view().bytes() / (n * n_out * 4);
        // Enough blocks to occupy the device three times, of two steps at least, and not so many that adding up takes long.
        let enough = (3 * gpu.info().n_sm as usize / tiles).clamp(1, 16);
        let parts = enough.min(room).min(steps.div_ceil(2));
        let a = args::MulMatSmall {
            w: w.view().at,
            x: self.x.view().at,
            part: self.w.view().at,
            row_bytes: w.row_bytes() as u64,
            ty: w.ty().id(),
            n_in: w.n_in() as u32,
            width: width as u32,
            n_out: n_out as u32,
            n: n as u32,
            pad: 0,
        };
        let tile = if n > 64 { 128 } else { 64 };
        let grid = launch([tiles, parts, 1], 256, shared_packed(tile));
        match (tile, gpu.has_group_products()) {
            (64, true) => gpu.launch(grid, &args::MulMatSmallHopper(a))?,
            (64, false) => gpu.launch(grid, &a)?,
            (_, true) => gpu.launch(grid, &args::MulMatSmall128Hopper(a))?,
            (_, false) => gpu.launch(grid, &args::MulMatSmall128(a))?,
        }
        let a = args::JoinParts {
            part: self.w.view().at,
            bias: at(bias),
            out: out.at,
            n_part: parts as u32,
            n_out: n_out as u32,
            n: n as u32,
            add: u32::from(add),
        };
        gpu.launch(launch([n_out.div_ceil(128), n, 1], 128, 0), &a)
    }

    fn multiply(
        &self,
        gpu: &Gpu,
        parts: &[args::PartF16],
        width: usize,
        n: usize,
        add: bool,
    ) -> Result<()> {
        let mut a = args::MulMatF16 {
            w: self.w.view().at,
            x: self.x.view().at,
            width: width as u32,
            n: n as u32,
            add: u32::from(add),
            n_part: parts.len() as u32,
            ..args::MulMatF16::default()
        };
        a.part[..parts.len()].copy_from_slice(parts);
        let tiles: usize = parts
            .iter()
            .map(|p| (p.n_out as usize).div_ceil(TILE))
            .sum();
        let shared = SHARED;
        let launch = launch([n.div_ceil(TILE) * tiles, 1, 1], 256, shared);
        if gpu.has_group_products() {
            gpu.launch(launch, &args::MulMatF16Hopper(a))
        } else {
            gpu.launch(launch, &a)
        }
    }
}
