//! What the machine has: instruction sets, cores, memory.

use lemma_cpu::{Isa, Limits, Ops, Team};

use crate::error::Error;
use crate::options::LoadOptions;
use crate::report;

pub use lemma_cpu::default_threads;

/// Names of the instruction sets that this machine has kernels for, the best last.
pub fn isas() -> Vec<String> {
    Isa::available().map(|isa| isa.to_string()).collect()
}

/// The operations that options ask for: their workers and instruction set.
pub(in super::super) fn ops_of(o: &LoadOptions, limits: Limits) -> Result<Ops, Error> {
    let isa = isa(o.isa.as_deref())?;
    let n_threads = o.n_threads.filter(|&n| n > 0);
    let team = team(n_threads.unwrap_or_else(lemma_cpu::default_threads))?;
    Ok(Ops::new(team, isa, limits))
}

/// Instruction set and number of the workers, for people.
pub(in super::super) fn workers(ops: &Ops) -> String {
    let (isa, n) = (ops.isa(), ops.team().n_threads());
    format!("{isa}, {n} thread{}", if n == 1 { "" } else { "s" })
}

/// Workers of a session.
fn team(n_threads: usize) -> Result<Team, Error> {
    Team::try_new(n_threads).map_err(|e| {
        report::memory(
            format!("{n_threads} threads ({e})"),
            "as many as the system starts",
        )
        .with_hint("-t N starts fewer")
    })
}

/// The instruction set of a name, of the environment, or the best there is.
fn isa(name: Option<&str>) -> Result<Isa, Error> {
    let env = std::env::var("LEMMA_ISA").ok().filter(|v| !v.is_empty());
    let Some(name) = name.or(env.as_deref()) else {
        return Ok(Isa::detect());
    };
    match Isa::from_name(name) {
        Some(isa) if isa.is_available() => Ok(isa),
        _ => Err(report::usage(
            format!("instruction set {name:?}"),
            format!("one of {}", isas().join(", ")),
        )),
    }
}
