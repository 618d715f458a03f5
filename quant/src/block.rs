//! What a block format can do, and the loops over rows that all formats share.

use crate::search::mean_square;
use crate::types::GgmlType;
use bytemuck::Pod;

/// A block: a fixed number of values in a fixed number of bytes, readable at any address.
pub trait Block: Pod {
    /// The ggml type that consists of these blocks.
    const TYPE: GgmlType;
    /// Values in a block.
    const LEN: usize;

    /// Writes the values of the block to `y`, which holds exactly [`Self::LEN`] of them.
    fn dequantize(&self, y: &mut [f32]);
}

/// A block that can be made from values.
///
/// No input makes it panic. NaN and infinities give some valid block.
pub trait Quantize: Block {
    /// Encodes `x`, exactly [`Block::LEN`] values.
    fn quantize(x: &[f32]) -> Self;

    /// Encodes `x` so that errors weigh as `importance` says, one number for each value (how large the inputs that
    /// meet it are, squared). `mean_square` is that of the whole row, some formats want it.
    ///
    /// Formats without freedom to choose ignore the importance, as this does.
    fn quantize_weighted(x: &[f32], importance: &[f32], mean_square: f32) -> Self {
        let _ = (importance, mean_square);
        Self::quantize(x)
    }
}

/// A block that can be multiplied with quantized activations without being dequantized.
pub trait Dot: Block {
    /// The activations' format. Its length divides [`Block::LEN`].
    type Partner: Block;

    /// The dot product with as many partner blocks as this block has values for.
    fn dot(&self, y: &[Self::Partner]) -> f32;
}

/// Reads a row of blocks.
///
/// # Panics
/// If `x` is not a whole number of blocks or `y` is not as long as they say.
pub fn dequantize_row<B: Block>(x: &[u8], y: &mut [f32]) {
    let x = blocks::<B>(x, y.len());
    for (b, y) in x.iter().zip(y.chunks_exact_mut(B::LEN)) {
        b.dequantize(y);
    }
}

/// Encodes a row.
///
/// # Panics
/// If `x` is not a whole number of blocks or `y` does not have the size they take.
pub fn quantize_row<B: Quantize>(x: &[f32], y: &mut [u8]) {
    check::<B>(y.len(), x.len());
    let y: &mut [B] = bytemuck::cast_slice_mut(y);
    for (b, x) in y.iter_mut().zip(x.chunks_exact(B::LEN)) {
        *b = B::quantize(x);
    }
}

/// Encodes one row, given how much each of its columns matters.
///
/// # Panics
/// If `x` is not a whole number of blocks, `importance` is not as long, or `y` does not have the size that `x` takes.
pub fn quantize_row_weighted<B: Quantize>(x: &[f32], importance: &[f32], y: &mut [u8]) {
    check::<B>(y.len(), x.len());
    assert_eq!(x.len(), importance.len(), "one importance for each value");
    let y: &mut [B] = bytemuck::cast_slice_mut(y);
    let mean_square = mean_square(x);
    let parts = x.chunks_exact(B::LEN).zip(importance.chunks_exact(B::LEN));
    for (b, (x, importance)) in y.iter_mut().zip(parts) {
        *b = B::quantize_weighted(x, importance, mean_square);
    }
}

/// The dot product of `n` weights `w` and activations `x`, the latter in the format `B::Partner`.
///
/// # Panics
/// If `n` is not a whole number of blocks or a slice has not the size that `n` values take.
pub fn vec_dot<B: Dot>(n: usize, w: &[u8], x: &[u8]) -> f32 {
    let w = blocks::<B>(w, n);
    let x = blocks::<B::Partner>(x, n);
    w.iter()
        .zip(x.chunks_exact(B::LEN / B::Partner::LEN))
        .map(|(w, x)| w.dot(x))
        .sum()
}

/// Views `bytes` as the blocks of `n` values.
///
/// # Panics
/// If `n` is not a whole number of blocks or `bytes` has not the size they take.
pub fn blocks<B: Block>(bytes: &[u8], n: usize) -> &[B] {
    check::<B>(bytes.len(), n);
    bytemuck::cast_slice(bytes)
}

#[track_caller]
fn check<B: Block>(n_bytes: usize, n: usize) {
    let name = B::TYPE.name();
    assert!(
        n.is_multiple_of(B::LEN),
        "{name}: {n} values are no whole number of blocks of {}",
        B::LEN
    );
    assert!(
        n / B::LEN * size_of::<B>() == n_bytes,
        "{name}: {n} values take {} bytes, not {n_bytes}",
        n / B::LEN * size_of::<B>()
    );
}
