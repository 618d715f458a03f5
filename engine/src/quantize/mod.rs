//! Other types for the weights of a file.
//!
//! [`plan`] decides what every tensor becomes, by the rules of a mix ([`mix`]) and what the caller wants otherwise;
//! [`write_file`] does it, a few pieces of a tensor at a time, so that memory does not depend on the model. Metadata is copied as it
//! lies, but for the keys that say what the types are and how the file is split.
//!
//! Blocks of all formats are independent of each other, so the values of a tensor are one long row here, cut where
//! it suits: the bytes are those of [`quantize_row`](lemma_quant::TypeTraits::quantize_row) over each of its rows, for every number
//! of threads. With an [importance matrix](Importance) it is cut between rows, since columns differ then.

mod importance;
mod job;
mod mix;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use lemma_quant::GgmlType;
use regex::Regex;

use crate::error::{Error, NAME_MAX, Result, escape};
use crate::gguf::{GgufFile, TensorInfo, TensorView, Value};
pub use importance::Importance;
pub use job::{Progress, n_file_bytes, write, write_file};
use mix::Role;
pub use mix::{Facts, Place, Recipe, fallback};

/// Parts of names of matrices that stay as they are: they are small and decide much, or serve for more than products.
const KEPT: &[&str] = &[
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
];

/// What the caller wants.
#[derive(Debug, Clone)]
pub struct Options {
    /// The mix.
    pub recipe: Recipe,
    /// The type of the output matrix.
    pub output_tensor: Option<GgmlType>,
    /// The type of the embeddings.
    pub token_embedding: Option<GgmlType>,
    /// Types of other matrices; the first whose pattern a name contains counts.
    pub overrides: Vec<Override>,
    /// Leave the output matrix as it is.
    pub leave_output: bool,
    /// Read quantized tensors too, and lose more.
    pub allow_requantize: bool,
    /// What columns of matrices matter.
    pub importance: Option<Arc<Importance>>,
}

impl Options {
    /// A mix and nothing else.
    pub fn new(recipe: Recipe) -> Self {
        Self {
            recipe,
            output_tensor: None,
            token_embedding: None,
            overrides: Vec::new(),
            leave_output: false,
            allow_requantize: false,
            importance: None,
        }
    }
}

/// A type for the tensors whose names a pattern is found in.
#[derive(Debug, Clone)]
pub struct Override {
    pattern: Regex,
    ty: GgmlType,
}

impl Override {
    /// Reads `PATTERN=TYPE`; the pattern is a regular expression, as in llama.cpp, and so any part of a name.
    ///
    /// # Errors
    /// [`Error::Usage`] saying what is wrong.
    pub fn parse(text: &str) -> Result<Self> {
        let Some((pattern, ty)) = text.rsplit_once('=').filter(|(p, _)| !p.is_empty()) else {
            return Err(Error::usage(format!(
                "'{}', expected NAME=TYPE",
                escape(text, NAME_MAX)
            )));
        };
        let regex = Regex::new(pattern).map_err(|_| {
            let pattern = escape(pattern, NAME_MAX);
            Error::usage(format!("'{pattern}' is not a name or a regular expression"))
        })?;
        Ok(Self {
            pattern: regex,
            ty: writable(ty)?,
        })
    }
}

/// The type called `name`, if weights can be written in it.
///
/// # Errors
/// [`Error::Usage`] for another name, or a type for which there is no quantizer.
pub fn writable(name: &str) -> Result<GgmlType> {
    match name.parse::<GgmlType>() {
        Ok(ty) if can_write(ty) => Ok(ty),
        Ok(ty) => Err(no_quantizer(ty.name())),
        Err(_) => {
            let names: Vec<_> = GgmlType::ALL.iter().filter(|t| can_write(**t)).collect();
            let names: Vec<_> = names.iter().map(|t| t.name()).collect();
            Err(Error::usage(format!(
                "unknown tensor type '{}', expected one of: {}",
                escape(name, NAME_MAX),
                names.join(" ")
            )))
        }
    }
}

