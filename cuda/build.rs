//! Compiles `kernels/` with nvcc to one fatbin (feature `cuda`), and as C++ for the emulator (feature `emulate`).

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Machine code for the cards people have; the last entry is PTX, which drivers compile for newer ones.
const ARCHS: &str = "80 86 89 90a ptx90";

const ADVICE: &str = "the feature `cuda` needs nvcc (CUDA 12 or newer) and a C++ compiler.
nvcc is looked for in $LEMMA_NVCC, on the PATH, in $CUDA_HOME/bin, in /usr/local/cuda/bin and in .venv-nvcc/ of the workspace.
It can be had from Python packages, which scripts/with-nvcc does:
  scripts/with-nvcc cargo build --release --features cuda
or by hand:
  python3 -m venv .venv-nvcc
  .venv-nvcc/bin/pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cccl==13.0.*' \\
      'nvidia-nvvm==13.0.*' 'nvidia-cuda-crt==13.0.*'";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rustc-check-cfg=cfg(group_products)");
    for name in ["LEMMA_NVCC", "LEMMA_CUDA_ARCHS", "CUDA_HOME"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        compile_kernels();
    }
    #[cfg(feature = "emulate")]
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .define("LEMMA_EMULATE", None)
        .flag("-U_FORTIFY_SOURCE")
        .flag("-Wno-unknown-pragmas")
        .flag("-fno-strict-aliasing")
        .flag("-ffp-contract=off")
        .flag("-Wno-clobbered")
        .flag("-Wno-maybe-uninitialized")
        .file("kernels/emulate.cpp")
        .compile("lemma_emulate");
}

fn compile_kernels() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo")).join("lemma.fatbin");
    let Some(nvcc) = find_nvcc() else {
        fail("nvcc was not found")
    };
    let archs = env::var("LEMMA_CUDA_ARCHS").ok().filter(|v| !v.is_empty());
    let archs = archs.unwrap_or_else(|| ARCHS.to_owned());
    if archs
        .split_whitespace()
        .any(|arch| arch.trim_start_matches("ptx") == "90a")
    {
        println!("cargo::rustc-cfg=group_products");
    }
    let mut command = Command::new(&nvcc);
    command
        .args(["-std=c++17", "-O3", "-fatbin", "--threads", "2", "-o"])
        .arg(&out);
    for arch in archs.split_whitespace() {
        let (from, code) = match arch.strip_prefix("ptx") {
            Some(n) => (n, format!("compute_{n}")),
            None => (arch, format!("sm_{arch}")),
        };
        command.arg(format!("-gencode=arch=compute_{from},code={code}"));
    }
    let result = command.arg("kernels/lemma.cu").output();
    match result {
        Ok(o) if o.status.success() => {}
        Ok(o) => fail(&format!(
            "{} failed:\n{}{}",
            nvcc.display(),
            String::from_utf8_lossy(&o.stdout),
            String::from_utf8_lossy(&o.stderr)
        )),
        Err(e) => fail(&format!("{} could not be run: {e}", nvcc.display())),
    }
}

fn fail(what: &str) -> ! {
    for line in what.lines().chain(ADVICE.lines()) {
        println!("cargo::error={line}");
    }
    std::process::exit(1);
}

fn find_nvcc() -> Option<PathBuf> {
    if let Some(path) = env::var_os("LEMMA_NVCC").filter(|v| !v.is_empty()) {
        return Some(path.into());
    }
    let on_path = env::var_os("PATH")
        .map(|p| env::split_paths(&p).collect::<Vec<_>>())
        .unwrap_or_default();
    let home = env::var_os("CUDA_HOME").map(|p| Path::new(&p).join("bin"));
    let root = Path::new(&env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"))
        .join("../.venv-nvcc/lib");
    let venv = root.read_dir().into_iter().flatten().flatten();
    let venv = venv.map(|e| e.path().join("site-packages/nvidia/cu13/bin"));
    on_path
        .into_iter()
        .chain(home)
        .chain([PathBuf::from("/usr/local/cuda/bin")])
        .chain(venv)
        .map(|d| d.join("nvcc"))
        .find(|p| p.is_file())
}
