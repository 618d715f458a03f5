//! Finds the model that the binary is to carry.
//!
//! With the feature `bundled` and the file in place, `cfg(bundled_model)` is set. A checkout without the file (it is large) still
//! builds, to a program that needs `-m`.

#![allow(
    clippy::print_stdout,
    reason = "this is how a build script talks to cargo"
)]

use std::path::Path;

const MODEL: &str = "../models/reasoner/reasoner.gguf";

fn main() {
    println!("cargo::rustc-check-cfg=cfg(bundled_model)");
    println!("cargo::rerun-if-changed={MODEL}");
    if std::env::var_os("CARGO_FEATURE_BUNDLED").is_none() {
        return;
    }
    if Path::new(MODEL).is_file() {
        println!("cargo::rustc-cfg=bundled_model");
    } else {
        println!("cargo::warning={MODEL} is missing: the program will carry no model");
    }
}
