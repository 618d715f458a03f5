//! JSON schemas, as people write them for llama.cpp.
//!
//! What the standard leaves open is closed where an answer would suffer: objects that list their properties have no others, and
//! white space, which has no meaning, has an end. A schema that says otherwise is obeyed.

use serde_json::{Map, Value, json};

use crate::error::Error;

/// Longest text, in bytes.
const MAX_TEXT: usize = 256 << 10;
/// White space between the parts of JSON, unless the schema has `x-guidance`: a blank, or a new line and its indentation.
const WHITE_SPACE: &str = r"[ ]|\n{1,2}[ \t]{0,20}";

const HINT: &str = r#"a schema is JSON: {"type":"object","properties":{"answer":{"type":"integer"}},"required":["answer"]}"#;

/// Reads a schema.
///
/// # Errors
/// [`Error::Grammar`] when it is none, or one that nothing fits.
pub(super) fn read(text: &str) -> Result<Value, Error> {
    if text.len() > MAX_TEXT {
        let found = text.len();
        return Err(Error::grammar(format!(
            "{found} bytes of schema, expected at most {MAX_TEXT}"
        )));
    }
    let value = serde_json::from_str(text).map_err(|e| {
        Error::grammar(format!("not JSON: {e}, expected a JSON schema")).with_hint(HINT)
    })?;
    let mut schema = match value {
        Value::Object(o) => o,
        Value::Bool(true) => Map::new(),
        Value::Bool(false) => {
            return Err(Error::grammar(
                "false, a schema that nothing fits, expected one that something fits",
            ));
        }
        _ => {
            let what = "not a JSON object, expected a JSON schema";
            return Err(Error::grammar(what).with_hint(HINT));
        }
    };
    // Parts of allOf add properties to each other: closing one would shut the others out.
    if !has_key(&schema, "allOf") {
        close(&mut schema);
    }
    schema
        .entry("x-guidance")
        .or_insert_with(|| json!({ "whitespace_pattern": WHITE_SPACE }));
    Ok(Value::Object(schema))
}

/// Keywords whose value is a list of schemas, a schema for each name, or one schema.
const LISTS: &[&str] = &["anyOf", "oneOf", "prefixItems"];
const NAMED: &[&str] = &["properties", "$defs", "definitions", "patternProperties"];
const SINGLE: &[&str] = &["items", "additionalProperties", "additionalItems"];

/// Gives objects that list their properties no others, here and in all schemas below. The depth is that of the text, which
/// serde_json limits.
fn close(schema: &mut Map<String, Value>) {
    for (key, value) in schema.iter_mut() {
        let key = key.as_str();
        match value {
            Value::Array(list) if LISTS.contains(&key) => {
                list.iter_mut()
                    .filter_map(Value::as_object_mut)
                    .for_each(close);
            }
            Value::Object(o) if NAMED.contains(&key) => {
                o.values_mut()
                    .filter_map(Value::as_object_mut)
                    .for_each(close);
            }
            Value::Object(o) if SINGLE.contains(&key) => close(o),
            _ => {}
        }
    }
    let open = [
        "additionalProperties",
        "patternProperties",
        "unevaluatedProperties",
        "anyOf",
        "oneOf",
        "$ref",
    ];
    if schema.contains_key("properties") && !open.iter().any(|k| schema.contains_key(*k)) {
        schema.insert("additionalProperties".to_owned(), false.into());
    }
}

fn has_key(schema: &Map<String, Value>, wanted: &str) -> bool {
    schema.iter().any(|(key, value)| {
        key == wanted
            || match value {
                Value::Object(o) => has_key(o, wanted),
                Value::Array(list) => list
                    .iter()
                    .filter_map(Value::as_object)
                    .any(|o| has_key(o, wanted)),
                _ => false,
            }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listed_properties_are_all_there_are() {
        let closed = |text: &str| {
            let mut v = read(text).unwrap();
            v.as_object_mut().unwrap().shift_remove("x-guidance");
            v.to_string()
        };
        assert_eq!(
            closed(r#"{"properties":{"a":{"properties":{}}}}"#),
            r#"{"properties":{"a":{"properties":{},"additionalProperties":false}},"additionalProperties":false}"#
        );
        for same in [
            r#"{"type":"object"}"#,
            r#"{"properties":{},"additionalProperties":true}"#,
            r#"{"allOf":[{"properties":{}},{"properties":{}}]}"#,
            r#"{"const":{"properties":{}}}"#,
        ] {
            assert_eq!(closed(same), same);
        }
        assert_eq!(
            closed(r#"{"anyOf":[{"properties":{}}]}"#),
            r#"{"anyOf":[{"properties":{},"additionalProperties":false}]}"#
        );
    }

    #[test]
    fn what_is_no_schema_is_refused() {
        for (text, what) in [
            ("", "not JSON"),
            ("{", "not JSON"),
            ("[]", "not a JSON object"),
            ("3", "not a JSON object"),
            ("false", "nothing fits"),
        ] {
            let e = read(text).unwrap_err();
            assert!(e.to_string().contains(what) && e.exit_code() == 8, "{e}");
        }
        let deep = "[".repeat(5000);
        assert_eq!(read(&deep).unwrap_err().exit_code(), 8);
        let long = format!("{{\"a\":\"{}\"}}", "x".repeat(300 << 10));
        assert!(read(&long).unwrap_err().to_string().contains("bytes"));
    }
}
