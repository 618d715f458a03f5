//! The log on stderr: warnings always, the rest with `-v` or `LEMMA_LOG`.

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::fail::{Failure, Result};
use crate::out;
use crate::term::{Style, escape};

struct Logger {
    style: Style,
}

/// Starts the log.
pub(crate) fn install(verbose: bool, style: Style) -> Result {
    let level = match (level_of_env()?, verbose) {
        (Some(level), _) => level,
        (None, true) => LevelFilter::Info,
        (None, false) => LevelFilter::Warn,
    };
    if log::set_boxed_logger(Box::new(Logger { style })).is_ok() {
        log::set_max_level(level);
    }
    Ok(())
}

/// What `LEMMA_LOG` says; set to nothing it says nothing.
fn level_of_env() -> Result<Option<LevelFilter>> {
    let given = std::env::var_os("LEMMA_LOG").filter(|v| !v.is_empty());
    let Some(given) = given else {
        return Ok(None);
    };
    let given = given.to_string_lossy();
    given.parse().map(Some).map_err(|_| {
        Failure::usage(format!(
            "LEMMA_LOG: {:?}, expected off, error, warn, info, debug or trace",
            escape(&given)
        ))
    })
}

impl Log for Logger {
    fn enabled(&self, m: &Metadata<'_>) -> bool {
        // Libraries below are only of interest to those who ask for everything.
        m.target().starts_with("lemma") || log::max_level() == LevelFilter::Trace
    }

    fn log(&self, r: &Record<'_>) {
        if self.enabled(r.metadata()) {
            let text = escape(&r.args().to_string());
            let word = match r.level() {
                Level::Error => "error: ",
                Level::Warn => "warning: ",
                _ => "",
            };
            out::note(&format!(
                "{}{word}{text}{}",
                self.style.dim(),
                self.style.reset()
            ));
        }
    }

    fn flush(&self) {}
}
