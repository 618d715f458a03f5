//! A conversation as a file: JSON to go on with, Markdown to read.

use lemma_engine::conversation::{Message, Role};
use serde_json::{Value, json};

use crate::fail::{Failure, Result};
use crate::{record, request};

pub(super) fn to_json(messages: &[Message], model: &str) -> String {
    let list: Vec<Value> = messages
        .iter()
        .map(|m| match &m.thinking {
            Some(t) => json!({ "role": m.role.name(), "content": m.content, "thinking": t }),
            None => json!({ "role": m.role.name(), "content": m.content }),
        })
        .collect();
    record::pretty(&json!({ "v": 1, "model": model, "messages": list }))
}

pub(super) fn from_json(text: &str) -> Result<Vec<Message>> {
    let object = request::object(text)?;
    match object.get("v").and_then(Value::as_u64) {
        Some(1) => {}
        _ => return Err(Failure::usage("not a saved conversation: \"v\" is not 1")),
    }
    match object.get("messages") {
        // Saved before anything was said.
        Some(Value::Array(list)) if list.is_empty() => Ok(Vec::new()),
        other => request::messages(other.unwrap_or(&Value::Null)),
    }
}

pub(super) fn to_markdown(messages: &[Message], model: &str) -> String {
    let mut text = format!("# Conversation with {model}\n");
    for m in messages {
        let who = match m.role {
            Role::System => "System",
            Role::User => "You",
            Role::Assistant => "Model",
        };
        text.push_str(&format!("\n## {who}\n\n"));
        if let Some(t) = m
            .thinking
            .as_deref()
            .map(str::trim)
            .filter(|t| !t.is_empty())
        {
            text.push_str(&format!(
                "<details><summary>Thinking</summary>\n\n{t}\n\n</details>\n\n"
            ));
        }
        text.push_str(m.content.trim());
        text.push('\n');
    }
    text
}

/// RFC 4648, with padding.
pub(super) fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word =
            chunk.iter().fold(0u32, |w, &b| w << 8 | u32::from(b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let sextet = word >> (18 - 6 * i) & 63;
            out.push(if i <= chunk.len() {
                char::from(ALPHABET[sextet as usize])
            } else {
                '='
            });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_can_be_loaded() {
        let messages = vec![
            request::message(Role::System, "s".into()),
            request::message(Role::User, "What is \"2+2\"?\n".into()),
            Message {
                role: Role::Assistant,
                content: "4".into(),
                thinking: Some("2+2=4".into()),
            },
        ];
        assert_eq!(from_json(&to_json(&messages, "m")).unwrap(), messages);
        assert_eq!(from_json(&to_json(&[], "m")).unwrap(), []);
        assert!(from_json("{}").is_err() && from_json("x").is_err());
        assert!(to_markdown(&messages, "m").contains("## Model\n\n<details>"));
    }

    #[test]
    fn base64_vectors() {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }
}
