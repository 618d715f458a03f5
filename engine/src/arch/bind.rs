//! Finds the tensors of a model by name, checks their shapes and hands them to a backend.

mod made;

use std::ops::Range;

use lemma_quant::GgmlType;

pub use super::hparams::Shape;
use super::{HParams, Heads};
use crate::backend::{Act, Embedding, Linear, Moe, MoeBias, Tensor};
use crate::error::Error;
use crate::gguf::{Bytes, GgufFile};
use crate::report;

/// Binds the tensors of one file to a backend's weights.
pub struct Binder<'a, W> {
    file: &'a GgufFile,
    make: &'a mut dyn FnMut(Tensor) -> Result<W, Error>,
    /// `blk.N.` inside [`Binder::layers`], empty outside.
    prefix: String,
    /// Whether weights are only looked for: nobody will read them.
    dry: bool,
    /// The layers that are bound.
    part: Range<usize>,
    /// The layer that is being bound, while its routed experts are.
    experts_of: Option<usize>,
    il: usize,
}

/// The layers of a model that are bound to a backend: all, or those that it has of a model that is divided.
#[derive(Debug)]
pub(super) struct Layers<L> {
    first: usize,
    bound: Vec<L>,
    /// Layers of the model.
    pub(super) n: usize,
}

impl<L> Layers<L> {
    /// Each with its number in the model.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &L)> {
        (self.first..).zip(&self.bound)
    }
}

impl<'a, W> Binder<'a, W> {
    /// A binder over `file`; `make` turns a tensor into a weight.
    pub fn new(file: &'a GgufFile, make: &'a mut dyn FnMut(Tensor) -> Result<W, Error>) -> Self {
        Self {
            file,
            make,
            prefix: String::new(),
            dry: false,
            part: 0..usize::MAX,
            experts_of: None,
            il: 0,
        }
    }

    /// Binds no other layers than these. Who has not the first one has no embeddings: it goes on with what another part of the model has
    /// left.
    #[must_use]
    pub fn part(self, part: Range<usize>) -> Self {
        Self { part, ..self }
    }

    /// The same where weights are only looked for and not read.
    #[must_use]
    pub fn dry(self) -> Self {
        Self { dry: true, ..self }
    }

    /// The file.
    pub fn file(&self) -> &GgufFile {
        self.file
    }

    /// Calls `each` for every layer, with names relative to `blk.N.`.
    pub(super) fn layers<L>(
        &mut self,
        n: usize,
        mut each: impl FnMut(&mut Self) -> Result<L, Error>,
    ) -> Result<Layers<L>, Error> {
        self.numbered_layers(n, |b, _| each(b))
    }

    /// The same; `each` is told which layer it is.
    pub(super) fn numbered_layers<L>(
        &mut self,
        n: usize,
        mut each: impl FnMut(&mut Self, usize) -> Result<L, Error>,
    ) -> Result<Layers<L>, Error> {
        self.rounds(n, n, &mut each)
    }

    /// The same where the layers that a file has, `n_round`, are bound again and again until there are `n`.
    pub(super) fn rounds<L>(
        &mut self,
        n: usize,
        n_round: usize,
        mut each: impl FnMut(&mut Self, usize) -> Result<L, Error>,
    ) -> Result<Layers<L>, Error> {
        let first = self.part.start;
        let bound = (first..self.part.end.min(n))
            .map(|il| {
                (self.prefix, self.il) = (format!("blk.{}.", il % n_round), il);
                each(self, il)
            })
            .collect::<Result<_, Error>>();
        self.prefix.clear();
        Ok(Layers {
            first,
            bound: bound?,
            n,
        })
    }

    /// The embeddings of tokens, `token_embd`.
    pub(super) fn embedding(&mut self, hp: &HParams) -> Result<Embedding<W>, Error> {
        Ok(Embedding {
            w: match self.part.start {
                0 => Some(self.matrix("token_embd", hp.n_embd, hp.n_vocab)?),
                _ => None,
            },
            scale: hp.embedding_scale,
            positions: match hp.learns_positions && self.part.start == 0 {
                true => Some(self.matrix("position_embd", hp.n_embd, hp.n_ctx_train as usize)?),
                false => None,
            },
        })
    }

    /// `<name>.weight` of `n_out` rows of `n_in` elements, and `<name>.bias` where the file has one.
    pub(super) fn linear(
        &mut self,
        name: &str,
        n_in: usize,
        n_out: usize,
    ) -> Result<Linear<W>, Error> {
        let w = self.matrix(name, n_in, n_out)?;
        let bias = self.optional(&format!("{name}.bias"), &[n_out])?;
        Ok(Linear { w, bias })
    }

