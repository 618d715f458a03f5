//! Decode steps of one launch that overlap with the host.
//!
//! When the caller [says](super::Runner::follow) that it will take the best token, or draw one of the best, the device does that too, and the
//! step behind the present one is asked for before the host has seen what came of this one: where it goes is known as long as no page is
//! needed. The host then works on masses and text of a step while the next one runs. What the pool decides is not touched by that: a page is taken, and another given up
//! for it, only when the masses of all steps before have been seen. A step that was asked for in vain has written to rows that hold
//! nothing yet, and to buffers of its own.

use lemma_cuda::ops::{self, Shortlist};
use lemma_cuda::step::{Inputs, Program};
use lemma_cuda::{CudaError, Gpu, Pinned, View};

use super::Host;
use super::buffers::Pool;
use super::pass::Pass;
use crate::error::Error;
use crate::kv::{Cache, PAGE, Place};
use crate::sampling::{Candidate, Choice, Draw, MAX_TOP};

const _: () = assert!(MAX_TOP == ops::MAX_TOP);

/// Steps in flight, and what the last one left.
pub(super) struct Ahead {
    choice: Choice,
    /// What was drawn among the largest logits of launches of either set, and those.
    lists: [Shortlist; 2],
    /// The step that was asked for before its token was known.
    flight: Option<Flight>,
    /// What the last step left, if that was one launch.
    last: Option<Last>,
    /// `[n_layer, max_pages]` masses, written by launches in turn.
    masses: [Pinned; 2],
    next: Vec<Place>,
    n_pages: Vec<u32>,
    places: Vec<u32>,
    rope: Vec<f32>,
}

struct Flight {
    set: usize,
    pos: u32,
}

struct Last {
    best: Option<u32>,
    /// The token that the device goes on with.
    next: Option<u32>,
    /// The set it wrote to, if it has left a list of so many logits.
    list: Option<(usize, usize)>,
    /// The logits that have not been fetched yet.
    logits: Option<usize>,
}

impl Ahead {
    pub(super) fn new(gpu: &Gpu, pool: &Pool) -> Result<Self, CudaError> {
        let bytes = pool.masses.view().bytes();
        Ok(Self {
            choice: Choice::Open,
            lists: [Shortlist::new(gpu)?, Shortlist::new(gpu)?],
            flight: None,
            last: None,
            masses: [gpu.pinned(bytes)?, gpu.pinned(bytes)?],
            next: Vec::new(),
            n_pages: Vec::new(),
            places: Vec::new(),
            rope: Vec::new(),
        })
    }

    /// Where launches leave masses.
    pub(super) fn masses(&self) -> [View; 2] {
        self.masses.each_ref().map(Pinned::view)
    }

    /// Makes room for the masses of a larger pool; no launch may be under way.
    pub(super) fn grow(&mut self, gpu: &Gpu, pool: &Pool) -> Result<(), CudaError> {
        let bytes = pool.masses.view().bytes();
        self.masses = [gpu.pinned(bytes)?, gpu.pinned(bytes)?];
        Ok(())
    }

    pub(super) fn follow(&mut self, choice: Choice) {
        self.choice = choice;
    }

    /// The last pass was another one, or the step is gone.
    pub(super) fn forget(&mut self) {
        (self.flight, self.last) = (None, None);
    }

    /// The best token of the last step, if that was one launch.
    pub(super) fn best(&self) -> Option<Option<u32>> {
        self.last.as_ref().map(|l| l.best)
    }

    /// The `k` largest logits of the last step, if there is a list of so many; whether there is.
    pub(super) fn top(&self, k: usize, out: &mut Vec<Candidate>) -> bool {
        let list = self.last.as_ref().and_then(|l| l.list);
        let list = list.filter(|&(_, n)| k <= n);
        match list.and_then(|(set, _)| self.lists[set].list()) {
            Some(list) => {
                out.clear();
                out.extend(list.take(k).map(|(id, logit)| Candidate::new(id, logit)));
                true
            }
            None => false,
        }
    }

