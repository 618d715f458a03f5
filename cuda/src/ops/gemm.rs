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
pub(super) const SHARED: usize = 3 * 2 * TILE * STEP * 2;

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
pub(super) fn unpack(gpu: &Gpu, a: &args::Unpack) -> Result<()> {
    let (width, rows) = (a.width as usize, a.n_row as usize);
    let block = if width < 4096 { 64 } else { 256 };
    let grid = [width.div_ceil(16 * block), rows, 1];
    gpu.launch(launch(grid, block as u32, 0), a)
}

impl Half {
    /// Tokens from which unpacking pays.
    pub const MIN_TOKENS: usize = 33;

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

    /// Whether a matrix of `n_out` rows of `n_in` elements, unpacked, has room as a whole.
    pub fn holds(n_in: usize, n_out: usize) -> bool {
        n_out <= 65535 && n_out * width(n_in) * 2 <= PANEL
    }

    /// Bytes of that room.
    pub fn bytes(n: usize, n_in: usize) -> usize {
        PANEL.max(TILE * width(n_in) * 2) + n * width(n_in) * 2
    }

    /// Products of several matrices with `n` tokens, through f16: x `[n, n_in]`, outputs `[n, rows]`; with `add`, added to them.
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
                    ..args::Unpack::default()
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
        if gpu.info().sm == (9, 0) {
            gpu.launch(launch, &args::MulMatF16Hopper(a))
        } else {
            gpu.launch(launch, &a)
        }
    }
}
