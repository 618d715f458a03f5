//! Requests: one JSON object a line.
//!
//! Only `prompt` or `messages` is needed. A key that is not known is an error rather than ignored, because a script that writes
//! `temprature` should hear of it before the ten thousandth line.

use lemma_engine::conversation::{Message, Role};
use lemma_engine::grammar::GrammarSource;
use lemma_engine::sampling::{SamplerOverrides, SamplerParams};
use serde_json::{Map, Value};

use crate::args::argv::nearest;
use crate::args::config::{self, Constraint};
use crate::fail::{Failure, Result};
use crate::term::escape;

/// A request that was understood.
#[derive(Debug, Default)]
pub(crate) struct Request {
    pub(crate) id: Option<Value>,
    pub(crate) messages: Vec<Message>,
    /// The text of `prompt`, before it became a message.
    pub(crate) prompt: Option<String>,
    pub(crate) n: Option<i64>,
    pub(crate) stop: Option<Vec<String>>,
    pub(crate) think: Option<bool>,
    pub(crate) think_budget: Option<u32>,
    pub(crate) kv_budget: Option<u32>,
    pub(crate) logprobs: bool,
    pub(crate) constraint: Option<Constraint>,
    pub(crate) sampling: SamplerOverrides,
}

/// Keys that are not sampling parameters.
const OTHER: &[&str] = &[
    "id",
    "prompt",
    "messages",
    "system",
    "n",
    "stop",
    "think",
    "think_budget",
    "kv_budget",
    "logprobs",
    "json_schema",
    "grammar",
];

/// The id of a line, if the line is an object that has one.
pub(crate) fn id_of(line: &str) -> Option<Value> {
    serde_json::from_str::<Value>(line)
        .ok()?
        .get("id")
        .filter(|v| !v.is_null())
        .cloned()
}

impl Request {
    /// Reads one line.
    pub(crate) fn parse(line: &str) -> Result<Self> {
        let object = object(line)?;
        let mut r = Self::default();
        let mut system = None;
        for (key, v) in &object {
            match key.as_str() {
                "id" => r.id = Some(v.clone()).filter(|v| !v.is_null()),
                "prompt" => r.prompt = Some(string(key, v)?),
                "system" => system = Some(string(key, v)?),
                "messages" => r.messages = messages(v)?,
                "n" => r.n = Some(config::n_predict(&format!("{key:?}"), integer(key, v)?)?),
                "stop" => r.stop = Some(strings(key, v)?),
                "think" => {
                    r.think = Some(v.as_bool().ok_or_else(|| expected(key, "true or false"))?)
                }
                "think_budget" => r.think_budget = tokens(key, v)?,
                "kv_budget" => r.kv_budget = tokens(key, v)?,
                "logprobs" => {
                    r.logprobs = v.as_bool().ok_or_else(|| expected(key, "true or false"))?
                }
                "grammar" | "json_schema" => {
                    if r.constraint.is_some() {
                        return Err(Failure::usage(
                            "\"grammar\" and \"json_schema\" exclude each other",
                        ));
                    }
                    r.constraint = constraint(key, v)?;
                }
                "dry_sequence_breakers" => {
                    r.sampling.dry_sequence_breakers = Some(strings(key, v)?)
                }
                _ if SamplerParams::NAMES.contains(&key.as_str()) => match v {
                    Value::Number(n) => config::set(&mut r.sampling, key, &n.to_string())?,
                    _ => return Err(expected(key, "a number")),
                },
                _ => return Err(unknown(key)),
            }
        }
        match (&r.prompt, r.messages.is_empty()) {
            (Some(_), false) => {
                return Err(Failure::usage(
                    "\"prompt\" and \"messages\" exclude each other",
                ));
            }
            (None, true) => {
                return Err(Failure::usage("a request needs \"prompt\" or \"messages\""));
            }
            // As -p has it.
            (Some(p), true) if p.trim().is_empty() => {
                return Err(Failure::usage("\"prompt\" is empty, expected a text"));
            }
            (Some(p), true) => r.messages.push(message(Role::User, p.clone())),
            (None, false) => {}
        }
        if let Some(text) = system {
            if r.messages[0].role == Role::System {
                return Err(Failure::usage(
                    "\"system\" and a system message exclude each other",
                ));
            }
            r.messages.insert(0, message(Role::System, text));
        }
        Ok(r)
    }
}

/// What the answer has to keep to; null is nothing.
fn constraint(key: &str, v: &Value) -> Result<Option<Constraint>> {
    let source = match (key, v) {
        (_, Value::Null) => return Ok(None),
        ("grammar", _) => GrammarSource::Gbnf(string(key, v)?),
        (_, Value::Object(_) | Value::Bool(_)) => GrammarSource::JsonSchema(v.to_string()),
        _ => return Err(expected(key, "a JSON schema (an object, not a text)")),
    };
    let name = format!("{key:?}");
    Ok(Some(Constraint { name, source }))
}

/// A line as a JSON object.
pub(crate) fn object(line: &str) -> Result<Map<String, Value>> {
    match serde_json::from_str(line) {
        Ok(Value::Object(o)) => Ok(o),
        Ok(_) => Err(Failure::usage("expected a JSON object on the line")),
        Err(e) => Err(Failure::usage(escape(&format!("not JSON: {e}")))),
    }
}

pub(crate) fn message(role: Role, content: String) -> Message {
    Message {
        role,
        content,
        thinking: None,
    }
}

