//! The model that is part of the program.
//!
//! With the feature `bundled` the binary carries a small reasoning model, so that it works with no download and no argument. It is
//! used in place like a mapped file, which needs the alignment of a tensor.

/// Whether this build carries a model.
pub(crate) const PRESENT: bool = cfg!(bundled_model);

/// What messages call it.
pub(crate) const NAME: &str = "bundled model";

/// What it is and what to ask it, for the banner.
pub(crate) const ABOUT: &str = "a small reasoner that does arithmetic step by step";

/// Two things to ask it.
pub(crate) const EXAMPLES: [&str; 2] = ["What is 47 * 86?", "What is 8213746 * 95371?"];

#[cfg(bundled_model)]
pub(crate) fn bytes() -> Option<&'static [u8]> {
    /// Tensors in a GGUF file start at multiples of its alignment, 32 by default; cache lines are 64.
    #[repr(C, align(64))]
    struct Aligned<T: ?Sized>(T);
    static MODEL: &Aligned<[u8]> = &Aligned(*include_bytes!("../../models/reasoner/reasoner.gguf"));
    Some(&MODEL.0)
}

#[cfg(not(bundled_model))]
pub(crate) fn bytes() -> Option<&'static [u8]> {
    None
}
