//! What a caller chooses before a model is loaded.
//!
//! Everything here has a default that is right for one user with one sequence; the command line maps its flags onto these
//! fields one to one.

use lemma_quant::GgmlType;
use lemma_quant::pages::{KvType, PAGE};

/// Where the forward pass runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendKind {
    /// The best device that is present.
    #[default]
    Auto,
    /// Hand-written CPU kernels.
    Cpu,
    /// The scalar reference that keeps every intermediate.
    Trace,
    /// The CUDA device of this index.
    Cuda(u32),
}

/// How large the KV pool is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvBudget {
    /// The prompt plus [`DEFAULT_BUDGET`] tokens, or what the machine holds if that is less.
    #[default]
    Default,
    /// This many tokens, the prompt included; rounded up to pages.
    Tokens(u32),
    /// As many pages as fit in this many MiB.
    MiB(u32),
}

/// Tokens that a default pool holds beside the prompt.
pub const DEFAULT_BUDGET: u32 = 4096;

/// Which pages get a new time stamp after a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Refresh {
    /// The best share of the live pages by attention mass, `0.0..=1.0` (RaaS, adaptive rule; 0.5).
    Rank(f32),
    /// Every page whose attention mass exceeds this (RaaS, section on alpha; 1e-4).
    Alpha(f32),
}

/// Which prompt pages may never be recycled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pin {
    /// Every prompt, that of later turns included.
    #[default]
    Prompt,
    /// The first prompt of the conversation up to its first user message.
    System,
    /// Only the first page of all (the attention sink).
    None,
}

/// How the query heads of a layer agree on one mass for a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aggregate {
    /// The largest mass over the query heads.
    #[default]
    Max,
    /// The mean over the query heads.
    Mean,
}

/// What the mass of a page is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Score {
    /// Its share of the softmax, which attention computes anyway.
    #[default]
    Exact,
    /// The softmax over the live pages of an upper bound of its logits, from the least and the greatest key in each dimension (Quest,
    /// arXiv 2406.10774; what the paper on RaaS uses).
    Bound,
}

/// The heads that share a page table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// All heads of a layer.
    #[default]
    Layer,
    /// The query heads of one key and value head.
    Head,
}

/// The tables that share a budget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BudgetScope {
    /// [`BudgetScope::Model`] if the policy ever recycles anything.
    #[default]
    Auto,
    /// Every table has slots of its own.
    Layer,
    /// One pool for the whole model: a table that needs a page takes the least valuable one of any table.
    Model,
}

/// The clock of decaying counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Clock {
    /// Decode steps.
    Step,
    /// Pages opened: sixteen steps with pages of sixteen tokens.
    #[default]
    Page,
}

/// A tier of the pool that pages go to before they are forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demotion {
    /// How keys are stored there: rows of a type with blocks in [`crate::model::KV_TYPES`], or [`KvType::K4`].
    pub ty_k: KvType,
    /// How values are stored there: rows of such a type, or [`KvType::V2`].
    pub ty_v: KvType,
    /// Its share of the pool's bytes, in millionths.
    pub share: u32,
}

/// Where pages go before they are forgotten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Demote {
    /// To `k4/v2` (on a GPU to no more than [`DEFAULT_BUDGET`] tokens in all), where the policy is `raas`, pages are of `f16`
    /// and heads are whole blocks; to `q8_0` where pages are of 8 tokens.
    Auto,
    /// To these, one after the other; nowhere if there are none. What the shares leave is the first tier's. Where all tiers together would
    /// hold more tokens than the number says, more of the first stays.
    To(Vec<Demotion>, Option<u32>),
}

impl Demotion {
    /// The name: one type, or that of keys and that of values.
    pub fn name(&self) -> String {
        if self.ty_k == self.ty_v {
            self.ty_k.to_string()
        } else {
            format!("{}/{}", self.ty_k, self.ty_v)
        }
    }

    /// Whether keys or values are stored as whole pages.
    pub fn is_of_pages(&self) -> bool {
        self.ty_k.rows().is_none() || self.ty_v.rows().is_none()
    }
}

/// Where pages go if nobody says.
const AUTO: Demotion = Demotion {
    ty_k: KvType::K4,
    ty_v: KvType::V2,
    share: 950_000,
};

/// The same where pages are too small to be stored as a whole.
const AUTO_ROWS: Demotion = Demotion {
    ty_k: KvType::Rows(GgmlType::Q8_0),
    ty_v: KvType::Rows(GgmlType::Q8_0),
    share: 900_000,
};

/// Options of the KV pool.
#[derive(Clone, Debug)]
pub struct KvOptions {
    /// Name of a policy in [`crate::kv::policy::POLICIES`].
    pub policy: String,
    /// Size of the pool.
    pub budget: KvBudget,
    /// Type of the stored keys, one of [`crate::model::KV_TYPES`].
    pub ty_k: GgmlType,
    /// Type of the stored values, one of [`crate::model::KV_TYPES`].
    pub ty_v: GgmlType,
    /// Rule by which time stamps are renewed.
    pub refresh: Refresh,
    /// What is never recycled.
    pub pin: Pin,
    /// The last pages that are never recycled, the current one included.
    pub recent: u32,
    /// Aggregation of page masses over query heads.
    pub aggregate: Aggregate,
    /// Seed of the policies that draw.
    pub seed: u64,
    /// What the mass of a page is.
    pub score: Score,
    /// The heads that share a page table.
    pub scope: Scope,
    /// The tables that share a budget.
    pub budget_scope: BudgetScope,
    /// Tokens in a page, one of [`crate::kv::PAGE_SIZES`].
    pub page: u32,
    /// Layers, counted from the first that has pages, that keep everything.
    pub dense_layers: u32,
    /// Factor of a page's count per tick of [`KvOptions::clock`] (`lrfu`), `0.0..=1.0`.
    pub lambda: f32,
    /// The clock of decaying counts.
    pub clock: Clock,
    /// Cosine of mean keys above which a later page makes an earlier one redundant, so that it is recycled first; 1 turns it off.
    pub redundancy: f32,
    /// Share of the live pages, those with the widest range of values, that is recycled last; 0 turns it off.
    pub guard: f32,
    /// Where pages go before they are forgotten. The bytes of the pool stay the same.
    pub demote: Demote,
    /// Allow positions beyond the context that the model was trained on.
    pub beyond_train: bool,
}

