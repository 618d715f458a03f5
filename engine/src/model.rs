//! A loaded model: the open file, its checked hyper-parameters, its tokenizer and its chat template.
//!
//! Loading reads metadata and binds nothing: tensors stay where the file has them, and a [`Session`](crate::session::Session) binds them to
//! a backend. Everything that can be wrong with a file is found here or when the session is made, before the first token.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use lemma_quant::GgmlType;
use lemma_quant::pages::{KvType, PAGE};

use crate::arch::{ArchModel, Binder, HParams, Widths};
use crate::backend::cpu::CpuRunner;
use crate::backend::trace::TraceRunner;
use crate::backend::{Buf, Runner};
use crate::chat::{ChatTemplate, named_template};
use crate::error::Error;
use crate::gguf::{Entering, GgufFile};
use crate::grammar::Vocabulary;
use crate::kv::Layout;
use crate::memory::{self, MemoryPlan};
use crate::options::{BackendKind, BudgetScope, DEFAULT_BUDGET, KvOptions, LoadOptions, Scope};
use crate::report;
use crate::tokenizer::{Tokenizer, TokenizerOptions};

/// A loaded model. Cheap to share between sessions.
pub struct Model {
    file: Arc<GgufFile>,
    hp: HParams,
    tokenizer: Tokenizer,
    template: Option<Result<ChatTemplate, Error>>,
    /// Made by the first grammar.
    vocabulary: OnceLock<Result<Vocabulary, Error>>,
    /// Until the first pass.
    entering: Entering,
}

/// Types that keys and values may be stored as.
pub const KV_TYPES: [GgmlType; 9] = [
    GgmlType::F32,
    GgmlType::F16,
    GgmlType::BF16,
    GgmlType::Q8_0,
    GgmlType::Q5_1,
    GgmlType::Q5_0,
    GgmlType::Q4_1,
    GgmlType::Q4_0,
    GgmlType::IQ4_NL,
];

