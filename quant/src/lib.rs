//! Block formats of every ggml tensor type.
