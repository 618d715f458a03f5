//! A whole decode step as one launch (`kernels/step.cuh` says how it works).
//!
//! [`Builder`] collects the phases of a step in order; [`Program`] is the list in device memory, ready to be run any number of times. What differs
//! between steps ([`Inputs`]) travels with the launch. Not every model fits: a phase that the kernel has no shape for is refused
//! with the reason, and the caller launches kernel by kernel instead.
//!
//! What one phase writes and a later one reads does not go to the buffer that the caller named but to a *place* of its own, of which
//! there are two sets that launches use in turn. Only what no phase reads arrives where the caller wants it, which may be two buffers in
//! turn as well ([`Builder::alternate`]), so that a launch can follow another before the host has seen what came of that.

mod attend;
mod experts;
mod products;
mod program;
mod rows;

pub use attend::{Attend, Norms};
pub use experts::Mixture;
pub use products::{First, Products};
pub use program::{Clocks, Inputs, Program};

use attend::Memory;

use crate::args::{self, Matrix, Phase, Words, Work};
use crate::gpu::{Gpu, Launch, Result, View};
use crate::ops::{Heads, Pairs, Part};
use crate::weight::Weight;

/// Threads of a block.
const BLOCK: u32 = 512;
/// Bytes of weights on their way to a warp.
const RING: usize = 9 << 10;
/// Bytes of `Asker`.
const ASKER: usize = 80;
/// Bytes of `Chosen`.
const CHOSEN: usize = experts::MAX_USED * 8;
/// Bytes of `StepShared`.
const STEP_SHARED: usize = (size_of::<args::Step>()
    + 4 * (size_of::<Phase>() + 8 + 16 * size_of::<Work>())
    + 16 * (8 * 8 + ASKER)
    + CHOSEN)
    .next_multiple_of(128)
    + 16 * RING;
/// Widest head, and query heads of a unit of attention.
const MAX_D: usize = 128;
const UNIT: usize = 8;
/// Pages that a block attends to, or half of that as long as few blocks share a unit.
const EACH: u32 = 8;
/// Blocks that share the pages of a unit, at most.
const MAX_SPLITS: usize = 64;
/// Room for sums of squares ahead of an input.
const NORMS: u32 = 128;
/// Marks the address of a place: what else is in it are bytes from the beginning of a set.
const PLACE: u64 = 1 << 63;
/// Places begin at multiples of this.
const ALIGN: usize = 128;

/// What all phases share.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Heads of every layer.
    pub heads: Heads,
    /// Layers.
    pub n_layer: usize,
    /// Pages of a layer's table.
    pub max_pages: usize,
    /// Which elements of a head rotate together.
    pub pairs: Pairs,
    /// Rotations, of which each layer has one.
    pub n_rope: usize,
    /// Masses are the mean over the heads instead of the largest.
    pub mean: bool,
    /// Factor of the scores.
    pub scale: f32,
}

impl Shape {
    /// Words that differ between steps.
    fn n_words(&self) -> usize {
        2 + 2 * self.n_layer + self.n_rope * self.heads.head_dim
    }
}

/// Collects phases.
pub struct Builder {
    gpu: Gpu,
    shape: Shape,
    phases: Vec<Phase>,
    /// Which of them are products, and with how many matrices.
    products: Vec<(usize, usize)>,
    /// Bytes of shared memory of the largest input of every second of them, and of the others.
    inputs: [usize; 2],
    /// What phases have written, in order.
    places: Vec<Place>,
    /// Bytes of shared memory that the largest phase wants.
    shared: usize,
    memory: Option<Memory>,
    /// Pairs of buffers that launches write in turn.
    pairs: Vec<[View; 2]>,
    /// Pages may be of any tier.
    tiered: bool,
    /// There is what only some models have: experts, windows, sinks, norms behind a block, factors, other gates than SwiGLU, several rotations.
    any: bool,
    /// Of each layer that attends, the pages that its window reaches at most.
    reach: Vec<u32>,
    /// Why the step cannot be one launch.
    refused: Option<String>,
}

/// Numbers that a phase writes.
struct Place {
    /// Where the caller wants them, and their bytes.
    buffer: u64,
    bytes: usize,
    /// Where they are instead, in bytes from the beginning of a set.
    from: usize,
    /// Whether a phase reads them.
    read: bool,
}

/// Bytes of dynamic shared memory that a block may have.
fn max_shared(gpu: &Gpu) -> usize {
    match gpu.info().sm.0 {
        9..=11 => 227 << 10,
        _ if gpu.is_emulated() => 227 << 10,
        _ => 99 << 10,
    }
}