    /// Several matrices that are one in the file: `<name>.weight` holds the rows of all, `n_out` of each, and so does `<name>.bias` where
    /// there is one. They stay where they are.
    pub(super) fn fused<const N: usize>(
        &mut self,
        name: &str,
        n_in: usize,
        n_out: [usize; N],
    ) -> Result<[Linear<W>; N], Error> {
        let all = n_out.iter().sum();
        let dims = [n_in, all];
        let weights = format!("{name}.weight");
        let w =
            (self.find(&weights, &dims, false)?).ok_or_else(|| self.missing(&weights, &dims))?;
        let bias = self.find(&format!("{name}.bias"), &[all], true)?;
        let mut at = 0;
        let mut parts = Vec::with_capacity(N);
        for n in n_out {
            parts.push(Linear {
                w: (self.make)(w.part(at, n))?,
                bias: (bias.as_ref())
                    .map(|b| (self.make)(b.part(at, n)))
                    .transpose()?,
            });
            at += n;
        }
        let parts = parts.try_into();
        Ok(parts.unwrap_or_else(|_| unreachable!("one for each")))
    }

    /// Matrices whose rows take turns in one: for each of `n_group` groups `<name>.weight` has `parts[0]` rows of the first, of `n_in` elements
    /// each, then `parts[1]` of the second, and so on. Those listed together in `outs` are bound as one, group after group of the first of
    /// them and so on. They are copied, as rows in the file's type.
    pub(super) fn taking_turns<const N: usize>(
        &mut self,
        name: &str,
        n_in: usize,
        n_group: usize,
        parts: &[usize],
        outs: [&[usize]; N],
    ) -> Result<[Linear<W>; N], Error> {
        let each: usize = parts.iter().sum();
        let (name, dims) = (format!("{name}.weight"), [n_in, n_group * each]);
        let all = (self.find(&name, &dims, false)?).ok_or_else(|| self.missing(&name, &dims))?;
        let mut bound = Vec::with_capacity(N);
        for out in outs {
            let mut bytes = Vec::new();
            let mut n_out = 0;
            for &i in out {
                let before: usize = parts[..i].iter().sum();
                n_out += n_group * parts[i];
                for g in (0..n_group).filter(|_| !self.dry) {
                    bytes.extend_from_slice(&all.part(g * each + before, parts[i]).bytes);
                }
            }
            let w = (self.make)(Tensor {
                n_out,
                bytes: Bytes::owned(bytes),
                ..all.clone()
            })?;
            bound.push(Linear { w, bias: None });
        }
        let bound = bound.try_into();
        Ok(bound.unwrap_or_else(|_| unreachable!("one for each")))
    }

    /// `<name>.weight` of `n_out` rows of `n_in` elements.
    pub(super) fn matrix(&mut self, name: &str, n_in: usize, n_out: usize) -> Result<W, Error> {
        self.required(&format!("{name}.weight"), &[n_in, n_out])
    }

    /// `<name>.weight` of `n` elements.
    pub(super) fn vector(&mut self, name: &str, n: usize) -> Result<W, Error> {
        self.required(&format!("{name}.weight"), &[n])
    }

    /// The weights of a norm: those of [`Binder::vector`], and behind them, in models whose norms may add something, `<name>.bias` where
    /// the file has one. Ones in models whose norms have no weights.
    pub(super) fn norm(&mut self, hp: &HParams, name: &str, n: usize) -> Result<W, Error> {
        if hp.norms_plain {
            return self.ones(n);
        }
        let bias = match hp.centers || hp.norms_add {
            true => self.find(&format!("{name}.bias"), &[n], true)?,
            false => None,
        };
        let Some(bias) = bias else {
            return self.vector(name, n);
        };
        let name = format!("{name}.weight");
        let found = self.find(&name, &[n], true)?;
        let mut t = found.ok_or_else(|| self.missing(&name, &[n]))?;
        if !self.dry {
            let both = [t.to_f32(), bias.to_f32()].concat();
            let bytes = both.into_iter().flat_map(f32::to_le_bytes).collect();
            (t.ty, t.n_in, t.bytes) = (GgmlType::F32, 2 * n, Bytes::owned(bytes));
        }
        (self.make)(t)
    }

    /// `<name>.weight` of `n` elements as a matrix of one row.
    pub(super) fn row(&mut self, name: &str, n: usize) -> Result<Linear<W>, Error> {
        let (name, dims) = (format!("{name}.weight"), [n]);
        let found = self.find(&name, &dims, false)?;
        let t = found.ok_or_else(|| self.missing(&name, &dims))?;
        Ok(Linear {
            w: (self.make)(t)?,
            bias: None,
        })
    }

