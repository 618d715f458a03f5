//! Reading ahead of products that are bound by memory: how far, and into which cache.
//!
//! What there is to know beyond the processor's own reading ahead differs between makers. On AMD's (Zen 4) a prefetch into the first
//! level holds one of the few places for lines that loads wait for, and one into the second does not: there, that is a tenth
//! to a quarter faster, and a fifth slower on Intel's (Emerald Rapids).

use std::arch::x86_64::*;
use std::sync::OnceLock;

/// Where lines go that are asked for ahead, and how far ahead that is.
#[derive(Clone, Copy)]
pub(crate) struct Reach {
    /// Into the first-level cache, not the second.
    pub(crate) near: bool,
    /// Bytes for each of four long runs of quantized rows.
    pub(crate) runs: usize,
}

impl Reach {
    /// What is good for this processor.
    pub(crate) fn get() -> Self {
        static REACH: OnceLock<Reach> = OnceLock::new();
        *REACH.get_or_init(|| match is_amd() {
            true => Self {
                near: false,
                runs: 2 << 10,
            },
            false => Self {
                near: true,
                runs: 1 << 10,
            },
        })
    }
}

fn is_amd() -> bool {
    if cfg!(miri) {
        return false;
    }
    // SAFETY: every processor of this architecture has the instruction.
    #[allow(unused_unsafe, reason = "older compilers ask for it")]
    let id = unsafe { __cpuid(0) };
    [id.ebx, id.edx, id.ecx]
        .map(u32::to_le_bytes)
        .as_flattened()
        == b"AuthenticAMD"
}

/// Begins to read `n` bytes from `p` on, which may be anywhere; to the first-level cache if that is `near`, or to the second.
#[inline(always)]
pub(crate) fn prefetch(near: bool, p: *const u8, n: usize) {
    // SAFETY: a prefetch cannot fault, and every processor of this architecture has it.
    #[allow(unused_unsafe, reason = "older compilers ask for it")]
    unsafe {
        if near {
            for i in (0..n).step_by(64) {
                _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(i).cast());
            }
        } else {
            for i in (0..n).step_by(64) {
                _mm_prefetch::<_MM_HINT_T1>(p.wrapping_add(i).cast());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    /// The system knows as well whose processor it is.
    #[test]
    #[cfg(all(target_os = "linux", not(miri)))]
    fn maker_is_what_the_system_says() {
        if let Ok(info) = std::fs::read_to_string("/proc/cpuinfo")
            && let Some(line) = info.lines().find(|l| l.starts_with("vendor_id"))
        {
            assert_eq!(super::is_amd(), line.ends_with("AuthenticAMD"), "{line}");
        }
    }
}