/// Whether weights can be written in a type; some are for activations alone.
fn can_write(ty: GgmlType) -> bool {
    let t = ty.traits();
    t.quantize_row.is_some() && t.vec_dot.is_some()
}

fn no_quantizer(name: &str) -> Error {
    let why = match name.starts_with("iq") {
        true => "it needs an importance matrix, and there is no quantizer for it here",
        false => "there is no quantizer for it here",
    };
    Error::usage(format!("type '{name}' cannot be written: {why}")).with_hint(format!(
        "types that can: {}",
        Recipe::writable().collect::<Vec<_>>().join(" ")
    ))
}

/// What becomes of a tensor.
#[derive(Debug, Clone)]
pub struct Planned {
    /// The tensor as it is.
    pub info: TensorInfo,
    /// Its new type.
    pub ty: GgmlType,
    /// The type that the rules want, if its rows are not whole blocks of it.
    pub instead_of: Option<GgmlType>,
    /// Its new size in bytes.
    pub n_bytes: u64,
}

/// What becomes of a file.
#[derive(Debug, Clone)]
pub struct Plan {
    /// All tensors, in file order.
    pub tensors: Vec<Planned>,
    file_type: u32,
    importance: Option<Arc<Importance>>,
}

impl Plan {
    /// Values in all tensors.
    pub fn n_elements(&self) -> u64 {
        self.tensors.iter().map(|t| t.info.n_elements()).sum()
    }

    /// The importance of the columns of a matrix: `[n_expert, n_in]`.
    fn importance_of(&self, t: &TensorInfo) -> Option<&[f32]> {
        let of = self.importance.as_ref()?.of(&t.name)?;
        (of.len() as u64 == t.dims[0] * t.dims[2]).then_some(of)
    }

    /// Matrices that get another type although the importance matrix, if there is one, says nothing of them.
    pub fn unweighted(&self) -> impl Iterator<Item = &Planned> {
        let changed = self.tensors.iter().filter(|t| t.ty != t.info.ty);
        changed.filter(|t| self.importance.is_some() && self.importance_of(&t.info).is_none())
    }

    /// Bytes of all tensors as they are.
    pub fn n_bytes_before(&self) -> u64 {
        self.tensors.iter().map(|t| t.info.n_bytes() as u64).sum()
    }

    /// Bytes of all tensors as they will be.
    pub fn n_bytes_after(&self) -> u64 {
        self.tensors.iter().map(|t| t.n_bytes).sum()
    }

    /// Lines that say where another type has to serve, one for each pair of types.
    pub fn fallbacks(&self) -> Vec<String> {
        let mut groups: BTreeMap<(GgmlType, GgmlType, u64), Vec<&str>> = BTreeMap::new();
        for t in &self.tensors {
            if let Some(wanted) = t.instead_of {
                let group = groups.entry((wanted, t.ty, t.info.dims[0]));
                group.or_default().push(&t.info.name);
            }
        }
        let line = |((wanted, ty, n_in), names): ((GgmlType, GgmlType, u64), Vec<&str>)| {
            let more = match names.len() {
                1 => String::new(),
                n => format!(" and {} more", n - 1),
            };
            format!(
                "{}{more}: rows of {n_in} are not whole blocks of {}, {ty} in place of {wanted}",
                escape(names[0], NAME_MAX),
                wanted.block_size()
            )
        };
        groups.into_iter().map(line).collect()
    }
}

