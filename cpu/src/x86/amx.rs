//! AMX: whether it is there, and how tile registers are used.
//!
//! Compilers know nothing of tile registers here, so they are named in assembly. The discipline: [`Tiles::new`] sets
//! their shapes, and whoever holds the value may use them; nothing is kept in a register from one block of assembly to
//! the next. Dropping it gives them back, so that the system has nothing to save for threads that do something else.
//!
//! | registers | hold |
//! |---|---|
//! | 0 to 3 | sums: 16 rows of weights by 16 tokens, 32 bits each |
//! | 4 and 5 | weights: 16 rows of up to 64 bytes |
//! | 6 and 7 | activations: up to 16 runs of four bytes (or two numbers of 16 bits) of each of 16 tokens |

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Whether the processor has tiles of bytes and of bf16, and the system lets this process use them. The first call asks
/// for that.
pub(crate) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| has_instructions() && saved_by_system() && permitted())
}

fn has_instructions() -> bool {
    const BF16_TILE_INT8: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    // SAFETY: every processor of this architecture has the instruction.
    #[allow(unused_unsafe, reason = "older compilers ask for it")]
    unsafe {
        __cpuid_count(0, 0).eax >= 7 && __cpuid_count(7, 0).edx & BF16_TILE_INT8 == BF16_TILE_INT8
    }
}

/// Whether the system saves tiles when it switches threads.
fn saved_by_system() -> bool {
    const TILES: u64 = 1 << 17 | 1 << 18;
    #[target_feature(enable = "xsave")]
    fn enabled() -> u64 {
        // SAFETY: the processor has it, and the system has turned it on.
        unsafe { _xgetbv(0) }
    }
    // SAFETY: the instruction set is there.
    is_x86_feature_detected!("xsave") && unsafe { enabled() } & TILES == TILES
}

/// Asks Linux for the use of tiles, which are a few kilobytes more to save. For the whole process, threads that are
/// there already among them.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const TILE_DATA: u64 = 18;
    let result: i64;
    // SAFETY: the call changes nothing but what is permitted; the kernel overwrites no registers but these.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") TILE_DATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of a row of each register.
    row_bytes: [u16; 16],
    /// Rows of each register.
    rows: [u8; 16],
}

/// The right to use tile registers, on this thread.
pub(super) struct Tiles(PhantomData<*const ()>);

impl Tiles {
    /// Shapes for products of `k` bytes of weights and activations, 4 to 64.
    ///
    /// # Safety
    /// [`is_available`], and no other `Tiles` is there on this thread.
    pub(super) unsafe fn new(k: u16) -> Self {
        assert!((4..=64).contains(&k) && k.is_multiple_of(4));
        let mut config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        for i in 0..8 {
            config.row_bytes[i] = if i == 4 || i == 5 { k } else { 64 };
            config.rows[i] = if i >= 6 { (k / 4) as u8 } else { 16 };
        }
        // SAFETY: by the caller; the shapes are valid.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
        Self(PhantomData)
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the instruction set is available, or there would be no value to drop.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}
