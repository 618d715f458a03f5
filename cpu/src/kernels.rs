//! The kernels of this machine's architecture, or none.

#[cfg(target_arch = "x86_64")]
pub(crate) use crate::x86::ahead::prefetch as read_ahead;
#[cfg(target_arch = "x86_64")]
pub(crate) use crate::x86::{
    Form, Kernel, ROWS as MAX_ROWS, Rows, Tile, TilesFn, UnpackFn, bf16, kernel,
};

/// Where the rows begin that are read next: at `at`, or nowhere if that is null, in four runs that are `stride` bytes apart.
#[derive(Clone, Copy)]
pub(crate) struct Next {
    pub(crate) at: *const u8,
    pub(crate) stride: usize,
}

/// Rows of a run, where `n` rows of a product with one token are read as four runs beside each other.
pub(crate) fn run(n: usize) -> usize {
    n.div_ceil(4)
}

/// The first rows of such runs, which overlap if there are no four times as many rows.
pub(crate) fn first_rows(n: usize) -> [usize; 4] {
    [0, 1, 2, 3].map(|r| (r * run(n)).min(n - run(n)))
}

/// Begins to read `n` bytes from `p` on, which may be anywhere.
#[cfg(target_arch = "x86_64")]
pub(crate) fn prefetch(isa: crate::Isa, p: *const u8, n: usize) {
    if isa >= crate::Isa::Avx2 {
        read_ahead(near(), p, n);
    }
}

/// Whether what is read ahead of products that are bound by memory goes to the first-level cache, not the second.
#[cfg(target_arch = "x86_64")]
pub(crate) fn near() -> bool {
    crate::x86::ahead::Reach::get().near
}

/// Products over registers alone, `n` rounds; returns the number of operations.
#[cfg(target_arch = "x86_64")]
pub(crate) fn peak(isa: crate::Isa, numbers: crate::ceiling::Numbers, n: u64) -> u64 {
    use crate::ceiling::Numbers;
    // SAFETY: the set is available, the caller has checked.
    unsafe {
        match numbers {
            Numbers::Bytes => crate::x86::peak::bytes(isa, n),
            Numbers::Pairs if isa >= crate::Isa::Avx512Bf16 => crate::x86::peak::pairs(n),
            Numbers::Floats | Numbers::Pairs => crate::x86::peak::floats(isa, n),
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) use none::*;

/// Where there are no kernels, the scalar path serves everything.
#[allow(dead_code, reason = "nothing makes kernels")]
#[cfg(not(target_arch = "x86_64"))]
mod none {
    use super::Next;
    use crate::Isa;
    use lemma_quant::GgmlType;

    pub(crate) const MAX_ROWS: usize = 16;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) enum Form {
        X32,
        X256,
    }

    pub(crate) struct Tile;

    pub(crate) struct Rows<'a> {
        pub(crate) w: &'a [u8],
        pub(crate) row_size: usize,
        pub(crate) x: *const u8,
        pub(crate) n_blocks: usize,
        pub(crate) next: Next,
    }

    pub(crate) fn peak(_: Isa, _: crate::ceiling::Numbers, _: u64) -> u64 {
        0
    }

    pub(crate) fn near() -> bool {
        true
    }

    pub(crate) fn prefetch(_: Isa, _: *const u8, _: usize) {}

    pub(crate) fn read_ahead(_: bool, _: *const u8, _: usize) {}

    pub(crate) mod bf16 {
        use crate::float::{ROWS, RoundedBlock, RoundedTile, TOKENS};

        pub(crate) const fn token_size(_: usize) -> usize {
            0
        }

        pub(crate) unsafe fn round(_: &[f32], _: &mut [u8]) {
            unreachable!("no such instruction set");
        }

        pub(crate) unsafe fn mul(_: RoundedTile<'_>, _: &mut [[f32; ROWS]; TOKENS]) {
            unreachable!("no such instruction set");
        }

        pub(crate) unsafe fn mul_many(_: RoundedBlock<'_>, _: &dyn Fn(usize, &[f32])) {
            unreachable!("no such instruction set");
        }
    }

    type RowsFn = unsafe fn(&Rows<'_>, &mut [f32]);
    pub(crate) type UnpackFn = unsafe fn(*const u8, usize, usize, usize, *const u8, &mut Tile);
    pub(crate) type TilesFn = unsafe fn(&[Tile], *const u8, usize, usize, &mut [[f32; MAX_ROWS]]);

    #[derive(Clone, Copy)]
    pub(crate) struct Kernel {
        pub(crate) form: Form,
        pub(crate) columns: usize,
        pub(crate) rows: RowsFn,
        pub(crate) gemm: (UnpackFn, TilesFn),
        pub(crate) wide: Option<(usize, UnpackFn, TilesFn)>,
    }

    pub(crate) fn kernel(_: GgmlType, _: Isa) -> Option<Kernel> {
        None
    }
}
