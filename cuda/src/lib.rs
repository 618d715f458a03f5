//! CUDA kernels and their host side.
