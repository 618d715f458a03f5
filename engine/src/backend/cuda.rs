//! The CUDA backend: the verbs over `lemma-cuda`.
//!
//! A decode step is one launch ([`step`], [`ahead`]) where the model's shapes allow it; where they do not, its launches are recorded once as a
//! graph and replayed. What differs between steps travels with the launch, or lies in device memory: one small upload before each pass brings
//! position, token, places and rotations. Page tables travel when they have changed. The books of the pool
//! stay with [`Cache`], so CPU and GPU decide alike; the device reduces page masses over the heads and hands over one number a
//! page.
//!
//! Some things are fused behind the verbs' backs: norms write their result once more quantized, for the products that follow;
//! norms over heads and the rotation wait for [`Backend::attention`], which does them while it stores keys and values; gate and up wait
//! for [`Backend::swiglu`] and become one launch; norms and gates of a delta net wait, for one token, for
//! [`Backend::gated_delta_net`], and the norm of what it gives waits for its gate; what gates a state space waits for the norm behind it.

mod ahead;
mod buffers;
mod host;
mod moves;
mod need;
mod pass;
mod recurrent;
mod step;
mod supports;
mod upload;

use std::sync::Arc;
use std::time::Instant;

use lemma_cuda::ops::Half;
use lemma_cuda::step::{Clocks, Program};
use lemma_cuda::{Buffer, CudaError, Gpu, Graph, View, Weight};

use self::ahead::Ahead;
use self::buffers::{Moe, Pool};
use self::host::{Host, StepLayout};
use self::need::Need;
pub use self::need::Split;
use self::pass::hosted::Hosted;
use self::pass::{Pass, Pending};
use self::recurrent::States;
use self::upload::upload;
use super::cpu::CpuWeight;
use super::{Buf, Ceiling, Outputs, Runner};
use crate::arch::{ArchModel, HParams, Rope, Widths};
use crate::error::Error;
use crate::gguf::GgufFile;
use crate::kv::{Cache, Layout};
use crate::options::{Aggregate, KvBudget, LoadOptions};
use crate::report;
use crate::sampling::{self, Candidate, Choice};

impl From<CudaError> for Error {
    fn from(e: CudaError) -> Self {
        Error::runtime(e.0)
    }
}

/// Tokens of a prompt that a divided model leaves room for beside a pool of default size.
const PROMPT: usize = 4096;

/// A weight in device memory.
#[derive(Clone, Debug)]
pub enum CudaWeight {
    /// A matrix.
    Mat(Arc<Weight>),
    /// A vector, in f32.
    Vec(Arc<Buffer>),
    /// Of experts that the CPU runs: in the file.
    Host(Arc<CpuWeight>),
}

impl CudaWeight {
    fn mat(&self) -> &Arc<Weight> {
        match self {
            Self::Mat(w) => w,
            Self::Vec(_) | Self::Host(_) => unreachable!("bound as a matrix"),
        }
    }

    fn vec(&self) -> View {
        match self {
            Self::Vec(b) => b.view(),
            Self::Mat(_) | Self::Host(_) => unreachable!("bound as a vector"),
        }
    }
}

/// A model in device memory.
pub struct CudaRunner {
    /// The decode step, and what it does. Before what it points to, so that it is dropped first.
    step: Option<(Decode, Kind)>,
    /// The decode step that was last run without a graph: the first of a kind loads the kernels, the second can be recorded.
    warm: Option<Kind>,
    /// Whether a step may be one launch.
    whole: bool,
    /// Steps of one launch that overlap with the host.
    ahead: Ahead,
    model: ArchModel<CudaWeight>,
    pass: Pass,
    host: Host,
}

/// A decode step that can be repeated.
enum Decode {
    /// One launch for all of it.
    Whole(Box<Program>),
    /// A launch for each operation, recorded.
    Graph(Graph),
}

