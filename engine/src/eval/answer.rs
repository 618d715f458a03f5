//! The final answer of a reply, and whether it is the right one.

/// The final answer that a reply states: the last `\boxed{…}`; else what follows the last "answer is" or "answer:" on its line; else the last
/// number of the last line that has one.
pub fn final_answer(text: &str) -> Option<String> {
    boxed(text)
        .or_else(|| after_phrase(text))
        .or_else(|| last_number(text))
        .map(|found| canonical(&found))
        .filter(|found| !found.is_empty())
}

/// Whether a reply states one of the answers.
pub fn is_right(text: &str, answers: &[String]) -> bool {
    final_answer(text).is_some_and(|found| answers.iter().any(|a| canonical(a) == found))
}

/// What the last `\boxed{…}` holds.
fn boxed(text: &str) -> Option<String> {
    const OPEN: &str = "\\boxed{";
    let start = text.rfind(OPEN)? + OPEN.len();
    let mut depth = 1;
    for (i, c) in text[start..].char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(text[start..start + i].to_owned());
        }
    }
    None
}

/// What follows the last "answer is" or "answer:".
fn after_phrase(text: &str) -> Option<String> {
    // Same length as the text, so that places agree: only ASCII changes.
    let lower = text.to_ascii_lowercase();
    let at = ["answer is", "answer:"]
        .iter()
        .filter_map(|p| lower.rfind(p).map(|i| i + p.len()))
        .max()?;
    let rest = text[at..].trim_start_matches(['*', ':', ' ', '\n']);
    let line = rest.lines().next().unwrap_or_default();
    // A number ends where it ends; anything else goes to the end of the sentence.
    let number = number_at(line.trim_start_matches(['$', '*']));
    let found = number.unwrap_or_else(|| {
        line.split_once(". ")
            .map_or(line, |(first, _)| first)
            .to_owned()
    });
    Some(found)
}

/// The number that a text begins with: sign, digits with thousands commas, fraction.
fn number_at(text: &str) -> Option<String> {
    let mut end = 0;
    let bytes = text.as_bytes();
    let digit = |i: usize| bytes.get(i).is_some_and(u8::is_ascii_digit);
    if matches!(bytes.first(), Some(b'-' | b'+')) {
        end = 1;
    }
    if !digit(end) {
        return None;
    }
    while digit(end) || (matches!(bytes.get(end), Some(b',' | b'.')) && digit(end + 1)) {
        end += 1;
    }
    // A fraction, a unit or an exponent makes it more than a number.
    let more = bytes
        .get(end)
        .is_some_and(|c| c.is_ascii_alphanumeric() || b"/^\\%".contains(c));
    (!more).then(|| text[..end].to_owned())
}

/// The last number of the text.
fn last_number(text: &str) -> Option<String> {
    let starts = text.char_indices().filter(|&(i, c)| {
        let before = text[..i].chars().next_back();
        let inside = before.is_some_and(|b| b.is_ascii_alphanumeric() || b == '.' || b == ',');
        (c.is_ascii_digit() && !inside && before != Some('-')) || (c == '-' && !inside)
    });
    starts
        .filter_map(|(i, _)| number_at(&text[i..]))
        .next_back()
}

/// One spelling for equal answers: no mathematics marks, no thousands commas, no zeros that say nothing, no full stop.
fn canonical(answer: &str) -> String {
    let mut s: String = answer
        .trim()
        .trim_matches(['$', '*', '`', '"', ' '])
        .trim_end_matches('.')
        .trim()
        .to_owned();
    let bare: String = s.chars().filter(|&c| c != ',' && c != '_').collect();
    let (sign, digits) = match bare.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", bare.strip_prefix('+').unwrap_or(&bare)),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let numeric = |t: &str| t.bytes().all(|b| b.is_ascii_digit());
    if !whole.is_empty() && numeric(whole) && numeric(fraction) {
        let whole = whole.trim_start_matches('0');
        let whole = if whole.is_empty() { "0" } else { whole };
        let fraction = fraction.trim_end_matches('0');
        s = match fraction {
            "" if whole == "0" => "0".to_owned(),
            "" => format!("{sign}{whole}"),
            f => format!("{sign}{whole}.{f}"),
        };
    } else {
        s = s
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
            .to_lowercase();
    }
    s
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> String {
        final_answer(text).unwrap_or_default()
    }

    #[test]
    fn forms_of_an_answer() {
        assert_eq!(found("The answer is 4042."), "4042");
        assert_eq!(found("The answer is -7. The answer is 12."), "12");
        assert_eq!(found("so **Answer:** 1,234.50"), "1234.5");
        assert_eq!(
            found("thus \\boxed{\\frac{1}{2}} and the answer is 3"),
            "\\frac{1}{2}"
        );
        assert_eq!(found("Final answer: Paris. It lies in France."), "paris");
        assert_eq!(found("first 12, then x3 is 15-8=7"), "7");
        assert_eq!(found("it is 3.14"), "3.14");
        assert_eq!(found("nothing here"), "");
        assert_eq!(found("\\boxed{open"), "");
    }

    #[test]
    fn equal_answers() {
        let right = |text: &str, answer: &str| is_right(text, &[answer.to_owned()]);
        assert!(right(
            "The answer is 62669679746357205907.",
            "62669679746357205907"
        ));
        assert!(!right(
            "The answer is 62669679746357205908.",
            "62669679746357205907"
        ));
        assert!(right("The answer is 007.0.", "7"));
        assert!(right("The answer is -0.", "0"));
        assert!(right("$\\boxed{12,000}$", "12000"));
        assert!(!right("The answer is 12", "2"));
        assert!(!right("", "0"));
    }
}
