//! A sequence on a device: tokens go in, logits come out, in a footprint that is known before the first token.
//!
//! A session owns the pool's books ([`Cache`]) and a [`Runner`] that owns the pool. Prompts are processed in batches of `n_ubatch`
//! tokens, decoding one token at a time; both append at the end of the sequence. What the pool forgets, and when, is the policy's
//! business; positions only grow until the context ends.

mod pool;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use lemma_quant::GgmlType;

use crate::backend::cpu::bound_bytes;
use crate::backend::{Ceiling, Outputs, Runner};
use crate::error::Error;
use crate::kv::policy::{self, PolicyInfo};
use crate::kv::{Cache, Demoted, Recycled};
use crate::memory::{self, MemoryPlan};
use crate::model::Model;
use crate::options::{KvBudget, LoadOptions, Pin};
use crate::report;
use crate::sampling::{Candidate, Choice};
use pool::first_layout;
pub use pool::{KvStats, TierStats};

/// Logits of one scoring batch are kept below this many elements.
pub(crate) const MAX_SCORE_LOGITS: usize = 16 << 20;

/// Where a recurrent state is kept for sequences that come back: so many tokens before the end of a prompt. What follows a prompt that is
/// rendered again often differs in the words that open the reply.
const KEPT_BEFORE: usize = 8;

/// Answer of [`Session::rewind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rewind {
    /// The sequence ends at the position asked for.
    Done,
    /// The model has a recurrent state, which can only go back to where it was kept: the sequence ends there, before the position asked for.
    Back(u32),
    /// A page was recycled since, or no recurrent state was kept: the sequence is empty now and has to be filled again.
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

