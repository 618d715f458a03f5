//! What has no kernels on a GPU.

use lemma_cuda::ops::{self, Grouped, Heads};
use lemma_quant::pages::KvType;

use super::buffers;
use crate::arch::HParams;
use crate::error::Error;
use crate::gguf::GgufFile;
use crate::kv::{Layout, PAGE};
use crate::options::LoadOptions;
use crate::report;

/// Refuses models and options of the pool that have no kernels here. The heads of a model, how keys and values are stored in each tier,
/// and of how many parts a page is made.
pub(super) fn check(
    file: &GgufFile,
    hp: &HParams,
    o: &LoadOptions,
    layout: &Layout,
) -> Result<(Heads, Vec<[KvType; 2]>, usize), Error> {
    let kv = &o.kv;
    let asked = [
        (hp.cpu_only.is_some(), hp.cpu_only.unwrap_or_default()),
        (layout.page != PAGE, "--kv-page other than 16"),
        (layout.groups > 1, "--kv-scope head"),
        (layout.dense > 0, "--kv-dense-layers"),
        (layout.attend.is_some(), "--kv-policy quest"),
        (layout.bounds, "--kv-score bound"),
        (kv.redundancy < 1.0, "--kv-redundancy"),
        (kv.guard > 0.0, "--kv-guard"),
        // Tokens are rows of a grid.
        (o.n_ubatch > 65535, "--ubatch-size above 65535"),
    ];
    if let Some((_, flag)) = asked.iter().find(|(asked, _)| *asked) {
        let found = format!("{flag} on a GPU");
        return Err(report::usage(found, "--device cpu with it"));
    }
    if let Some((found, expected)) = too_wide(hp) {
        return Err(report::unsupported(file.name(), found, expected));
    }
    let heads = Heads {
        n_head: hp.n_head,
        n_head_kv: hp.n_head_kv,
        head_dim: hp.head_dim,
    };
    let n_part = if hp.latent.is_some() { 1 } else { 2 };
    let types = buffers::types(kv, layout, heads, n_part)?;
    Ok((heads, types, n_part))
}

/// Heads or experts of a width that kernels do not have, and what they have.
fn too_wide(hp: &HParams) -> Option<(String, String)> {
    let ([most_k, most_v], d) = (ops::MAX_LATENT, hp.head_dim);
    if hp.latent.is_some() {
        let fits = d.is_multiple_of(2) && d <= most_k && hp.head_dim_v <= most_v;
        let found = format!(
            "latent keys of {d} elements with values of {} on a GPU",
            hp.head_dim_v
        );
        return (!fits).then(|| {
            (
                found,
                format!("an even number of at most {most_k}, with {most_v}"),
            )
        });
    }
    if !d.is_multiple_of(2) || d > ops::MAX_HEAD_DIM {
        let expected = format!("an even number of at most {}", ops::MAX_HEAD_DIM);
        return Some((format!("heads of {d} elements on a GPU"), expected));
    }
    let widest = hp.n_ff_exp.max(hp.n_expert_latent.unwrap_or(hp.n_embd));
    if hp.n_expert > 0 && widest > Grouped::MAX_ROWS {
        let expected = format!("at most {}", Grouped::MAX_ROWS);
        return Some((format!("experts of {widest} rows on a GPU"), expected));
    }
    let delta = hp.delta.filter(|d| d.head_dim > ops::MAX_DELTA_DIM)?;
    let found = format!(
        "delta nets with heads of {} elements on a GPU",
        delta.head_dim
    );
    Some((found, format!("at most {}", ops::MAX_DELTA_DIM)))
}
