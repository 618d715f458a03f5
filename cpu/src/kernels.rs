//! The kernels of this machine's architecture, or none.

#[cfg(target_arch = "x86_64")]
pub(crate) use crate::x86::{Form, Kernel, ROWS as MAX_ROWS, Tile, kernel};

#[cfg(not(target_arch = "x86_64"))]
pub(crate) use none::*;

/// Where there are no kernels, the scalar path serves everything.
#[cfg(not(target_arch = "x86_64"))]
mod none {
    use crate::Isa;
    use lemma_quant::GgmlType;

    pub(crate) const MAX_ROWS: usize = 16;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) enum Form {
        X32,
        X256,
    }

    pub(crate) struct Tile;

    type RowsFn = unsafe fn(*const u8, usize, usize, *const u8, usize) -> [f32; 4];
    type UnpackFn = unsafe fn(*const u8, usize, usize, usize, &mut Tile);
    type TileFn = unsafe fn(&Tile, *const u8, usize, usize, usize, &mut [[f32; MAX_ROWS]; 8]);

    #[derive(Clone, Copy)]
    pub(crate) struct Kernel {
        pub(crate) form: Form,
        pub(crate) rows: RowsFn,
        pub(crate) gemm: Option<(UnpackFn, TileFn)>,
    }

    pub(crate) fn kernel(_: GgmlType, _: Isa) -> Option<Kernel> {
        None
    }
}
