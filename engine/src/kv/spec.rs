//! Options of the pool as text: `NAME`, or `NAME:key=value,…` such as `raas:alpha=1e-4` or `lrfu:lambda=0.7,scope=head`.
//!
//! One table, [`KEYS`], says what a key is called and what it may be; the flags of the command line, grids of an evaluation and
//! tests go through it, so that a value means the same everywhere.

use lemma_quant::GgmlType;
use lemma_quant::pages::KvType;

use super::PAGE_SIZES;
use super::policy::{self, POLICIES};
use crate::error::Error;
use crate::model::KV_TYPES;
use crate::options::{
    Aggregate, BudgetScope, Clock, Demote, Demotion, KvBudget, KvOptions, Pin, Refresh, Scope,
    Score,
};
use crate::report;

/// A key of a specification.
pub struct Key {
    /// What it is called; `--kv-NAME` on the command line, with `-` for `_`.
    pub name: &'static str,
    /// What it may be, for messages.
    pub values: &'static str,
    set: fn(&mut KvOptions, &str) -> Option<()>,
}

/// Every key.
pub static KEYS: &[Key] = &[
    Key {
        name: "budget",
        values: "a number of tokens",
        set: |o, v| put(&mut o.budget, v.parse().ok().map(KvBudget::Tokens)),
    },
    Key {
        name: "alpha",
        values: "a number from 0 to 1",
        set: |o, v| put(&mut o.refresh, share(v).map(Refresh::Alpha)),
    },
    Key {
        name: "top_r",
        values: "a number from 0 to 1",
        set: |o, v| put(&mut o.refresh, share(v).map(Refresh::Rank)),
    },
    Key {
        name: "lambda",
        values: "a number from 0 to 1",
        set: |o, v| put(&mut o.lambda, share(v)),
    },
    Key {
        name: "clock",
        values: "step or page",
        set: |o, v| {
            let named = [("step", Clock::Step), ("page", Clock::Page)];
            put(&mut o.clock, word(v, &named))
        },
    },
    Key {
        name: "pin",
        values: "prompt, system or none",
        set: |o, v| {
            let named = [
                ("prompt", Pin::Prompt),
                ("system", Pin::System),
                ("none", Pin::None),
            ];
            put(&mut o.pin, word(v, &named))
        },
    },
    Key {
        name: "recent",
        values: "a number of pages",
        set: |o, v| put(&mut o.recent, v.parse().ok()),
    },
    Key {
        name: "aggregate",
        values: "max or mean",
        set: |o, v| {
            let named = [("max", Aggregate::Max), ("mean", Aggregate::Mean)];
            put(&mut o.aggregate, word(v, &named))
        },
    },
    Key {
        name: "score",
        values: "exact or bound",
        set: |o, v| {
            let named = [("exact", Score::Exact), ("bound", Score::Bound)];
            put(&mut o.score, word(v, &named))
        },
    },
    Key {
        name: "scope",
        values: "layer or head",
        set: |o, v| {
            let named = [("layer", Scope::Layer), ("head", Scope::Head)];
            put(&mut o.scope, word(v, &named))
        },
    },
    Key {
        name: "budget_scope",
        values: "auto, layer or model",
        set: |o, v| {
            let named = [
                ("auto", BudgetScope::Auto),
                ("layer", BudgetScope::Layer),
                ("model", BudgetScope::Model),
            ];
            put(&mut o.budget_scope, word(v, &named))
        },
    },
    Key {
        name: "page",
        values: "8, 16, 32 or 64",
        set: |o, v| {
            let size = v.parse().ok().filter(|n| PAGE_SIZES.contains(n));
            put(&mut o.page, size)
        },
    },
    Key {
        name: "dense_layers",
        values: "a number of layers",
        set: |o, v| put(&mut o.dense_layers, v.parse().ok()),
    },
    Key {
        name: "redundancy",
        values: "a number from 0 to 1",
        set: |o, v| put(&mut o.redundancy, share(v)),
    },
    Key {
        name: "guard",
        values: "a number from 0 to 1",
        set: |o, v| put(&mut o.guard, share(v)),
    },
    Key {
        name: "demote",
        values: "auto, none, or types from q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl and k4/v2, at most three, with or without their shares of the bytes and the most tokens to hold: q8_0, q8_0+k4/v2@4096, q8_0:0.25+q4_0:0.5",
        set: |o, v| put(&mut o.demote, demotions(v)),
    },
    Key {
        name: "seed",
        values: "a number",
        set: |o, v| put(&mut o.seed, v.parse().ok()),
    },
    Key {
        name: "ctk",
        values: "f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl",
        set: |o, v| put(&mut o.ty_k, stored(v)),
    },
    Key {
        name: "ctv",
        values: "f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl",
        set: |o, v| put(&mut o.ty_v, stored(v)),
    },
];

