//! Methods of Python's strings, lists and dictionaries, and filters that differ from Jinja2's.
//!
//! The engine counts the work of a template, but not always that of a single call; calls that can make much out of
//! little are paid for here before they are made.

use minijinja::value::{Kwargs, Rest, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

/// Whether something can be gone through: `None` cannot, which templates ask that then measure what they were given.
pub(super) fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// Methods of Python's types: those of minijinja-contrib and a few that templates use besides.
pub(super) fn method(
    state: &mut State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if let Some(s) = value.as_str() {
        match name {
            "removeprefix" => {
                let (p,): (&str,) = from_args(args)?;
                return Ok(Value::from(s.strip_prefix(p).unwrap_or(s)));
            }
            "removesuffix" => {
                let (p,): (&str,) = from_args(args)?;
                return Ok(Value::from(s.strip_suffix(p).unwrap_or(s)));
            }
            "partition" | "rpartition" => {
                let (sep,): (&str,) = from_args(args)?;
                let parts = match (name == "partition", s.split_once(sep), s.rsplit_once(sep)) {
                    (true, Some((a, b)), _) | (false, _, Some((a, b))) => [a, sep, b],
                    (true, None, _) => [s, "", ""],
                    (false, _, None) => ["", "", s],
                };
                return Ok(Value::from(parts.map(Value::from).to_vec()));
            }
            "rsplit" => {
                let (sep, max): (Option<&str>, Option<i64>) = from_args(args)?;
                let n = max
                    .filter(|&m| m >= 0)
                    .map_or(usize::MAX, |m| (m as usize).saturating_add(1));
                let mut parts: Vec<&str> = match sep {
                    Some(sep) => s.rsplitn(n, sep).collect(),
                    None => s
                        .trim()
                        .rsplitn(n, char::is_whitespace)
                        .filter(|p| !p.is_empty())
                        .collect(),
                };
                parts.reverse();
                return Ok(Value::from(
                    parts.into_iter().map(Value::from).collect::<Vec<_>>(),
                ));
            }
            "index" => {
                let (what,): (&str,) = from_args(args)?;
                return match s.find(what) {
                    Some(at) => Ok(Value::from(s[..at].chars().count())),
                    None => Err(Error::new(
                        ErrorKind::InvalidOperation,
                        "substring not found",
                    )),
                };
            }
            "join" => {
                let (items,): (&Value,) = from_args(args)?;
                return join(state, s, items);
            }
            "format" => charge_format(state, s, args)?,
            "casefold" => return Ok(Value::from(s.to_lowercase())),
            _ => {}
        }
    } else if matches!(value.kind(), ValueKind::Map | ValueKind::Seq) {
        match name {
            "copy" => return Ok(value.clone()),
            // Comparing or hashing containers that share their parts can take for ever.
            "count" | "index" | "get" if args.first().is_some_and(|a| a.as_object().is_some()) => {
                let detail = format!("{name}: the argument must not be a container");
                return Err(Error::new(ErrorKind::InvalidOperation, detail));
            }
            "append" | "extend" | "insert" | "pop" | "popitem" | "remove" | "clear" | "update"
            | "setdefault" | "sort" | "reverse" => {
                let detail = format!("{name}: values cannot be changed by a template");
                return Err(Error::new(ErrorKind::InvalidOperation, detail));
            }
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// The `indent` filter as Jinja2 has it, where a line break at the end stays.
pub(super) fn indent(
    state: &State,
    text: &str,
    positional: Rest<Value>,
    args: Kwargs,
) -> Result<String, Error> {
    let (width, first, blank): (Option<Value>, Option<bool>, Option<bool>) =
        from_args(&positional)?;
    let width = width.map_or_else(|| args.get::<Option<Value>>("width"), |w| Ok(Some(w)))?;
    let first = first
        .map_or_else(|| args.get::<Option<bool>>("first"), |b| Ok(Some(b)))?
        .unwrap_or(false);
    let blank = blank
        .map_or_else(|| args.get::<Option<bool>>("blank"), |b| Ok(Some(b)))?
        .unwrap_or(false);
    args.assert_all_used()?;
    let lines = text.split('\n').count();
    let width = width.unwrap_or_else(|| Value::from(4));
    let prefix = match width.as_str() {
        Some(prefix) => prefix.to_owned(),
        None => {
            let n = u64::try_from(width)?;
            state.consume_fuel(n / 64)?;
            " ".repeat(n as usize)
        }
    };
    state.consume_fuel(
        (prefix
            .len()
            .saturating_mul(lines)
            .saturating_add(text.len())
            / 64) as u64,
    )?;
    let mut out = String::new();
    for (i, line) in text.split('\n').enumerate() {
        if i > 0 {
            out.push('\n');
        }
        // The first line is indented even if it is blank.
        if if i == 0 {
            first
        } else {
            blank || !line.is_empty()
        } {
            out.push_str(&prefix);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// `str.join`. As in Python the items are strings; other plain values are let through, containers are not, because
/// one that shares its parts can print without end.
fn join(state: &State, separator: &str, items: &Value) -> Result<Value, Error> {
    let mut out = String::new();
    for (i, item) in items.try_iter()?.enumerate() {
        if i > 0 {
            out.push_str(separator);
        }
        match item.as_str() {
            Some(text) => out.push_str(text),
            None if item.as_object().is_some() => {
                let detail = format!("join: item {i} is a {}, expected a string", item.kind());
                return Err(Error::new(ErrorKind::InvalidOperation, detail));
            }
            None => out.push_str(&item.to_string()),
        }
        // The text joined so far is paid for again and again only in units too small to matter.
        state.consume_fuel(
            1 + ((separator.len() + item.as_str().map_or(8, str::len)) / 64) as u64,
        )?;
    }
    Ok(Value::from(out))
}

/// Pays for the padding that `str.format` may produce, and refuses containers as for `join`.
fn charge_format(state: &State, format: &str, args: &[Value]) -> Result<(), Error> {
    let is_container = |v: &Value| v.as_object().is_some() && !v.is_kwargs();
    if args.iter().any(is_container) {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "format: arguments must not be containers",
        ));
    }
    let fields = format.matches('{').count() as u64;
    let in_format = format
        .split(|c: char| !c.is_ascii_digit())
        .filter(|digits| !digits.is_empty())
        .map(|digits| digits.parse::<u64>().unwrap_or(u64::MAX))
        .max()
        .unwrap_or(0);
    // A field inside a field takes its width from an argument.
    let nested = format
        .split('{')
        .skip(1)
        .any(|field| field.contains(':') && !field.contains('}'));
    let in_args = args
        .iter()
        .filter_map(|a| u64::try_from(a.clone()).ok())
        .max()
        .unwrap_or(0);
    let width = if nested {
        in_format.max(in_args)
    } else {
        in_format
    };
    let text: usize = args.iter().filter_map(|a| a.as_str()).map(str::len).sum();
    state.consume_fuel(fields.saturating_mul(width.saturating_add(text as u64)) / 64)
}
