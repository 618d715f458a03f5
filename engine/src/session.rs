//! A sequence on a device: tokens go in, logits come out, in a footprint that is known before the first token.
//!
//! A session owns the pool's books ([`Cache`]) and a [`Runner`] that owns the pool. Prompts are processed in batches of `n_ubatch`
//! tokens, decoding one token at a time; both append at the end of the sequence. What the pool forgets, and when, is the policy's
//! business; positions only grow until the context ends.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::time::Instant;

use crate::arch::HParams;
use crate::backend::cpu::bound_bytes;
use crate::backend::{Outputs, Runner};
use crate::error::Error;
use crate::kv::policy::{self, PolicyInfo};
use crate::kv::{Attend, Cache, Layout, PAGE, PageMeta, Recycled};
use crate::memory::{self, MemoryPlan};
use crate::model::Model;
use crate::options::{DEFAULT_BUDGET, KvBudget, KvOptions, LoadOptions, Pin};
use crate::report;

/// Logits of one scoring batch are kept below this many elements.
const MAX_SCORE_LOGITS: usize = 16 << 20;

/// State of the pool, for people and for JSON.
#[derive(Clone, Debug)]
pub struct KvStats {
    /// Name of the policy.
    pub policy: &'static str,
    /// Slots of a layer.
    pub n_slots: usize,
    /// Live pages, the most of any layer; the mean where layers share their budget.
    pub pages: usize,
    /// Pinned pages, the most of any layer.
    pub pinned: usize,
    /// Pages recycled since the sequence began, the most of any layer; the mean where layers share their budget.
    pub recycled: u64,
    /// Tokens in a page.
    pub page: usize,
    /// Bytes of the pool.
    pub bytes: u64,
    /// Position at which the first page was recycled.
    pub first_recycle: Option<u32>,
}

/// Answer of [`Session::rewind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rewind {
    /// The sequence ends at the position asked for.
    Done,
    /// A page was recycled since: the sequence is empty now and has to be filled again.
    Refill,
}

/// Time spent in a session since it was last cleared.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timings {
    /// Seconds in prompt batches.
    pub prefill_s: f64,
    /// Tokens in prompt batches.
    pub prefill_n: usize,
    /// Seconds in decode steps.
    pub decode_s: f64,
    /// Decode steps.
    pub decode_n: usize,
}

/// Called with what was recycled and the tokens of the sequence.
pub type OnRecycle = Box<dyn FnMut(&[Recycled], &[u32]) + Send>;

/// Called with a position and its logits, `[n_vocab]`.
type EachLogits<'a> = dyn FnMut(usize, &[f32]) -> Result<(), Error> + 'a;

/// One sequence over a model.
pub struct Session {
    model: Arc<Model>,
    runner: Box<dyn Runner>,
    cache: Cache,
    policy: &'static PolicyInfo,
    pin: Pin,
    budget: KvBudget,
    n_ctx: u32,
    n_batch: usize,
    n_ubatch: usize,
    tokens: Vec<u32>,
    timings: Timings,
    on_recycle: Option<OnRecycle>,
}

