//! Between JSON and the values of the template engine.
//!
//! By hand: a dependency switches on `serde_json/arbitrary_precision`, under which numbers that pass through serde
//! into another data model arrive as maps.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;

use minijinja::value::{Enumerator, Kwargs, Object, ObjectExt, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

/// Converts a JSON value. Integers beyond 128 bits become floats.
pub(super) fn to_value(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(b) => Value::from(*b),
        serde_json::Value::Number(n) => number(n),
        serde_json::Value::String(s) => Value::from(Arc::<str>::from(s.as_str())),
        serde_json::Value::Array(items) => {
            Value::from(items.iter().map(to_value).collect::<Vec<_>>())
        }
        serde_json::Value::Object(map) => map
            .iter()
            .map(|(k, v)| (k.as_str(), to_value(v)))
            .collect::<Dict>()
            .into(),
    }
}

/// A dictionary with string keys that keeps the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Dict {
    keys: Vec<Arc<str>>,
    values: HashMap<Arc<str>, Value>,
}

impl Dict {
    pub(super) fn insert(&mut self, key: &str, value: Value) {
        let key = Arc::<str>::from(key);
        if self.values.insert(key.clone(), value).is_none() {
            self.keys.push(key);
        }
    }
}

impl<'a> FromIterator<(&'a str, Value)> for Dict {
    fn from_iter<I: IntoIterator<Item = (&'a str, Value)>>(pairs: I) -> Self {
        let mut dict = Self::default();
        pairs.into_iter().for_each(|(k, v)| dict.insert(k, v));
        dict
    }
}

impl From<Dict> for Value {
    fn from(dict: Dict) -> Self {
        Value::from_object(dict)
    }
}

impl Object for Dict {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.values.get(key.as_str()?).cloned()
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        self.values.get(key).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        self.mapped_enumerator(|dict| Box::new(dict.keys.iter().map(|k| Value::from(k.clone()))))
    }
}

fn number(n: &serde_json::Number) -> Value {
    let text = n.to_string();
    if let Ok(i) = text.parse::<i64>() {
        return Value::from(i);
    }
    if let Ok(i) = text.parse::<i128>() {
        return Value::from(i);
    }
    Value::from(text.parse::<f64>().unwrap_or(f64::NAN))
}

/// Nesting below the top of a JSON value; deeper ones are refused rather than converted by recursion.
pub(super) fn depth(json: &serde_json::Value, limit: usize) -> bool {
    match json {
        _ if limit == 0 => false,
        serde_json::Value::Array(items) => items.iter().all(|x| depth(x, limit - 1)),
        serde_json::Value::Object(map) => map.values().all(|x| depth(x, limit - 1)),
        _ => true,
    }
}

/// Bytes of text in a JSON value, roughly.
pub(super) fn size(json: &serde_json::Value) -> usize {
    match json {
        serde_json::Value::String(s) => s.len(),
        serde_json::Value::Array(items) => items.iter().map(|x| 8 + size(x)).sum(),
        serde_json::Value::Object(map) => map.iter().map(|(k, x)| 8 + k.len() + size(x)).sum(),
        _ => 8,
    }
}

/// The layout that `json.dumps` was asked for.
struct Style {
    indent: Option<String>,
    item: String,
    key: String,
    ascii: bool,
    sort: bool,
}

/// The `tojson` filter: Python's `json.dumps` with `ensure_ascii=False` unless told otherwise, and without the HTML
/// escapes of Jinja's own filter.
pub(super) fn tojson(
    state: &State,
    value: &Value,
    indent: Option<Value>,
    args: Kwargs,
) -> Result<Value, Error> {
    let indent = match indent {
        Some(v) => Some(v),
        None => args.get::<Option<Value>>("indent")?,
    };
    let indent = match indent {
        None => None,
        Some(v) if v.is_none() || v.is_undefined() => None,
        Some(v) => Some(match v.as_str() {
            Some(s) => s.to_owned(),
            // More would only be a way to ask for a lot of memory.
            None => " ".repeat(i64::try_from(v)?.clamp(0, 64) as usize),
        }),
    };
    let separators: Option<Vec<String>> = match args.get::<Option<Value>>("separators")? {
        Some(v) if !v.is_none() => Some(v.try_iter()?.map(|s| s.to_string()).collect()),
        _ => None,
    };
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                "separators must be a pair of strings",
            ));
        }
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
    };
    let style = Style {
        indent,
        item,
        key,
        ascii: args.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort: args.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    args.assert_all_used()?;
    let mut out = String::new();
    write(&mut out, state, value, &style, 0)?;
    Ok(Value::from(out))
}

