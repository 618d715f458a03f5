//! Whether a sequence goes round in circles.
//!
//! A reasoner that has lost what it was working with may say the same block of tokens again and again until somebody stops it. What counts is
//! exact repetition, at least [`TIMES`] of it and at least [`LEAST`] tokens long in all: the rows of a table, the steps of a sum or the
//! items of a list are alike but not the same, and a short refrain is nobody's business.

/// Repetitions that make a circle.
pub const TIMES: usize = 5;

/// Tokens of all repetitions together.
pub const LEAST: usize = 160;

/// The longest block that is looked for.
const LONGEST: usize = 512;

/// A block that is repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Circle {
    /// Tokens of the block.
    pub period: usize,
    /// How often it was said.
    pub times: usize,
}

/// The shortest block that the end of `tokens` repeats, if it does.
pub fn circle(tokens: &[u32]) -> Option<Circle> {
    let n = tokens.len();
    (1..=LONGEST.min(n / TIMES)).find_map(|period| {
        let wanted = (period * TIMES).max(LEAST);
        if wanted > n {
            return None;
        }
        let same = |back: &usize| tokens[n - 1 - back] == tokens[n - 1 - back - period];
        let all = (0..wanted - period).take_while(same).count();
        (all == wanted - period).then(|| {
            let more = (wanted - period..n - period).take_while(same).count();
            Circle {
                period,
                times: (wanted + more) / period,
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(block: &[u32], n: usize) -> Vec<u32> {
        block
            .iter()
            .copied()
            .cycle()
            .take(block.len() * n)
            .collect()
    }

    #[test]
    fn circles_are_found() {
        let block: Vec<u32> = (100..140).collect();
        let mut tokens: Vec<u32> = (0..1000).collect();
        tokens.extend(times(&block, 5));
        let found = circle(&tokens);
        assert_eq!(
            found,
            Some(Circle {
                period: 40,
                times: 5
            })
        );
        // Said again up to the middle of the block.
        tokens.extend(&block[..20]);
        assert_eq!(circle(&tokens).map(|c| c.period), Some(40));
        assert_eq!(
            circle(&[7; 200]),
            Some(Circle {
                period: 1,
                times: 200
            })
        );
    }

    #[test]
    fn what_is_alike_is_no_circle() {
        let block: Vec<u32> = (0..40).collect();
        assert_eq!(circle(&times(&block, 4)), None);
        assert_eq!(circle(&[7; 100]), None);
        // Rows of a table: the same but for one cell.
        let rows: Vec<u32> = (0..100)
            .flat_map(|row| [1, 2, 1, 1000 + row, 1, 2, 3, 9])
            .collect();
        assert_eq!(circle(&rows), None);
        assert_eq!(circle(&[]), None);
    }
}
