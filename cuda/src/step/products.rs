//! Phases of products, and what becomes of their results.

use super::{BLOCK, Builder, PLACE, want};
use crate::args::{Matrix, Phase};
use crate::gpu::View;
use crate::ops::{Activation, Glu, Mode, Part};

/// Products with one input.
#[derive(Clone, Copy, Debug)]
pub struct Products<'a> {
    /// The matrices: at most three.
    pub parts: &'a [Part<'a>],
    /// `[n_in]`
    pub src: View,
    /// What is done to the input first.
    pub first: First,
    /// `[n_in]` weights of a norm of the input, and its epsilon.
    pub norm: Option<(View, f32)>,
    /// What is done with the results.
    pub mode: Mode,
}

/// What is done to the input of products ahead of all else.
#[derive(Clone, Copy, Debug, Default)]
pub enum First {
    /// Nothing.
    #[default]
    Nothing,
    /// Something is normed and added to it, and the sum takes its place.
    Add {
        /// `[n_in]`
        x: View,
        /// `[n_in]` weights of the norm.
        norm: View,
        /// Epsilon of the norm.
        eps: f32,
    },
    /// Its mean is taken off; where it lies it stays as it is.
    Center,
}

impl Builder {
    /// Products with one input.
    pub fn products(&mut self, p: &Products<'_>) {
        let n_in = p.parts[0].0.n_in();
        assert!(p.src.bytes() >= n_in * 4 && (1..=3).contains(&p.parts.len()));
        let gates = match p.mode {
            Mode::Store | Mode::Add => None,
            Mode::Gated(glu) => Some(glu),
            Mode::ReluSqr => return self.refuse("products that are squared"),
        };
        let gated = gates.is_some();
        self.any |= gates.is_some_and(|g| g != Glu::Swiglu);
        let mut phase = self.input(p.src, n_in, p.first, p.norm);
        phase.gated = gates.map_or(0, |g| 1 + g as u32);
        for (to, part) in phase.m.iter_mut().zip(p.parts).rev() {
            assert_eq!(part.0.n_in(), n_in);
            *to = self.matrix(part, p.mode == Mode::Add);
        }
        p.parts.iter().for_each(|part| want(&mut phase, part.0));
        if gated {
            let same = |a: &Matrix, b: &Matrix| (a.ty, a.n_out) == (b.ty, b.n_out);
            assert!(p.parts.len() == 2 && same(&phase.m[0], &phase.m[1]));
        }
        self.push_products(phase, p.parts.len());
    }

    /// A phase of products with an input of `n_in`.
    pub(super) fn input(
        &mut self,
        src: View,
        n_in: usize,
        first: First,
        norm: Option<(View, f32)>,
    ) -> Phase {
        let mut phase = Phase {
            src: self.read(src, n_in * 4),
            kind: 1,
            n_in: n_in as u32,
            width: n_in as u32,
            scale: 1.0,
            ..Phase::default()
        };
        if !matches!(first, First::Nothing) {
            // All of it is held in registers.
            self.want(
                n_in <= 16 * BLOCK as usize && n_in.is_multiple_of(8),
                || format!("sums of {n_in} elements ahead of products"),
            );
            self.any = true;
        }
        match first {
            First::Nothing => {}
            First::Add { x, norm, eps } => {
                assert!(x.bytes() >= n_in * 4 && norm.bytes() >= n_in * 4);
                phase.plus = self.read(x, n_in * 4);
                (phase.plus_norm, phase.eps_plus) = (norm.at, eps);
                phase.sum = self.write(src, n_in * 4);
            }
            First::Center => phase.center = 1,
        }
        if let Some((w, eps)) = norm {
            assert!(w.bytes() >= n_in * 4);
            (phase.norm, phase.eps) = (w.at, eps);
        }
        phase
    }

    /// The phase that came last, if all it does is to write its results, products of one input, to a buffer.
    fn last_to(&mut self, out: View) -> Option<&mut Phase> {
        let place = self.places.last().filter(|p| p.buffer == out.at)?;
        let at = PLACE | place.from as u64;
        let phase = self.phases.last_mut()?;
        let [m, others @ ..] = &phase.m;
        let alone = phase.gated != 0 || others.iter().all(|m| m.w == 0);
        (phase.kind == 1 && phase.experts == 0 && alone && (m.out, m.add) == (at, 0))
            .then_some(phase)
    }

    /// Multiplies what the last phase has written to a buffer.
    pub fn scale_last(&mut self, out: View, factor: f32) {
        match self.last_to(out) {
            Some(phase) => phase.scale *= factor,
            None => self.refuse("factors of what is no product"),
        }
        self.any = true;
    }

    /// What becomes of the results that the last phase has written to a buffer.
    pub fn activate_last(&mut self, out: View, by: Activation) {
        match self.last_to(out) {
            Some(phase) if phase.gated == 0 && phase.scale == 1.0 => phase.act = by.args(),
            _ => self.refuse("activations of what is no product"),
        }
        self.any = true;
    }

    /// Multiplies what the last phase has added to a buffer.
    pub fn scale_added(&mut self, factor: f32) {
        let added = |p: &&mut Phase| p.kind == 1 && p.experts == 0 && p.m[0].add != 0;
        match self.phases.last_mut().filter(added) {
            Some(phase) => phase.scale *= factor,
            None => self.refuse("factors of what is no product"),
        }
        self.any = true;
    }

    /// Adds what the last phase has written to a buffer to what another holds instead, and writes the sum there.
    pub fn add_last(&mut self, acc: View, out: View) {
        // Who reads it already would find the sum.
        let is_read = self.places.last().is_none_or(|p| p.read);
        if self.last_to(out).is_none() || is_read {
            return self.refuse("sums that are not of products");
        }
        let bytes = self.places.pop().map_or(0, |p| p.bytes);
        let (add, out) = (self.read(acc, bytes), self.write(acc, bytes));
        let m = self.phases.last_mut().map(|p| &mut p.m[0]);
        let m = m.expect("the phase that wrote there");
        (m.add, m.out) = (add, out);
    }
}