/// Values can be shared, so that a small one prints as an endless one; every item is paid for as it is written.
fn write(
    out: &mut String,
    state: &State,
    value: &Value,
    style: &Style,
    level: usize,
) -> Result<(), Error> {
    let before = out.len();
    if level > 100 {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "value is nested too deeply for JSON",
        ));
    }
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&python_number(value)),
        ValueKind::String => write_string(out, value.as_str().unwrap_or_default(), style.ascii),
        ValueKind::Map => {
            let mut pairs: Vec<(Value, Value)> = Vec::new();
            for key in value.try_iter()? {
                let item = value.get_item(&key)?;
                pairs.push((key, item));
            }
            if style.sort {
                pairs.sort_by(|a, b| a.0.cmp(&b.0));
            }
            out.push('{');
            let n = pairs.len();
            for (i, (key, item)) in pairs.iter().enumerate() {
                separate(out, style, level + 1, i == 0);
                match key.kind() {
                    ValueKind::String => {
                        write_string(out, key.as_str().unwrap_or_default(), style.ascii)
                    }
                    ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                        out.push('"');
                        write(out, state, key, style, level + 1)?;
                        out.push('"');
                    }
                    kind => return Err(not_serializable(kind)),
                }
                out.push_str(&style.key);
                write(out, state, item, style, level + 1)?;
            }
            close(out, style, level, '}', n);
        }
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            let mut n = 0;
            for item in value.try_iter()? {
                separate(out, style, level + 1, n == 0);
                write(out, state, &item, style, level + 1)?;
                n += 1;
            }
            close(out, style, level, ']', n);
        }
        kind => return Err(not_serializable(kind)),
    }
    // Containers have paid for their items already, but paying again per level keeps the arithmetic simple.
    state.consume_fuel(1 + ((out.len() - before) / 64) as u64)
}

fn not_serializable(kind: ValueKind) -> Error {
    Error::new(
        ErrorKind::InvalidOperation,
        format!("a value of type {kind} cannot be written as JSON"),
    )
}

fn separate(out: &mut String, style: &Style, level: usize, first: bool) {
    if !first {
        out.push_str(&style.item);
    }
    newline(out, style, level);
}

fn close(out: &mut String, style: &Style, level: usize, bracket: char, n: usize) {
    if n > 0 {
        newline(out, style, level);
    }
    out.push(bracket);
}

fn newline(out: &mut String, style: &Style, level: usize) {
    if let Some(indent) = &style.indent {
        out.push('\n');
        for _ in 0..level {
            out.push_str(indent);
        }
    }
}

fn write_string(out: &mut String, s: &str, ascii: bool) {
    out.push('"');
    for c in s.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 || (ascii && (c as u32) >= 0x7f && c != '\u{7f}') => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    // Writing to a String does not fail.
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// A number as Python's `repr` shows it; JSON's `NaN` and `Infinity` are as `json.dumps` writes them.
fn python_number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    match f64::try_from(value.clone()) {
        Ok(x) if x.is_nan() => "NaN".into(),
        Ok(x) if x.is_infinite() => if x > 0.0 { "Infinity" } else { "-Infinity" }.into(),
        Ok(x) => python_float(x),
        Err(_) => value.to_string(),
    }
}

/// `repr` of a finite float: shortest digits that read back the same, exponent form below 1e-4 and from 1e16.
pub(super) fn python_float(x: f64) -> String {
    let magnitude = x.abs();
    if magnitude == 0.0 || (1e-4..1e16).contains(&magnitude) {
        return format!("{x:?}");
    }
    let text = format!("{x:e}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, exponent) = exponent
                .strip_prefix('-')
                .map_or(('+', exponent), |e| ('-', e));
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => text,
    }
}