impl Model {
    /// Opens a GGUF file (or the first part of a split one).
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Unreadable`], [`Error::Malformed`] and [`Error::Unsupported`], each naming the culprit.
    pub fn load(path: &Path, o: &LoadOptions) -> Result<Self, Error> {
        Self::new(GgufFile::open(path)?, o)
    }

    /// Opens a model that is part of the program. `name` is what errors call it.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_static(bytes: &'static [u8], name: &str, o: &LoadOptions) -> Result<Self, Error> {
        Self::new(GgufFile::from_static(bytes, name)?, o)
    }

    fn new(file: GgufFile, o: &LoadOptions) -> Result<Self, Error> {
        let entering = match enters_pages(o) {
            true => file.enter(),
            false => Entering::none(),
        };
        let hp = HParams::read(&file)?;
        memory::ask(file.n_header_bytes().saturating_mul(12), "the vocabulary")?;
        let options = TokenizerOptions {
            pre_override: o.pre_override.clone(),
        };
        let tokenizer = Tokenizer::from_gguf(&file, &options)?;
        if tokenizer.n_vocab() > hp.n_vocab {
            return Err(report::malformed(
                file.name(),
                format!("tokenizer.ggml.tokens has {} entries", tokenizer.n_vocab()),
                format!("at most the {} rows of token_embd.weight", hp.n_vocab),
            ));
        }
        let template = template(&file, &tokenizer, o.chat_template.as_deref());
        let file = Arc::new(file);
        // A dry run of binding finds missing tensors and wrong shapes before anything is allocated.
        ArchModel::bind(&hp, &mut Binder::new(&file, &mut |_| Ok(())).dry())?;
        Ok(Self {
            file,
            hp,
            tokenizer,
            template,
            vocabulary: OnceLock::new(),
            entering,
        })
    }

    /// The open file.
    pub fn gguf(&self) -> &GgufFile {
        &self.file
    }

    /// A pass begins, which needs all cores.
    pub(crate) fn begins_to_run(&self) {
        self.entering.stop();
    }

    /// Hyper-parameters.
    pub fn hparams(&self) -> &HParams {
        &self.hp
    }

    /// Tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The vocabulary as grammars need it.
    pub(crate) fn vocabulary(&self) -> Result<&Vocabulary, Error> {
        let made = self.vocabulary.get_or_init(|| Vocabulary::new(self));
        made.as_ref().map_err(Clone::clone)
    }

    /// Architecture, as `general.architecture` names it.
    pub fn arch(&self) -> &str {
        self.hp.arch
    }

    /// `general.name`, or the file's name; printable.
    pub fn name(&self) -> String {
        let name = self
            .file
            .meta()
            .opt_str("general.name")
            .ok()
            .flatten()
            .filter(|n| !n.is_empty());
        crate::error::escape(name.unwrap_or(self.file.name()), 64)
    }

    /// Whether the model has a chat template (working or not).
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// The chat template.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the model has none, or what is wrong with the one it has.
    pub fn template(&self) -> Result<&ChatTemplate, Error> {
        match &self.template {
            Some(Ok(t)) => Ok(t),
            Some(Err(e)) => Err(e.clone()),
            None => Err(report::unsupported(
                self.file.name(),
                "the model has no chat template",
                "a model with tokenizer.chat_template, or --chat-template",
            )),
        }
    }

    /// Bytes that the key and the value of a token take for one head, where pages are not demoted.
    ///
    /// # Errors
    /// [`Error::Usage`] for a type that the pool cannot hold, and for types to demote to that do not become smaller.
    pub fn kv_row_bytes(&self, kv: &KvOptions) -> Result<u64, Error> {
        let names = || KV_TYPES.map(GgmlType::name).join(", ");
        let row = |flag: &str, ty: GgmlType, dim: usize| match ty.row_size(dim) {
            _ if !KV_TYPES.contains(&ty) => {
                Err(report::usage(format!("{flag} {}", ty.name()), names()))
            }
            Some(bytes) => Ok(bytes),
            None => Err(report::usage(
                format!("{flag} {} with heads of {dim}", ty.name()),
                format!("a type whose blocks of {} divide a head", ty.block_size()),
            )),
        };
        if self.hp.has_unlike_heads() {
            return self.unlike_row_bytes(kv, row);
        }
        // Latent keys hold the values.
        let latent = self.hp.latent.is_some();
        let dim = self.hp.head_dim;
        let first = row("-ctk", kv.ty_k, dim)?
            + if latent {
                0
            } else {
                row("-ctv", kv.ty_v, dim)?
            };
        let mut least = first * PAGE;
        for d in kv.demotions() {
            let bytes = |ty: KvType| {
                ty.page_size(self.hp.head_dim).ok_or_else(|| {
                    report::usage(
                        format!("--kv-demote {ty} with heads of {}", self.hp.head_dim),
                        format!("a type whose blocks of {} divide a head", ty.block_size()),
                    )
                })
            };
            let bytes = bytes(d.ty_k)? + if latent { 0 } else { bytes(d.ty_v)? };
            if bytes >= least {
                return Err(report::usage(
                    format!("--kv-demote {} after types as small as it", d.name()),
                    "types of fewer bits, one after the other",
                ));
            }
            if d.is_of_pages() && (kv.page as usize) < PAGE {
                return Err(report::usage(
                    format!("--kv-demote {} with pages of {}", d.name(), kv.page),
                    format!("pages of {PAGE} tokens at least"),
                ));
            }
            least = bytes;
        }
        Ok(first as u64)
    }

    /// Bytes of the weights that one token reads: of mixtures the experts that it is sent to, of the embeddings none, unless they are the output
    /// as well.
    pub fn token_bytes(&self) -> u64 {
        let (hp, file) = (&self.hp, &self.file);
        let bytes = |t: crate::gguf::TensorView<'_>| {
            let n = t.n_bytes() as u64;
            let rounds = (hp.n_layer / hp.n_round.max(1)).max(1) as u64;
            let rest = t.name.strip_prefix("blk.").and_then(|r| r.split_once('.'));
            match rest {
                // Layers that guess further tokens are not run.
                Some((il, _)) if il.parse().is_ok_and(|il: usize| il >= hp.n_round) => 0,
                Some((_, name)) if name.contains("_exps.") => {
                    n * hp.n_expert_used as u64 / hp.n_expert.max(1) as u64
                }
                Some(_) => n * rounds,
                None if &*t.name == "per_layer_token_embd.weight" => 0,
                None if &*t.name == "token_embd.weight" => match file.tensor("output.weight") {
                    Some(_) => 0,
                    None => n,
                },
                _ => n,
            }
        };
        file.tensors().map(bytes).sum()
    }

    /// The same of layers whose heads are not alike: the mean of all, so that they come to what the pool has together.
    fn unlike_row_bytes(
        &self,
        kv: &KvOptions,
        row: impl Fn(&str, GgmlType, usize) -> Result<usize, Error>,
    ) -> Result<u64, Error> {
        let asked = [
            (kv.scope == Scope::Head, "--kv-scope head"),
            (
                kv.budget_scope == BudgetScope::Model,
                "--kv-budget-scope model",
            ),
            (!kv.demotions().is_empty(), "--kv-demote"),
            (kv.redundancy < 1.0, "--kv-redundancy"),
            (kv.guard > 0.0, "--kv-guard"),
        ];
        if let Some((_, flag)) = asked.iter().find(|(asked, _)| *asked) {
            let found = format!("{flag} with a model whose layers have different heads");
            return Err(report::usage(found, "a pool without it"));
        }
        let n = self.hp.n_layer_kv();
        let mut all = 0;
        for il in 0..n {
            let h = self.hp.heads_of_pool(il);
            let bytes = row("-ctk", kv.ty_k, h.dim)? + row("-ctv", kv.ty_v, h.dim_v)?;
            all += h.n_kv * bytes;
        }
        Ok(all.div_ceil(n * self.hp.n_head_kv) as u64)
    }

    pub(crate) fn plan_of(&self, kv: u64, n_ubatch: usize) -> MemoryPlan {
        let widths = Widths::of(&self.hp);
        let token: usize = Buf::ALL.iter().map(|&b| widths.get(b)).sum();
        // Activations in f32 and once more quantized, and the logits of one token.
        let scratch = n_ubatch * token * 6 + self.hp.n_vocab * 4;
        MemoryPlan {
            weights: self.file.n_tensor_bytes(),
            kv,
            state: self.hp.state_bytes(),
            scratch: scratch as u64,
        }
    }

    /// How many tokens a pool may hold by storing pages anew as other types if nobody says, where that can be: heads are whole blocks of
    /// those types, and it is not the reference, which does so only when asked; nor are they latent keys, which hold the values as well
    /// and of which nobody has measured what few bits leave. A GPU, which is there for its speed, holds no more than
    /// the default budget; small pools gain as much as on a CPU.
    pub(crate) fn demotes(&self, backend: BackendKind) -> Option<u32> {
        let most = match backend {
            BackendKind::Trace => return None,
            BackendKind::Cpu => u32::MAX,
            BackendKind::Cuda(_) => DEFAULT_BUDGET,
            BackendKind::Auto if lemma_cuda::devices().list.is_empty() => u32::MAX,
            BackendKind::Auto => DEFAULT_BUDGET,
        };
        let can = self.hp.latent.is_none() && !self.hp.has_unlike_heads();
        (self.hp.head_dim.is_multiple_of(32) && can).then_some(most)
    }

    /// What `auto` stands for in the pool's options when a session of this model is made with a policy that recycles, as a specification
    /// says it: `budget_scope=model,demote=k4/v2:0.95`.
    pub fn what_auto_means(&self, o: &LoadOptions) -> String {
        self.decided(&o.kv.open(), o.backend, true).decision()
    }

    /// [`KvOptions::decided`] for this model: layers whose heads are not alike have budgets of their own.
    pub(crate) fn decided(
        &self,
        kv: &KvOptions,
        backend: BackendKind,
        ever_recycled: bool,
    ) -> KvOptions {
        let decided = kv.decided(ever_recycled, self.demotes(backend));
        match kv.budget_scope {
            BudgetScope::Auto if self.hp.has_unlike_heads() => KvOptions {
                budget_scope: BudgetScope::Layer,
                ..decided
            },
            _ => decided,
        }
    }

    pub(crate) fn runner(
        &self,
        o: &LoadOptions,
        layout: &Layout,
        n_ubatch: usize,
    ) -> Result<Box<dyn Runner>, Error> {
        match o.backend {
            BackendKind::Trace => Ok(Box::new(TraceRunner::new(&self.file, &self.hp, layout)?)),
            BackendKind::Cuda(i) => self.cuda(i, o, layout, n_ubatch),
            BackendKind::Auto if !lemma_cuda::devices().list.is_empty() => {
                match self.cuda(0, o, layout, n_ubatch) {
                    Ok(runner) => Ok(runner),
                    // Who says how many layers wants them there.
                    Err(e @ Error::Memory(_)) if o.gpu_layers.is_some() => Err(e),
                    Err(e) => {
                        log::warn!("running on the CPU: {e}");
                        self.cpu(o, layout, n_ubatch)
                    }
                }
            }
            BackendKind::Auto | BackendKind::Cpu => self.cpu(o, layout, n_ubatch),
        }
    }

    fn cpu(
        &self,
        o: &LoadOptions,
        layout: &Layout,
        n_ubatch: usize,
    ) -> Result<Box<dyn Runner>, Error> {
        let runner = CpuRunner::new(&self.file, &self.hp, o, layout, n_ubatch)?;
        Ok(Box::new(runner))
    }

    #[cfg(feature = "cuda")]
    fn cuda(
        &self,
        ordinal: u32,
        o: &LoadOptions,
        layout: &Layout,
        n_ubatch: usize,
    ) -> Result<Box<dyn Runner>, Error> {
        use crate::backend::cuda::CudaRunner;
        use crate::backend::offload::OffloadRunner;
        let gpu = lemma_cuda::Gpu::open(ordinal)
            .map_err(|e| report::usage(format!("device CUDA{ordinal} ({e})"), "another, or cpu"))?;
        let (file, hp) = (&self.file, &self.hp);
        if o.gpu_layers == Some(0) {
            return self.cpu(o, layout, n_ubatch);
        }
        let mut split = CudaRunner::what_fits(&gpu, file, hp, o, layout, n_ubatch)?;
        let bind = |split| CudaRunner::part(&gpu, file, hp, o, layout, n_ubatch, split);
        let mut back = bind(split);
        let is_divided = split.first + split.experts > 0;
        if is_divided && o.gpu_layers.is_none() && o.cpu_experts.is_none() {
            // Others may have taken memory meanwhile.
            for _ in 0..3 {
                let smaller = split.less(hp);
                if back.is_ok() || smaller.first >= hp.n_layer {
                    break;
                }
                split = smaller;
                back = bind(split);
            }
        }
        let back = back.map_err(|e| match (&e, o.gpu_layers) {
            (Error::Memory(_), Some(_)) => e.with_hint("-ngl auto takes as many layers as fit"),
            _ => e,
        })?;
        if split.first == 0 {
            return Ok(Box::new(back));
        }
        let front = CpuRunner::part(file, hp, o, layout, n_ubatch, 0..split.first)?;
        Ok(Box::new(OffloadRunner::new(front, back, split.layers(hp))))
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda(
        &self,
        ordinal: u32,
        _: &LoadOptions,
        _: &Layout,
        _: usize,
    ) -> Result<Box<dyn Runner>, Error> {
        let reason = lemma_cuda::devices().reason.unwrap_or_default();
        Err(report::usage(
            format!("device CUDA{ordinal} ({reason})"),
            "cpu",
        ))
    }
}

/// Whether pages of the file should be entered while the model is opened: a CPU is going to read them, and has a core that is idle.
fn enters_pages(o: &LoadOptions) -> bool {
    let on_cpu = match o.backend {
        BackendKind::Cpu => true,
        BackendKind::Auto => !cfg!(feature = "cuda"),
        BackendKind::Cuda(_) | BackendKind::Trace => false,
    };
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    on_cpu && o.n_threads != Some(1) && cores() > 1
}

fn template(
    file: &GgufFile,
    tokenizer: &Tokenizer,
    source: Option<&str>,
) -> Option<Result<ChatTemplate, Error>> {
    let own = file.meta().opt_str("tokenizer.chat_template");
    let source = match (source, own) {
        // A name of a built-in template, or a template.
        (Some(s), _) => named_template(s).unwrap_or(s),
        (None, Ok(Some(s))) => s,
        (None, Ok(None)) => return None,
        (None, Err(e)) => return Some(Err(e)),
    };
    let text = |id: Option<u32>| {
        let bytes = id
            .and_then(|id| tokenizer.token_text(id))
            .unwrap_or_default();
        String::from_utf8_lossy(bytes).into_owned()
    };
    let made = ChatTemplate::new(source, &text(tokenizer.bos()), &text(tokenizer.eos()));
    Some(made.map_err(|e| Error::from(e).in_file(file.name())))
}
