//! `lemma tokenize`, `detokenize` and `template`: the vocabulary without the model.
//!
//! Files that hold a vocabulary and no weights will do.

use lemma_engine::chat::ChatTemplate;
use lemma_engine::conversation::{MARK, Message, PromptOptions, Role, render};
use lemma_engine::gguf::GgufFile;
use lemma_engine::tokenizer::{Tokenizer, TokenizerOptions, VocabSource};
use serde_json::{Value, json};

use super::{Line, Lines, input_text, verdict};
use crate::args::Invocation;
use crate::args::config;
use crate::args::tools::{DetokenizeArgs, TemplateArgs, TokenizeArgs};
use crate::args::typed::ModelArgs;
use crate::fail::{Failure, MALFORMED, Result};
use crate::request::{id_of, message, messages, object};
use crate::term::filter::Filter;
use crate::term::{Term, escape};
use crate::text::unmarked;
use crate::{load, out, record};

/// The file of the arguments and its tokenizer.
fn open(args: &ModelArgs, invocation: &Invocation) -> Result<(GgufFile, Tokenizer)> {
    let file = load::gguf(&config::model_source(
        args.model.as_ref(),
        invocation.model_from_env(),
        None,
    )?)?;
    let tokenizer = tokenizer(&file, args.pre.clone())?;
    Ok((file, tokenizer))
}

fn tokenizer(file: &GgufFile, pre_override: Option<String>) -> Result<Tokenizer> {
    let source = VocabSource::from_gguf(file)?;
    let made = Tokenizer::with_options(&source, &TokenizerOptions { pre_override });
    made.map_err(|e| {
        Failure::new(
            MALFORMED,
            format!("{}: {}", escape(file.name()), escape(&e.to_string())),
        )
    })
}

pub(crate) fn tokenize(args: &TokenizeArgs, invocation: &Invocation, term: Term) -> Result {
    let (_, tokenizer) = open(&args.model, invocation)?;
    let encode = |text: &str| tokenizer.encode(text, !args.no_bos, !args.no_parse_special);
    if args.jsonl {
        return each_line(args.file.as_deref(), |line| {
            let text = line
                .get("text")
                .and_then(Value::as_str)
                .ok_or_else(|| Failure::usage("a request needs \"text\" (a text)"))?;
            Ok(("ids", encode(text).into()))
        });
    }
    let text = input_text(
        args.text.as_ref().or(args.prompt.as_ref()),
        args.file.as_deref(),
    )?;
    let ids = encode(&text);
    if args.count {
        return out::line(&ids.len().to_string());
    }
    if args.ids {
        return out::line(&json!(ids).to_string().replace(',', ", "));
    }
    let mut lines = String::new();
    for &id in &ids {
        let text = String::from_utf8_lossy(tokenizer.token_bytes(id, true)).into_owned();
        let shown = if term.out_tty {
            escape(&text)
        } else {
            text.replace('\n', "\\n")
        };
        lines.push_str(&format!("{id:>6} -> '{shown}'\n"));
    }
    out::put(&lines)
}

pub(crate) fn detokenize(args: &DetokenizeArgs, invocation: &Invocation, term: Term) -> Result {
    let (_, tokenizer) = open(&args.model, invocation)?;
    let n_vocab = tokenizer.n_vocab();
    let check = |id: u64| match u32::try_from(id) {
        Ok(id) if (id as usize) < n_vocab => Ok(id),
        _ => Err(Failure::usage(format!(
            "token {id}: expected a number below {n_vocab}"
        ))),
    };
    if args.jsonl {
        return each_line(None, |line| {
            let list = line
                .get("ids")
                .or_else(|| line.get("tokens"))
                .and_then(Value::as_array);
            let list =
                list.ok_or_else(|| Failure::usage("a request needs \"ids\" (a list of numbers)"))?;
            let id = |v: &Value| {
                v.as_u64()
                    .ok_or_else(|| Failure::usage("\"ids\": expected a list of token numbers"))
                    .and_then(check)
            };
            let ids = list.iter().map(id).collect::<Result<Vec<u32>>>()?;
            Ok((
                "text",
                String::from_utf8_lossy(&tokenizer.decode(&ids, false, args.special)).into(),
            ))
        });
    }
    let typed = if args.ids.is_empty() {
        unmarked(input_text(None, None)?)
    } else {
        args.ids.join(" ")
    };
    let words = typed
        .split(|c: char| c.is_whitespace() || matches!(c, ',' | '[' | ']'))
        .filter(|w| !w.is_empty());
    let id = |w: &str| {
        w.parse::<u64>()
            .map_err(|_| Failure::usage(format!("{:?}: expected a token number", escape(w))))
            .and_then(check)
    };
    let ids = words.map(id).collect::<Result<Vec<u32>>>()?;
    let bytes = tokenizer.decode(&ids, false, args.special);
    if term.out_tty {
        return out::line(&Filter::default().clean(&String::from_utf8_lossy(&bytes)));
    }
    // A pipe gets the bytes as they are, and one newline.
    out::bytes(&[bytes.as_slice(), b"\n"].concat())
}

