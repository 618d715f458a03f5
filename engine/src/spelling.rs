//! What a word was probably meant to be.

/// The candidate that is the fewest edits away, if that is few enough to be a slip.
pub fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let bare = |s: &'a str| s.trim_start_matches('-');
    let word = word.trim_start_matches(['-', '/']);
    let limit = (word.chars().count() / 3).max(1);
    let scored = candidates.map(|c| (distance(word, bare(c).trim_start_matches('/')), c));
    // A beginning of a name counts as near as well.
    let best = scored.min_by_key(|(d, c)| (*d, c.len()))?;
    (best.0 <= limit).then_some(best.1)
}

/// Edits (insert, delete, replace, swap of neighbours) between two words.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0usize; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    rows[0] = (0..=b.len()).collect();
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let replace = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replace.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_near_and_other_words_are_not() {
        let names = ["maxLength", "minLength", "properties", "--temp"];
        let near = |word: &str| nearest(word, names.into_iter());
        assert_eq!(near("maxlength"), Some("maxLength"));
        assert_eq!(near("propertis"), Some("properties"));
        assert_eq!(near("--tmep"), Some("--temp"));
        assert_eq!(near("nullable"), None);
    }
}