impl Builder {
    /// No phases yet.
    pub fn new(gpu: &Gpu, shape: Shape) -> Self {
        let Heads {
            n_head,
            n_head_kv,
            head_dim,
        } = shape.heads;
        let mut new = Self {
            gpu: gpu.clone(),
            shape,
            phases: Vec::new(),
            products: Vec::new(),
            inputs: [0; 2],
            places: Vec::new(),
            shared: n_head * 8,
            memory: None,
            pairs: Vec::new(),
            tiered: false,
            any: shape.n_rope > 1,
            reach: vec![u32::MAX; shape.n_layer],
            refused: None,
        };
        let (sm, emulated) = (gpu.info().sm, gpu.is_emulated());
        new.want(sm >= (9, 0) || emulated, || {
            "a device older than Hopper".to_owned()
        });
        let words = shape.n_words();
        new.want(words <= Words::MAX, || format!("{} layers", shape.n_layer));
        new.want(
            head_dim.is_multiple_of(8) && head_dim <= MAX_D && n_head.is_multiple_of(n_head_kv),
            || format!("heads of {head_dim} elements"),
        );
        new.want(shape.pairs.code().is_multiple_of(2), || {
            "an odd number of pairs that rotate".to_owned()
        });
        new
    }

    fn want(&mut self, fits: bool, what: impl FnOnce() -> String) {
        if !fits {
            self.refused.get_or_insert_with(what);
        }
    }

    /// Says that the step holds something there is no phase for.
    pub fn refuse(&mut self, what: &str) {
        self.want(false, || what.to_owned());
    }

    /// Where a phase writes `bytes` that the caller wants in `out`.
    fn write(&mut self, out: View, bytes: usize) -> u64 {
        let end = |p: &Place| (p.from + p.bytes).next_multiple_of(ALIGN);
        let from = self.places.last().map_or(0, end);
        self.places.push(Place {
            buffer: out.at,
            bytes,
            from,
            read: false,
        });
        PLACE | from as u64
    }

    /// Whether a phase has written to a buffer: if not, others find there what it holds ahead of the step.
    pub fn is_written(&self, src: View) -> bool {
        let of = |p: &Place| (src.at..src.at + src.bytes() as u64).contains(&p.buffer);
        self.places.iter().any(of)
    }

    /// What the first `bytes` of a buffer hold now, for phases that want it when it holds something else.
    pub fn hold(&mut self, src: View, bytes: usize) -> View {
        View {
            at: self.read(src, bytes),
            ..src.slice(0, bytes)
        }
    }

    /// Where a phase finds the first `bytes` of `src`.
    fn read(&mut self, src: View, bytes: usize) -> u64 {
        if src.at & PLACE != 0 {
            return src.at;
        }
        let (from, to) = (src.at, src.at + bytes as u64);
        let overlaps = |p: &&mut Place| p.buffer < to && from < p.buffer + p.bytes as u64;
        let Some(place) = self.places.iter_mut().rev().find(overlaps) else {
            return src.at;
        };
        place.read = true;
        let inside = from >= place.buffer && to <= place.buffer + place.bytes as u64;
        let at = place.from as u64 + from.saturating_sub(place.buffer);
        self.want(inside, || {
            "a phase that reads the results of several".to_owned()
        });
        PLACE | at
    }

    fn matrix(&mut self, &(w, bias, out): &Part<'_>, add: bool) -> Matrix {
        let bytes = w.n_row() * 4;
        assert!(out.bytes() >= bytes);
        let add = if add { self.read(out, bytes) } else { 0 };
        Matrix {
            out: self.write(out, bytes),
            add,
            ..self.weights(w, bias, w.n_row())
        }
    }

    /// A matrix of `n_out` rows, or several one after the other.
    fn weights(&mut self, w: &Weight, bias: Option<View>, n_out: usize) -> Matrix {
        let (n_in, block) = (w.n_in(), if w.wants_q8() { 32 } else { 8 });
        self.want(n_in.is_multiple_of(block), || format!("rows of {n_in}"));
        assert!(bias.is_none_or(|b| b.bytes() >= w.n_row() * 4));
        Matrix {
            w: w.view().at,
            bias: bias.map_or(0, |b| b.at),
            row_bytes: w.row_bytes() as u64,
            ty: w.ty().id(),
            n_out: n_out as u32,
            ..Matrix::default()
        }
    }

    /// The token's row of a matrix, times a factor.
    pub fn embed(&mut self, out: View, w: &Weight, scale: f32) {
        assert!(out.bytes() >= w.n_in() * 4);
        let matrix = Matrix {
            w: w.view().at,
            out: self.write(out, w.n_in() * 4),
            row_bytes: w.row_bytes() as u64,
            ty: w.ty().id(),
            n_out: w.n_row() as u32,
            ..Matrix::default()
        };
        self.phases.push(Phase {
            m: [matrix, Matrix::default(), Matrix::default()],
            n_in: w.n_in() as u32,
            kind: 0,
            scale,
            ..Phase::default()
        });
    }

