//! `lemma devices`: what can run a model here.

use serde_json::json;

use crate::args::tools::DevicesArgs;
use crate::fail::Result;
use crate::term::escape;
use crate::{out, repl};

pub(crate) fn run(args: &DevicesArgs) -> Result {
    let name = cpu_name().unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = lemma_engine::memory::available();
    let isas = lemma_engine::backend::cpu::isas();
    let cuda = lemma_engine::backend::devices();
    if args.json {
        let cpu = json!({ "device": "cpu", "name": name, "threads": threads, "isa": isas, "memory_available": memory });
        let gpus = cuda.list.iter().map(|d| {
            json!({
                "device": format!("cuda{}", d.ordinal), "name": d.name, "sm": d.sm.0 * 10 + d.sm.1, "n_sm": d.n_sm, "memory": d.memory,
                "driver": format!("{}.{}", d.driver.0, d.driver.1),
            })
        });
        let all: Vec<_> = std::iter::once(cpu).chain(gpus).collect();
        return out::json(&json!(all));
    }
    out::line(&format!(
        "cpu    {}, {threads} threads, {}{}",
        escape(&name),
        isas.join(" "),
        memory.map_or(String::new(), |m| format!(
            ", {} of memory available",
            repl::size(m)
        ))
    ))?;
    for d in &cuda.list {
        out::line(&format!(
            "cuda{}  {}, compute capability {}.{}, {} multiprocessors, {}, driver for CUDA {}.{}",
            d.ordinal,
            escape(&d.name),
            d.sm.0,
            d.sm.1,
            d.n_sm,
            repl::size(d.memory),
            d.driver.0,
            d.driver.1
        ))?;
    }
    match cuda.reason {
        Some(reason) => out::line(&format!("cuda   none: {reason}")),
        None => Ok(()),
    }
}

fn cpu_name() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|l| l.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}