impl Decode {
    /// Runs the last step once more.
    fn repeat(&mut self) -> Result<(), CudaError> {
        match self {
            Self::Whole(program) => program.repeat(),
            Self::Graph(graph) => graph.replay(),
        }
    }
}

/// What decode steps differ in.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Kind {
    /// Whether it leaves masses.
    masses: bool,
    /// Whether pages may lie in lower tiers.
    tiered: bool,
}

impl CudaRunner {
    /// [`CudaRunner::part`] that is all of a model.
    ///
    /// # Errors
    /// As there.
    pub fn new(
        gpu: &Gpu,
        file: &GgufFile,
        hp: &HParams,
        o: &LoadOptions,
        layout: &Layout,
        n_ubatch: usize,
    ) -> Result<Self, Error> {
        Self::part(gpu, file, hp, o, layout, n_ubatch, Split::default())
    }

    /// As much of a model as a device can hold and as the options say; all of it where nothing fits. Where a model has to be divided anyway, a pool
    /// that grows with the first prompt has room to.
    ///
    /// # Errors
    /// As [`CudaRunner::part`], but for memory.
    pub fn what_fits(
        gpu: &Gpu,
        file: &GgufFile,
        hp: &HParams,
        o: &LoadOptions,
        layout: &Layout,
        n_ubatch: usize,
    ) -> Result<Split, Error> {
        let (heads, types, n_part) = supports::check(file, hp, o, layout)?;
        gpu.bind()?;
        let (free, _) = gpu.memory()?;
        let room = |layout: &Layout| buffers::room(gpu, &types, heads, n_part, layout);
        let fits = |room, free, split| {
            let need = Need::new(file, hp, room, n_ubatch.max(1), split);
            need.is_ok_and(|n| n.bytes() <= free)
        };
        let (free, whole) = (free as u64, Split::default());
        let asked = o.gpu_layers.is_some() || o.cpu_experts.is_some();
        if !asked && fits(room(layout), free, whole) {
            return Ok(whole);
        }
        let mut larger = layout.clone();
        if o.kv.budget == KvBudget::Default {
            let n = PROMPT.div_ceil(layout.page) + layout.n_slots;
            larger = layout.grown(n.min(layout.n_ctx.div_ceil(layout.page)));
        }
        // While it grows half of it is held twice.
        let twice = match larger.n_slots > layout.n_slots {
            true => buffers::pool_bytes(gpu, &types, heads, n_part, &larger) / 2,
            false => 0,
        };
        let (room, free) = (room(&larger), free.saturating_sub(twice));
        Ok(Split::that_fits(hp, o, |split| fits(room, free, split)))
    }

    /// Bytes that a part of a model takes on a device, no fewer.
    ///
    /// # Errors
    /// As [`CudaRunner::part`], but for memory.
    pub fn need(
        gpu: &Gpu,
        file: &GgufFile,
        hp: &HParams,
        o: &LoadOptions,
        layout: &Layout,
        n_ubatch: usize,
        split: Split,
    ) -> Result<u64, Error> {
        let (heads, types, n_part) = supports::check(file, hp, o, layout)?;
        let room = buffers::room(gpu, &types, heads, n_part, layout);
        Ok(Need::new(file, hp, room, n_ubatch.max(1), split)?.bytes())
    }