    fn push_products(&mut self, mut phase: Phase, n_mat: usize) {
        self.lay_out(&mut phase);
        self.products.push((self.phases.len(), n_mat));
        self.phases.push(phase);
    }

    /// Where the input of a phase of products lies in shared memory, from the beginning of its own; and what experts say, behind it.
    fn lay_out(&mut self, phase: &mut Phase) {
        let n = phase.n_in;
        phase.f_at = NORMS;
        phase.q_at = phase.f_at + phase.want_f * (4 * n).next_multiple_of(128);
        phase.ds_at = phase.q_at + phase.want_q * n.next_multiple_of(128);
        phase.join_at = phase.ds_at + phase.want_q * (n / 2).next_multiple_of(128);
        let rows = phase.m[0].n_out.div_ceil(self.gpu.info().n_sm);
        let joined = match phase.experts {
            0 => 0,
            1 => 8 * phase.n_expert.next_multiple_of(128),
            _ => phase.n_used * rows * 4,
        };
        let bytes = phase.join_at + joined.next_multiple_of(128);
        let own = &mut self.inputs[self.products.len() % 2];
        *own = (*own).max(bytes as usize);
    }

    /// Inputs lie in two places in turn, so that one is prepared while others still multiply by the one before, if there is room. Says how much
    /// they take.
    fn place_inputs(&mut self) -> usize {
        let [even, odd] = self.inputs;
        let again = STEP_SHARED + even + odd > max_shared(&self.gpu);
        for (i, (k, _)) in self.products.iter().enumerate() {
            let p = &mut self.phases[*k];
            p.again = u32::from(again);
            if i % 2 == 1 && !again {
                let at = [&mut p.f_at, &mut p.q_at, &mut p.ds_at, &mut p.join_at];
                at.into_iter().for_each(|at| *at += even as u32);
            }
        }
        if again { even.max(odd) } else { even + odd }
    }

    /// What each warp has to do in each phase: `[n_phase, n_block, n_warp]`. A search for the largest result has the rows of the products before.
    fn work(&mut self, n_block: u32, n_warp: u32) -> Vec<Work> {
        let each = (n_block * n_warp) as usize;
        let mut all = vec![Work::default(); self.phases.len() * each];
        let mut before = 0;
        for &(k, n_mat) in &self.products {
            self.phases[before].next = k as u32;
            (before, self.phases[k].next) = (k, u32::MAX);
            let work = match self.phases[k].experts {
                0 => rows::work(&mut self.phases[k], n_mat, n_block, n_warp),
                _ => rows::work_of_experts(&mut self.phases[k], n_block, n_warp),
            };
            let searched = self.phases.get(k + 1).is_some_and(|p| p.kind == 4);
            for k in k..=k + usize::from(searched) {
                all[k * each..][..each].copy_from_slice(&work);
            }
        }
        all
    }

    /// Finds the largest of the results of the products that came last: of the first matrix, which are logits.
    pub fn best(&mut self) {
        let of = self.phases.last().filter(|p| p.kind == 1 && p.gated == 0);
        let m = of.expect("products").m;
        self.phases.push(Phase {
            m,
            kind: 4,
            ..Phase::default()
        });
    }

    /// Every second launch writes to the second of these buffers of one size what goes to the first otherwise.
    pub fn alternate(&mut self, pair: [View; 2]) {
        assert_eq!(pair[0].bytes(), pair[1].bytes());
        self.pairs.push(pair);
    }

