//! The memory plan: what a session will take, printed before it is taken, and refused when the machine cannot hold it.
//!
//! A limit of the process (`ulimit -v`) is found out about in two ways. Buffers that a session is made of say that they could not be had
//! ([`taking`]). Where memory is taken bit by bit, by code that knows no way to fail, the system is [asked](ask) before.

use std::fmt;

use lemma_cpu::{OutOfMemory, allocating};
use memmap2::MmapMut;

use crate::error::Error;
use crate::report;

/// What a session takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Bytes of weights, mapped: the system may drop and reread them.
    pub weights: u64,
    /// Bytes of the KV pool.
    pub kv: u64,
    /// Bytes of recurrent states, of models that have them.
    pub state: u64,
    /// Bytes of activations, logits and tables.
    pub scratch: u64,
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (w, kv, s) = (show(self.weights), show(self.kv), show(self.scratch));
        write!(f, "weights {w} mapped + KV pool {kv}")?;
        if self.state > 0 {
            write!(f, " + recurrent states {}", show(self.state))?;
        }
        write!(f, " + scratch {s}")
    }
}

/// Room for `n` elements in all. What [`Vec::reserve`] does instead may copy all of the old room, and so take memory for the part of it that
/// nothing was ever written to.
pub(crate) fn make_room<T>(list: &mut Vec<T>, n: usize) {
    if n > list.capacity() {
        let mut larger = Vec::with_capacity(n);
        larger.append(list);
        *list = larger;
    }
}

/// Bytes for people: `11.0 MiB`, `1.04 GiB`.
pub fn show(bytes: u64) -> String {
    const MIB: f64 = 1024.0 * 1024.0;
    let b = bytes as f64;
    if b >= 1024.0 * MIB {
        format!("{:.2} GiB", b / (1024.0 * MIB))
    } else if b >= 100.0 * MIB {
        format!("{:.0} MiB", b / MIB)
    } else {
        format!("{:.1} MiB", b / MIB)
    }
}

impl From<OutOfMemory> for Error {
    fn from(e: OutOfMemory) -> Self {
        report::memory(format!("a buffer of {}", show(e.bytes as u64)), ALLOWED)
            .with_hint("a smaller --kv-budget or -ub takes less")
    }
}

/// Calls `f`; a buffer that it cannot have is an error like its others.
///
/// # Errors
/// Those of `f`, and [`Error::Memory`].
pub fn taking<T, E: From<Error>>(f: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    allocating(f).map_err(|e| E::from(e.into()))?
}

/// What a process without memory would have needed.
const ALLOWED: &str = "at most what the process may have";

/// What small things take beside what is asked for.
const SMALL: u64 = 8 << 20;

/// Asks whether the `bytes` that `what` takes can be had now, for those who could not say so later.
///
/// # Errors
/// [`Error::Memory`] if not.
pub fn ask(bytes: u64, what: impl fmt::Display) -> Result<(), Error> {
    let all = bytes.saturating_add(SMALL);
    let free = available().unwrap_or(u64::MAX);
    let is_there = usize::try_from(all).is_ok_and(|n| MmapMut::map_anon(n).is_ok());
    match is_there && all <= free {
        true => Ok(()),
        false => Err(report::memory(
            format!("{what}, in memory {}", show(bytes)),
            ALLOWED,
        )),
    }
}

/// Refuses a plan whose pool and scratch exceed what is available.
///
/// Mapped weights do not count: a model larger than memory runs, slowly, and a warning says so.
///
/// # Errors
/// [`Error::Memory`] naming what is needed and what there is.
pub fn check(plan: &MemoryPlan) -> Result<(), Error> {
    let Some(free) = available() else {
        return Ok(());
    };
    let scratch = plan.state.saturating_add(plan.scratch);
    let need = plan.kv.saturating_add(scratch);
    if need > free {
        return Err(report::memory(
            format!(
                "{} for the KV pool and {} of scratch",
                show(plan.kv),
                show(scratch)
            ),
            format!("at most the {} that are available", show(free)),
        ));
    }
    if need.saturating_add(plan.weights) > free {
        log::warn!(
            "weights ({}) and pool exceed the available {}: expect slow reads",
            show(plan.weights),
            show(free)
        );
    }
    Ok(())
}

/// Bytes that can be taken now without swapping: the smaller of what the kernel calls available and what the control group still
/// allows. `None` where the system does not say.
pub fn available() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find(|l| l.starts_with("MemAvailable:"))?;
    let machine = line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024;
    Some(cgroup_room().map_or(machine, |c| c.min(machine)))
}

/// What the control group (version 2) still allows; reclaimable file cache counts as free.
fn cgroup_room() -> Option<u64> {
    let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|l| l.strip_prefix("0::"))?;
    let dir = format!("/sys/fs/cgroup{path}");
    let read = |name: &str| std::fs::read_to_string(format!("{dir}/{name}")).ok();
    let max = read("memory.max")?.trim().parse::<u64>().ok()?;
    let used = read("memory.current")?.trim().parse::<u64>().ok()?;
    let stat = read("memory.stat").unwrap_or_default();
    let file = stat
        .lines()
        .find_map(|l| l.strip_prefix("inactive_file "))?
        .trim()
        .parse::<u64>()
        .ok()?;
    Some(max.saturating_sub(used.saturating_sub(file)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_reads_well() {
        let plan = MemoryPlan {
            weights: 1_116_691_497,
            kv: 112 << 20,
            state: 0,
            scratch: 24 << 20,
        };
        assert_eq!(
            plan.to_string(),
            "weights 1.04 GiB mapped + KV pool 112 MiB + scratch 24.0 MiB"
        );
        let plan = MemoryPlan {
            state: 3 << 20,
            ..plan
        };
        assert_eq!(
            plan.to_string(),
            "weights 1.04 GiB mapped + KV pool 112 MiB + recurrent states 3.0 MiB + scratch 24.0 MiB"
        );
    }

    #[test]
    fn a_plan_beyond_any_machine_is_refused() {
        let plan = MemoryPlan {
            weights: 0,
            kv: u64::MAX,
            state: 0,
            scratch: 1,
        };
        if available().is_some() {
            assert!(matches!(check(&plan), Err(Error::Memory(_))));
        }
    }

    #[test]
    fn lists_get_room_and_keep_what_is_in_them() {
        let mut list = vec![1, 2, 3];
        make_room(&mut list, 100);
        assert!(list.capacity() >= 100 && list == [1, 2, 3]);
        let at = list.as_ptr();
        make_room(&mut list, 50);
        assert_eq!((at, &list[..]), (list.as_ptr(), &[1, 2, 3][..]));
    }
}
