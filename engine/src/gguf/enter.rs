//! Entering the pages of a mapped file into the tables of the process before they are read.
//!
//! A file that is in memory is not yet in the tables of a process that maps it: the first access of every 64 KiB is a fault, for a
//! gigabyte in small pages some 18,000 of them, a quarter of the time of a first pass. While one thread builds the vocabulary, the others
//! have nothing to do; so one of them enters what the pass is going to read, until the pass begins. It touches pages: to ask the system for all of
//! them (`MADV_POPULATE_READ`) is cheaper by a fifth, but holds a lock for which everybody waits who maps memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::GgufFile;
use super::source::Source;

/// What Linux enters around an access that faults.
const AROUND: usize = 64 << 10;

/// A thread that enters pages, as long as this lives and until it is told to stop.
#[derive(Debug)]
pub(crate) struct Entering(Arc<AtomicBool>);

impl Entering {
    /// Nothing is entered.
    pub(crate) fn none() -> Self {
        Self(Arc::default())
    }

    /// The thread ends: from now on it would take a core from those who read.
    pub(crate) fn stop(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Drop for Entering {
    fn drop(&mut self) {
        self.stop();
    }
}

impl GgufFile {
    /// Begins to enter the pages of tensors that a pass reads as a whole, in file order. Where that cannot be done, nothing happens.
    pub(crate) fn enter(&self) -> Entering {
        if !self
            .parts
            .iter()
            .any(|p| matches!(p.source, Source::Map(_)))
        {
            return Entering::none();
        }
        // Of a token's embedding a row is read, unless it is the output as well; of experts those that are chosen.
        let tied = self.tensor("output.weight").is_none();
        let whole = |name: &str| tied || name != "token_embd.weight";
        let tensors = self.tensors.iter();
        let parts: Vec<_> = tensors
            .filter(|t| t.n_dims < 3 && whole(&t.name))
            .map(|t| self.bytes_of(t))
            .collect();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let enter = move || {
            for bytes in parts {
                for at in (0..bytes.len()).step_by(AROUND) {
                    if stopped.load(Ordering::Relaxed) {
                        return;
                    }
                    std::hint::black_box(bytes[at]);
                }
            }
        };
        // Without a thread the pass does it.
        let _ = std::thread::Builder::new()
            .name("lemma-pages".into())
            .spawn(enter);
        Entering(stop)
    }
}