    /// `<name>` of `n` elements, if there is one.
    pub(super) fn optional_vector(&mut self, name: &str, n: usize) -> Result<Option<W>, Error> {
        self.optional(name, &[n])
    }

    /// `<name>` of `n` elements.
    pub(super) fn plain_vector(&mut self, name: &str, n: usize) -> Result<W, Error> {
        self.required(name, &[n])
    }

    /// `<name>.weight`: weights of a convolution over `d_conv` tokens for each of `n` channels. Files have those of a channel side by side;
    /// they are bound (and copied, being few) as a vector of `[d_conv, n]`, so that channels can be computed side by side.
    pub(super) fn conv1d(&mut self, name: &str, d_conv: usize, n: usize) -> Result<W, Error> {
        self.conv1d_and(name, None, d_conv, n)
    }

    /// The same with `<name>.bias` behind the weights, where the file has one.
    pub(super) fn conv1d_biased(
        &mut self,
        name: &str,
        d_conv: usize,
        n: usize,
    ) -> Result<W, Error> {
        let bias = self.find(&format!("{name}.bias"), &[n], true)?;
        self.conv1d_and(name, bias, d_conv, n)
    }

    fn conv1d_and(
        &mut self,
        name: &str,
        bias: Option<Tensor>,
        d_conv: usize,
        n: usize,
    ) -> Result<W, Error> {
        let (name, dims) = (format!("{name}.weight"), [d_conv, n]);
        let found = self.find(&name, &dims, true)?;
        let mut t = found.ok_or_else(|| self.missing(&name, &dims))?;
        if !self.dry {
            let w = t.to_f32();
            let turned = (0..d_conv * n).map(|i| w[i % n * d_conv + i / n]);
            let bias = bias.map(|b| b.to_f32()).unwrap_or_default();
            t.n_in += bias.len();
            let bytes = turned.chain(bias).flat_map(f32::to_le_bytes);
            (t.ty, t.bytes) = (GgmlType::F32, Bytes::owned(bytes.collect()));
        }
        (self.make)(t)
    }

    /// `<name>.weight`: a matrix of `n_out` rows of `n_in` elements for each head.
    pub(super) fn heads(
        &mut self,
        name: &str,
        n_in: usize,
        n_out: usize,
        n_head: usize,
    ) -> Result<W, Error> {
        self.required(&format!("{name}.weight"), &[n_in, n_out, n_head])
    }

    /// [`Binder::heads`] of keys and of values as older files have them: in one matrix, which has for each head `n_k` rows that make its key
    /// and `n_v` that make its value, of `n_in` elements each. Keys are wanted the other way round, so these weights are copied: in 16
    /// bits, if they are not numbers already.
    pub(super) fn heads_in_one(
        &mut self,
        name: &str,
        n_in: usize,
        [n_k, n_v]: [usize; 2],
        n_head: usize,
    ) -> Result<[W; 2], Error> {
        let (name, dims) = (format!("{name}.weight"), [n_in, n_head * (n_k + n_v)]);
        let all = (self.find(&name, &dims, false)?).ok_or_else(|| self.missing(&name, &dims))?;
        let (mut k, mut v) = (Vec::new(), Vec::new());
        let ty = match all.ty {
            GgmlType::F32 | GgmlType::BF16 => all.ty,
            _ => GgmlType::F16,
        };
        if let Some(quantize_row) = ty.traits().quantize_row.filter(|_| !self.dry) {
            let size = ty.row_size(n_k).unwrap_or(0);
            let (mut rows, mut column) = (vec![0.0; n_k * n_in], vec![0.0; n_k]);
            for h in 0..n_head {
                let first = h * (n_k + n_v);
                for (i, row) in rows.chunks_exact_mut(n_in).enumerate() {
                    all.dequantize_row(first + i, row);
                }
                for i in 0..n_in {
                    for (to, row) in column.iter_mut().zip(rows.chunks_exact(n_in)) {
                        *to = row[i];
                    }
                    let at = k.len();
                    k.resize(at + size, 0);
                    quantize_row(&column, &mut k[at..]);
                }
                v.extend_from_slice(&all.part(first + n_k, n_v).bytes);
            }
        }
        let (ty_v, vector) = (all.ty, false);
        let k = Tensor {
            ty,
            n_in: n_k,
            n_out: n_head * n_in,
            vector,
            experts_of: None,
            bytes: Bytes::owned(k),
        };
        let v = Tensor {
            ty: ty_v,
            n_in,
            n_out: n_head * n_v,
            vector,
            experts_of: None,
            bytes: Bytes::owned(v),
        };
        Ok([(self.make)(k)?, (self.make)(v)?])
    }

