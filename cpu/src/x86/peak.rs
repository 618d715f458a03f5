//! Loops over registers alone: what the arithmetic units can do.

use super::amx::Tiles;
use crate::Isa;
use std::arch::asm;

/// Independent sums, which hide the latency.
const SUMS: u64 = 10;

/// A loop of one instruction with ten independent results.
macro_rules! repeat {
    ($n:expr, $start:literal, $r:literal, $end:literal) => {
        asm!(
            // Whatever is in registers may be slow to compute with.
            "vzeroall",
            "2:",
            concat!($start, $r, "2", $end), concat!($start, $r, "3", $end),
            concat!($start, $r, "4", $end), concat!($start, $r, "5", $end),
            concat!($start, $r, "6", $end), concat!($start, $r, "7", $end),
            concat!($start, $r, "8", $end), concat!($start, $r, "9", $end),
            concat!($start, $r, "10", $end), concat!($start, $r, "11", $end),
            "dec {n}",
            "jnz 2b",
            n = inout(reg) $n => _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
            out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nostack, nomem),
        )
    };
}

/// Products of bytes, `n` rounds (at least one); returns how many operations that was, two for each product. Without an
/// instruction that adds them up as well (AVX2), only the products count.
///
/// # Safety
/// `isa` is available.
pub(crate) unsafe fn bytes(isa: Isa, n: u64) -> u64 {
    assert!(n > 0);
    // SAFETY: by the caller; nothing but registers is touched.
    unsafe {
        match isa {
            Isa::Scalar => 0,
            Isa::Avx2 => {
                repeat!(n, "vpmaddubsw ", "ymm", ", ymm0, ymm1");
                n * SUMS * 32 * 2
            }
            Isa::AvxVnni => {
                // Without the prefix it is encoded as for AVX-512.
                repeat!(n, "{{vex}} vpdpbusd ", "ymm", ", ymm0, ymm1");
                n * SUMS * 32 * 2
            }
            Isa::Avx512 | Isa::Avx512Bf16 => {
                repeat!(n, "vpdpbusd ", "zmm", ", zmm0, zmm1");
                n * SUMS * 64 * 2
            }
            Isa::Amx => {
                let mut tiles = Tiles::new();
                tiles.shape(64, [16; 2]);
                asm!(
                    "2:",
                    "tdpbssd tmm0, tmm4, tmm6",
                    "tdpbssd tmm1, tmm4, tmm7",
                    "tdpbssd tmm2, tmm5, tmm6",
                    "tdpbssd tmm3, tmm5, tmm7",
                    "dec {n}",
                    "jnz 2b",
                    n = inout(reg) n => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    options(nostack, nomem),
                );
                n * 4 * 16 * 16 * 64 * 2
            }
        }
    }
}

/// Fused products of f32, as [`bytes`].
///
/// # Safety
/// `isa` is available.
pub(crate) unsafe fn floats(isa: Isa, n: u64) -> u64 {
    assert!(n > 0);
    // SAFETY: by the caller; nothing but registers is touched.
    unsafe {
        match isa {
            Isa::Scalar => 0,
            Isa::Avx2 | Isa::AvxVnni => {
                repeat!(n, "vfmadd231ps ", "ymm", ", ymm0, ymm1");
                n * SUMS * 8 * 2
            }
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => {
                repeat!(n, "vfmadd231ps ", "zmm", ", zmm0, zmm0");
                n * SUMS * 16 * 2
            }
        }
    }
}

/// Products of pairs of bf16, as [`bytes`].
///
/// # Safety
/// AVX-512 BF16 is available.
pub(crate) unsafe fn pairs(n: u64) -> u64 {
    assert!(n > 0);
    // SAFETY: by the caller; nothing but registers is touched.
    unsafe { repeat!(n, "vdpbf16ps ", "zmm", ", zmm0, zmm0") };
    n * SUMS * 32 * 2
}