/// Called with what moved to lower tiers and the tokens of the sequence.
pub type OnDemote = Box<dyn FnMut(&[Demoted], &[u32]) + Send>;

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
    /// The position of the recurrent state that was kept, of models that have one.
    kept_state: Option<u32>,
    timings: Timings,
    on_recycle: Option<OnRecycle>,
    on_demote: Option<OnDemote>,
    /// Types of keys and values in the first tier.
    types: [GgmlType; 2],
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
                    "at most the {} that the model was trained on",
                    hp.n_ctx_train
                ),
            )
            .with_hint("--beyond-train allows more"));
        }
        if n_ctx > hp.n_ctx_train && hp.learns_positions {
            return Err(report::usage(
                format!("a context of {n_ctx} positions"),
                format!(
                    "{} at most: the model has embeddings of so many",
                    hp.n_ctx_train
                ),
            ));
        }
        let n_ubatch = (o.n_ubatch.max(1) as usize).min(n_ctx as usize);
        let kv = model.decided(&o.kv, o.backend, !policy.whole_context);
        let row = model.kv_row_bytes(&kv)?;
        let layout = first_layout(policy, &kv, hp, n_ctx, row)?;
        let plan = model.plan_of(layout.bytes(row, bound_bytes(hp)), n_ubatch);
        memory::check(&plan)?;
        log::info!("{plan}");
        let runner = memory::taking(|| model.runner(o, &layout, n_ubatch))?;
        log::info!("{}", runner.describe());
        Ok(Self {
            cache: Cache::with_layout(&kv, policy, layout),
            runner,
            policy,
            pin: o.kv.pin,
            budget: o.kv.budget,
            n_ctx,
            n_batch: o.n_batch.max(o.n_ubatch).max(1) as usize,
            n_ubatch,
            kept_state: None,
            tokens: room((n_ctx as usize).min(1 << 18)),
            timings: Timings::default(),
            on_recycle: None,
            on_demote: None,
            types: [o.kv.ty_k, o.kv.ty_v],
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

    /// The token with the largest of these logits, the lowest id on ties; `None` if none is a number.
    pub fn best(&mut self) -> Option<u32> {
        self.runner.best()
    }

    /// The `k` tokens with the largest of these logits, as [`sampling::top`](crate::sampling::top) puts them in order.
    pub fn top(&mut self, k: usize, out: &mut Vec<Candidate>) {
        self.runner.top(k, out);
    }

    /// How the token behind the one decoded next will be chosen, as far as the caller knows. Devices work ahead then.
    pub fn follow(&mut self, choice: Choice) {
        self.runner.follow(choice);
    }

    /// Time spent since the sequence was last cleared.
    pub fn timings(&self) -> Timings {
        self.timings
    }

    /// How fast the memory is that the weights lie in ([`Runner::ceiling`]).
    ///
    /// # Errors
    /// [`Error`] of the device.
    pub fn ceiling(&mut self) -> Result<Option<Ceiling>, Error> {
        self.runner.ceiling()
    }

    /// What runs the passes, for the log.
    pub fn describe(&self) -> String {
        self.runner.describe()
    }

    /// Calls `f` whenever pages are recycled, with what was recycled and the tokens of the sequence.
    pub fn on_recycle(&mut self, f: Option<OnRecycle>) {
        self.on_recycle = f;
    }

    /// Calls `f` whenever pages move to lower tiers, with what moved and the tokens of the sequence.
    pub fn on_demote(&mut self, f: Option<OnDemote>) {
        self.on_demote = f;
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
        let n_pinned = n_pinned.min(tokens.len());
        let keep_at = tokens.len().saturating_sub(KEPT_BEFORE);
        let mut done = 0;
        while done < tokens.len() {
            let pin = done < n_pinned;
            let mut end = if pin { n_pinned } else { tokens.len() };
            if self.is_recurrent() && done <= keep_at {
                match done == keep_at {
                    true => self.keep_state(),
                    false => end = end.min(keep_at),
                }
            }
            let n = (end - done).min(self.n_ubatch).min(self.cache.batch());
            let last = done + n == tokens.len();
            let outputs = if last { Outputs::Last } else { Outputs::None };
            self.run(&tokens[done..done + n], pin, outputs)?;
            done += n;
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
        while done < tokens.len() {
            let n = (tokens.len() - done).min(size).min(self.cache.batch());
            self.run(&tokens[done..done + n], false, Outputs::All)?;
            for (i, logits) in self.runner.logits().chunks_exact(n_vocab).enumerate() {
                each(done + i, logits)?;
            }
            done += n;
        }
        Ok(())
    }

    /// Empties the sequence.
    pub fn clear(&mut self) {
        self.forget();
        self.timings = Timings::default();
    }

    fn forget(&mut self) {
        self.cache.clear();
        self.tokens.clear();
        self.kept_state = None;
    }

    /// Drops the tokens from `pos` on, or everything if a page was recycled since `pos`.
    ///
    /// A recurrent state cannot forget its last tokens. Where the model has one, the sequence goes back to where a copy was kept (shortly
    /// before the end of the last prompt), if that is not behind `pos`, and else to its beginning.
    pub fn rewind(&mut self, pos: u32) -> Rewind {
        let to = match self.kept_state {
            _ if pos >= self.pos() || !self.is_recurrent() => Some(pos),
            kept => kept.filter(|&kept| kept <= pos),
        };
        match to {
            Some(to) if self.cache.rewind(to) => {
                if self.is_recurrent() && to < self.tokens.len() as u32 {
                    self.runner.restore_state();
                }
                self.tokens.truncate(to as usize);
                if to == pos {
                    Rewind::Done
                } else {
                    Rewind::Back(to)
                }
            }
            _ => {
                self.clear();
                Rewind::Refill
            }
        }
    }

    /// Whether the model has recurrent states beside the pool.
    fn is_recurrent(&self) -> bool {
        self.model.hparams().n_layer_state() > 0
    }

    /// Keeps the recurrent state as it is now; of an empty sequence there is nothing to keep.
    fn keep_state(&mut self) {
        self.kept_state = Some(self.pos()).filter(|&pos| pos > 0);
        if self.kept_state.is_some() {
            self.runner.save_state();
        }
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
        self.model.begins_to_run();
        self.tokens.extend_from_slice(tokens);
        if let Some(f) = &mut self.on_recycle
            && !self.cache.recycled().is_empty()
        {
            f(self.cache.recycled(), &self.tokens);
        }
        if let Some(f) = &mut self.on_demote
            && !self.cache.demoted().is_empty()
        {
            f(self.cache.demoted(), &self.tokens);
        }
        let done = self.runner.run(tokens, &mut self.cache, outputs);
        if done.is_err() {
            // What the pass has written nobody knows, so nothing may be taken up from here.
            self.forget();
        }
        done
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
            return Err(self.beyond_pool(n, spare, room));
        }
        Ok(())
    }

    /// A prompt of `n` tokens that the pool has no room for.
    fn beyond_pool(&self, n: usize, spare: usize, room: usize) -> Error {
        let pool = self.cache.n_slots() * self.page();
        let expected = match room.saturating_sub(spare) {
            0 => format!(
                "a KV pool of more than {pool} tokens: two pages of {} take turns behind it",
                self.page()
            ),
            most => format!("at most {most} in a KV pool of {pool} tokens"),
        };
        let error = report::prompt_too_long(format!("a prompt of {n} tokens"), expected);
        match self.budget {
            KvBudget::Tokens(_) => error.with_hint(format!(
                "--kv-budget {} is enough; without it the pool grows with prompts",
                self.enough(n + spare - room)
            )),
            _ => error.with_hint(
                "a larger --kv-budget holds longer prompts; without it the pool grows with them",
            ),
        }
    }

    /// The smallest budget whose pool has room for so many tokens more; one page may hold several as cheaper types.
    fn enough(&self, more: usize) -> usize {
        let (layout, page) = (self.cache.layout(), self.page());
        let now = layout.all_slots();
        let most = layout.n_slots + more.div_ceil(page);
        let holds = |&n: &usize| (layout.grown(n).all_slots() - now) * page >= more;
        (layout.n_slots..most).find(holds).unwrap_or(most) * page
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