    /// Uploads a part of a model and allocates the pool and the scratch of batches of `n_ubatch` tokens.
    ///
    /// # Errors
    /// Those of [`ArchModel::bind`]; [`Error::Usage`] for a pool of types that have no kernels; [`Error::Memory`] when the device cannot hold
    /// the model; those of the driver.
    pub fn part(
        gpu: &Gpu,
        file: &GgufFile,
        hp: &HParams,
        o: &LoadOptions,
        layout: &Layout,
        n_ubatch: usize,
        split: Split,
    ) -> Result<Self, Error> {
        let (heads, types, n_part) = supports::check(file, hp, o, layout)?;
        gpu.bind()?;
        let widths = Widths::of(hp);
        let n_ubatch = n_ubatch.max(1);
        let pool = buffers::pool_bytes(gpu, &types, heads, n_part, layout);
        let tables = buffers::table_bytes(gpu, heads, n_part, layout);
        let need = Need::new(file, hp, [pool, tables], n_ubatch, split)?;
        need.check(gpu)?;
        let (model, hosted) = upload(gpu, file, hp, &need, o.on_upload)?;
        let pool = Pool::new(gpu, heads, types, n_part, layout)?;
        let host = Host::new(gpu, hp, &pool, n_ubatch, split.first > 0)?;
        let scratch = |b: Buf| gpu.alloc(n_ubatch * widths.get(b) * 4);
        let mut bufs = Vec::new();
        let mut q8 = Vec::new();
        for b in Buf::ALL {
            bufs.push(scratch(b)?);
            q8.push(
                // What is multiplied may be narrower: a layer's, or a head's.
                if is_multiplied(hp, b) && widths.get(b) >= 32 {
                    let n = n_ubatch * widths.get(b);
                    Some((gpu.alloc(n)?, gpu.alloc(n / 4)?))
                } else {
                    None
                },
            );
        }
        let moe = if hp.n_expert > 0 {
            Some(Moe::new(gpu, hp, n_ubatch)?)
        } else {
            None
        };
        let widest = Buf::ALL.iter().map(|&b| widths.get(b)).max().unwrap_or(0);
        let half = if n_ubatch >= Half::MIN_TOKENS {
            Some(Half::new(gpu, n_ubatch, widest)?)
        } else {
            None
        };
        let pass = Pass {
            half,
            rope: Rope::from_file(hp, file, layout.n_ctx)?,
            layers: hp.layers_of_pool(&split.layers(hp)),
            hosted: Hosted::of(gpu, hp, o, n_ubatch, hosted)?,
            hp: hp.clone(),
            heads,
            widths,
            bufs,
            fresh: [false; Buf::ALL.len()],
            q8,
            pool,
            states: States::new(gpu, hp, n_ubatch)?,
            step: gpu.alloc(StepLayout::new(hp, n_ubatch).bytes())?,
            layout: StepLayout::new(hp, 1),
            logits: [gpu.alloc(hp.n_vocab * 4)?, gpu.alloc(hp.n_vocab * 4)?],
            moe,
            pending: Pending::default(),
            n: 0,
            n_outputs: 0,
            wants_mass: false,
            mean: o.kv.aggregate == Aggregate::Mean,
            tiered: false,
            failed: None,
            n_ubatch,
            gpu: gpu.clone(),
        };
        Ok(Self {
            step: None,
            warm: None,
            whole: true,
            ahead: Ahead::new(gpu, &pass.pool)?,
            model,
            pass,
            host,
        })
    }

    /// Makes ready for a pass of `n` tokens.
    fn begin(&mut self, n: usize, cache: &Cache, outputs: Outputs) -> Result<(), Error> {
        let (p, host) = (&mut self.pass, &mut self.host);
        assert!(n >= 1 && n <= p.n_ubatch, "a batch of {n} tokens");
        p.n = n;
        p.wants_mass = n == 1 && cache.wants_mass();
        p.tiered = is_tiered(cache);
        p.n_outputs = match outputs {
            Outputs::None => 0,
            Outputs::Last => 1,
            Outputs::All => n,
        };
        let wanted = p.n_outputs * p.hp.n_vocab * 4;
        if p.logits[0].view().bytes() < wanted {
            self.step = None;
            p.logits[0] = p.gpu.alloc(wanted)?;
            host.logits = p.gpu.pinned(wanted)?;
        }
        p.layout = StepLayout::new(&p.hp, n);
        Ok(())
    }