impl KvOptions {
    /// Applies a specification, `NAME` or `NAME:key=value,…`: the policy of that name, and the options given. Others stay as they are.
    ///
    /// # Errors
    /// [`Error::Usage`] for a policy, a key or a value that does not exist; nothing is changed then.
    pub fn apply(&mut self, spec: &str) -> Result<(), Error> {
        let mut new = self.clone();
        let (name, options) = spec.split_once(':').unwrap_or((spec, ""));
        new.policy = policy::find(name)
            .ok_or_else(|| unknown("KV policy", name, POLICIES.iter().map(|p| p.name)))?
            .name
            .to_owned();
        for option in options.split(',').filter(|o| !o.is_empty()) {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            new.set(key, value)?;
        }
        *self = new;
        Ok(())
    }

    /// Sets one option by the name of its [key](KEYS).
    ///
    /// # Errors
    /// [`Error::Usage`] for a key or a value that does not exist.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), Error> {
        let key = key.trim().replace('-', "_");
        let Some(k) = KEYS.iter().find(|k| k.name == key) else {
            return Err(unknown("KV option", &key, KEYS.iter().map(|k| k.name)));
        };
        (k.set)(self, value.trim()).ok_or_else(|| {
            let shown = crate::error::escape(value, 64);
            report::usage(format!("{} {shown:?}", k.name), k.values)
        })
    }
}

fn unknown(what: &str, name: &str, known: impl Iterator<Item = &'static str>) -> Error {
    let known: Vec<&str> = known.collect();
    let shown = crate::error::escape(name, 64);
    report::usage(
        format!("{what} {shown:?}"),
        format!("one of {}", known.join(", ")),
    )
}

fn put<T>(to: &mut T, value: Option<T>) -> Option<()> {
    *to = value?;
    Some(())
}

fn word<T: Copy>(value: &str, named: &[(&str, T)]) -> Option<T> {
    named.iter().find(|(n, _)| *n == value).map(|(_, v)| *v)
}

/// A number from 0 to 1.
fn share(value: &str) -> Option<f32> {
    value.parse().ok().filter(|v| (0.0..=1.0).contains(v))
}

/// A type that the pool can hold.
fn stored(name: &str) -> Option<GgmlType> {
    let mut types = KV_TYPES.into_iter();
    types.find(|t| t.name().eq_ignore_ascii_case(name))
}

/// Shares of the bytes, in millionths, of tiers that are not told theirs, by how many there are: most for the last, which holds the
/// most tokens for them (`docs/kv-policies.md`).
const SHARES: [&[u32]; 3] = [
    &[900_000],
    &[150_000, 700_000],
    &[100_000, 200_000, 500_000],
];

/// `auto`, `none`, or `TYPE+TYPE+…`, with or without `:SHARE` after each; a type is one for both or `KEYS/VALUES`. `@N` behind the list:
/// the tokens that all tiers may hold.
fn demotions(list: &str) -> Option<Demote> {
    match list {
        "auto" => return Some(Demote::Auto),
        "none" => return Some(Demote::To(Vec::new(), None)),
        _ => {}
    }
    let (list, most) = match list.split_once('@') {
        Some((list, n)) => (list, Some(n.parse().ok().filter(|n| *n > 0)?)),
        None => (list, None),
    };
    let named: Vec<(&str, Option<&str>)> = list
        .split('+')
        .map(|d| d.split_once(':').map_or((d, None), |(n, s)| (n, Some(s))))
        .collect();
    let default = SHARES.get(named.len() - 1)?;
    let told = named.iter().any(|(_, share)| share.is_some());
    let one = |(&(name, share), default): (&(&str, Option<&str>), &u32)| {
        let (ty_k, ty_v) = name.split_once('/').unwrap_or((name, name));
        Some(Demotion {
            ty_k: demoted(ty_k, KvType::K4)?,
            ty_v: demoted(ty_v, KvType::V2)?,
            share: if told { millionths(share?)? } else { *default },
        })
    };
    let list: Vec<_> = named.iter().zip(*default).map(one).collect::<Option<_>>()?;
    let sum: u64 = list.iter().map(|d| u64::from(d.share)).sum();
    (sum < 1_000_000).then_some(Demote::To(list, most))
}

/// A type that keys or values can be demoted to: one with blocks, or `pages`.
fn demoted(name: &str, pages: KvType) -> Option<KvType> {
    if name.eq_ignore_ascii_case(pages.name()) {
        return Some(pages);
    }
    let rows = stored(name).filter(|ty| ty.traits().block_size > 1)?;
    Some(rows.into())
}