/// Decides what every tensor of `file` becomes.
///
/// # Errors
/// [`Error::Usage`] for a type without a quantizer and for tensors that are quantized already, [`Error::Unsupported`] for rows that
/// neither the type nor what would serve instead can hold, [`Error::Malformed`] for metadata that the rules cannot read.
pub fn plan(file: &GgufFile, o: &Options) -> Result<Plan> {
    if !can_write(o.recipe.base()) {
        return Err(no_quantizer(o.recipe.name));
    }
    let facts = Facts {
        importance: o.importance.is_some(),
        ..Facts::of(file)?
    };
    let places = places(file, &facts);
    let mut tensors = Vec::with_capacity(file.tensors().len());
    for t in file.tensors() {
        tensors.push(planned(&t, &facts, &places, o).map_err(|e| e.in_file(file.name()))?);
    }
    if let Some(importance) = &o.importance {
        let changed = || tensors.iter().filter(|t: &&Planned| t.ty != t.info.ty);
        changed().try_for_each(|t| fits(importance, &t.info))?;
        if !changed().any(|t| importance.of(&t.info.name).is_some()) {
            return Err(Error::usage_in(
                &importance.name,
                "knows none of the matrices, expected the importance matrix of this model",
            ));
        }
    }
    Ok(Plan {
        tensors,
        file_type: o.recipe.file_type,
        importance: o.importance.clone(),
    })
}

/// Checks that an importance matrix is one of a model with this tensor.
fn fits(importance: &Importance, t: &TensorInfo) -> Result<()> {
    let wanted = t.dims[0] * t.dims[2];
    match importance.of(&t.name) {
        // Of the inputs of embeddings nothing is known, whatever it says.
        Some(of) if of.len() as u64 != wanted && &*t.name != "token_embd.weight" => {
            Err(Error::malformed_in(
                &importance.name,
                format!(
                    "{} numbers for '{}', expected {wanted}: the importance matrix of this model",
                    of.len(),
                    escape(&*t.name, NAME_MAX)
                ),
            ))
        }
        _ => Ok(()),
    }
}

fn planned(
    t: &TensorView<'_>,
    facts: &Facts,
    places: &HashMap<&str, u32>,
    o: &Options,
) -> Result<Planned> {
    let mut planned = Planned {
        info: t.info.clone(),
        ty: t.ty,
        instead_of: None,
        n_bytes: t.n_bytes() as u64,
    };
    if !is_weight(t) || (o.leave_output && &*t.name == "output.weight") {
        return Ok(planned);
    }
    let n_in = t.dims[0];
    let wanted = wanted(t, facts, places, o);
    if wanted == t.ty {
        return Ok(planned);
    }
    let name = escape(&*t.name, NAME_MAX);
    let Some(ty) = fallback(wanted, n_in) else {
        return Err(Error::unsupported(format!(
            "tensor '{name}' has rows of {n_in} values, expected whole blocks of {} ({wanted})",
            wanted.block_size()
        ))
        .with_hint("name a type of numbers (f16, bf16) for it with --tensor-type"));
    };
    if !can_write(ty) {
        return Err(no_quantizer(ty.name()));
    }
    let is_block = t.ty.block_size() > 1;
    if is_block && ty != t.ty && !o.allow_requantize {
        return Err(Error::usage(format!(
            "tensor '{name}' is quantized already ({}), expected f32, f16 or bf16",
            t.ty
        ))
        .with_hint("start from the original, or accept a loss twice with --allow-requantize"));
    }
    planned.ty = ty;
    planned.instead_of = (ty != wanted).then_some(wanted);
    let n_bytes = ty.row_size(n_in as usize).map(|n| n as u64);
    let n_bytes = n_bytes.and_then(|n| n.checked_mul(t.n_rows()));
    planned.n_bytes = n_bytes.ok_or_else(|| {
        Error::unsupported(format!("tensor '{name}' would be larger than any file"))
    })?;
    Ok(planned)
}