    /// Whether the file has a tensor.
    pub(super) fn has(&self, name: &str) -> bool {
        let name = format!("{}{name}.weight", self.prefix);
        self.file.tensor(&name).is_some()
    }

    /// Whether the file has a matrix of `n_out` rows.
    pub(super) fn has_rows(&self, name: &str, n_out: usize) -> bool {
        let name = format!("{}{name}.weight", self.prefix);
        let found = self.file.tensor(&name);
        found.is_some_and(|t| t.dims[1] == n_out as u64)
    }

    /// The output matrix, which is the embedding where the file has none (tied).
    pub(super) fn output(&mut self, n_embd: usize, n_vocab: usize) -> Result<Linear<W>, Error> {
        let w = match self.optional("output.weight", &[n_embd, n_vocab])? {
            Some(w) => w,
            None => self.required("token_embd.weight", &[n_embd, n_vocab])?,
        };
        let bias = self.optional("output.bias", &[n_vocab])?;
        Ok(Linear { w, bias })
    }

    /// Queries, keys and values: three matrices, or the rows of one, `attn_qkv`.
    pub(super) fn qkv(&mut self, hp: &HParams) -> Result<[Linear<W>; 3], Error> {
        self.qkv_of(hp, hp.heads(0))
    }

    /// The same of a layer that has heads of its own.
    pub(super) fn qkv_of(&mut self, hp: &HParams, h: Heads) -> Result<[Linear<W>; 3], Error> {
        let (n_embd, [n_q, n_k, n_v]) = (hp.n_embd, [h.n_q(), h.n_k(), h.n_v()]);
        if self.has("attn_qkv") && !self.has("attn_q") {
            return self.fused("attn_qkv", n_embd, [n_q, n_k, n_v]);
        }
        Ok([
            self.linear("attn_q", n_embd, n_q)?,
            self.linear("attn_k", n_embd, n_k)?,
            self.linear("attn_v", n_embd, n_v)?,
        ])
    }

    /// The norm of a feed-forward block, [`HParams::norm_names`]; some files name it after what comes before, `post_attention_norm`.
    pub(super) fn ffn_norm(&mut self, hp: &HParams) -> Result<W, Error> {
        let (after, usual) = ("post_attention_norm", hp.norm_names[1]);
        let name = match self.has(after) && !self.has(usual) {
            true => after,
            false => usual,
        };
        self.norm(hp, name, hp.n_embd)
    }

    /// Router and experts of a mixture-of-experts block; gates and what goes up may be one tensor, `ffn_gate_up_exps`.
    pub(super) fn moe(&mut self, hp: &HParams) -> Result<Moe<W>, Error> {
        self.routed(|b| b.moe_weights(hp))
    }

    /// Calls `bind`, whose tensors are those of the layer's routed experts.
    fn routed<T>(&mut self, bind: impl FnOnce(&mut Self) -> T) -> T {
        self.experts_of = Some(self.il);
        let bound = bind(self);
        self.experts_of = None;
        bound
    }

    fn moe_weights(&mut self, hp: &HParams) -> Result<Moe<W>, Error> {
        // What a file that speaks of experts by mistake lacks first of all.
        let gate_inp = self.matrix("ffn_gate_inp", hp.n_embd, hp.n_expert)?;
        let all = [hp.n_embd, 2 * hp.n_ff_exp, hp.n_expert];
        if let Some(t) = self.find("ffn_gate_up_exps.weight", &all, false)? {
            let (gates, ups) = ((self.make)(t.clone())?, (self.make)(t)?);
            return Ok(Moe {
                gates_and_ups: true,
                ..self.moe_of(hp, gate_inp, Some(gates), ups)?
            });
        }
        let n_embd = hp.n_expert_latent.unwrap_or(hp.n_embd);
        let dims = [n_embd, hp.n_ff_exp, hp.n_expert];
        let gate_exps = match hp.activations.is_empty() {
            true => Some(self.required("ffn_gate_exps.weight", &dims)?),
            false => None,
        };
        let up_exps = self.required("ffn_up_exps.weight", &dims)?;
        self.moe_of(hp, gate_inp, gate_exps, up_exps)
    }

