//! Unpacking for batches: from rows as they lie in the file to tiles.
//!
//! Sixteen bytes of each of sixteen rows are turned at a time, packed as they are, so that every lane has four bytes of a row;
//! whatever there is to do with bits and scales is then done for all rows at once, and nothing has to be moved again.

use super::ahead::prefetch;
use super::bytes::{Bytes, Places, ROWS};

/// Up to 256 columns of sixteen rows.
#[repr(C, align(64))]
pub(crate) struct Tile {
    /// Quants, made unsigned (but in `sixteens`): `[columns / 4][row][4 columns]`.
    pub(super) q: [u8; 256 * ROWS],
    /// The upper bits of quants that scales are multiplied into, as `q`.
    pub(super) high: [u8; 256 * ROWS],
    /// Scales of sub-blocks; in `sixteens` what is added to the sums of sixteen columns.
    pub(super) scales: [[i32; ROWS]; 16],
    /// Minimums of sub-blocks, two neighbours for each row; where there are none, scales times what quants are too large by,
    /// negative.
    pub(super) mins: [[[i16; 2]; ROWS]; 8],
    /// Scales of blocks.
    pub(super) d: [[f32; ROWS]; 8],
    /// Scales of minimums, or minimums, of blocks; in `sixteens` scales of second halves.
    pub(super) m: [[f32; ROWS]; 8],
}

/// A block of some rows, and where it goes.
pub(super) struct To<'a, B> {
    /// The blocks.
    p: Places<'a>,
    /// The first of the rows.
    first: usize,
    /// Where the tile is.
    tile: *mut Tile,
    /// Where the block begins, in columns / 32.
    b: usize,
    /// What is read after these rows: as many bytes as they have. Null if they have been read to elsewhere.
    next: *const u8,
    bytes: std::marker::PhantomData<B>,
}

impl<B: Bytes> To<'_, B> {
    /// The block of row `i` of those that are unpacked together.
    #[inline(always)]
    pub(super) fn row(&self, i: usize) -> *const u8 {
        self.p.row(self.first + i)
    }

    /// The same place for rows that have been read to elsewhere, the first of them to `w`.
    #[inline(always)]
    pub(super) fn rows<'r>(&self, w: *const u8, offsets: &'r [i32; ROWS]) -> To<'r, B> {
        To {
            // Of all rows: the first of these comes first there.
            p: Places {
                w: w.wrapping_offset(-(offsets[self.first] as isize)),
                offsets,
            },
            next: std::ptr::null(),
            ..*self
        }
    }

    /// The first `n` columns of the block, which are the first bytes of `rows`.
    ///
    /// # Safety
    /// They are there; the instruction set is available.
    #[inline(always)]
    pub(super) unsafe fn all_quants(&self, rows: &To<'_, B>, n: usize) {
        for part in 0..n / 16 {
            // SAFETY: by the caller.
            unsafe {
                for (c, v) in rows.sixteen(16 * part).into_iter().enumerate() {
                    self.quants(4 * part + c, v);
                }
            }
        }
    }

    /// Begins to read what is read next, as much as blocks of `size` bytes of these rows take.
    #[inline(always)]
    pub(super) fn read_ahead(&self, size: usize) {
        prefetch(
            false,
            self.next.wrapping_add(self.first * size),
            B::LANES * size,
        );
    }

    /// Sixteen bytes of the block from `at` on, four in each vector.
    ///
    /// # Safety
    /// They are within the block; the instruction set is available.
    #[inline(always)]
    pub(super) unsafe fn sixteen(&self, at: usize) -> [B::V; 4] {
        let w = self.p.w.wrapping_add(at);
        if !self.next.is_null() {
            // A few lines with every few that are used, so that there are always some on their way, and never more than can be.
            for line in 0..B::LANES / 4 {
                // To the second level: four tiles of long rows do not fit the first.
                let next = ROWS * at + 16 * self.first + 64 * line;
                prefetch(false, self.next.wrapping_add(next), 64);
            }
        }
        // SAFETY: by the caller.
        unsafe { B::sixteen(Places { w, ..self.p }, self.first) }
    }

    /// Four bytes of the block from `at` on.
    ///
    /// # Safety
    /// As for `sixteen`.
    #[inline(always)]
    pub(super) unsafe fn four(&self, at: usize) -> B::V {
        let w = self.p.w.wrapping_add(at);
        // SAFETY: by the caller.
        unsafe { B::four(Places { w, ..self.p }, self.first) }
    }

    /// Columns `4 i ..` of the block.
    ///
    /// # Safety
    /// The instruction set is available. The same for all below.
    #[inline(always)]
    pub(super) unsafe fn quants(&self, i: usize, v: B::V) {
        // SAFETY: a tile has room for 256 columns.
        unsafe {
            let q = &raw mut (*self.tile).q;
            B::store(
                q.cast::<u8>().add(64 * (8 * self.b + i) + 4 * self.first),
                v,
            );
        }
    }

    /// The scale of sub-block `j`: of sixteen columns, or of more in formats of 256.
    ///
    /// # Safety
    /// See `quants`.
    #[inline(always)]
    pub(super) unsafe fn scale(&self, j: usize, v: B::V) {
        // SAFETY: there are sixteen at most.
        unsafe {
            let to = &raw mut (*self.tile).scales[2 * self.b + j][self.first];
            B::store(to.cast(), v);
        }
    }

    /// Minimums of sub-blocks `2 i` and `2 i + 1`, 16 bits each.
    ///
    /// # Safety
    /// See `quants`.
    #[inline(always)]
    pub(super) unsafe fn mins(&self, i: usize, v: B::V) {
        // SAFETY: there are eight at most.
        unsafe {
            let to = &raw mut (*self.tile).mins[i][self.first];
            B::store(to.cast(), v);
        }
    }

    /// The scales of sub-blocks `2 i` and `2 i + 1`, whose quants are `2^bits` too large.
    ///
    /// # Safety
    /// See `quants`.
    #[inline(always)]
    pub(super) unsafe fn scales_of_two(&self, i: usize, a: B::V, b: B::V, bits: u32) {
        // SAFETY: by the caller.
        unsafe {
            self.scale(2 * i, a);
            self.scale(2 * i + 1, b);
            let zero = B::splat(0);
            let (a, b) = (B::sub(zero, B::shl(a, bits)), B::sub(zero, B::shl(b, bits)));
            let low = B::and(a, B::splat(0xffff));
            self.mins(i, B::or(low, B::shl(b, 16)));
        }
    }

    /// The scale of the block, in half precision, in the lower halves of lanes.
    ///
    /// # Safety
    /// See `quants`.
    #[inline(always)]
    pub(super) unsafe fn d(&self, v: B::V) {
        // SAFETY: there are eight blocks at most.
        unsafe { B::store_halves(&raw mut (*self.tile).d[self.b][self.first], v) };
    }

    /// The scale of the block, bits of f32.
    ///
    /// # Safety
    /// See `quants`.
    #[inline(always)]
    pub(super) unsafe fn d_bits(&self, v: B::V) {
        // SAFETY: as for `d`.
        unsafe {
            let to = &raw mut (*self.tile).d[self.b][self.first];
            B::store(to.cast(), v);
        }
    }

    /// Scales of the halves of 32 columns, `32 i ..` of the block: bits of f32.
    ///
    /// # Safety
    /// See `quants`.
    #[inline(always)]
    pub(super) unsafe fn halves(&self, i: usize, first: B::V, second: B::V) {
        // SAFETY: a tile has eight times 32 columns.
        unsafe {
            let (d, m) = (&raw mut (*self.tile).d, &raw mut (*self.tile).m);
            B::store((&raw mut (*d)[self.b + i][self.first]).cast(), first);
            B::store((&raw mut (*m)[self.b + i][self.first]).cast(), second);
        }
    }

    /// The scale of the block in the lower halves of lanes, and that of its minimums, or its minimum, in the upper ones.
    ///
    /// # Safety
    /// See `quants`.
    #[inline(always)]
    pub(super) unsafe fn d_and_m(&self, v: B::V) {
        // SAFETY: as for `d`.
        unsafe {
            self.d(v);
            let to = &raw mut (*self.tile).m[self.b][self.first];
            B::store_halves(to, B::shr(v, 16));
        }
    }
}