/// JSONL in, JSONL out.
fn each_line(
    file: Option<&std::path::Path>,
    f: impl Fn(&serde_json::Map<String, Value>) -> Result<(&'static str, Value)>,
) -> Result {
    let mut lines = Lines::open(file)?;
    let (mut total, mut failed) = (0, 0);
    while let Some(Line { number, text }) = lines.next()? {
        total += 1;
        let id = text.as_ref().ok().and_then(|t| id_of(t));
        let record = match text.and_then(|t| f(&object(&t)?)) {
            Ok((key, value)) => match id {
                Some(id) => json!({ "id": id, key: value }),
                None => json!({ key: value }),
            },
            Err(e) => {
                failed += 1;
                record::error(id.as_ref(), &lines.locate(number, e))
            }
        };
        out::json(&record)?;
    }
    verdict(failed, total)
}

pub(crate) fn template(args: &TemplateArgs, invocation: &Invocation, term: Term) -> Result {
    let (file, tokenizer) = open(&args.model, invocation)?;
    let source = match config::chat_template(&args.model)? {
        Some(source) => source,
        None => file
            .meta()
            .opt_str("tokenizer.chat_template")?
            .map(str::to_owned)
            .ok_or_else(|| {
                Failure::new(
                    MALFORMED,
                    format!(
                        "{}: no chat template, expected tokenizer.chat_template",
                        escape(file.name())
                    ),
                )
                .hint("give one with --chat-template or --chat-template-file")
            })?,
    };
    let show = |text: &str| {
        let clean = if term.out_tty {
            Filter::default().clean(text)
        } else {
            text.to_owned()
        };
        out::line(clean.strip_suffix('\n').unwrap_or(&clean))
    };
    let mut list: Vec<Message> = match (&args.prompt, &args.file) {
        (Some(p), _) => vec![message(Role::User, p.clone())],
        (None, Some(path)) => {
            let text = unmarked(input_text(None, Some(path))?);
            let name = match path.as_os_str() == "-" {
                true => "stdin".to_owned(),
                false => crate::term::escape_path(path),
            };
            let json: Value = serde_json::from_str(&text).map_err(|e| {
                Failure::usage(format!("{name}: not JSON: {}", escape(&e.to_string())))
            })?;
            messages(json.get("messages").unwrap_or(&json)).map_err(|f| Failure {
                message: format!("{name}: {}", f.message),
                ..f
            })?
        }
        (None, None) => return show(&source),
    };
    if let Some(system) = &args.system {
        list.insert(0, message(Role::System, system.clone()));
    }
    let text = |id: Option<u32>| {
        id.and_then(|id| tokenizer.token_text(id))
            .map_or(String::new(), |b| String::from_utf8_lossy(b).into_owned())
    };
    let template = ChatTemplate::new(&source, &text(tokenizer.bos()), &text(tokenizer.eos()))
        .map_err(|e| Failure::from(lemma_engine::error::Error::from(e).in_file(file.name())))?;
    let rendered = render(
        &template,
        &tokenizer,
        &list,
        &PromptOptions::default(),
        !args.no_generation_prompt,
    )?;
    // Marks keep what users wrote from being read as control tokens; they are no part of the text.
    show(&rendered.replace(MARK, ""))
}
