//! From the sources of sampling parameters to a sampler.

use lemma_engine::gguf::Value;
use lemma_engine::model::Model;
use lemma_engine::sampling::{ParamSource, ParamSources, Sampler, SamplerOverrides, SamplerParams};
use serde_json::{Map, Value as Json, json};

use crate::args::config::Sampling;
use crate::fail::{Failure, Result};

/// The parameters in force, and who set each.
#[derive(Clone, Debug)]
pub(crate) struct Resolved {
    pub(crate) params: SamplerParams,
    pub(crate) sources: ParamSources,
}

/// Flag (or request) over environment over the model's recommendation over the built-in value.
pub(crate) fn resolve(
    sampling: &Sampling,
    request: Option<&SamplerOverrides>,
    model: &Model,
) -> Resolved {
    let meta = model.gguf().meta();
    let own = SamplerOverrides::from_model(|key| match meta.get(key)? {
        Value::Int { value, .. } => Some(value as f64),
        Value::F32(x) => Some(f64::from(x)),
        Value::F64(x) => Some(x),
        _ => None,
    });
    let mut layers = vec![
        (ParamSource::Model, &own),
        (ParamSource::Env, &sampling.env),
        (ParamSource::Flag, &sampling.flags),
        (ParamSource::Set, &sampling.set),
    ];
    layers.extend(request.map(|r| (ParamSource::Flag, r)));
    let (params, sources) = SamplerParams::merge(layers);
    Resolved { params, sources }
}

impl Resolved {
    /// A sampler for one reply; `seed` replaces that of the parameters.
    pub(crate) fn sampler(&self, model: &Model, seed: u64) -> Result<Sampler> {
        let mut params = self.params.clone();
        params.seed = Some(seed);
        let n_vocab = model.hparams().n_vocab;
        let beyond = |&&(id, _): &&(u32, f32)| id as usize >= n_vocab;
        if let Some((id, _)) = params.logit_bias.iter().find(beyond) {
            return Err(Failure::usage(format!(
                "--logit-bias: token {id}, expected a number below {n_vocab}"
            )));
        }
        let tokenizer = model.tokenizer();
        Sampler::new(params, n_vocab, |id| {
            tokenizer.token_bytes(id, true).to_vec()
        })
        .map_err(|e| Failure::usage(e.to_string()))
    }

    /// Every parameter with its value and source, for records.
    pub(crate) fn json(&self) -> Json {
        let list = self
            .params
            .describe(&self.sources)
            .into_iter()
            .filter(|(name, _, source)| {
                // What nobody touched and switches nothing on would only fill the page.
                *source != ParamSource::Builtin
                    || matches!(*name, "temp" | "top_k" | "top_p" | "min_p")
            });
        Json::Object(
            list.map(|(name, value, source)| {
                (
                    name.to_owned(),
                    json!({ "value": value, "source": source.as_str() }),
                )
            })
            .collect::<Map<_, _>>(),
        )
    }
}
