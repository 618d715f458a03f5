//! AMX: whether it is there, and how tile registers are used.
//!
//! Compilers know nothing of tile registers here, so they are named in assembly. The discipline: [`Tiles::shape`]
//! sets their shapes, and whoever holds the value may use them; nothing is kept in a register from one block of assembly to
//! the next. Dropping it gives them back, so that the system has nothing to save for threads that do something else.
//!
//! | registers | hold |
//! |---|---|
//! | 0 to 3 | sums: up to 16 tokens by 16 rows of weights, 32 bits each; even ones of the first group of tokens, odd ones of the second |
//! | 4 and 5 | activations: up to 16 tokens of up to 64 bytes, of the first group and of the second |
//! | 6 and 7 | weights: up to 16 runs of four bytes of each of 16 rows |

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
pub(super) struct Tiles {
    /// What was asked for last.
    shape: (u16, [usize; 2]),
    not_send: PhantomData<*const ()>,
}

impl Tiles {
    /// # Safety
    /// [`is_available`], and no other `Tiles` is there on this thread.
    pub(super) unsafe fn new() -> Self {
        Self {
            shape: (0, [0; 2]),
            not_send: PhantomData,
        }
    }

    /// Shapes for products over `k` bytes, 4 to 64, of two groups of 1 to 16 tokens.
    pub(super) fn shape(&mut self, k: u16, tokens: [usize; 2]) {
        if self.shape == (k, tokens) {
            return;
        }
        assert!((4..=64).contains(&k) && k.is_multiple_of(4));
        assert!(tokens.iter().all(|n| (1..=16).contains(n)));
        let mut config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        for i in 0..8 {
            config.row_bytes[i] = if i == 4 || i == 5 { k } else { 64 };
            config.rows[i] = if i >= 6 {
                (k / 4) as u8
            } else {
                tokens[i % 2] as u8
            };
        }
        // SAFETY: by the caller of `new`; the shapes are valid.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
        self.shape = (k, tokens);
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the instruction set is available, or there would be no value to drop.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}
