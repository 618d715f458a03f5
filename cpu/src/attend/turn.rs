//! From rows in blocks, as they lie in the pool, to what [`blocks`](super::blocks) multiplies.

use std::ops::Range;

use super::blocks::{Blocks, QUADS, WEIGHT};
use super::{BLOCK, TINY};
use crate::decode::decode_f16;
use crate::lanes::multiversion;
use crate::simd::{Simd, for_isa};
use crate::words::Words;
use crate::{Isa, PAGE};
use lemma_quant::pages::tiles;
use lemma_quant::{BlockIQ4NL, BlockQ5_0, BlockQ5_1, GgmlType};

/// What a page holds.
#[derive(Clone, PartialEq)]
pub(crate) enum Part {
    Keys,
    /// Values, and the rows that are the page's: others are another page's, or what an earlier sequence has left.
    Values(Range<usize>),
}

/// How a block is stored: a half-precision scale, a minimum, then quants.
struct Format {
    /// Bytes of a block.
    size: usize,
    has_min: bool,
    quants: Quants,
}

#[derive(Clone, Copy)]
enum Quants {
    /// Signed bytes.
    Bytes,
    /// 16 bytes with the first half of the quants in their lower halves and the others in the upper ones, 8 too large.
    Halves,
    /// Something else, of which signed bytes are made first.
    Other,
}

impl Format {
    fn of(ty: GgmlType) -> Option<Self> {
        let (size, has_min, quants) = match ty {
            GgmlType::Q8_0 => (34, false, Quants::Bytes),
            GgmlType::Q4_0 => (18, false, Quants::Halves),
            GgmlType::Q4_1 => (20, true, Quants::Halves),
            GgmlType::Q5_0 => (22, false, Quants::Other),
            GgmlType::Q5_1 => (24, true, Quants::Other),
            GgmlType::IQ4_NL => (18, false, Quants::Other),
            _ => return None,
        };
        Some(Self {
            size,
            has_min,
            quants,
        })
    }
}

/// Whether pages of this type can be turned.
pub(crate) fn is_turned(ty: GgmlType) -> bool {
    Format::of(ty).is_some()
}

/// Turns the first `dim` numbers of each row of a page, `[PAGE, stride]`, in `memory`, which has room for it as f32.
///
/// # Panics
/// If the type is none that is turned, or `dim` is not a multiple of 32.
pub(crate) fn turn<'a>(
    isa: Isa,
    part: Part,
    ty: GgmlType,
    page: &[u8],
    dim: usize,
    memory: &'a mut [f32],
) -> Blocks<'a> {
    let format = Format::of(ty).expect("a type that is turned");
    let (blocks, row) = (dim / BLOCK, page.len() / PAGE);
    assert!(dim.is_multiple_of(BLOCK) && row.is_multiple_of(format.size));
    assert!(page.len() == PAGE * row && blocks * format.size <= row);
    let (quads, rest) = memory.split_at_mut(PAGE * dim / 4);
    let (d, rest) = rest.split_at_mut(blocks * PAGE);
    let (m, rest) = rest.split_at_mut(if format.has_min { d.len() } else { 0 });
    let (unit, rest) = rest.split_at_mut(if part == Part::Keys { 0 } else { blocks });
    let mut from = Rows {
        bytes: page,
        row,
        block: format.size,
        first: if format.has_min { 4 } else { 2 },
    };
    // A vector cannot read what has just been written in parts: scales become numbers when quants are turned.
    let n = d.len() / 2;
    let (halves, rest) = rest.split_at_mut(2 * n);
    let (d_halves, m_halves) = halves.split_at_mut(n);
    copy_halves(isa, from, 0, d_halves);
    if format.has_min {
        copy_halves(isa, from, 2, m_halves);
    }
    if let Quants::Other = format.quants {
        let n = page.len() / format.size * BLOCK;
        assert!(n <= size_of_val(rest));
        // SAFETY: there are so many bytes, and any are numbers.
        let bytes = unsafe { std::slice::from_raw_parts_mut(rest.as_mut_ptr().cast(), n) };
        match ty {
            GgmlType::Q5_0 => bytes_of_q5_0(isa, tiles(page), bytes),
            GgmlType::Q5_1 => bytes_of_q5_1(isa, tiles(page), bytes),
            _ => bytes_of_iq4_nl(isa, tiles(page), bytes),
        }
        from = Rows {
            bytes,
            row: n / PAGE,
            block: BLOCK,
            first: 0,
        };
    }
    let small = matches!(format.quants, Quants::Halves);
    let scales = Rows {
        bytes: page,
        row,
        block: format.size,
        first: 0,
    };
    // SAFETY: `isa` is available.
    unsafe {
        match &part {
            Part::Keys => turn_keys(isa, from, format.quants, quads),
            Part::Values(_) => turn_values(isa, from, format.quants, scales, quads),
        }
        decode_f16(isa, bytes_of(d_halves), d);
        if format.has_min {
            decode_f16(isa, bytes_of(m_halves), m);
            // What quants are made less by, here and where they become bytes.
            let less = match format.quants {
                Quants::Halves => 8.0,
                Quants::Bytes | Quants::Other => 16.0,
            };
            m.iter_mut().zip(&*d).for_each(|(m, d)| *m += less * d);
        }
        if let Part::Values(live) = part {
            // Scales are made relative to the largest of a page, in which the others have no say.
            for x in d
                .as_chunks_mut::<PAGE>()
                .0
                .iter_mut()
                .chain(m.as_chunks_mut::<PAGE>().0)
            {
                x[..live.start].fill(0.0);
                x[live.end..].fill(0.0);
            }
            relative(isa, WEIGHT[usize::from(!small)], d, unit);
        }
    }
    Blocks {
        quads,
        small,
        d,
        m,
        unit,
    }
}

