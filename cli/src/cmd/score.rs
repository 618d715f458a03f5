//! `lemma score`: how likely a model finds given texts.
//!
//! JSONL in, one record a line out:
//!
//! ```text
//! {"v":1,"id":…,"ok":true,"tokens":[…],"logprobs":[null,-1.2,…],"sum":-12.3,"n":11,"top":[null,[[id,logprob],…],…],"next":[…]}
//! ```
//!
//! `logprobs[i]` belongs to `tokens[i]`, so the first is null: nothing precedes it. `top[i]` are the best candidates for the same
//! place, `next` those for the place after the last token. A text is read as the tokenizer of the model would begin it (with its
//! beginning-of-text token if it wants one) and the names of special tokens in it count.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use lemma_engine::error::Error as EngineError;
use lemma_engine::model::Model;
use lemma_engine::sampling::{log_prob, top_log_probs};
use lemma_engine::session::Session;
use serde_json::{Map, Value, json};

use super::{Line, Lines, verdict};
use crate::args::Invocation;
use crate::args::config;
use crate::args::tools::ScoreArgs;
use crate::fail::{Failure, Result};
use crate::request::{id_of, object};
use crate::term::escape;
use crate::trace::Trace;
use crate::{load, out, record};

/// Where `--logits` goes.
struct Logits<'a> {
    file: BufWriter<File>,
    path: &'a Path,
}

pub(crate) fn run(args: &ScoreArgs, invocation: &Invocation) -> Result {
    out::check()?;
    let source =
        config::model_source(args.model.model.as_ref(), invocation.model_from_env(), None)?;
    let options = config::load_options(&args.model, &args.kv, &args.compute)?;
    let mut lines = Lines::open(args.file.as_deref())?;
    let model = load::model(&source, &options)?.model;
    let mut session = Session::new(model.clone(), &options)?;
    let trace = Trace::open(args.kv.kv_trace.as_deref())?;
    let mut logits = match &args.logits {
        Some(path) => Some(Logits {
            file: BufWriter::with_capacity(
                1 << 20,
                File::create(path).map_err(|e| Failure::file(path, &e))?,
            ),
            path,
        }),
        None => None,
    };

    let (mut total, mut failed) = (0, 0);
    while let Some(Line { number, text }) = lines.next()? {
        let id = text.as_ref().ok().and_then(|t| id_of(t));
        if let Some(trace) = &trace {
            let name = id.clone().unwrap_or_else(|| number.into());
            trace.install(&mut session, Some(("request", name)));
        }
        let result = text
            .and_then(|t| tokens_of(&t, &model))
            .and_then(|tokens| score(&mut session, &tokens, args.top, logits.as_mut()));
        total += 1;
        let record = match result {
            Ok(body) => {
                let mut r = Map::from_iter([
                    ("v".to_owned(), 1.into()),
                    ("id".to_owned(), id.unwrap_or(Value::Null)),
                    ("ok".to_owned(), true.into()),
                ]);
                r.extend(body);
                Value::Object(r)
            }
            Err(f) if f.is_quiet() => return Err(f),
            Err(f) => {
                failed += 1;
                record::error(id.as_ref(), &lines.locate(number, f))
            }
        };
        out::json(&record)?;
    }
    if let Some(l) = &mut logits {
        l.file.flush().map_err(|e| Failure::file(l.path, &e))?;
    }
    verdict(failed, total)
}

/// The tokens of a request.
fn tokens_of(line: &str, model: &Model) -> Result<Vec<u32>> {
    let request = object(line)?;
    if let Some(key) = request
        .keys()
        .find(|k| !matches!(k.as_str(), "id" | "text" | "tokens"))
    {
        return Err(Failure::usage(format!("unknown key {:?}", escape(key)))
            .hint("known keys: id, text, tokens"));
    }
    let tokens: Vec<u32> = match (request.get("text"), request.get("tokens")) {
        (Some(Value::String(text)), None) => model.tokenizer().encode(text, true, true),
        (None, Some(Value::Array(list))) => {
            let id = |v: &Value| {
                v.as_u64()
                    .and_then(|v| u32::try_from(v).ok())
                    .ok_or_else(|| Failure::usage("\"tokens\": expected a list of token numbers"))
            };
            list.iter().map(id).collect::<Result<_>>()?
        }
        (Some(_), Some(_)) => {
            return Err(Failure::usage("\"text\" and \"tokens\" exclude each other"));
        }
        _ => {
            return Err(Failure::usage(
                "a request needs \"text\" (a text) or \"tokens\" (a list)",
            ));
        }
    };
    if tokens.is_empty() {
        return Err(Failure::usage("nothing to score: no tokens"));
    }
    Ok(tokens)
}

fn score(
    session: &mut Session,
    tokens: &[u32],
    n_top: usize,
    mut logits: Option<&mut Logits<'_>>,
) -> Result<Map<String, Value>> {
    session.clear();
    let mut logprobs = vec![Value::Null];
    let mut top = vec![Value::Null];
    let mut next = Value::Null;
    let mut sum = 0.0;
    let mut write_error = None;
    session
        .score(tokens, &mut |i, row| {
            if let Some(l) = &mut logits
                && let Err(e) = row
                    .iter()
                    .try_for_each(|x| l.file.write_all(&x.to_le_bytes()))
            {
                write_error = Some(Failure::file(l.path, &e));
                return Err(EngineError::runtime("the logits cannot be written"));
            }
            let best = |row: &[f32]| -> Value {
                top_log_probs(row, n_top)
                    .iter()
                    .map(|&(id, p)| json!([id, record::number(f64::from(p))]))
                    .collect()
            };
            if let Some(&following) = tokens.get(i + 1) {
                let p = f64::from(log_prob(row, following));
                sum += p;
                logprobs.push(record::number(p));
                if n_top > 0 {
                    top.push(best(row));
                }
            } else if n_top > 0 {
                next = best(row);
            }
            Ok(())
        })
        // A disk that is full is not a bad request.
        .map_err(|e| {
            write_error.map_or_else(
                || Failure::from(e),
                |_| Failure::quiet(crate::fail::RUNTIME),
            )
        })?;
    let mut body = Map::new();
    body.insert("tokens".into(), tokens.into());
    body.insert("logprobs".into(), logprobs.into());
    body.insert("sum".into(), record::number(sum));
    body.insert("n".into(), (tokens.len() - 1).into());
    if n_top > 0 {
        body.insert("top".into(), top.into());
        body.insert("next".into(), next);
    }
    Ok(body)
}