/// A share of the bytes, more than nothing and less than all.
fn millionths(value: &str) -> Option<u32> {
    let share = value.parse::<f64>().ok()? * 1e6;
    (1.0..1e6).contains(&share).then_some(share.round() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_specification_names_a_policy_and_its_options() {
        let mut o = KvOptions::default();
        o.apply("raas:alpha=1e-4,budget-scope=model,page=32,ctk=q8_0")
            .unwrap();
        assert_eq!(o.policy, "raas");
        assert_eq!(o.refresh, Refresh::Alpha(1e-4));
        assert_eq!(o.budget_scope, BudgetScope::Model);
        assert_eq!((o.page, o.ty_k), (32, GgmlType::Q8_0));
        o.apply("window").unwrap();
        assert_eq!(
            (o.policy.as_str(), o.page),
            ("window", 32),
            "the rest stays"
        );
        o.apply("raas:demote=q8_0:0.25+q4_0:0.5").unwrap();
        let tier = |ty: GgmlType, share| Demotion {
            ty_k: ty.into(),
            ty_v: ty.into(),
            share,
        };
        assert_eq!(
            o.demotions(),
            [tier(GgmlType::Q8_0, 250_000), tier(GgmlType::Q4_0, 500_000)]
        );
        o.apply("raas:demote=q4_0").unwrap();
        assert_eq!(o.demotions(), [tier(GgmlType::Q4_0, 900_000)]);
        o.apply("raas:demote=q8_0/q4_0+k4/v2").unwrap();
        let types = o.demotions().iter().map(|d| (d.ty_k, d.ty_v));
        let mixed = (GgmlType::Q8_0.into(), GgmlType::Q4_0.into());
        assert!(types.eq([mixed, (KvType::K4, KvType::V2)]));
        assert_eq!(o.most_held(), None);
        o.apply("raas:demote=q8_0+k4/v2@4096").unwrap();
        assert_eq!((o.demotions().len(), o.most_held()), (2, Some(4096)));
        o.apply("raas:demote=none").unwrap();
        assert_eq!(o.demote, Demote::To(Vec::new(), None));
        o.apply("raas:demote=auto").unwrap();
        assert_eq!(o.demote, Demote::Auto);
    }

    #[test]
    fn what_auto_means_is_a_specification_of_the_same() {
        for (given, demotes) in [
            ("raas", Some(u32::MAX)),
            ("raas", Some(4096)),
            ("raas:page=8", Some(u32::MAX)),
            ("raas", None),
        ] {
            let mut auto = KvOptions::default();
            auto.apply(given).unwrap();
            let mut said = auto.clone();
            said.apply(&format!(
                "raas:{}",
                auto.open().decided(true, demotes).decision()
            ))
            .unwrap();
            assert_ne!(said.demote, Demote::Auto);
            assert_ne!(said.budget_scope, BudgetScope::Auto);
            let decided = auto.decided(true, demotes);
            assert_eq!(said.demote, decided.demote);
            assert_eq!(said.budget_scope, decided.budget_scope);
        }
    }

    #[test]
    fn what_does_not_exist_is_named() {
        let mut o = KvOptions::default();
        for (spec, said) in [
            ("ras", "KV policy \"ras\", expected one of raas"),
            ("raas:alfa=1", "KV option \"alfa\", expected one of budget"),
            ("raas:alpha=2", "alpha \"2\", expected a number from 0 to 1"),
            (
                "raas:alpha=nan",
                "alpha \"nan\", expected a number from 0 to 1",
            ),
            ("raas:page=12", "page \"12\", expected 8, 16, 32 or 64"),
            (
                "raas:demote=q8_0:0.5+q4_0",
                "demote \"q8_0:0.5+q4_0\", expected auto, none, or types from q8_0",
            ),
            ("raas:demote=q8_0:1", "demote \"q8_0:1\""),
            ("raas:demote=f16", "demote \"f16\""),
            ("raas:demote=q8_0@0", "demote \"q8_0@0\""),
            ("raas:demote=q8_0@", "demote \"q8_0@\""),
            ("raas:demote=@9", "demote \"@9\""),
            ("raas:demote=k4", "demote \"k4\""),
            ("raas:demote=v2/k4", "demote \"v2/k4\""),
            ("raas:demote=", "demote \"\""),
            ("raas:demote=q8_0:0.6+q4_0:0.4", "demote"),
            ("raas:demote=q8_0+q5_0+q4_1+q4_0", "demote"),
            ("window:pin", "pin \"\", expected prompt, system or none"),
        ] {
            let e = o.apply(spec).unwrap_err().to_string();
            assert!(e.contains(said), "{spec}: {e}");
        }
        assert_eq!(o.policy, KvOptions::default().policy, "nothing is changed");
    }
}
