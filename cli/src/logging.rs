//! The log on stderr: warnings always, the rest with `-v` or `LEMMA_LOG`.

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::out;
use crate::term::Style;

struct Logger {
    style: Style,
}

/// Starts the log.
pub(crate) fn install(verbose: bool, style: Style) {
    let from_env = std::env::var("LEMMA_LOG").ok().and_then(|l| l.parse().ok());
    let level = from_env.unwrap_or(if verbose {
        LevelFilter::Info
    } else {
        LevelFilter::Warn
    });
    if log::set_boxed_logger(Box::new(Logger { style })).is_ok() {
        log::set_max_level(level);
    }
}

impl Log for Logger {
    fn enabled(&self, m: &Metadata<'_>) -> bool {
        // Libraries below are only of interest to those who ask for everything.
        m.target().starts_with("lemma") || log::max_level() == LevelFilter::Trace
    }

    fn log(&self, r: &Record<'_>) {
        if self.enabled(r.metadata()) {
            let text = crate::term::escape(&r.args().to_string());
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