    /// Seconds of a recorded decode step, the mean of `n` that repeat the last one without the host in between.
    ///
    /// # Errors
    /// [`Error::Usage`] before two decode steps have been run; those of the driver.
    pub fn time_steps(&mut self, n: usize) -> Result<f64, Error> {
        let Some((step, _)) = &mut self.step else {
            return Err(report::usage("no recorded step", "two decode steps before"));
        };
        self.pass.gpu.bind()?;
        self.pass.gpu.synchronize()?;
        let start = Instant::now();
        for _ in 0..n {
            step.repeat()?;
        }
        self.pass.gpu.synchronize()?;
        Ok(start.elapsed().as_secs_f64() / n as f64)
    }

    /// Clocks of the phases of a decode step that is one launch, waiting and working ([`Program::trace`]); nothing if it is not.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn trace_step(&mut self) -> Result<Option<Vec<Clocks>>, Error> {
        match &mut self.step {
            Some((Decode::Whole(program), _)) => Ok(Some(program.trace()?)),
            _ => Ok(None),
        }
    }

    /// A decode step that can be repeated; nothing while the kernels of one that would be recorded have not been loaded by running it.
    fn make_step(&mut self, kind: Kind) -> Result<Option<Decode>, Error> {
        if self.pass.hosted.is_some() {
            // The host has its part in each step.
            return Ok(None);
        }
        if std::env::var_os("LEMMA_CUDA_STEP").is_none_or(|v| v != "0") && self.whole {
            match step::program(&self.model, &self.pass, self.ahead.masses())? {
                Ok(program) => return Ok(Some(Decode::Whole(Box::new(program)))),
                Err(why) => log::debug!("a decode step is not one launch: {why}"),
            }
            self.whole = false;
        }
        if self.warm != Some(kind) {
            return Ok(None);
        }
        let (model, pass) = (&self.model, &mut self.pass);
        let gpu = pass.gpu.clone();
        Ok(Some(Decode::Graph(gpu.record(|| pass.forward(model))?)))
    }

    fn fetch(&mut self, cache: &mut Cache) -> Result<(), Error> {
        let (p, host) = (&mut self.pass, &mut self.host);
        let bytes = p.n_outputs * p.hp.n_vocab * 4;
        if bytes > 0 {
            host.logits
                .download(0, p.logits[0].view().slice(0, bytes))?;
        }
        if p.wants_mass {
            host.masses.download(0, p.pool.masses.view())?;
        }
        if p.n_outputs == 0 && !p.wants_mass {
            return Ok(());
        }
        // Waits for the step; the second call finds nothing left to wait for.
        host.masses.bytes()?;
        host.logits.bytes()?;
        if p.wants_mass {
            let max_pages = p.pool.max_pages;
            for il in p.layers.clone() {
                let n = cache.layer(il).pages.len();
                cache.end_layer(il, &host.masses.settled_f32()[il * max_pages..][..n], 1);
            }
        }
        Ok(())
    }
}

impl CudaRunner {
    /// Runs a pass; `rows`, `[n_tokens, n_embd]`, are what the layers before those on the device have left, if there are some.
    pub(super) fn run_behind(
        &mut self,
        rows: &[f32],
        tokens: &[u32],
        cache: &mut Cache,
        outputs: Outputs,
    ) -> Result<(), Error> {
        self.pass.gpu.bind()?;
        self.begin(tokens.len(), cache, outputs)?;
        let p = &mut self.pass;
        p.states.as_mut().map_or(Ok(()), States::check)?;
        p.pool.follow(p.heads, cache)?;
        p.pool.moves.run(&p.gpu, p.heads, cache, &p.layers)?;
        let kind = Kind {
            masses: p.wants_mass,
            tiered: p.tiered,
        };
        let decode = tokens.len() == 1 && outputs == Outputs::Last;
        if decode && self.step.as_ref().is_none_or(|s| s.1 != kind) {
            self.ahead.forget();
            self.step = self.make_step(kind)?.map(|s| (s, kind));
        }
        match &mut self.step {
            Some((Decode::Whole(program), _)) if decode => {
                let (p, host) = (&self.pass, &mut self.host);
                return self.ahead.run(program, tokens[0], p, host, cache);
            }
            _ => self.ahead.forget(),
        }
        self.host.prepare(&self.pass, rows, tokens, cache)?;
        match &self.step {
            Some((Decode::Graph(graph), _)) if decode => graph.replay()?,
            _ => self.pass.forward(&self.model)?,
        }
        if decode {
            self.warm = Some(kind);
        }
        self.fetch(cache)
    }
}

