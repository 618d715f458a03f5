# `just` lists the recipes.

_default:
    @just --list

# format, lint and test, as continuous integration does
check: fmt lint test

# formatting, checked
fmt:
    cargo fmt --all --check

# lints, all warnings are errors
lint:
    cargo clippy --workspace --all-targets -- -D warnings

# every test
test:
    cargo test --release --workspace

# every test on the scalar path
test-scalar:
    LEMMA_ISA=scalar cargo test --release --workspace

# the block formats under miri
miri:
    cargo +nightly miri test -p lemma-quant

# kernels, one by one, with the roofline beside them
bench:
    cargo bench -p lemma-cpu

# prompt and decode speed of a model
bench-model model:
    cargo run --release -- bench -m {{model}} -p 256,512 -n 64 --ceiling

# the REPL
run *args:
    cargo run --release -- {{args}}

# CUDA kernels and whole models on the emulator, which needs no GPU
test-cuda:
    cargo test --release -p lemma-cuda --features emulate
    cargo test --release -p lemma-tests --features cuda-emulate --test cuda --test cuda_tiers --test cuda_made
    cargo test --release -p lemma-engine --features cuda-emulate cuda

# CUDA backend on a GPU: tests, then speed
gpu-check:
    scripts/gpu-check
