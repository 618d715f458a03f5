//! JSON records: what a script gets instead of text.
//!
//! One object a line, keys in a fixed order, `"v":1` first. A result and an error have the same frame, so that a reader looks at
//! `ok` and nothing else:
//!
//! ```text
//! {"v":1,"id":…,"ok":true,"text":…,"thinking":…,"finish":"eos","usage":{…},"kv":{…},"timing":{…},"seed":…,"model":…}
//! {"v":1,"id":…,"ok":false,"error":{"code":…,"kind":…,"message":…,"hint":…}}
//! ```
//!
//! A reply without an answer is an error that keeps what there is: the thinking and the counts.

use lemma_engine::generate::{Finish, Outcome};
use lemma_engine::session::KvStats;
use serde_json::{Map, Value, json};

use crate::fail::{Failure, NO_ANSWER};
use crate::stats::{gen_tps, prompt_tps};

/// What a record says beside the outcome.
pub(crate) struct Context<'a> {
    pub(crate) id: Option<&'a Value>,
    pub(crate) kv: &'a KvStats,
    pub(crate) load_ms: f64,
    pub(crate) seed: u64,
    pub(crate) model: &'a str,
    /// Sampling parameters with their sources.
    pub(crate) sampling: Option<Value>,
}

/// The failure that a reply amounts to, if it is one.
pub(crate) fn no_answer(o: &Outcome, n_predict: i64) -> Option<Failure> {
    if o.finish == Finish::Interrupt {
        return Some(Failure {
            kind: "interrupt",
            ..Failure::new(crate::fail::INTERRUPT, "interrupted")
        });
    }
    let limit = match o.finish {
        Finish::Length => format!("-n {n_predict} was reached"),
        Finish::Position => "the context ended".to_owned(),
        Finish::Budget => "the KV pool ended".to_owned(),
        Finish::Eos | Finish::Stop | Finish::Interrupt => "the reply ended".to_owned(),
    };
    let said = !o.text.trim().is_empty();
    // A model that has to go on after its answer may think again.
    if o.still_thinking && !said {
        let hint = match o.finish {
            Finish::Length => "raise -n, or bring the thinking to an end with --reasoning-budget N",
            Finish::Position => {
                "raise -c, or bring the thinking to an end with --reasoning-budget N"
            }
            Finish::Budget => {
                "raise --kv-budget, or bring the thinking to an end with --reasoning-budget N"
            }
            _ => "ask again with another --seed, or with --reasoning off",
        };
        return Some(
            Failure::new(
                NO_ANSWER,
                format!("no answer: {limit} while the model was still thinking"),
            )
            .hint(hint),
        );
    }
    // A stop string that came first is an answer, and an empty one.
    if !said && o.finish != Finish::Stop {
        return Some(Failure::new(
            NO_ANSWER,
            format!("no answer: {limit} before the model said anything"),
        ));
    }
    None
}

/// The record of a reply.
pub(crate) fn reply(o: &Outcome, failure: Option<&Failure>, c: &Context<'_>) -> Value {
    let mut r = head(c.id, failure.is_none());
    r.insert("text".into(), o.text.as_str().into());
    r.insert("thinking".into(), o.thinking.as_str().into());
    r.insert("finish".into(), o.finish.name().into());
    r.insert(
        "usage".into(),
        json!({ "prompt": o.n_prompt, "thinking": o.n_think, "answer": o.n_answer }),
    );
    r.insert("kv".into(), kv(c.kv));
    r.insert("timing".into(), timing(o, c.load_ms));
    if !o.logprobs.is_empty() {
        let list = o
            .logprobs
            .iter()
            .map(|&(id, logprob)| json!({ "id": id, "logprob": number(f64::from(logprob)) }));
        r.insert("logprobs".into(), list.collect());
    }
    r.insert("seed".into(), c.seed.into());
    r.insert("model".into(), c.model.into());
    if let Some(s) = &c.sampling {
        r.insert("sampling".into(), s.clone());
    }
    if let Some(f) = failure {
        r.insert("error".into(), error_object(f));
    }
    Value::Object(r)
}

/// The record of a request that failed before there was a reply.
pub(crate) fn error(id: Option<&Value>, failure: &Failure) -> Value {
    let mut r = head(id, false);
    r.insert("error".into(), error_object(failure));
    Value::Object(r)
}

fn head(id: Option<&Value>, ok: bool) -> Map<String, Value> {
    let mut r = Map::new();
    r.insert("v".into(), 1.into());
    r.insert("id".into(), id.cloned().unwrap_or(Value::Null));
    r.insert("ok".into(), ok.into());
    r
}

fn error_object(f: &Failure) -> Value {
    json!({ "code": f.code, "kind": f.kind, "message": f.message, "hint": f.hint })
}

/// State of the pool.
pub(crate) fn kv(k: &KvStats) -> Value {
    json!({ "pages": k.pages, "pinned": k.pinned, "recycled": k.recycled, "bytes": k.bytes })
}

fn timing(o: &Outcome, load_ms: f64) -> Value {
    json!({
        "load_ms": rounded(load_ms),
        "ttft_ms": rounded(o.ttft_s * 1e3),
        "prompt_tps": rounded(prompt_tps(o)),
        "gen_tps": rounded(gen_tps(o)),
    })
}

/// Two decimals: more would pretend.
pub(crate) fn rounded(x: f64) -> Value {
    number((x * 100.0).round() / 100.0)
}

/// A value as it is written: every JSON that leaves the program goes through here. What serde_json leaves as it is though it may
/// drive a terminal is escaped: DEL, C1 controls, bidirectional overrides and isolates. They occur in texts only.
pub(crate) fn text(value: &Value) -> String {
    escaped(&value.to_string())
}

/// The same over several lines.
pub(crate) fn pretty(value: &Value) -> String {
    escaped(&format!("{value:#}"))
}

fn escaped(json: &str) -> String {
    let drives = |c: char| matches!(c, '\u{7f}'..='\u{9f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        match drives(c) {
            true => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            false => out.push(c),
        }
    }
    out
}

/// JSON has no infinity.
pub(crate) fn number(x: f64) -> Value {
    serde_json::Number::from_f64(x).map_or(Value::Null, Value::Number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_drives_a_terminal_is_escaped() {
        let value = json!({ "a": "\u{1b}[0m\u{7f}\u{9b}2J\u{202e}x\u{2069}é日" });
        let written = text(&value);
        assert_eq!(
            written,
            "{\"a\":\"\\u001b[0m\\u007f\\u009b2J\\u202ex\\u2069é日\"}"
        );
        assert_eq!(serde_json::from_str::<Value>(&written).unwrap(), value);
        assert_eq!(
            serde_json::from_str::<Value>(&pretty(&value)).unwrap(),
            value
        );
    }
}
