//! JSON schemas, as people write them for llama.cpp.
//!
//! What the standard leaves open is closed where an answer would suffer: objects that list their properties have no others, and
//! white space, which has no meaning, has an end. A schema that says otherwise is obeyed.

use std::collections::BTreeSet;

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
    let value: Value = serde_json::from_str(text).map_err(|e| {
        Error::grammar(format!("not JSON: {e}, expected a JSON schema")).with_hint(HINT)
    })?;
    let pointers = Pointers::of(&value);
    let schema = match value {
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
    pointers.check(&schema, "#", true)?;
    let mut value = Value::Object(schema);
    for target in &pointers.targets {
        if let Some(part) = value.pointer(target).and_then(Value::as_object) {
            pointers.check(part, &format!("#{target}"), true)?;
        }
    }
    // Parts of allOf add properties to each other: closing one would shut the others out.
    if !has_key(&value, "allOf") {
        close(&mut value);
        for target in &pointers.targets {
            if let Some(part) = value.pointer_mut(target) {
                close(part);
            }
        }
    }
    let Value::Object(mut schema) = value else {
        unreachable!("an object is closed in place")
    };
    // With the name of an older edition the words of newer ones would be skipped without a word. None of them means anything else than
    // it did but a list of `items`, which is told by its form.
    schema.shift_remove("$schema");
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
    "discriminator",
    "example",
    "examples",
    "externalDocs",
    "id",
    "readOnly",
    "title",
    "writeOnly",
    "xml",
];
/// Keywords of the standard that an answer cannot be kept to.
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

/// What the references of a schema point to, as JSON pointers.
struct Pointers {
    targets: BTreeSet<String>,
    /// The targets and all that lies on the way to them, each behind a `#`.
    ways: BTreeSet<String>,
}

impl Pointers {
    fn of(schema: &Value) -> Self {
        let mut targets = BTreeSet::new();
        collect(schema, &mut targets);
        let way = |(at, _): (usize, char), t: &str| format!("#{}", &t[..at]);
        let ways = targets.iter().flat_map(|t| {
            let inner = t.char_indices().skip(1).filter(|&(_, c)| c == '/');
            inner.map(|i| way(i, t)).chain([format!("#{t}")])
        });
        Self {
            ways: ways.collect(),
            targets,
        }
    }

