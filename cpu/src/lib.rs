//! Hand-written CPU kernels and the worker team.
