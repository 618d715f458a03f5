//! Problems with known answers, one JSON object a line.
//!
//! ```text
//! {"id":"mul-500-1-0","prompt":"What is 12 * 7?","answer":"84"}
//! ```
//!
//! `prompt` and `answer` are all that is needed. `history` holds earlier turns, `system` a system message, `answers` several answers that are
//! right, `accepted` whole replies that are right (for small talk), `reply` a reference reply as the model would write it.
//! `prompt_tokens` and `reply_tokens` are lengths in tokens of the model that the file was made for; they are believed only if the first
//! agrees with the tokenizer at hand.

use serde_json::{Map, Value};

use super::answer;
use crate::chat::ThinkTags;
use crate::conversation::{Message, PromptOptions, Role, prompt_of};
use crate::error::Error;
use crate::generate::{Outcome, Prompt};
use crate::model::Model;
use crate::report;

/// A question whose answer is known.
#[derive(Clone, Debug)]
pub struct Problem {
    /// Its name within the set.
    pub id: String,
    /// The set that it belongs to: the name of its file.
    pub set: String,
    /// What is asked, with what was said before.
    pub messages: Vec<Message>,
    /// Final answers that are right.
    pub answers: Vec<String>,
    /// Whole replies that are right; then the final answer does not matter.
    pub accepted: Vec<String>,
    /// A reference reply: thinking, answer and tags as the model writes them.
    pub reply: Option<String>,
    /// Tokens of the prompt, as the file says.
    prompt_tokens: Option<usize>,
    /// Tokens of the reference reply, as the file says.
    reply_tokens: Option<usize>,
}

impl Problem {
    /// Reads a line. `set` and `number` name a problem that has no id.
    ///
    /// # Errors
    /// [`Error::Usage`] that says what is wrong with the line.
    pub fn parse(line: &str, set: &str, number: u64) -> Result<Self, Error> {
        let object = match serde_json::from_str(line) {
            Ok(Value::Object(o)) => o,
            Ok(_) => return Err(report::usage("a line that is no object", "a JSON object")),
            Err(e) => return Err(report::usage(format!("not JSON: {e}"), "a JSON object")),
        };
        let mut messages = Vec::new();
        if let Some(text) = text(&object, "system")? {
            messages.push(message(Role::System, text));
        }
        history(&object, &mut messages)?;
        let prompt = text(&object, "prompt")?
            .ok_or_else(|| report::usage("a problem without \"prompt\"", "a question"))?;
        messages.push(message(Role::User, prompt));
        let mut answers = texts(&object, "answers")?;
        answers.extend(text(&object, "answer")?);
        let accepted = texts(&object, "accepted")?;
        if answers.is_empty() && accepted.is_empty() {
            return Err(report::usage(
                "a problem without \"answer\"",
                "\"answer\", \"answers\" or \"accepted\"",
            ));
        }
        let count = |key: &str| object.get(key).and_then(Value::as_u64).map(|n| n as usize);
        Ok(Self {
            id: text(&object, "id")?.unwrap_or_else(|| number.to_string()),
            set: set.to_owned(),
            messages,
            answers,
            accepted,
            reply: text(&object, "reply")?,
            prompt_tokens: count("prompt_tokens"),
            reply_tokens: count("reply_tokens"),
        })
    }

    /// What the model is given: the rendered messages, or the bare question where it has no chat template.
    ///
    /// # Errors
    /// What the template says.
    pub fn prompt(&self, model: &Model, tags: Option<&ThinkTags>) -> Result<Prompt, Error> {
        if model.has_template() {
            return prompt_of(model, tags, &self.messages, &PromptOptions::default());
        }
        let text = self.messages.last().map_or("", |m| &m.content);
        Ok(Prompt::raw(model.tokenizer(), text, false))
    }

    /// Tokens of the reference reply, if the file was made for a model that reads the prompt as `n_prompt` tokens.
    pub fn reply_tokens(&self, n_prompt: usize) -> Option<usize> {
        self.reply_tokens
            .filter(|_| self.prompt_tokens == Some(n_prompt))
    }

    /// Whether a reply is right. One that ended in the middle of the thinking is not.
    pub fn is_right(&self, o: &Outcome) -> bool {
        if o.still_thinking {
            return false;
        }
        if !self.accepted.is_empty() {
            return self.accepted.iter().any(|a| a.trim() == o.text.trim());
        }
        answer::is_right(&o.text, &self.answers)
    }
}

fn message(role: Role, content: String) -> Message {
    Message {
        role,
        content,
        thinking: None,
    }
}

fn history(object: &Map<String, Value>, messages: &mut Vec<Message>) -> Result<(), Error> {
    let wrong = || report::usage("\"history\"", "a list of {\"role\", \"content\"}");
    let list = match object.get("history") {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Array(list)) => list,
        Some(_) => return Err(wrong()),
    };
    for turn in list {
        let role = match turn["role"].as_str() {
            Some("user") => Role::User,
            Some("assistant") => Role::Assistant,
            Some("system") => Role::System,
            _ => return Err(wrong()),
        };
        let content = turn["content"].as_str().ok_or_else(wrong)?.to_owned();
        messages.push(message(role, content));
    }
    Ok(())
}

/// A text, or a number that is meant as one.
fn as_text(v: &Value) -> Option<String> {
    match v {
        Value::String(s) => Some(s.clone()),
        Value::Number(n) => Some(n.to_string()),
        _ => None,
    }
}

fn text(object: &Map<String, Value>, key: &str) -> Result<Option<String>, Error> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(v) => as_text(v)
            .map(Some)
            .ok_or_else(|| report::usage(format!("{key:?}"), "a text")),
    }
}

fn texts(object: &Map<String, Value>, key: &str) -> Result<Vec<String>, Error> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(list)) => list
            .iter()
            .map(|v| as_text(v).ok_or_else(|| report::usage(format!("{key:?}"), "a list of texts")))
            .collect(),
        Some(_) => Err(report::usage(format!("{key:?}"), "a list of texts")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let p = Problem::parse(r#"{"prompt":"What is 2+2?","answer":4}"#, "a", 7).unwrap();
        assert_eq!((p.id.as_str(), p.answers[0].as_str()), ("7", "4"));
        assert_eq!(p.reply_tokens(5), None);
        let p = Problem::parse(
            r#"{"id":"x","history":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello"}],"prompt":"2+2","answer":"4","prompt_tokens":9,"reply_tokens":20}"#,
            "a",
            1,
        )
        .unwrap();
        assert_eq!(p.messages.len(), 3);
        assert_eq!((p.reply_tokens(9), p.reply_tokens(8)), (Some(20), None));
        for bad in [
            "",
            "[]",
            "{}",
            r#"{"prompt":"x"}"#,
            r#"{"prompt":1,"answer":[]}"#,
            r#"{"prompt":"x","answer":"1","history":[1]}"#,
        ] {
            assert!(
                matches!(Problem::parse(bad, "a", 1), Err(Error::Usage(_))),
                "{bad}"
            );
        }
    }
}