impl Runner for CudaRunner {
    fn run(&mut self, tokens: &[u32], cache: &mut Cache, outputs: Outputs) -> Result<(), Error> {
        self.run_behind(&[], tokens, cache, outputs)
    }

    fn best(&mut self) -> Option<u32> {
        match self.ahead.best() {
            Some(best) => best,
            None => sampling::best(self.logits()),
        }
    }

    fn top(&mut self, k: usize, out: &mut Vec<Candidate>) {
        if !self.ahead.top(k, out) {
            sampling::top(self.logits(), k, out);
        }
    }

    fn follow(&mut self, choice: Choice) {
        self.ahead.follow(choice);
    }

    fn logits(&mut self) -> &[f32] {
        if let Err(e) = self.ahead.fetch_logits(&self.pass, &mut self.host) {
            log::error!("{e}");
            return &[];
        }
        &self.host.logits.settled_f32()[..self.pass.n_outputs * self.pass.hp.n_vocab]
    }

    fn save_state(&mut self) {
        let p = &mut self.pass;
        if let Some(states) = &mut p.states {
            states.save(&p.gpu);
        }
    }

    fn restore_state(&mut self) {
        let p = &mut self.pass;
        if let Some(states) = &mut p.states {
            states.restore(&p.gpu);
        }
    }

    fn grow(&mut self, layout: &Layout) -> Result<(), Error> {
        let p = &mut self.pass;
        if layout.n_slots <= p.pool.n_slots {
            return Ok(());
        }
        p.gpu.bind()?;
        self.step = None;
        self.ahead.forget();
        p.pool.grow(&p.gpu, p.heads, layout)?;
        self.ahead.grow(&p.gpu, &p.pool)?;
        self.host.tables = p.gpu.pinned(p.pool.tables.view().bytes())?;
        self.host.masses = p.gpu.pinned(p.pool.masses.view().bytes())?;
        self.host.n_pages.fill(0);
        Ok(())
    }

    fn pool_bytes(&self, layout: &Layout) -> u64 {
        self.pass
            .pool
            .bytes(&self.pass.gpu, self.pass.heads, layout)
    }

    fn ceiling(&mut self) -> Result<Option<Ceiling>, Error> {
        if self.pass.hosted.is_some() {
            return Ok(None);
        }
        let c = lemma_cuda::ceiling(&self.pass.gpu)?;
        Ok(Some(Ceiling {
            read: c.read,
            copy: Some(c.copy),
        }))
    }

    fn describe(&self) -> String {
        let device = self.pass.gpu.info();
        match &self.pass.hosted {
            Some(hosted) => format!("{device}, {hosted}"),
            None => device.to_string(),
        }
    }
}

/// Whether a buffer is the input of matrices, which may want it quantized.
fn is_multiplied(hp: &HParams, b: Buf) -> bool {
    match b {
        Buf::Xn | Buf::Att | Buf::Gate | Buf::GateSh | Buf::Z | Buf::Ql | Buf::Qh | Buf::Vh => true,
        Buf::Up => !hp.activations.is_empty(),
        Buf::Qkv => hp.short_conv.is_some(),
        // Routers apart from their experts may read the residual stream.
        Buf::X | Buf::Lat | Buf::Y => hp.routes_apart,
        _ => false,
    }
}

/// Whether pages lie in lower tiers: the steps of before know only the first.
fn is_tiered(cache: &Cache) -> bool {
    let layout = cache.layout();
    let mut lower = 1..layout.n_tiers();
    lower.any(|tier| (0..layout.n_regions()).any(|r| cache.open(tier, r) > 0))
}