impl KvOptions {
    /// The options with what is [`BudgetScope::Auto`] and [`Demote::Auto`] decided: one budget for the model, unless nothing is
    /// `ever_recycled`; then nothing is demoted either. `demotes`: [`Model::demotes`](crate::model::Model::demotes).
    pub(crate) fn decided(&self, ever_recycled: bool, demotes: Option<u32>) -> Self {
        let mut o = self.clone();
        let plain = o.policy == "raas" && o.score == Score::Exact;
        let half = o.ty_k == GgmlType::F16 && o.ty_v == GgmlType::F16;
        if !ever_recycled {
            o.demote = Demote::To(Vec::new(), None);
        } else if o.demote == Demote::Auto {
            o.demote = match demotes.filter(|_| plain && half) {
                Some(most) => {
                    let auto = match o.page as usize >= PAGE {
                        true => AUTO,
                        false => AUTO_ROWS,
                    };
                    Demote::To(vec![auto], (most < u32::MAX).then_some(most))
                }
                None => Demote::To(Vec::new(), None),
            };
        }
        if o.budget_scope == BudgetScope::Auto {
            o.budget_scope = match ever_recycled {
                true => BudgetScope::Model,
                false => BudgetScope::Layer,
            };
        }
        o
    }

    /// The options with everything open that can be left open.
    pub(crate) fn open(&self) -> Self {
        Self {
            budget_scope: BudgetScope::Auto,
            demote: Demote::Auto,
            ..self.clone()
        }
    }

    /// What was [decided](Self::decided), in the words of the options: what a record of a measurement needs beside the options as they
    /// were given.
    pub(crate) fn decision(&self) -> String {
        let tiers = self.demotions().iter();
        let tiers: Vec<String> = tiers
            .map(|d| format!("{}:{}", d.name(), f64::from(d.share) / 1e6))
            .collect();
        let demote = match tiers.is_empty() {
            true => "none".to_owned(),
            false => tiers.join("+"),
        };
        let most = self.most_held().map(|n| format!("@{n}"));
        let most = most.unwrap_or_default();
        format!("budget_scope={:?},demote={demote}{most}", self.budget_scope).to_lowercase()
    }

    /// Where pages go before they are forgotten, once that is [decided](Self::decided).
    pub fn demotions(&self) -> &[Demotion] {
        match &self.demote {
            Demote::Auto => &[],
            Demote::To(list, _) => list,
        }
    }

    /// Tokens that all tiers together may hold, if there is a limit, once that is decided.
    pub fn most_held(&self) -> Option<u32> {
        match self.demote {
            Demote::Auto => None,
            Demote::To(_, most) => most,
        }
    }
}

impl Default for KvOptions {
    fn default() -> Self {
        Self {
            policy: "raas".to_owned(),
            budget: KvBudget::Default,
            ty_k: GgmlType::F16,
            ty_v: GgmlType::F16,
            refresh: Refresh::Alpha(0.5),
            pin: Pin::Prompt,
            recent: 4,
            aggregate: Aggregate::Max,
            seed: 0,
            score: Score::Exact,
            scope: Scope::Layer,
            budget_scope: BudgetScope::Auto,
            page: 16,
            dense_layers: 0,
            lambda: 0.9,
            clock: Clock::Page,
            redundancy: 1.0,
            guard: 0.0,
            demote: Demote::Auto,
            beyond_train: false,
        }
    }
}

/// Options of a model and its sessions.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Worker threads; `None` takes the physical cores within the allowance of the process.
    pub n_threads: Option<usize>,
    /// Instruction set to force: `scalar`, `avx2`, `avx_vnni`, `avx512`, `avx512_bf16` or `amx`; `None` takes the best present.
    pub isa: Option<String>,
    /// Where the forward pass runs.
    pub backend: BackendKind,
    /// Layers that are on a GPU, counted from the last; `None` takes as many as fit. Those before them run on the CPU.
    pub gpu_layers: Option<u32>,
    /// Layers, counted from the first, whose routed experts the CPU runs though the layers are on a GPU; `None` takes as many as must.
    pub cpu_experts: Option<u32>,
    /// Cap of positions; `None` takes the trained context.
    pub n_ctx: Option<u32>,
    /// Tokens of a prompt between two progress reports.
    pub n_batch: u32,
    /// Tokens in one forward pass of a prompt.
    pub n_ubatch: u32,
    /// The KV pool.
    pub kv: KvOptions,
    /// Pre-tokenizer that replaces `tokenizer.ggml.pre`.
    pub pre_override: Option<String>,
    /// Chat template (source text) that replaces that of the model.
    pub chat_template: Option<String>,
    /// Called while weights travel to a device: bytes that have gone, and all.
    pub on_upload: Option<fn(u64, u64)>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            n_threads: None,
            isa: None,
            backend: BackendKind::Auto,
            gpu_layers: None,
            cpu_experts: None,
            n_ctx: None,
            n_batch: 2048,
            n_ubatch: 512,
            kv: KvOptions::default(),
            pre_override: None,
            chat_template: None,
            on_upload: None,
        }
    }
}
