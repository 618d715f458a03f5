//! JSON schemas, as people write them for llama.cpp.
//!
//! What the standard leaves open is closed where an answer would suffer: objects that list their properties have no others, and
//! white space, which has no meaning, has an end. A schema that says otherwise is obeyed.

use serde_json::{Map, Value, json};

use crate::error::Error;
use crate::spelling::nearest;

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
    check(&schema, "#", &|key| text.contains(&format!("\"#/{key}/")))?;
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

/// Keywords of the standard that an answer can be kept to.
const SUPPORTED: &[&str] = &[
    "$ref",
    "additionalItems",
    "additionalProperties",
    "allOf",
    "anyOf",
    "const",
    "enum",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "format",
    "items",
    "maxItems",
    "maxLength",
    "maxProperties",
    "maximum",
    "minItems",
    "minLength",
    "minProperties",
    "minimum",
    "multipleOf",
    "oneOf",
    "pattern",
    "patternProperties",
    "prefixItems",
    "properties",
    "required",
    "type",
];
/// Keywords that say nothing about what an answer is.
const NOTES: &[&str] = &[
    "$anchor",
    "$comment",
    "$defs",
    "$id",
    "$schema",
    "$vocabulary",
    "contentEncoding",
    "contentMediaType",
    "contentSchema",
    "default",
    "definitions",
    "deprecated",
    "description",
    "examples",
    "id",
    "readOnly",
    "title",
    "writeOnly",
];
/// Keywords of the standard that are refused, with the reason, by what compiles the schema.
const UNSUPPORTED: &[&str] = &[
    "$dynamicAnchor",
    "$dynamicRef",
    "$recursiveAnchor",
    "$recursiveRef",
    "contains",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "else",
    "if",
    "maxContains",
    "minContains",
    "not",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
    "uniqueItems",
];

/// Refuses words that are no keywords: a slip would make the schema say less than its author believes. `place` is where it stands. At the
/// top there may be others that are `pointed` into.
fn check(
    schema: &Map<String, Value>,
    place: &str,
    pointed: &dyn Fn(&str) -> bool,
) -> Result<(), Error> {
    let known = |key: &str| {
        pointed(key)
            || key.starts_with("x-")
            || [SUPPORTED, NOTES, UNSUPPORTED]
                .iter()
                .any(|l| l.contains(&key))
    };
    if let Some(key) = schema.keys().find(|k| !known(k)) {
        return Err(unknown(key, place));
    }
    for (key, value) in schema {
        let below = |name: &dyn std::fmt::Display| format!("{place}/{key}/{name}");
        match value {
            Value::Array(list)
                if LISTS.contains(&key.as_str()) || key == "allOf" || key == "items" =>
            {
                for (i, part) in list.iter().enumerate() {
                    check_part(part, &below(&i))?;
                }
            }
            Value::Object(named) if NAMED.contains(&key.as_str()) => {
                for (name, part) in named {
                    check_part(part, &below(name))?;
                }
            }
            Value::Object(o) if SINGLE.contains(&key.as_str()) => {
                check(o, &format!("{place}/{key}"), &|_| false)?;
            }
            _ => {}
        }
    }
    Ok(())
}

fn check_part(part: &Value, place: &str) -> Result<(), Error> {
    part.as_object()
        .map_or(Ok(()), |o| check(o, place, &|_| false))
}

fn unknown(key: &str, place: &str) -> Error {
    let error = Error::grammar(format!(
        "{key:?} at {place}, expected a keyword of JSON schemas"
    ));
    if key == "nullable" {
        return error.with_hint(r#"what may be null has two types: "type":["string","null"]"#);
    }
    match nearest(key, SUPPORTED.iter().chain(NOTES).copied()) {
        Some(near) => error.with_hint(format!("did you mean {near:?}?")),
        None => error.with_hint(
            "names of properties go into \"properties\"; nothing in a schema is ignored silently",
        ),
    }
}

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
    fn words_that_are_no_keywords_are_refused() {
        for (text, what, hint) in [
            (
                r#"{"type":"string","maxlength":3}"#,
                "\"maxlength\" at #,",
                "\"maxLength\"",
            ),
            (
                r#"{"properties":{"a":{"propertis":{}}}}"#,
                "\"propertis\" at #/properties/a,",
                "\"properties\"",
            ),
            (
                r#"{"anyOf":[{},{"items":[{"nullable":true}]}]}"#,
                "at #/anyOf/1/items/0,",
                "null",
            ),
            (
                r#"{"$defs":{"x":{"name":1}}}"#,
                "at #/$defs/x,",
                "properties",
            ),
        ] {
            let e = read(text).unwrap_err();
            assert!(e.to_string().contains(what) && e.exit_code() == 8, "{e}");
            assert!(e.hint().unwrap().contains(hint), "{:?}", e.hint());
        }
        for fine in [
            r#"{"title":"t","description":"d","$schema":"https://json-schema.org/draft/2020-12/schema","$id":"i","$comment":"c"}"#,
            r#"{"properties":{"maxlength":{"const":{"maxlength":1}}},"required":["maxlength"]}"#,
            r#"{"enum":[{"a":1}],"default":{"b":2},"examples":[{"c":3}],"deprecated":true,"x-order":1}"#,
            r##"{"$defs":{"name":{"type":"string"}},"$ref":"#/$defs/name"}"##,
            r##"{"components":{"a":{"type":"string"}},"$ref":"#/components/a"}"##,
        ] {
            assert!(read(fine).is_ok(), "{fine}");
        }
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
