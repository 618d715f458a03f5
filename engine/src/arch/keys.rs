//! Reads `<arch>.<name>` keys of the metadata, each checked where it is read.

use super::{HParams, RopeParams, RopeScaling, Sections};
use crate::error::Error;
use crate::gguf::{GgufFile, Value};
use crate::report;

/// Larger counts than any model has are refused before anything is allocated by them.
pub(super) const MAX_DIM: u32 = 1 << 24;
pub(super) const MAX_LAYERS: u32 = 1024;
pub(super) const MAX_HEADS: u32 = 1 << 14;

/// Architectures whose layers are of different kinds, so that what one of them has another has not.
const MIXED: &[&str] = &[
    "lfm2",
    "lfm2moe",
    "nemotron_h",
    "nemotron_h_moe",
    "granitehybrid",
    "jamba",
    "kimi-linear",
];

/// Architectures whose layers are of different widths; what each has is read where it is bound.
const UNLIKE: &[&str] = &["deci", "gemma4", "mimo2", "step35"];

const WINDOW: &str = "attention.sliding_window";
const MAX_WINDOW: u32 = u32::MAX >> 1;

/// The `<arch>.<name>` keys of a file.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    pub(super) file: &'a GgufFile,
    pub(super) arch: &'static str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    /// The error for a number that nobody can use.
    pub(super) fn bad(&self, name: &str, found: impl std::fmt::Display, expected: String) -> Error {
        self.file.meta().invalid(&self.key(name), found, &expected)
    }

    /// The error for a number that is missing.
    pub(super) fn missing(&self, name: &str) -> Error {
        self.file.meta().missing(&self.key(name), "a number")
    }

    /// Refuses a model that has the key.
    pub(super) fn absent(&self, name: &str) -> Result<(), Error> {
        let key = self.key(name);
        match self.file.meta().get(&key) {
            None => Ok(()),
            Some(_) => Err(report::unsupported(
                self.file.name(),
                format!("key {key}"),
                "a model without it",
            )),
        }
    }

    /// Whether the file has a key.
    pub(super) fn has(&self, name: &str) -> bool {
        self.file.meta().get(&self.key(name)).is_some()
    }

    /// Whether layer `il` has a tensor.
    pub(super) fn has_tensor(&self, il: usize, name: &str) -> bool {
        self.file.tensor(&format!("blk.{il}.{name}")).is_some()
    }

    /// Refuses experts.
    pub(super) fn no_experts(&self, hp: &HParams) -> Result<(), Error> {
        match hp.n_expert {
            0 => Ok(()),
            n => Err(self.bad("expert_count", n, "none".to_owned())),
        }
    }

    /// Refuses a model without experts.
    pub(super) fn only_experts(&self, hp: &HParams) -> Result<(), Error> {
        match hp.n_expert {
            0 => Err(self.bad("expert_count", 0, "1 to 4096".to_owned())),
            _ => Ok(()),
        }
    }

    /// A number, or an array in which every layer has the same number.
    pub(super) fn optional(&self, name: &str) -> Result<Option<u32>, Error> {
        let key = self.key(name);
        let meta = self.file.meta();
        let n = match meta.get(&key) {
            Some(Value::Array(a)) => a.len(),
            _ => return meta.opt_u32(&key),
        };
        let all = meta.opt_u32_per_layer(&key, n)?.unwrap_or_default();
        match all.first() {
            Some(first) if all.iter().all(|n| n == first) => Ok(Some(*first)),
            _ => Err(report::unsupported(
                self.file.name(),
                format!("key {key} differs between layers"),
                "the same number in every layer",
            )),
        }
    }

    /// A number of at least one, like [`Keys::optional`].
    pub(super) fn optional_count(&self, name: &str, max: u32) -> Result<Option<usize>, Error> {
        match self.optional(name)? {
            None => Ok(None),
            Some(n) if n >= 1 && n <= max => Ok(Some(n as usize)),
            Some(n) => Err(self.bad(name, n, format!("1 to {max}"))),
        }
    }

    /// Refuses a number that is said and is another than `all`, that of all layers.
    pub(super) fn no_other(&self, name: &str, all: usize, max: u32) -> Result<(), Error> {
        match self.optional_count(name, max)? {
            Some(n) if n != all => Err(self.bad(name, n, format!("{all}, as in all layers"))),
            _ => Ok(()),
        }
    }

    /// A number of at least one that has to be there.
    pub(super) fn count(&self, name: &str, max: u32) -> Result<usize, Error> {
        self.optional_count(name, max)?
            .ok_or_else(|| self.missing(name))
    }

    /// Whether layers are of different widths.
    pub(super) fn is_unlike(&self) -> bool {
        UNLIKE.contains(&self.arch)
    }

    /// What all layers have, or the largest of them where they are of different widths.
    pub(super) fn of_layers(&self, name: &str, max: u32) -> Result<Option<usize>, Error> {
        match self.is_unlike() && self.has(name) {
            true => self.largest(name, max),
            false => self.count_where_any(name, max),
        }
    }

    /// The number of those layers that have one, where layers are of different kinds: zero stands for none there. Elsewhere
    /// [`Keys::optional_count`].
    pub(super) fn count_where_any(&self, name: &str, max: u32) -> Result<Option<usize>, Error> {
        if !MIXED.contains(&self.arch) || !self.has(name) {
            return self.optional_count(name, max);
        }
        let all = self.layer_counts(name, 0)?;
        let some = || all.iter().filter(|n| **n > 0);
        match some().next() {
            Some(n) if *n > max || some().any(|other| other != n) => {
                let expected = format!("the same number, 1 to {max}, in layers that have one");
                Err(self.bad(name, format!("{:?}", &all[..all.len().min(64)]), expected))
            }
            n => Ok(n.map(|n| *n as usize)),
        }
    }

    /// The largest number of all layers, `None` where there is none but zeros.
    pub(super) fn largest(&self, name: &str, max: u32) -> Result<Option<usize>, Error> {
        match self.layer_counts(name, 0)?.into_iter().max() {
            Some(n) if n > max => Err(self.bad(name, n, format!("at most {max}"))),
            n => Ok(n.filter(|n| *n > 0).map(|n| n as usize)),
        }
    }

    /// A number for each of `n_layer` layers: an array, which may speak of those that guess further tokens too, or the same for all.
    pub(super) fn layer_counts(&self, name: &str, n_layer: usize) -> Result<Vec<u32>, Error> {
        let n_block = self.optional("block_count")?.unwrap_or(0) as usize;
        let n = match self.file.meta().get(&self.key(name)) {
            Some(Value::Array(a)) if a.len() == n_layer => n_layer,
            _ => n_block.max(n_layer),
        };
        let all = self.file.meta().opt_u32_per_layer(&self.key(name), n)?;
        all.ok_or_else(|| self.missing(name))
    }

    pub(super) fn float(&self, name: &str) -> Result<Option<f32>, Error> {
        self.file.meta().opt_f32(&self.key(name))
    }

    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>, Error> {
        self.file.meta().opt_bool(&self.key(name))
    }

    /// A positive number, `default` where there is none.
    pub(super) fn positive(&self, name: &str, default: Option<f32>) -> Result<f32, Error> {
        match self.float(name)?.or(default) {
            Some(x) if x.is_finite() && x > 0.0 => Ok(x),
            Some(x) => Err(self.bad(name, x, "a positive number".to_owned())),
            None => Err(self
                .file
                .meta()
                .missing(&self.key(name), "a positive number")),
        }
    }

    /// Width of an expert, in architectures that have nothing but experts.
    pub(super) fn expert_width(&self, hp: &HParams) -> Result<usize, Error> {
        self.only_experts(hp)?;
        if let Some(s) = self.float("expert_weights_scale")?
            && s != 0.0
            && s != 1.0
        {
            return Err(self.bad("expert_weights_scale", s, "1".to_owned()));
        }
        match self.optional_count("expert_feed_forward_length", MAX_DIM)? {
            Some(n) => Ok(n),
            // Together the experts of a token are as wide as the block says.
            None => Ok((self.count("feed_forward_length", MAX_DIM)? / hp.n_expert_used).max(1)),
        }
    }

    /// Tokens that a layer with a window sees.
    pub(super) fn window(&self) -> Result<u32, Error> {
        Ok(self.count(WINDOW, MAX_WINDOW)? as u32)
    }

    /// The same where there may be none, which zero says as well.
    pub(super) fn optional_window(&self) -> Result<Option<u32>, Error> {
        match self.optional(WINDOW)? {
            None | Some(0) => Ok(None),
            Some(_) => self.window().map(Some),
        }
    }

    /// Which of `n_layer` layers have a window: the file says it for each, or that every `period`-th has none, zero for all having one.
    pub(super) fn window_pattern(&self, n_layer: usize, period: u32) -> Result<Vec<bool>, Error> {
        let name = "attention.sliding_window_pattern";
        if let Some(all) = self.layer_flags(name, n_layer)? {
            return Ok(all);
        }
        let period = self.optional(name)?.unwrap_or(period) as usize;
        let has = |il| period == 0 || il % period < period - 1;
        Ok((0..n_layer).map(has).collect())
    }

    /// An array that says yes or no for each of `n_layer` layers, or for those that guess further tokens too; `None` if it is missing or a number.
    pub(super) fn layer_flags(
        &self,
        name: &str,
        n_layer: usize,
    ) -> Result<Option<Vec<bool>>, Error> {
        let Some(Value::Array(a)) = self.file.meta().get(&self.key(name)) else {
            return Ok(None);
        };
        let bools = a.bools().map(Iterator::collect::<Vec<bool>>);
        let ints = a.ints().map(|all| all.map(|n| n != 0).collect());
        let n_block = self.optional("block_count")?.unwrap_or(0) as usize;
        let fits = |n: usize| n == n_layer || n == n_block.max(n_layer);
        let all = bools.or(ints).filter(|all| fits(all.len()));
        let found = format!("an array of {} {}", a.len(), a.elem().name());
        let all = all.ok_or_else(|| self.bad(name, found, format!("{n_layer} bools")));
        all.map(|mut all| {
            all.truncate(n_layer);
            Some(all)
        })
    }

    /// [`Keys::layer_floats`] of an architecture's own key; an array may speak of layers that guess further tokens too.
    pub(super) fn layer_floats_of(&self, name: &str, n_layer: usize) -> Result<Vec<f32>, Error> {
        let n_block = self.optional("block_count")?.unwrap_or(0) as usize;
        let n = match self.file.meta().get(&self.key(name)) {
            Some(Value::Array(a)) if a.len() == n_block.max(n_layer) => a.len(),
            _ => n_layer,
        };
        let mut all = self.layer_floats(&self.key(name), n)?;
        all.truncate(n_layer);
        Ok(all)
    }

    /// A number for each of `n_layer` layers: an array, or the same for all. The key is one that no architecture's name begins.
    pub(super) fn layer_floats(&self, key: &str, n_layer: usize) -> Result<Vec<f32>, Error> {
        let meta = self.file.meta();
        let all: Vec<f32> = match meta.get(key) {
            None => return Err(meta.missing(key, "a number for each layer")),
            Some(Value::Array(a)) if a.len() == n_layer => match meta.opt_f32s(key)? {
                Some(all) => all.collect(),
                None => Vec::new(),
            },
            Some(Value::Array(a)) => {
                let found = format!("an array of {}", a.len());
                return Err(meta.invalid(key, found, &format!("{n_layer} numbers")));
            }
            Some(_) => vec![meta.opt_f32(key)?.unwrap_or(0.0); n_layer],
        };
        match all.iter().find(|x| !x.is_finite()) {
            Some(x) => Err(meta.invalid(key, x, "numbers")),
            None => Ok(all),
        }
    }

    /// How many pairs of elements rotate by each coordinate of a position.
    pub(super) fn rope_sections(&self) -> Result<Sections, Error> {
        let name = "rope.dimension_sections";
        let all = self.file.meta().opt_i32s(&self.key(name))?;
        let Some(all) = all else {
            return Err(self
                .file
                .meta()
                .missing(&self.key(name), "an array of four numbers"));
        };
        let all: Vec<i32> = all.take(5).collect();
        let sections = all.iter().filter_map(|n| usize::try_from(*n).ok());
        match <[usize; 4]>::try_from(sections.collect::<Vec<_>>()) {
            Ok(pairs) if all.len() == 4 && pairs.iter().any(|&n| n > 0) => Ok(Sections {
                pairs,
                take_turns: true,
            }),
            _ => {
                let expected = "four numbers, none negative and not all zero".to_owned();
                Err(self.bad(name, format!("{all:?}"), expected))
            }
        }
    }

    /// A bound of scores or logits; zero stands for none.
    pub(super) fn softcap(&self, name: &str, default: f32) -> Result<Option<f32>, Error> {
        match self.float(name)?.unwrap_or(default) {
            0.0 => Ok(None),
            cap if cap.is_finite() && cap > 0.0 => Ok(Some(cap)),
            cap => Err(self.bad(name, cap, "a positive number".to_owned())),
        }
    }

    /// The rotation that the common keys describe.
    pub(super) fn rope(&self) -> Result<RopeParams, Error> {
        let (scaling, magnitude) = self.rope_scaling()?;
        Ok(RopeParams {
            freq_base: self.positive("rope.freq_base", Some(10_000.0))?,
            scaling,
            magnitude: magnitude * self.positive("rope.scaling.attn_factor", Some(1.0))?,
            ..RopeParams::plain(1.0)
        })
    }

    fn rope_scaling(&self) -> Result<(RopeScaling, f32), Error> {
        let kind = self
            .file
            .meta()
            .opt_str(&self.key("rope.scaling.type"))?
            .unwrap_or("linear");
        // Old files have `rope.scale_linear` instead.
        let factor = match self.float("rope.scaling.factor")? {
            Some(f) => Some(("rope.scaling.factor", f)),
            None => self
                .float("rope.scale_linear")?
                .map(|f| ("rope.scale_linear", f)),
        };
        let factor = match factor {
            None => 1.0,
            Some((_, 0.0)) => 1.0,
            Some((_, f)) if f.is_finite() && f > 0.0 => f,
            Some((name, f)) => return Err(self.bad(name, f, "a positive number".to_owned())),
        };
        match kind {
            "none" => Ok((RopeScaling::None, 1.0)),
            // The divisors of longrope are tensors.
            "linear" | "longrope" if factor == 1.0 => Ok((RopeScaling::None, 1.0)),
            "linear" | "longrope" => Ok((RopeScaling::Linear { factor }, 1.0)),
            "yarn" => {
                // ggml multiplies by 1 + 0.1 ln(factor) inside the rotation and the loader cancels it, so what is left is
                // the plain YaRN magnitude, or its ratio when the model states an exponent for all dimensions.
                let mscale = |m: f32| {
                    if factor <= 1.0 {
                        1.0
                    } else {
                        0.1 * m * factor.ln() + 1.0
                    }
                };
                let log_mul = self
                    .float("rope.scaling.yarn_log_multiplier")?
                    .unwrap_or(0.0);
                let ext_factor = self
                    .float("rope.scaling.yarn_ext_factor")?
                    .filter(|f| *f >= 0.0)
                    .unwrap_or(1.0);
                let magnitude = match (ext_factor, log_mul) {
                    (0.0, _) => 1.0,
                    (_, 0.0) => mscale(1.0),
                    (_, all) => mscale(1.0) / mscale(all),
                };
                let scaling = RopeScaling::Yarn {
                    factor,
                    ext_factor,
                    beta_fast: self.float("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                    beta_slow: self.float("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                };
                Ok((scaling, magnitude))
            }
            other => Err(report::unsupported(
                self.file.name(),
                format!("key {} is {:?}", self.key("rope.scaling.type"), other),
                "none, linear, yarn or longrope",
            )),
        }
    }
}