    /// The list in device memory, or why there is none.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn finish(mut self) -> Result<std::result::Result<Program, String>> {
        let inputs = self.place_inputs();
        let (shared, max) = (STEP_SHARED + self.shared.max(inputs), max_shared(&self.gpu));
        self.want(shared <= max, || {
            format!("{shared} bytes of shared memory where there are {max}")
        });
        if let Some(why) = self.refused {
            return Ok(Err(why));
        }
        let emulated = self.gpu.is_emulated();
        let n_block = self.gpu.info().n_sm;
        rows::ask_early(&mut self.phases, &self.products, n_block as usize);
        let work = self.work(n_block, BLOCK / 32);
        let (gpu, s) = (&self.gpu, &self.shape);
        let work = gpu.buffer_of(bytes_of(&work))?;
        let reach = gpu.buffer_of(bytes_of(&self.reach))?;
        let Heads {
            n_head,
            n_head_kv,
            head_dim,
        } = s.heads;
        let n_sm = gpu.info().n_sm as usize;
        let units = n_head_kv * (n_head / n_head_kv).div_ceil(UNIT);
        let max_splits = (n_sm / units).clamp(1, MAX_SPLITS);
        let counters = gpu.alloc(192)?;
        let part = gpu.alloc(n_head * max_splits * head_dim * 8)?;
        let best = gpu.alloc(8)?;
        let told = gpu.pinned(8)?;
        let set = self.places.last().map_or(0, |p| p.from + p.bytes);
        let set = set.next_multiple_of(ALIGN);
        // All ones is what a word holds before it is written (`SENTINEL`).
        let places = gpu.buffer_of(&vec![0xff; 2 * set])?;
        let bases = [0, 1].map(|k| places.view().at + (k * set) as u64);
        let mut phases = Vec::new();
        for (k, base) in bases.into_iter().enumerate() {
            let mut list = self.phases.clone();
            let second = if k == 1 { &self.pairs[..] } else { &[] };
            for p in &mut list {
                settle(p, &self.places, base);
                p.reach = reach.view().at;
                p.m.iter_mut().for_each(|m| other_of(&mut m.out, second));
                other_of(&mut p.mass, second);
            }
            phases.push(gpu.buffer_of(bytes_of(&list))?);
        }
        let args = [0, 1].map(|k: usize| args::Step {
            phases: phases[k].view().at,
            work: work.view().at,
            unused: bases[1 - k],
            arrived: counters.view().at,
            left: counters.view().at + 64,
            part: part.view().at,
            top: counters.view().at + 128,
            best: best.view().at + 4 * k as u64,
            told: told.view().at + 4 * k as u64,
            follows: 0,
            trace: 0,
            each: if emulated { 3 } else { EACH },
            n_unused: (set / 16) as u32,
            turn: 0,
            n_phase: self.phases.len() as u32,
            n_head: n_head as u32,
            n_head_kv: n_head_kv as u32,
            group: (n_head / n_head_kv) as u32,
            tiles: (units / n_head_kv) as u32,
            units: units as u32,
            head_dim: head_dim as u32,
            max_pages: s.max_pages as u32,
            max_splits: max_splits as u32,
            neox: s.pairs.code(),
            mean: u32::from(s.mean),
            pad: 0,
            scale: s.scale,
            n_layer: s.n_layer as u32,
            n_words: s.n_words() as u32,
            words: Words::default(),
        });
        let launch = Launch {
            grid: [n_sm as u32, 1, 1],
            block: BLOCK,
            shared: shared as u32,
            together: true,
        };
        let mut buffers = vec![counters, part, places, work, reach];
        buffers.extend(phases);
        buffers.extend(self.memory.into_iter().flat_map(|m| [m.head_ml, m.page_ml]));
        Ok(Ok(Program {
            done: [self.gpu.mark()?, self.gpu.mark()?],
            gpu: self.gpu,
            args,
            launches: 0,
            tiered: self.tiered,
            any: self.any,
            launch,
            words: Words::default(),
            best,
            told,
            _buffers: buffers,
        }))
    }
}

/// Notes in which form a phase wants its input for products with a matrix.
fn want(phase: &mut Phase, w: &Weight) {
    let q8 = w.wants_q8();
    phase.want_q |= u32::from(q8);
    phase.want_f |= u32::from(!q8);
}

/// What the device has in its memory.
trait Plain: Copy {}
// They are `repr(C)` without padding, as their sizes say.
impl Plain for Phase {}
impl Plain for Work {}
impl Plain for u32 {}

fn bytes_of<T: Plain>(all: &[T]) -> &[u8] {
    // SAFETY: types that are `Plain` have no padding.
    unsafe { std::slice::from_raw_parts(all.as_ptr().cast::<u8>(), size_of_val(all)) }
}

/// Gives the places of a phase their addresses in the set at `base`; what nobody reads goes where the caller wants it.
fn settle(phase: &mut Phase, places: &[Place], base: u64) {
    let inside = |at: &mut u64| {
        if *at & PLACE != 0 {
            *at = base + (*at & !PLACE);
        }
    };
    let result = |at: &mut u64| {
        let unread = |p: &&Place| *at == PLACE | p.from as u64 && !p.read;
        match places.iter().find(unread) {
            Some(place) => *at = place.buffer,
            None => inside(at),
        }
    };
    for m in &mut phase.m {
        result(&mut m.out);
        inside(&mut m.add);
    }
    result(&mut phase.out);
    result(&mut phase.sum);
    let read = [
        &mut phase.src,
        &mut phase.plus,
        &mut phase.q,
        &mut phase.k,
        &mut phase.v,
        &mut phase.logits,
    ];
    read.into_iter().for_each(inside);
}

/// Moves an address inside the first of a pair of buffers to the second.
fn other_of(at: &mut u64, pairs: &[[View; 2]]) {
    let inside = |[a, _]: &&[View; 2]| (a.at..a.at + a.bytes() as u64).contains(at);
    if let Some([a, b]) = pairs.iter().find(inside) {
        *at = *at - a.at + b.at;
    }
}
