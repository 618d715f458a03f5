//! `lemma perplexity`: the perplexity of a model over a text.
//!
//! By default as llama-perplexity does it: the tokens are cut into disjoint chunks of `-c` positions (512 if not given), and the
//! second half of each chunk is scored, so that every scored token has at least half a chunk before it. With `--ppl-stride N` the
//! window moves by N tokens and the last N of each are scored: slower, and every token has (nearly) a full window before it.

use lemma_engine::sampling::log_prob;
use lemma_engine::session::Session;
use serde_json::json;

use super::input_text;
use crate::args::Invocation;
use crate::args::config;
use crate::args::tools::PerplexityArgs;
use crate::fail::{Failure, INTERRUPT, Result};
use crate::signals::{self, Polling};
use crate::term::{Style, Term};
use crate::{load, out, record, trace};

/// llama-perplexity's default.
const WINDOW: u32 = 512;

pub(crate) fn run(args: &PerplexityArgs, invocation: &Invocation, term: Term) -> Result {
    out::check()?;
    if args.chunks == 0 {
        return Err(Failure::usage(
            "--chunks 0: expected at least 1, or -1 for all",
        ));
    }
    let source =
        config::model_source(args.model.model.as_ref(), invocation.model_from_env(), None)?;
    let mut options = config::load_options(&args.model, &args.kv, &args.compute)?;
    let text = input_text(args.prompt.as_ref(), args.file.as_deref())?;
    let model = load::model(&source, &options)?.model;
    let window = options
        .n_ctx
        .unwrap_or(WINDOW.min(model.hparams().n_ctx_train))
        .max(2) as usize;
    options.n_ctx = Some(window as u32);
    let mut session = Session::new(model.clone(), &options)?;
    trace::install(&mut session, args.kv.kv_trace.as_deref())?;
    let tokenizer = model.tokenizer();
    let tokens = tokenizer.encode(&text, true, false);
    let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());

    let windows = windows(tokens.len(), window, args.ppl_stride);
    let limit = usize::try_from(args.chunks).unwrap_or(usize::MAX);
    if windows.is_empty() {
        return Err(Failure::usage(format!(
            "{} tokens of text, expected at least 2",
            tokens.len()
        )));
    }
    let total = windows.len().min(limit);
    let mut sum = Sum::default();
    let polling = Polling::begin();
    for (i, w) in windows.iter().take(limit).enumerate() {
        let mut chunk = tokens[w.start..w.end].to_vec();
        if let Some(bos) = bos {
            chunk[0] = bos;
        }
        session.clear();
        session.score(&chunk, &mut |j, row| {
            if j + 1 < chunk.len() && j + 1 >= w.first_scored {
                sum.add(-f64::from(log_prob(row, chunk[j + 1])));
            }
            Ok(())
        })?;
        if signals::interrupted() {
            return Err(Failure::quiet(INTERRUPT));
        }
        let so_far = format!("[{}/{total}] {:.4}", i + 1, sum.perplexity());
        out::transient(&term, &so_far, Style::default());
    }
    drop(polling);
    out::erase(&term);
    if args.json {
        return out::json(&json!({
            "ppl": record::number(sum.perplexity()),
            "ppl_error": record::number(sum.error()),
            "nll": record::number(sum.mean()),
            "n_tokens": tokens.len(),
            "n_scored": sum.n,
            "n_chunks": total,
            "n_ctx": window,
            "stride": args.ppl_stride,
            "model": model.name(),
        }));
    }
    out::line(&format!(
        "Final estimate: PPL = {:.4} +/- {:.5} ({} tokens scored in {total} chunks of {window})",
        sum.perplexity(),
        sum.error(),
        sum.n
    ))
}

/// A stretch of tokens, and the index in it of the first token that is scored.
#[derive(Debug, PartialEq, Eq)]
struct Window {
    start: usize,
    end: usize,
    first_scored: usize,
}

fn windows(n: usize, size: usize, stride: usize) -> Vec<Window> {
    if n < 2 {
        return Vec::new();
    }
    // A short text is one chunk of its own.
    let size = size.min(n);
    if stride == 0 {
        return (0..n / size)
            .map(|i| Window {
                start: i * size,
                end: (i + 1) * size,
                first_scored: (size / 2 + 1).min(size - 1),
            })
            .collect();
    }
    let stride = stride.min(size - 1);
    let count = (n - size) / stride + 1;
    (0..count)
        .map(|i| Window {
            start: i * stride,
            end: i * stride + size,
            first_scored: if i == 0 { 1 } else { size - stride },
        })
        .collect()
}

/// Mean of negative log-likelihoods and its spread.
#[derive(Default)]
struct Sum {
    n: usize,
    nll: f64,
    nll2: f64,
}

impl Sum {
    fn add(&mut self, nll: f64) {
        self.n += 1;
        self.nll += nll;
        self.nll2 += nll * nll;
    }
    fn mean(&self) -> f64 {
        self.nll / self.n as f64
    }
    fn perplexity(&self) -> f64 {
        self.mean().exp()
    }
    fn error(&self) -> f64 {
        if self.n < 2 {
            return 0.0;
        }
        let variance = self.nll2 / self.n as f64 - self.mean() * self.mean();
        (variance.max(0.0) / (self.n - 1) as f64).sqrt() * self.perplexity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disjoint_chunks_score_their_second_half() {
        let w = windows(1100, 512, 0);
        assert_eq!(
            w,
            [
                Window {
                    start: 0,
                    end: 512,
                    first_scored: 257
                },
                Window {
                    start: 512,
                    end: 1024,
                    first_scored: 257
                }
            ]
        );
        assert_eq!(
            windows(2, 512, 0),
            [Window {
                start: 0,
                end: 2,
                first_scored: 1
            }]
        );
        assert!(windows(1, 512, 0).is_empty());
    }

    #[test]
    fn a_stride_scores_every_token_once() {
        let (n, size) = (1000, 100);
        for stride in [1, 7, 50, 99, 500] {
            let mut seen = vec![0; n];
            for w in windows(n, size, stride) {
                for i in w.first_scored..w.end - w.start {
                    seen[w.start + i] += 1;
                }
            }
            assert!(seen[1..n - size].iter().all(|&s| s == 1), "stride {stride}");
        }
    }

    #[test]
    fn a_uniform_model_has_the_perplexity_of_its_vocabulary() {
        let mut s = Sum::default();
        (0..10).for_each(|_| s.add(64f64.ln()));
        assert!((s.perplexity() - 64.0).abs() < 1e-9 && s.error() < 1e-4);
    }
}