    /// Refuses words that are no keywords, unless a reference leads through them: a slip would make the schema say less than its author
    /// believes. `place` is where it stands. What is not `used` may have words that an answer cannot be kept to.
    fn check(&self, schema: &Map<String, Value>, place: &str, used: bool) -> Result<(), Error> {
        for (key, value) in schema {
            let at = below(place, key);
            if !self.ways.contains(&at) {
                if used && UNSUPPORTED.contains(&key.as_str()) {
                    return Err(unsupported(key, place));
                }
                let known = [SUPPORTED, NOTES, UNSUPPORTED];
                if !key.starts_with("x-") && !known.iter().any(|l| l.contains(&key.as_str())) {
                    return Err(unknown(key, place));
                }
            }
            let key = key.as_str();
            match value {
                Value::Array(list) if LISTS.contains(&key) || key == "allOf" || key == "items" => {
                    for (i, part) in list.iter().enumerate() {
                        self.check_part(part, &below(&at, &i.to_string()), used)?;
                    }
                }
                Value::Object(named) if NAMED.contains(&key) => {
                    let used = used && !matches!(key, "$defs" | "definitions");
                    for (name, part) in named {
                        self.check_part(part, &below(&at, name), used)?;
                    }
                }
                Value::Object(o) if SINGLE.contains(&key) => self.check(o, &at, used)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn check_part(&self, part: &Value, place: &str, used: bool) -> Result<(), Error> {
        part.as_object()
            .map_or(Ok(()), |o| self.check(o, place, used))
    }
}

/// All references to places in the schema itself.
fn collect(value: &Value, targets: &mut BTreeSet<String>) {
    match value {
        Value::Object(o) => {
            if let Some(Value::String(reference)) = o.get("$ref")
                && let Some(pointer) = reference.strip_prefix('#')
                && pointer.starts_with('/')
            {
                targets.insert(percent_decoded(pointer));
            }
            o.values().for_each(|v| collect(v, targets));
        }
        Value::Array(list) => list.iter().for_each(|v| collect(v, targets)),
        _ => {}
    }
}

/// A reference is part of an address, where `%` and two digits stand for a byte.
fn percent_decoded(pointer: &str) -> String {
    let mut bytes = Vec::with_capacity(pointer.len());
    let mut rest = pointer.as_bytes();
    while let [first, more @ ..] = rest {
        let digits = more.first_chunk::<2>().filter(|_| *first == b'%');
        let byte = digits.and_then(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 16).ok());
        bytes.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &more[2..] } else { more };
    }
    String::from_utf8(bytes).unwrap_or_else(|_| pointer.to_owned())
}

/// The pointer to `key` at `place`.
fn below(place: &str, key: &str) -> String {
    format!("{place}/{}", key.replace('~', "~0").replace('/', "~1"))
}

fn unsupported(key: &str, place: &str) -> Error {
    Error::grammar(format!(
        "{key:?} at {place}, which is not supported, expected a keyword that an answer can be kept to"
    ))
    .with_hint("what is not supported has to be left out; nothing in a schema is ignored silently")
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
fn close(schema: &mut Value) {
    let Value::Object(schema) = schema else {
        return;
    };
    for (key, value) in schema.iter_mut() {
        let key = key.as_str();
        match value {
            Value::Array(list) if LISTS.contains(&key) => list.iter_mut().for_each(close),
            Value::Object(o) if NAMED.contains(&key) => o.values_mut().for_each(close),
            value if SINGLE.contains(&key) => close(value),
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

fn has_key(value: &Value, wanted: &str) -> bool {
    match value {
        Value::Object(o) => o.iter().any(|(k, v)| k == wanted || has_key(v, wanted)),
        Value::Array(list) => list.iter().any(|v| has_key(v, wanted)),
        _ => false,
    }
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
        assert_eq!(
            closed(r##"{"$ref":"#/a","a":{"properties":{}}}"##),
            r##"{"$ref":"#/a","a":{"properties":{},"additionalProperties":false}}"##
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
            r##"{"components":{"a":{"type":"string"}},"$ref":"#\/components\/a"}"##,
            r##"{"$ref":"#/person","person":{"type":"integer"}}"##,
            r##"{"$ref":"#/definitions/g/a","definitions":{"g":{"a":{"type":"integer"}}}}"##,
            r##"{"$ref":"#/a~1b%20c","a/b c":{"type":"integer"}}"##,
            r##"{"oneOf":[{"type":"null"}],"discriminator":{"propertyName":"kind"}}"##,
            r##"{"type":"string","example":"a","externalDocs":{"url":"u"},"xml":{"name":"n"}}"##,
            r##"{"$defs":{"spare":{"not":{}}},"type":"integer"}"##,
        ] {
            assert!(read(fine).is_ok(), "{fine}");
        }
    }

    #[test]
    fn what_an_answer_cannot_be_kept_to_is_refused() {
        for (text, what) in [
            (
                r##"{"$schema":"http://json-schema.org/draft-07/schema#","type":"object","dependentRequired":{"a":["b"]}}"##,
                "\"dependentRequired\" at #,",
            ),
            (
                r#"{"properties":{"a/b":{"items":{"uniqueItems":true}}}}"#,
                "\"uniqueItems\" at #/properties/a~1b/items,",
            ),
            (
                r##"{"$ref":"#/$defs/a","$defs":{"a":{"not":{}}}}"##,
                "\"not\" at #/$defs/a,",
            ),
            (
                r##"{"$ref":"#/parts/a","parts":{"a":{"if":{}}}}"##,
                "\"if\" at #/parts/a,",
            ),
            (
                r##"{"$ref":"#/parts/a","parts":{"a":{"maxlength":3}}}"##,
                "\"maxlength\" at #/parts/a,",
            ),
        ] {
            let e = read(text).unwrap_err();
            assert!(e.to_string().contains(what) && e.exit_code() == 8, "{e}");
        }
        // Whatever edition it names, all that it says counts.
        let old = r##"{"$schema":"http://json-schema.org/draft-04/schema#","const":1}"##;
        assert_eq!(read(old).unwrap().get("$schema"), None);
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
