//! Recurrent states in device memory: what layers without keys and values keep of the tokens before.
//!
//! Kernels take a state as empty where a pass begins at position 0, which they read from device memory, so nothing is reset here and recorded
//! launches serve every step. Models with states have no steps that are asked for ahead of their token: those could not be taken back.

use lemma_cuda::{Buffer, CudaError, Gpu, View};

use crate::arch::{HParams, StateShape};

/// The states of a sequence.
pub(super) struct States {
    pub(super) shape: StateShape,
    /// `[n_layer_state, n_all]` of [`StateShape`]: last inputs of the convolution, then the matrices.
    now: Buffer,
    /// A copy of all, to go back to.
    saved: Buffer,
    /// `[n_ubatch, width]`: what the convolution gives. Blocks read inputs of which others would write the results.
    conv: Buffer,
    /// Whether [`Buf::Qkv`](super::super::Buf::Qkv) has been through it.
    pub(super) convolved: bool,
    /// What went wrong when states were kept or brought back, until a pass can say it.
    lost: Option<CudaError>,
}

impl States {
    /// Nothing for models without states.
    pub(super) fn new(gpu: &Gpu, hp: &HParams, n_ubatch: usize) -> Result<Option<Self>, CudaError> {
        let Some(shape) = hp.state() else {
            return Ok(None);
        };
        let bytes = hp.n_layer_state() * shape.n_all() * 4;
        Ok(Some(Self {
            shape,
            now: gpu.alloc(bytes)?,
            saved: gpu.alloc(bytes)?,
            conv: gpu.alloc(n_ubatch * shape.width * 4)?,
            convolved: false,
            lost: None,
        }))
    }

    /// Bytes of all of it.
    pub(super) fn bytes(hp: &HParams, n_ubatch: usize) -> u64 {
        let conv = hp.state().map_or(0, |s| n_ubatch * s.width * 4);
        hp.state_bytes() + conv as u64
    }

    /// The state of layer `il`: last inputs, matrices.
    pub(super) fn of(&self, hp: &HParams, il: usize) -> [View; 2] {
        let i = hp.layer_of_state(il);
        let (all, past) = (
            self.shape.n_all() * 4,
            (self.shape.d_conv - 1) * self.shape.width * 4,
        );
        let state = self.now.view().slice(i * all, all);
        [state.slice(0, past), state.slice(past, all - past)]
    }

    /// What the convolution gives.
    pub(super) fn conv(&self) -> View {
        self.conv.view()
    }

    pub(super) fn save(&mut self, gpu: &Gpu) {
        self.copy(gpu, self.saved.view(), self.now.view());
    }

    pub(super) fn restore(&mut self, gpu: &Gpu) {
        self.copy(gpu, self.now.view(), self.saved.view());
    }

    fn copy(&mut self, gpu: &Gpu, to: View, from: View) {
        if let Err(e) = gpu.bind().and_then(|()| gpu.copy(to, from)) {
            self.lost.get_or_insert(e);
        }
    }

    /// Says what went wrong since the last pass.
    pub(super) fn check(&mut self) -> Result<(), CudaError> {
        self.lost.take().map_or(Ok(()), Err)
    }
}