/// The type that a matrix gets if its rows allow.
fn wanted(t: &TensorView<'_>, facts: &Facts, places: &HashMap<&str, u32>, o: &Options) -> GgmlType {
    let name = &*t.name;
    let role = Role::of(name);
    let named = match role {
        Role::TokenEmbd => o.token_embedding,
        Role::Output => o.output_tensor,
        _ => None,
    };
    let found = || o.overrides.iter().find(|r| r.pattern.is_match(name));
    if let Some(ty) = named.or_else(|| found().map(|r| r.ty)) {
        return ty;
    }
    // Embeddings that serve as the output matrix are one.
    if role == Role::TokenEmbd
        && facts.tied
        && let Some(ty) = o.output_tensor
    {
        return ty;
    }
    let place = Place {
        name,
        index: places.get(name).copied().unwrap_or(0),
        n_in: t.dims[0],
        stacked: t.dims[2] > 1,
    };
    o.recipe.type_of(&place, facts)
}

/// Whether a tensor is a matrix of weights that products are made with.
fn is_weight(t: &TensorInfo) -> bool {
    let name = &*t.name;
    let is_number = t.ty.traits().vec_dot.is_some();
    is_number
        && t.n_rows() > 1
        && name.ends_with("weight")
        && !matches!(name, "position_embd.weight" | "token_types.weight")
        && !KEPT.iter().any(|part| name.contains(part))
}

impl Facts {
    /// What the rules ask about the model in `file`.
    ///
    /// # Errors
    /// [`Error::Malformed`] for keys of another type.
    pub fn of(file: &GgufFile) -> Result<Self> {
        let meta = file.meta();
        let arch = meta.opt_str("general.architecture")?.unwrap_or("");
        let number = |key: &str| {
            // Some models give a number for each layer; the rules look at the first.
            let key = format!("{arch}.{key}");
            match meta.get(&key) {
                Some(Value::Array(a)) => {
                    let first = a.ints().and_then(|mut ints| ints.next());
                    Ok(first.and_then(|v| u32::try_from(v).ok()))
                }
                _ => meta.opt_u32(&key),
            }
        };
        let n_head = number("attention.head_count")?.unwrap_or(0);
        let n_head_kv = number("attention.head_count_kv")?.unwrap_or(n_head);
        // No model has more layers than this, and what the rules compute with them stays small.
        let n_layer = number("block_count")?.unwrap_or(0).min(1 << 16);
        let is_attn_v = |t: &TensorView<'_>| Role::of(&t.name) == Role::AttnV;
        Ok(Self {
            n_layer,
            n_attn_v: file.tensors().filter(is_attn_v).count() as u32,
            n_gqa: n_head.checked_div(n_head_kv).unwrap_or(0),
            n_expert: number("expert_count")?.unwrap_or(0),
            tied: file.tensor("output.weight").is_none(),
            importance: false,
            is_70b: Self::is_70b(arch, n_layer, n_head, n_head_kv),
            is_falcon: arch == "falcon",
        })
    }
}

/// Which one of its role each tensor is, in the order of layers; in a mixture of experts those of the FFN are counted by layer,
/// since a layer may have several.
fn places<'a>(file: &'a GgufFile, facts: &Facts) -> HashMap<&'a str, u32> {
    let mut names: Vec<(u64, &str)> = file
        .tensors()
        .map(|t| (layer(&t.info.name), &*t.info.name))
        .collect();
    names.sort_unstable();
    let mut counts: HashMap<Role, u32> = HashMap::new();
    let mut places = HashMap::with_capacity(names.len());
    for (layer, name) in names {
        let role = Role::of(name);
        let is_ffn = matches!(role, Role::FfnDown | Role::FfnUpGate);
        if is_ffn && facts.n_expert > 1 || role == Role::FfnUpGate {
            places.insert(name, u32::try_from(layer).unwrap_or(u32::MAX));
            continue;
        }
        let count = counts.entry(role).or_insert(0);
        places.insert(name, *count);
        *count += 1;
    }
    places
}

/// The layer in a name, 0 if there is none.
fn layer(name: &str) -> u64 {
    name.strip_prefix("blk.")
        .and_then(|rest| rest.split('.').next())
        .and_then(|n| n.parse::<u32>().ok())
        .map_or(0, u64::from)
}