/// How a format is unpacked, a block at a time, or several as one.
///
/// # Safety
/// `SIZE` is the size of a block, and `unpack` reads nothing outside of it.
pub(super) unsafe trait Unpack {
    /// Bytes of a block.
    const SIZE: usize;
    /// Values in a block.
    const LEN: usize;

    /// Unpacks a block of some rows.
    ///
    /// # Safety
    /// The instruction set of `B` is available, and the blocks are there.
    unsafe fn unpack<B: Bytes>(to: &To<'_, B>);
}

/// Unpacks columns of some rows. See `UnpackFn`.
///
/// # Safety
/// The instruction set of `B` is available, and the rows are there.
#[inline(always)]
pub(super) unsafe fn unpack<F: Unpack, B: Bytes>(
    w: *const u8,
    row_size: usize,
    n: usize,
    n32: usize,
    next: *const u8,
    tile: &mut Tile,
) {
    // Rows that are missing repeat the last one; their results are not used.
    let offsets = std::array::from_fn(|r| (r.min(n - 1) * row_size) as i32);
    for b in 0..n32 * 32 / F::LEN {
        for half in 0..ROWS / B::LANES {
            // SAFETY: by the caller.
            unsafe {
                F::unpack(&To::<B> {
                    p: Places {
                        w: w.add(b * F::SIZE),
                        offsets: &offsets,
                    },
                    first: half * B::LANES,
                    tile,
                    b: b * F::LEN / 32,
                    next: next.wrapping_add(b * F::SIZE * ROWS),
                    bytes: std::marker::PhantomData,
                });
            }
        }
    }
}

/// The low and the high halves of bytes.
///
/// # Safety
/// The instruction set of `B` is available.
#[inline(always)]
pub(super) unsafe fn nibbles<B: Bytes>(v: B::V) -> [B::V; 2] {
    // SAFETY: by the caller.
    unsafe {
        let mask = B::splat(0x0f0f_0f0f);
        [B::and(v, mask), B::and(B::shr(v, 4), mask)]
    }
}

/// Byte `i` of each lane.
///
/// # Safety
/// The instruction set of `B` is available.
#[inline(always)]
pub(super) unsafe fn byte<B: Bytes>(v: B::V, i: usize) -> B::V {
    // SAFETY: by the caller.
    unsafe { B::and(B::shr(v, 8 * i as u32), B::splat(0xff)) }
}

/// Two bytes of each lane, from `2 i` on, as 16-bit numbers.
///
/// # Safety
/// The instruction set of `B` is available.
#[inline(always)]
pub(super) unsafe fn two_bytes<B: Bytes>(v: B::V, i: usize) -> B::V {
    let mut pick = [-1; 16];
    for (lane, pick) in pick.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let first = (4 * lane + 2 * i) as i8;
        (pick[0], pick[2]) = (first, first + 1);
    }
    // SAFETY: by the caller.
    unsafe { B::pick(v, pick) }
}