multiversion! {
    /// Copies the half-precision numbers at byte `at` of blocks, as bits of two tokens: `[blocks, PAGE / 2]`.
    fn copy_halves(from: Rows<'_>, at: usize, to: &mut [f32]) {
        let to = to.as_chunks_mut::<{ PAGE / 2 }>().0;
        assert!(from.bytes.len() == PAGE * from.row && at + 2 <= from.block);
        assert!(to.len() * from.block <= from.row);
        for (block, to) in to.iter_mut().enumerate() {
            // SAFETY: lengths are asserted, and there is room for two of them in a number.
            unsafe {
                let from_block = from.bytes.as_ptr().add(block * from.block + at);
                let to = to.as_mut_ptr().cast::<[u8; 2]>();
                for t in 0..PAGE {
                    *to.add(t) = *from_block.add(t * from.row).cast::<[u8; 2]>();
                }
            }
        }
    }

    /// Quants of blocks, in order.
    fn bytes_of_q5_0(from: &[BlockQ5_0], to: &mut [u8]) {
        for (block, to) in from.iter().zip(to.as_chunks_mut::<BLOCK>().0) {
            let q = block.quants();
            for i in 0..BLOCK {
                to[i] = q[i].cast_unsigned();
            }
        }
    }

    /// The same, less 16.
    fn bytes_of_q5_1(from: &[BlockQ5_1], to: &mut [u8]) {
        for (block, to) in from.iter().zip(to.as_chunks_mut::<BLOCK>().0) {
            // In the middle of what bytes can be, so that little is lost with weights.
            let q = block.quants();
            for i in 0..BLOCK {
                to[i] = q[i].wrapping_sub(16);
            }
        }
    }

    /// Quants of blocks, in order.
    fn bytes_of_iq4_nl(from: &[BlockIQ4NL], to: &mut [u8]) {
        for (block, to) in from.iter().zip(to.as_chunks_mut::<BLOCK>().0) {
            let q = block.quants();
            for i in 0..BLOCK {
                to[i] = q[i].cast_unsigned();
            }
        }
    }
}

/// The bytes of numbers.
fn bytes_of(x: &[f32]) -> &[u8] {
    // SAFETY: any are bytes.
    unsafe { std::slice::from_raw_parts(x.as_ptr().cast(), size_of_val(x)) }
}

/// Sixteen rows of blocks.
#[derive(Clone, Copy)]
struct Rows<'a> {
    bytes: &'a [u8],
    /// Bytes of a row and of a block.
    row: usize,
    block: usize,
    /// Where the quants of a block begin.
    first: usize,
}