    fn moe_of(
        &mut self,
        hp: &HParams,
        gate_inp: W,
        gate_exps: Option<W>,
        up_exps: W,
    ) -> Result<Moe<W>, Error> {
        let (n_ff, n_expert) = (hp.n_ff_exp, hp.n_expert);
        let n_embd = hp.n_expert_latent.unwrap_or(hp.n_embd);
        let routing = hp.routing;
        Ok(Moe {
            gate_inp,
            gate_exps,
            up_exps,
            gates_and_ups: false,
            down_exps: self.required("ffn_down_exps.weight", &[n_ff, n_embd, n_expert])?,
            down_exps_s: None,
            n_expert,
            n_expert_used: hp.n_expert_used,
            n_ff,
            gating: routing.gating,
            exp_probs_b: match routing.is_biased {
                true => match self.optional_vector("exp_probs_b.bias", n_expert)? {
                    None => self.optional_vector("exp_probs_b", n_expert)?,
                    found => found,
                },
                false => None,
            },
            n_group: routing.n_group,
            n_group_used: routing.n_group_used,
            norm_topk: routing.norm_topk,
            weights_scale: routing.weights_scale,
            weighs_input: routing.weighs_input,
            clamp: None,
            bias: None,
            act: match hp.activations.is_empty() {
                true => Act::Swiglu,
                false => Act::ReluSqr,
            },
        })
    }

    /// Biases of a mixture-of-experts block; all of them.
    pub(super) fn moe_bias(&mut self, hp: &HParams) -> Result<MoeBias<W>, Error> {
        let (n_embd, n_ff, n_expert) = (hp.n_embd, hp.n_ff_exp, hp.n_expert);
        self.routed(|b| {
            Ok(MoeBias {
                gate_inp: b.table("ffn_gate_inp.bias", &[n_expert])?,
                gate_exps: b.table("ffn_gate_exps.bias", &[n_ff, n_expert])?,
                up_exps: b.table("ffn_up_exps.bias", &[n_ff, n_expert])?,
                down_exps: b.table("ffn_down_exps.bias", &[n_embd, n_expert])?,
            })
        })
    }

    /// Numbers that are added, not multiplied with, whatever their shape; bound as one vector.
    pub(super) fn table(&mut self, name: &str, dims: &[usize]) -> Result<W, Error> {
        let found = self.find(name, dims, true)?;
        let t = found.ok_or_else(|| self.missing(name, dims))?;
        (self.make)(t)
    }

    fn required(&mut self, name: &str, dims: &[usize]) -> Result<W, Error> {
        let found = self.optional(name, dims)?;
        found.ok_or_else(|| self.missing(name, dims))
    }

    fn missing(&self, name: &str, dims: &[usize]) -> Error {
        report::malformed(
            self.file.name(),
            format!("tensor {}{name} is missing", self.prefix),
            format!("a tensor of shape {}", show(dims)),
        )
    }

    fn optional(&mut self, name: &str, dims: &[usize]) -> Result<Option<W>, Error> {
        let found = self.find(name, dims, dims.len() == 1)?;
        found.map(|t| (self.make)(t)).transpose()
    }

    /// A tensor, if the file has it, of this shape and of a type that can be used.
    fn find(&self, name: &str, dims: &[usize], vector: bool) -> Result<Option<Tensor>, Error> {
        let full = format!("{}{name}", self.prefix);
        let Some(t) = self.file.tensor(&full) else {
            return Ok(None);
        };
        let wanted: [u64; 4] = std::array::from_fn(|i| dims.get(i).map_or(1, |&n| n as u64));
        if t.dims != wanted {
            let found: Vec<usize> = t.dims[..(t.n_dims as usize).max(dims.len())]
                .iter()
                .map(|&n| n as usize)
                .collect();
            return Err(report::malformed(
                self.file.name(),
                format!("tensor {full} has shape {}", show(&found)),
                show(dims),
            ));
        }
        let fits = if vector {
            matches!(t.ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16)
        } else {
            t.ty.traits().vec_dot.is_some()
        };
        if !fits {
            let expected = if vector {
                "f32, f16 or bf16"
            } else {
                "a type of weights"
            };
            return Err(report::unsupported(
                self.file.name(),
                format!("tensor {full} has type {}", t.ty.name()),
                expected,
            ));
        }
        let (n_in, n_out) = match vector {
            true => (dims.iter().product(), 1),
            false => (dims[0], dims[1..].iter().product()),
        };
        Ok(Some(Tensor {
            ty: t.ty,
            n_in,
            n_out,
            vector,
            experts_of: self.experts_of,
            bytes: self.file.bytes_of(t.info),
        }))
    }
}

fn show(dims: &[usize]) -> String {
    let list: Vec<String> = dims.iter().map(usize::to_string).collect();
    format!("[{}]", list.join(", "))
}