    /// Brings the logits of the last step to the host.
    pub(super) fn fetch_logits(&mut self, p: &Pass, host: &mut Host) -> Result<(), CudaError> {
        if let Some(set) = self.last.as_mut().and_then(|l| l.logits.take()) {
            let bytes = p.hp.n_vocab * 4;
            p.gpu.bind()?;
            host.logits
                .download(0, p.logits[set].view().slice(0, bytes))?;
            host.logits.bytes()?;
        }
        Ok(())
    }

    /// The step of `token`, whose place the cache has just given.
    pub(super) fn run(
        &mut self,
        program: &mut Program,
        token: u32,
        p: &Pass,
        host: &mut Host,
        cache: &mut Cache,
    ) -> Result<(), Error> {
        let pos = cache.pos() - 1;
        let guessed = self.last.as_ref().and_then(|l| l.next) == Some(token);
        let flight = self.flight.take();
        let set = match flight.filter(|f| guessed && f.pos == pos) {
            // Its page has had room, so that the tables are as they were.
            Some(f) => f.set,
            None => {
                host.send_tables(p, cache)?;
                self.next.clear();
                let tables = cache.tables().iter();
                self.next.extend(tables.flat_map(|t| t.places.last()));
                self.launch(program, p, cache, pos, Some(token))?
            }
        };
        let mut list = None;
        if let Choice::Draw(d) = &self.choice {
            self.draw(program, p, set, d)?;
            list = Some((set, d.top_k));
        }
        let follows = self.choice != Choice::Open;
        if follows && cache.next_places(&mut self.next) {
            let set = self.launch(program, p, cache, pos + 1, None)?;
            self.flight = Some(Flight { set, pos: pos + 1 });
        }
        let mut logits = Some(set);
        if follows {
            program.wait(set)?;
        } else {
            // Behind the step; what waits for them waits for it as well.
            let bytes = p.hp.n_vocab * 4;
            host.logits
                .download(0, p.logits[set].view().slice(0, bytes))?;
            host.logits.bytes()?;
            logits = None;
        }
        let best = program.best(set);
        let next = match list {
            Some((set, _)) => self.lists[set].drawn(),
            None => best,
        };
        self.last = Some(Last {
            best,
            next,
            list,
            logits,
        });
        if p.wants_mass {
            let (max, masses) = (p.pool.max_pages, self.masses[set].settled_f32());
            for il in 0..cache.n_layer() {
                let n = cache.layer(il).pages.len();
                cache.end_layer(il, &masses[il * max..][..n], 1);
            }
        }
        Ok(())
    }

    /// Draws the token behind the last launch of a set.
    fn draw(&self, program: &Program, p: &Pass, set: usize, d: &Draw) -> Result<(), CudaError> {
        let (n_vocab, next) = (p.hp.n_vocab, program.next_token(set));
        let d = ops::Draw {
            top_k: d.top_k,
            top_p: d.top_p,
            min_p: d.min_p,
            temp: d.temp,
            lot: d.lot as f32,
        };
        self.lists[set].draw(&p.gpu, next, p.logits[set].view(), n_vocab, &d)?;
        program.mark(set)
    }

    /// Asks for the step at `pos`, whose places are in `next`; the set that it writes to.
    fn launch(
        &mut self,
        program: &mut Program,
        p: &Pass,
        cache: &Cache,
        pos: u32,
        token: Option<u32>,
    ) -> Result<usize, CudaError> {
        let d = p.hp.head_dim;
        self.rope.resize(p.hp.ropes.len() * d, 0.0);
        for (kind, to) in self.rope.chunks_exact_mut(d.max(1)).enumerate() {
            p.rope.fill(kind, pos, 1, d, to);
        }
        self.n_pages.clear();
        let tables = cache.tables().iter();
        self.n_pages.extend(tables.map(|t| t.pages.len() as u32));
        self.places.clear();
        let place = |at: &Place| at.slot * PAGE as u32 + at.row;
        self.places.extend(self.next.iter().map(place));
        let set = program.next_set();
        program.run(&Inputs {
            pos,
            token,
            n_pages: &self.n_pages,
            places: &self.places,
            rope: &self.rope,
        })?;
        Ok(set)
    }
}