/// The messages of a JSON array.
pub(crate) fn messages(v: &Value) -> Result<Vec<Message>> {
    let list = v
        .as_array()
        .filter(|l| !l.is_empty())
        .ok_or_else(|| expected("messages", "a list of messages"))?;
    list.iter()
        .map(|m| {
            let m = m
                .as_object()
                .ok_or_else(|| expected("messages", "objects"))?;
            let field = |name: &str| m.get(name).and_then(Value::as_str);
            if let Some(other) = m.keys().find(|k| {
                !matches!(
                    k.as_str(),
                    "role" | "content" | "thinking" | "reasoning_content"
                )
            }) {
                return Err(Failure::usage(format!(
                    "unknown key {:?} in a message",
                    escape(other)
                )));
            }
            let role = match field("role") {
                Some("system" | "developer") => Role::System,
                Some("user") => Role::User,
                Some("assistant") => Role::Assistant,
                _ => return Err(expected("role", "system, user or assistant")),
            };
            let content = field("content")
                .ok_or_else(|| expected("content", "a text"))?
                .to_owned();
            let thinking = field("thinking")
                .or_else(|| field("reasoning_content"))
                .map(str::to_owned);
            Ok(Message {
                role,
                content,
                thinking,
            })
        })
        .collect()
}

fn expected(key: &str, what: &str) -> Failure {
    Failure::usage(format!("{key:?}: expected {what}"))
}

fn string(key: &str, v: &Value) -> Result<String> {
    v.as_str()
        .map(str::to_owned)
        .ok_or_else(|| expected(key, "a text"))
}

fn strings(key: &str, v: &Value) -> Result<Vec<String>> {
    let list = match v {
        Value::String(s) => vec![s.clone()],
        Value::Array(a) => a.iter().map(|s| string(key, s)).collect::<Result<_>>()?,
        _ => return Err(expected(key, "a text or a list of texts")),
    };
    Ok(list.into_iter().filter(|s| !s.is_empty()).collect())
}

fn integer(key: &str, v: &Value) -> Result<i64> {
    v.as_i64().ok_or_else(|| expected(key, "a whole number"))
}

/// A number of tokens; -1 is no limit.
fn tokens(key: &str, v: &Value) -> Result<Option<u32>> {
    match integer(key, v)? {
        -1 => Ok(None),
        n => u32::try_from(n)
            .map(Some)
            .map_err(|_| expected(key, "a number of tokens")),
    }
}

fn unknown(key: &str) -> Failure {
    let failure = Failure::usage(format!("unknown key {:?}", escape(key)));
    // What other programs call it.
    let near = match key {
        "temperature" => Some("temp"),
        "max_tokens" | "max_completion_tokens" | "n_predict" | "num_predict" => Some("n"),
        "typical_p" => Some("typical"),
        "response_format" | "format" => Some("json_schema"),
        _ => nearest(key, SamplerParams::NAMES.iter().chain(OTHER).copied()),
    };
    match near {
        Some(near) => failure.hint(format!("did you mean {near:?}?")),
        None => failure.hint(format!(
            "known keys: {}, and sampling parameters as in 'lemma --help' (temp, top_k …)",
            OTHER.join(", ")
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_in_full() {
        let r = Request::parse(
            r#"{"id":7,"messages":[{"role":"system","content":"s"},{"role":"user","content":"u"}],"n":12,"temp":0.5,"seed":3,"stop":"x","think":false,"think_budget":9,"kv_budget":64,"logprobs":true}"#,
        )
        .unwrap();
        assert_eq!(
            (
                r.id,
                r.messages.len(),
                r.n,
                r.think,
                r.think_budget,
                r.kv_budget,
                r.logprobs
            ),
            (
                Some(7.into()),
                2,
                Some(12),
                Some(false),
                Some(9),
                Some(64),
                true
            )
        );
        assert_eq!(r.stop.unwrap(), ["x"]);
        assert_eq!(
            (r.sampling.temp, r.sampling.seed),
            (Some(0.5), Some(Some(3)))
        );
    }

    #[test]
    fn a_bare_prompt_is_a_user_message() {
        let r = Request::parse(r#"{"prompt":"hi","system":"be kind"}"#).unwrap();
        assert_eq!(
            r.messages,
            [
                message(Role::System, "be kind".into()),
                message(Role::User, "hi".into())
            ]
        );
    }

    #[test]
    fn mistakes_are_named() {
        let message = |line: &str| Request::parse(line).unwrap_err().message;
        assert!(message("{").starts_with("not JSON"));
        assert_eq!(message("[]"), "expected a JSON object on the line");
        assert_eq!(message("{}"), "a request needs \"prompt\" or \"messages\"");
        assert_eq!(
            message(r#"{"prompt":" "}"#),
            "\"prompt\" is empty, expected a text"
        );
        assert_eq!(message(r#"{"prompt":1}"#), "\"prompt\": expected a text");
        assert_eq!(
            message(r#"{"prompt":"x","temp":"hot"}"#),
            "\"temp\": expected a number"
        );
        let e = Request::parse(r#"{"prompt":"x","temprature":1}"#).unwrap_err();
        assert_eq!(e.message, "unknown key \"temprature\"");
        assert_eq!(
            Request::parse(r#"{"prompt":"x","tmep":1}"#)
                .unwrap_err()
                .hint
                .unwrap(),
            "did you mean \"temp\"?"
        );
        let hint = |line: &str| Request::parse(line).unwrap_err().hint.unwrap();
        assert_eq!(
            hint(r#"{"prompt":"x","max_tokens":5}"#),
            "did you mean \"n\"?"
        );
        assert!(hint(r#"{"prompt":"x","zzzzzz":5}"#).contains("top_k"));
        assert_eq!(
            message(r#"{"messages":[{"role":"robot","content":"x"}]}"#),
            "\"role\": expected system, user or assistant"
        );
    }
}