for_isa! {
    /// Makes scales what [`Blocks`] has of values.
    ///
    /// # Safety
    /// `isa` is available.
    unsafe fn relative<S>(weight: f32, d: &mut [f32], unit: &mut [f32]) relative_s;

    /// Quants of keys.
    ///
    /// # Safety
    /// `isa` is available.
    unsafe fn turn_keys<S, W>(from: Rows<'_>, quants: Quants, quads: &mut [f32]) turn_keys_s;

    /// Quants of values, less than zero where they were more if their scale is.
    ///
    /// # Safety
    /// `isa` is available.
    unsafe fn turn_values<S, W>(from: Rows<'_>, quants: Quants, scales: Rows<'_>, quads: &mut [f32]) turn_values_s;
}

#[inline(always)]
unsafe fn relative_s<S: Simd>(weight: f32, d: &mut [f32], unit: &mut [f32]) {
    for (d, unit) in d.as_chunks_mut::<PAGE>().0.iter_mut().zip(unit) {
        // SAFETY: sixteen numbers.
        unsafe {
            let mut most = S::splat(TINY);
            for t in (0..PAGE).step_by(S::N) {
                let p = d.as_mut_ptr().add(t);
                let x = S::load(p);
                let x = S::max(x, S::mul(x, S::splat(-1.0)));
                S::store(p, x);
                // In this order what is not a number is passed over.
                most = S::max(x, most);
            }
            let most = S::largest(most);
            let factor = S::splat(weight / most);
            for t in (0..PAGE).step_by(S::N) {
                let p = d.as_mut_ptr().add(t);
                S::store(p, S::mul(S::load(p), factor));
            }
            *unit = most * (1.0 / weight);
        }
    }
}

/// Bytes of a block's quants.
fn len(quants: Quants) -> usize {
    match quants {
        Quants::Halves => BLOCK / 2,
        Quants::Bytes | Quants::Other => BLOCK,
    }
}

#[inline(always)]
unsafe fn turn_keys_s<S: Simd, W: Words>(from: Rows<'_>, quants: Quants, quads: &mut [f32]) {
    let blocks = quads.len() / (QUADS[0] * PAGE);
    let len = len(quants);
    assert!((blocks - 1) * from.block + from.first + len <= from.row);
    assert!(from.bytes.len() == PAGE * from.row);
    for block in 0..blocks {
        for first in (0..PAGE).step_by(W::N) {
            // SAFETY: lengths are asserted; the instruction set is available.
            unsafe {
                let p = from.bytes.as_ptr();
                let p = p.add(first * from.row + block * from.block + from.first);
                let to = quads.as_mut_ptr().add(block * QUADS[0] * PAGE + first);
                let store = |i: usize, v| W::store(to.add(i * PAGE).cast(), v);
                for half in 0..len / 16 {
                    for (i, v) in (4 * half..).zip(W::columns(p.add(16 * half), from.row)) {
                        match quants {
                            Quants::Halves => {
                                let nibbles = W::splat(0x0f0f_0f0f);
                                store(i, W::and(v, nibbles));
                                store(i + 4, W::and(W::shr::<4>(v), nibbles));
                            }
                            _ => store(i, W::xor(v, W::splat(0x8080_8080))),
                        }
                    }
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn turn_values_s<S: Simd, W: Words>(
    from: Rows<'_>,
    quants: Quants,
    scales: Rows<'_>,
    quads: &mut [f32],
) {
    let blocks = quads.len() / (QUADS[1] * BLOCK);
    let len = len(quants);
    assert!((blocks - 1) * from.block + from.first + len <= from.row);
    assert!(from.bytes.len() == PAGE * from.row && scales.bytes.len() == PAGE * scales.row);
    assert!(blocks * scales.block <= scales.row);
    for block in 0..blocks {
        for j in 0..QUADS[1] {
            // Ones for tokens whose scale is less than zero, zeros for others.
            let mut sign = 0;
            if !matches!(quants, Quants::Bytes) {
                for t in 0..4 {
                    let at = (4 * j + t) * scales.row + block * scales.block + 1;
                    // SAFETY: lengths are asserted.
                    let byte = unsafe { *scales.bytes.get_unchecked(at) }.cast_signed();
                    sign |= (i32::from(byte >> 7) & 255).cast_unsigned() << (8 * t);
                }
            }
            for at in (0..len).step_by(W::N) {
                // SAFETY: lengths are asserted; the instruction set is available.
                unsafe {
                    let p = from.bytes.as_ptr();
                    let p = p.add(block * from.block + from.first + at);
                    let v = W::rows([0, 1, 2, 3].map(|t| p.add((4 * j + t) * from.row)));
                    let to = quads.as_mut_ptr();
                    let to = to.add((block * QUADS[1] + j) * BLOCK + at);
                    // All bits the other way round make -1 - q of q.
                    match quants {
                        Quants::Halves => {
                            let nibbles = W::splat(0x0f0f_0f0f);
                            // -8, or 9.
                            let less = W::splat(0xf8f8_f8f8 ^ (sign & 0xf1f1_f1f1));
                            let number =
                                |v| W::add8(W::xor(W::and(v, nibbles), W::splat(sign)), less);
                            W::store(to.cast(), number(v));
                            W::store(to.add(BLOCK / 2).cast(), number(W::shr::<4>(v)));
                        }
                        Quants::Bytes => W::store(to.cast(), v),
                        Quants::Other => {
                            let more = W::splat(sign & 0x0101_0101);
                            W::store(to.cast(), W::add8(W::xor(v, W::splat(sign)), more));
                        }
                    }
                }
            }
        }
    }
}