impl Session {
    /// Allocates the pool and the scratch of a sequence.
    ///
    /// # Errors
    /// [`Error::Usage`] for an unknown policy or a context beyond the trained one, [`Error::Memory`] when the machine cannot hold
    /// the plan, the errors of binding weights.
    pub fn new(model: Arc<Model>, o: &LoadOptions) -> Result<Self, Error> {
        let hp = model.hparams();
        let Some(policy) = policy::find(&o.kv.policy) else {
            let names: Vec<&str> = policy::POLICIES.iter().map(|p| p.name).collect();
            return Err(report::usage(
                format!("KV policy {:?}", o.kv.policy),
                format!("one of {}", names.join(", ")),
            ));
        };
        let n_ctx = o.n_ctx.filter(|&n| n > 0).unwrap_or(hp.n_ctx_train);
        if n_ctx > hp.n_ctx_train && !o.kv.beyond_train {
            return Err(report::usage(
                format!("a context of {n_ctx} positions"),
                format!(
                    "at most the {} that the model was trained on, or the option to go beyond",
                    hp.n_ctx_train
                ),
            ));
        }
        let n_ubatch = (o.n_ubatch.max(1) as usize).min(n_ctx as usize);
        let row = model.kv_row_bytes(&o.kv)?;
        let kv = o.kv.decided(!policy.whole_context);
        let layout = first_layout(policy, &kv, hp, n_ctx, row)?;
        let plan = model.plan_of(layout.bytes(row, bound_bytes(hp)), n_ubatch);
        memory::check(&plan)?;
        log::info!("{plan}");
        let runner = model.runner(o, &layout, n_ubatch)?;
        log::info!("{}", runner.describe());
        Ok(Self {
            cache: Cache::with_layout(&o.kv, policy, layout),
            runner,
            policy,
            pin: o.kv.pin,
            budget: o.kv.budget,
            n_ctx,
            n_batch: o.n_batch.max(o.n_ubatch).max(1) as usize,
            n_ubatch,
            tokens: room((n_ctx as usize).min(1 << 18)),
            timings: Timings::default(),
            on_recycle: None,
            model,
        })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Position of the next token.
    pub fn pos(&self) -> u32 {
        self.cache.pos()
    }

    /// Positions that the sequence may have.
    pub fn n_ctx(&self) -> u32 {
        self.n_ctx
    }

    /// Tokens of the sequence, recycled ones included.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Logits of the last token, `[n_vocab]`; empty before the first.
    pub fn logits(&mut self) -> &[f32] {
        self.runner.logits()
    }

    /// Time spent since the sequence was last cleared.
    pub fn timings(&self) -> Timings {
        self.timings
    }

    /// What runs the passes, for the log.
    pub fn describe(&self) -> String {
        self.runner.describe()
    }

    /// Calls `f` whenever pages are recycled, with what was recycled and the tokens of the sequence.
    pub fn on_recycle(&mut self, f: Option<OnRecycle>) {
        self.on_recycle = f;
    }

    /// What the options say is never recycled.
    pub fn pin(&self) -> Pin {
        self.pin
    }

    /// Appends a prompt in batches. The pages of its first `n_pinned` tokens are pinned.
    ///
    /// `progress` is told the tokens done and their total, and may stop the prompt; the sequence then ends where it stopped.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] when the prompt does not fit the context or the pool; nothing is appended then.
    pub fn prefill(
        &mut self,
        tokens: &[u32],
        n_pinned: usize,
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        self.check_ids(tokens)?;
        self.make_room(tokens.len())?;
        let start = Instant::now();
        let (pinned, free) = tokens.split_at(n_pinned.min(tokens.len()));
        let batches = pinned.chunks(self.n_ubatch).map(|b| (b, true));
        let batches = batches.chain(free.chunks(self.n_ubatch).map(|b| (b, false)));
        let mut done = 0;
        for (batch, pin) in batches {
            let last = done + batch.len() == tokens.len();
            self.run(batch, pin, if last { Outputs::Last } else { Outputs::None })?;
            done += batch.len();
            if (last || done % self.n_batch < self.n_ubatch)
                && progress(done, tokens.len()).is_break()
            {
                break;
            }
        }
        self.timings.prefill_s += start.elapsed().as_secs_f64();
        self.timings.prefill_n += done;
        Ok(())
    }

    /// Appends one token; its logits are in [`Session::logits`] then.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] at the end of the context, or when everything in the pool is pinned.
    pub fn decode(&mut self, token: u32) -> Result<(), Error> {
        if self.pos() >= self.n_ctx {
            return Err(self.beyond_context(1));
        }
        if token as usize >= self.model.hparams().n_vocab {
            self.check_ids(&[token])?;
        }
        let start = Instant::now();
        self.run(&[token], false, Outputs::Last)?;
        self.timings.decode_s += start.elapsed().as_secs_f64();
        self.timings.decode_n += 1;
        Ok(())
    }

    /// Appends `tokens` as given text and hands out the logits at every position, `each(i, [n_vocab])`.
    ///
    /// A text that fits the pool is processed in batches. One that does not is processed token by token under the policy, with
    /// only the first page pinned.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] when the text does not fit the context; what `each` returns.
    pub fn score(&mut self, tokens: &[u32], each: &mut EachLogits<'_>) -> Result<(), Error> {
        self.check_ids(tokens)?;
        if self.pos() as usize + tokens.len() > self.n_ctx as usize {
            return Err(self.beyond_context(tokens.len()));
        }
        if self.budget == KvBudget::Default && !self.policy.whole_context {
            self.grow_for(tokens.len())?;
        }
        let n_vocab = self.model.hparams().n_vocab;
        let fits = self.cache.room() >= tokens.len();
        let size = if fits {
            self.n_ubatch.min((MAX_SCORE_LOGITS / n_vocab).max(1))
        } else {
            1
        };
        let mut done = 0;
        for batch in tokens.chunks(size) {
            self.run(batch, false, Outputs::All)?;
            for (i, logits) in self.runner.logits().chunks_exact(n_vocab).enumerate() {
                each(done + i, logits)?;
            }
            done += batch.len();
        }
        Ok(())
    }

    /// Empties the sequence.
    pub fn clear(&mut self) {
        self.cache.clear();
        self.tokens.clear();
        self.timings = Timings::default();
    }

    /// Drops the tokens from `pos` on, or everything if a page was recycled since `pos`.
    pub fn rewind(&mut self, pos: u32) -> Rewind {
        if self.cache.rewind(pos) {
            self.tokens.truncate(pos as usize);
            Rewind::Done
        } else {
            self.clear();
            Rewind::Refill
        }
    }

    /// State of the pool.
    pub fn kv(&self) -> KvStats {
        // Dense layers have no budget to speak of, unless there is nothing else.
        let (all, layout) = (self.cache.tables(), self.cache.layout());
        let first = (layout.dense * layout.groups).min(all.len() - 1);
        let layers = || all[first..].iter();
        let n = if layout.shared { all.len() - first } else { 1 };
        let pages = layers().map(|l| l.pages.len());
        let recycled = layers().map(|l| l.recycled);
        KvStats {
            policy: self.policy.name,
            n_slots: self.cache.n_slots(),
            pages: if layout.shared {
                pages.sum::<usize>().div_ceil(n)
            } else {
                pages.max().unwrap_or(0)
            },
            pinned: layers()
                .map(|l| l.pages.iter().filter(|p| p.pinned).count())
                .max()
                .unwrap_or(0),
            recycled: if layout.shared {
                recycled.sum::<u64>().div_ceil(n as u64)
            } else {
                recycled.max().unwrap_or(0)
            },
            page: self.cache.layout().page,
            bytes: self.runner.pool_bytes(self.cache.layout()),
            first_recycle: self.cache.first_recycle(),
        }
    }

    /// Position at which the first page was recycled.
    pub fn first_recycle(&self) -> Option<u32> {
        self.cache.first_recycle()
    }

    /// Live pages of a page table in position order.
    pub fn kv_pages(&self, table: usize) -> &[PageMeta] {
        &self.cache.tables()[table].pages
    }

    /// Pins the pages that hold any of `positions` until they are [unpinned](Session::unpin) or dropped; returns the first positions of those
    /// that were not pinned before. What was recycled cannot be pinned.
    ///
    /// # Errors
    /// [`Error::Usage`] when too few pages would be left to take turns; nothing is pinned then.
    pub fn pin_positions(&mut self, positions: &Range<u32>) -> Result<Vec<u32>, Error> {
        self.cache.pin(positions).map_err(|full| {
            report::usage(
                format!("{} pages pinned in a pool of {}", full.held, full.n_slots),
                format!("at most {}", full.n_slots.saturating_sub(2)),
            )
        })
    }

    /// Lets pages go that were pinned by [`Session::pin_positions`], named by their first positions.
    pub fn unpin(&mut self, pages: &[u32]) {
        self.cache.unpin(pages);
    }

    /// First positions of the pages of a table that may be recycled, the next to go first. `None` if the policy draws.
    pub fn recycling_order(&mut self, table: usize) -> Option<Vec<u32>> {
        self.cache.order(table)
    }

    /// Leaves the attention mass of every page in [`PageMeta::w`] after each decode step, whatever the policy.
    pub fn watch_masses(&mut self) {
        self.cache.watch();
    }

    /// Page tables: one for each layer, or for each key and value head of each layer.
    pub fn n_tables(&self) -> usize {
        self.cache.tables().len()
    }

    fn run(&mut self, tokens: &[u32], pin: bool, outputs: Outputs) -> Result<(), Error> {
        if let Err(full) = self.cache.begin(tokens.len(), pin) {
            return Err(report::prompt_too_long(
                format!(
                    "the KV pool of {} pages holds nothing that may be recycled",
                    full.n_slots
                ),
                "a larger --kv-budget",
            ));
        }
        self.tokens.extend_from_slice(tokens);
        if let Some(f) = &mut self.on_recycle
            && !self.cache.recycled().is_empty()
        {
            f(self.cache.recycled(), &self.tokens);
        }
        self.runner.run(tokens, &mut self.cache, outputs)
    }

    fn check_ids(&self, tokens: &[u32]) -> Result<(), Error> {
        let n_vocab = self.model.hparams().n_vocab;
        match tokens.iter().find(|&&t| t as usize >= n_vocab) {
            Some(t) => Err(report::usage(
                format!("token {t}"),
                format!("an id below {n_vocab}"),
            )),
            None => Ok(()),
        }
    }

    fn beyond_context(&self, n: usize) -> Error {
        report::prompt_too_long(
            format!("{n} tokens at position {}", self.pos()),
            format!("room within the context of {} positions", self.n_ctx),
        )
    }

    /// Checks that a prompt of `n` tokens fits, growing a pool of default size where that helps.
    fn make_room(&mut self, n: usize) -> Result<(), Error> {
        if self.pos() as usize + n > self.n_ctx as usize {
            return Err(self.beyond_context(n));
        }
        if self.policy.whole_context {
            return Ok(());
        }
        if self.budget == KvBudget::Default {
            self.grow_for(n)?;
        }
        // Behind the prompt at least two pages must take turns, or decoding would stop at once; a pool that reaches the end of
        // the context needs no turns.
        let spare = (2 * self.page()).min(self.n_ctx as usize - self.pos() as usize - n);
        let room = self.cache.room_with_recycling();
        if n + spare > room {
            return Err(report::prompt_too_long(
                format!("a prompt of {n} tokens"),
                format!(
                    "at most {} in a KV pool of {} tokens",
                    room.saturating_sub(spare),
                    self.cache.n_slots() * self.page()
                ),
            )
            .with_hint(
                "a larger --kv-budget holds longer prompts; without it the pool grows with them",
            ));
        }
        Ok(())
    }

    /// Grows a pool of default size so that a prompt of `n` tokens leaves the default budget free, if memory allows.
    fn grow_for(&mut self, n: usize) -> Result<(), Error> {
        let (page, n_slots) = (self.page(), self.cache.n_slots());
        let pages = |tokens: usize| tokens.div_ceil(page);
        let pinned = self.kv().pinned * page;
        let wanted = pages((pinned + n + DEFAULT_BUDGET as usize).min(self.n_ctx as usize));
        let needed = pages(pinned + n) + 2;
        if wanted <= n_slots {
            return Ok(());
        }
        let layout = |n_slots| Layout {
            n_slots,
            ..self.cache.layout().clone()
        };
        let more =
            self.runner.pool_bytes(&layout(wanted)) - self.runner.pool_bytes(&layout(n_slots));
        let n_slots = match memory::available() {
            Some(free) if more > free => {
                let slot = more / (wanted - n_slots) as u64;
                let fit = n_slots + (free / 2 / slot.max(1)) as usize;
                if fit < needed.min(wanted) {
                    return Err(report::memory(
                        format!("a KV pool of {} more", memory::show(more)),
                        format!("at most the {} that are free", memory::show(free)),
                    ));
                }
                fit.min(wanted)
            }
            _ => wanted,
        };
        if n_slots > self.cache.n_slots() {
            self.runner.grow(&layout(n_slots))?;
            self.cache.grow(n_slots);
        }
        Ok(())
    }

    /// Tokens in a page.
    fn page(&self) -> usize {
        self.cache.layout().page
    }

    /// The plan of this session's memory.
    pub fn plan(&self) -> MemoryPlan {
        self.model
            .plan_of(self.runner.pool_bytes(self.cache.layout()), self.n_ubatch)
    }
}

/// An empty list of ids with room for every position that a long chain of thought is likely to reach, so that a decode step allocates
/// nothing. It is written once: memory that is only reserved would be taken bit by bit later.
fn room(n: usize) -> Vec<u32> {
    let mut ids = vec![u32::MAX; n];
    ids.clear();
    ids
}

/// The pool that a session begins with; `row` is what [`Model::kv_row_bytes`] says.
fn first_layout(
    policy: &PolicyInfo,
    kv: &KvOptions,
    hp: &HParams,
    n_ctx: u32,
    row: u64,
) -> Result<Layout, Error> {
    let mut layout = Layout::new(kv, hp.n_layer, hp.n_head_kv, 0, n_ctx as usize);
    layout.head_dim = hp.head_dim;
    layout.bounds |= policy.selects;
    if layout.bounds && layout.page > PAGE {
        return Err(report::usage(
            format!("pages of {} tokens with bounds of their keys", layout.page),
            format!("at most {PAGE}"),
        ));
    }
    if policy.selects && layout.groups > 1 {
        let found = format!("--kv-policy {} with --kv-scope head", policy.name);
        return Err(report::usage(found, "layer"));
    }
    let of = |n_slots| Layout {
        n_slots,
        ..layout.clone()
    };
    let pages = |tokens: u32| tokens.div_ceil(kv.page) as usize;
    let n = match kv.budget {
        KvBudget::Default => pages(DEFAULT_BUDGET),
        KvBudget::Tokens(n) => pages(n),
        KvBudget::MiB(n) => {
            // What dense layers take is the same for every number of slots.
            let bytes = |n| of(n).bytes(row, bound_bytes(hp));
            let slot = ((bytes(1024) - bytes(0)) / 1024).max(1);
            ((u64::from(n) << 20).saturating_sub(bytes(0)) / slot) as usize
        }
    };
    if n < 2 && (policy.selects || !policy.whole_context) {
        return Err(report::usage(
            format!("a KV pool of {n} pages"),
            format!("at least 2 pages of {} tokens", kv.page),
        ));
    }
    let all = pages(n_ctx);
    if policy.selects {
        layout.attend = Some(Attend {
            pages: n,
            beside_pinned: kv.budget == KvBudget::Default,
        });
    }
    layout.n_slots = if policy.whole_context {
        all
    } else {
        n.min(all)
    };
    Ok(layout)
}
