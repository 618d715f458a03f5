//! The grid: policies × budgets × seeds, and how large a pool each cell has.

use crate::error::Error;
use crate::kv::PAGE;
use crate::kv::policy::{self, PolicyInfo};
use crate::options::{KvBudget, KvOptions};
use crate::report;

/// Size of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Budget {
    /// This many tokens, the prompt included.
    Tokens(u32),
    /// A share of the chain's length, prompt and reply, in millionths.
    Share(u32),
}

const MILLION: u64 = 1_000_000;

impl Budget {
    /// Reads `512`, `1/4`, `25%` or `0.25`.
    ///
    /// # Errors
    /// [`Error::Usage`] for anything else.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let wrong = || {
            report::usage(
                format!("budget {text:?}"),
                "tokens (512) or a share of the chain (1/4, 25%)",
            )
        };
        let number = |t: &str| t.trim().parse::<f64>().map_err(|_| wrong());
        let share = if let Some((a, b)) = text.split_once('/') {
            number(a)? / number(b)?
        } else if let Some(percent) = text.strip_suffix('%') {
            number(percent)? / 100.0
        } else if text.contains('.') {
            number(text)?
        } else {
            let n = text.trim().parse::<u32>().map_err(|_| wrong())?;
            return if n >= 2 * PAGE as u32 {
                Ok(Self::Tokens(n))
            } else {
                Err(wrong())
            };
        };
        if share > 0.0 && share <= 1.0 {
            Ok(Self::Share(
                ((share * MILLION as f64).round() as u32).max(1),
            ))
        } else {
            Err(wrong())
        }
    }

    /// What that is of a chain of `n_chain` tokens, prompt and reply.
    fn tokens(self, n_chain: usize) -> u32 {
        match self {
            Self::Tokens(n) => n,
            Self::Share(m) => (n_chain as u64 * u64::from(m)).div_ceil(MILLION) as u32,
        }
    }

    /// Whether its size depends on the chain.
    pub fn is_share(self) -> bool {
        matches!(self, Self::Share(_))
    }
}

impl std::fmt::Display for Budget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::Tokens(n) => write!(f, "{n}"),
            Self::Share(m) => {
                let whole = (1..=16).find(|d| (u64::from(m) * d).abs_diff(MILLION) <= *d);
                match whole {
                    Some(d) => write!(f, "1/{d}"),
                    None => write!(f, "{}%", f64::from(m) / 1e4),
                }
            }
        }
    }
}

/// A policy with its options, as the command line names it.
#[derive(Clone)]
pub struct Contender {
    /// What it is called in tables and logs.
    pub label: String,
    /// Its options; the budget and the seed are those of the cell.
    pub kv: KvOptions,
    /// The policy.
    pub info: &'static PolicyInfo,
}

impl Contender {
    /// Reads a [specification](KvOptions::apply); what it does not say comes from `base`.
    ///
    /// # Errors
    /// [`Error::Usage`] that names what does not exist.
    pub fn parse(spec: &str, base: &KvOptions) -> Result<Self, Error> {
        let mut kv = base.clone();
        kv.apply(spec)?;
        let info = policy::find(&kv.policy)
            .ok_or_else(|| report::usage(format!("policy {spec:?}"), "one that exists"))?;
        Ok(Self {
            label: spec.to_owned(),
            kv,
            info,
        })
    }

    /// Whether it draws, so that seeds make a difference.
    pub fn draws(&self) -> bool {
        (self.info.new)(&self.kv).draws()
    }

    /// Whether it computes what `other` does as long as the budget is not full: pages of the same size and the same types in them.
    pub fn computes_like(&self, other: &Self) -> bool {
        let computes = |c: &Self| (c.kv.page, c.kv.ty_k, c.kv.ty_v);
        computes(self) == computes(other)
    }

    /// Whether it keeps everything whatever the budget.
    pub fn is_full(&self) -> bool {
        self.info.name == "full"
    }

    /// The pool of a chain of `n_chain` tokens: what the budget says, and two pages at least where that is a share, since none works
    /// with less.
    pub fn tokens(&self, budget: Budget, n_chain: usize) -> u32 {
        let tokens = budget.tokens(n_chain);
        match budget.is_share() {
            true => tokens.max(2 * self.kv.page),
            false => tokens,
        }
    }

    /// Options of a cell.
    pub fn options(&self, tokens: Option<u32>, seed: u64) -> KvOptions {
        let mut kv = self.kv.clone();
        if let Some(n) = tokens {
            kv.budget = KvBudget::Tokens(n);
        }
        kv.seed = self.kv.seed.wrapping_add(seed);
        kv
    }
}

/// Splits a list of specifications at its commas; a piece with `=` but no `:` belongs to the one before it
/// (`raas:top_r=0.3,recent=8,window` are two).
pub fn split_specs(list: &str) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for piece in list.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let head = piece.split('=').next().unwrap_or(piece);
        match out.last_mut() {
            Some(last) if piece.contains('=') && !head.contains(':') && last.contains(':') => {
                last.push(',');
                last.push_str(piece);
            }
            _ => out.push(piece.to_owned()),
        }
    }
    out
}

/// One column of the grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cell {
    /// Index of the contender.
    pub contender: usize,
    /// `None` for a policy that keeps everything.
    pub budget: Option<Budget>,
    /// Counted from 0.
    pub seed: u64,
}

/// Every cell. The first contender is `full`, the one that the others are measured against; it has one cell a seed and no budget.
/// Seeds beyond the first are for policies that draw, or for all if tokens are sampled.
pub fn cells(
    contenders: &[Contender],
    budgets: &[Budget],
    n_seeds: u64,
    sampled: bool,
) -> Vec<Cell> {
    let mut out = Vec::new();
    for (i, c) in contenders.iter().enumerate() {
        let seeds = if sampled || c.draws() { n_seeds } else { 1 };
        let budgets: Vec<Option<Budget>> = if c.is_full() {
            vec![None]
        } else {
            budgets.iter().copied().map(Some).collect()
        };
        for budget in budgets {
            out.extend((0..seeds).map(|seed| Cell {
                contender: i,
                budget,
                seed,
            }));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets() {
        let b = |t: &str| Budget::parse(t).unwrap();
        assert_eq!(b("512"), Budget::Tokens(512));
        assert_eq!(
            (b("1/4"), b("25%"), b("0.25")),
            (b("1/4"), b("1/4"), b("1/4"))
        );
        assert_eq!(b("1/4").tokens(2001), 501);
        assert_eq!(
            (b("1/3").to_string(), b("3/8").to_string()),
            ("1/3".into(), "37.5%".into())
        );
        for bad in ["", "0", "31", "-1", "1/0", "5/4", "x", "1e9", "0%", "nan%"] {
            assert!(Budget::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn specs_with_options() {
        assert_eq!(
            split_specs("full, raas:top_r=0.3,recent=8,window,lrfu:lambda=0.5"),
            [
                "full",
                "raas:top_r=0.3,recent=8",
                "window",
                "lrfu:lambda=0.5"
            ]
        );
    }

    #[test]
    fn only_policies_that_draw_have_seeds() {
        let base = KvOptions::default();
        let c = |s: &str| Contender::parse(s, &base).unwrap();
        let all = [c("full"), c("window"), c("random")];
        let budgets = [Budget::Tokens(64), Budget::Share(250_000)];
        assert_eq!(cells(&all, &budgets, 3, false).len(), 1 + 2 + 6);
        assert_eq!(cells(&all, &budgets, 3, true).len(), 3 + 6 + 6);
        assert!(Contender::parse("raaz", &base).is_err());
    }
}
