//! Instruction sets that kernels are written for, and which of them this machine has.

use std::fmt;

/// A set of instructions that kernels are written for. The choice is made at run time.
///
/// Results of two sets may differ by rounding; each of them is deterministic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust. Always there.
    Scalar,
    /// x86-64 with `avx2`, `fma` and `f16c`.
    Avx2,
    /// [`Isa::Avx2`] with sums of products of bytes in 256 bits (`avxvnni`).
    AvxVnni,
    /// x86-64 with `avx512` `f`, `bw`, `vl`, `dq`, `vnni` and all of [`Isa::Avx2`]; `vbmi` is used where it is there.
    Avx512,
    /// [`Isa::Avx512`] with products of bf16 pairs.
    Avx512Bf16,
    /// [`Isa::Avx512Bf16`] with tiles of AMX, `int8` and `bf16`, where the system permits their use.
    Amx,
}

impl Isa {
    /// All sets, weakest first.
    pub const ALL: [Self; 6] = [
        Self::Scalar,
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512,
        Self::Avx512Bf16,
        Self::Amx,
    ];

    /// The strongest set that this machine has.
    pub fn detect() -> Self {
        Self::available().last().unwrap_or(Self::Scalar)
    }

    /// The sets that this machine has, weakest first.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// Whether this machine has the set.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            // Kernels are not written for Miri, which interprets only some of the instructions.
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            Self::AvxVnni => Self::Avx2.is_available() && is_x86_feature_detected!("avxvnni"),
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            Self::Avx512Bf16 => {
                Self::Avx512.is_available() && is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            Self::Amx => Self::Avx512Bf16.is_available() && crate::x86::amx::is_available(),
            #[cfg(not(all(target_arch = "x86_64", not(miri))))]
            _ => false,
        }
    }

    /// The set with this name: `scalar`, `avx2`, `avx_vnni`, `avx512`, `avx512_bf16` or `amx`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|isa| isa.name() == name)
    }

    /// The name that [`Isa::from_name`] takes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avx_vnni",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512_bf16",
            Self::Amx => "amx",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for isa in Isa::ALL {
            assert_eq!(Isa::from_name(isa.name()), Some(isa));
        }
        assert_eq!(Isa::from_name("sse2"), None);
    }

    #[test]
    fn scalar_is_always_available() {
        assert_eq!(Isa::available().next(), Some(Isa::Scalar));
        assert!(Isa::detect().is_available());
    }
}
