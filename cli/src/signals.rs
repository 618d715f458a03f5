//! Signals.
//!
//! SIGINT means two things. While a reply is being made it means "stop this": a flag is set, the reply ends in an orderly way, and
//! what was said is kept. At any other time, and the second time, it means "stop": the program ends with 130. In a conversation it never
//! means that while a reply is being made: who presses Ctrl-C twice because a long prompt goes on for a moment wants the prompt back, not
//! to lose what was said. SIGTERM, SIGHUP and SIGQUIT (Ctrl-\) always end it. Whatever the end, a file that is half written is removed
//! and a terminal that the line editor had put into raw mode is put back first, which is why a thread waits for the signals rather
//! than a handler.
//!
//! SIGPIPE is left ignored, as Rust has it: a broken pipe is an error of a write and ends the program from there, quietly.

use std::io::{IsTerminal as _, stderr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::fail::{INTERRUPT, TERMINATE};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static POLLED: AtomicBool = AtomicBool::new(false);
/// Whether there is a conversation to go back to.
static PATIENT: AtomicBool = AtomicBool::new(false);
/// When a reply of a conversation ended that SIGINT had stopped.
static STOPPED: Mutex<Option<Instant>> = Mutex::new(None);
/// The file that goes away if a signal ends the program.
static UNFINISHED: Mutex<Option<PathBuf>> = Mutex::new(None);
static COOKED: OnceLock<Termios> = OnceLock::new();

/// A SIGINT this soon after a reply that was stopped was meant for the reply.
const ECHO: Duration = Duration::from_secs(1);

/// Starts the thread that waits for signals.
pub(crate) fn install() {
    if let Ok(t) = tcgetattr(std::io::stdin()) {
        let _ = COOKED.set(t);
    }
    let Ok(mut signals) = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT]) else {
        return;
    };
    // Without the thread the defaults of the system apply, which end the program as well.
    let _ = std::thread::Builder::new()
        .name("signals".into())
        .stack_size(128 << 10)
        .spawn(move || {
            for signal in signals.forever() {
                match signal {
                    SIGINT if !is_the_end() => {}
                    SIGINT => exit(INTERRUPT),
                    SIGTERM => exit(TERMINATE),
                    signal => exit(128 + signal as u8),
                }
            }
        });
}

/// What a SIGINT means now.
fn is_the_end() -> bool {
    if !POLLED.load(Ordering::SeqCst) {
        return lock(&STOPPED).is_none_or(|at| at.elapsed() > ECHO);
    }
    if !INTERRUPTED.swap(true, Ordering::SeqCst) {
        return false;
    }
    let patient = PATIENT.load(Ordering::SeqCst);
    if patient && stderr().is_terminal() {
        // The reply looks up only between two batches of a prompt.
        let _ = rustix::io::write(stderr(), b"\r\x1b[Kstopping; Ctrl-\\ leaves at once\r\n");
    }
    !patient
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn exit(code: u8) -> ! {
    if let Some(path) = &*lock(&UNFINISHED) {
        let _ = std::fs::remove_file(path);
    }
    restore_terminal();
    // The shell's prompt does not go on in the middle of a reply.
    // Not through the lock, which the reply may hold.
    if code == INTERRUPT && POLLED.load(Ordering::SeqCst) && stderr().is_terminal() {
        let _ = rustix::io::write(stderr(), b"\n");
    }
    signal_hook::low_level::exit(i32::from(code))
}

/// Puts the terminal into the modes that the program found it in.
pub(crate) fn restore_terminal() {
    if let Some(t) = COOKED.get() {
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, t);
    }
}

/// As long as this lives, the first SIGINT only sets the flag.
pub(crate) struct Polling(());

impl Polling {
    pub(crate) fn begin() -> Self {
        Self::new(false)
    }

    /// For replies of a conversation: no further SIGINT ends it either.
    pub(crate) fn of_conversation() -> Self {
        Self::new(true)
    }

    fn new(patient: bool) -> Self {
        PATIENT.store(patient, Ordering::SeqCst);
        INTERRUPTED.store(false, Ordering::SeqCst);
        POLLED.store(true, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for Polling {
    fn drop(&mut self) {
        if PATIENT.load(Ordering::SeqCst) && interrupted() {
            *lock(&STOPPED) = Some(Instant::now());
        }
        POLLED.store(false, Ordering::SeqCst);
    }
}

/// As long as this lives, a signal that ends the program removes a file first.
pub(crate) struct Unfinished(());

impl Unfinished {
    /// `path` is removed only if it is not there yet.
    pub(crate) fn begin(path: Option<&Path>) -> Self {
        *lock(&UNFINISHED) = path.filter(|p| !p.exists()).map(Path::to_owned);
        Self(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        *lock(&UNFINISHED) = None;
    }
}

/// Whether SIGINT came since [`Polling::begin`].
pub(crate) fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// As long as this lives, what is typed waits unseen for the line editor instead of being echoed into the reply.
///
/// The line discipline is told to keep bytes as they come: no echo, no lines, Enter stays Enter, and Ctrl-C does not throw away
/// what was typed before it. The editor finds all of it in the queue when it reads next, several lines too.
pub(crate) struct TypeAhead {
    before: Termios,
}

impl TypeAhead {
    pub(crate) fn begin() -> Option<Self> {
        let before = tcgetattr(std::io::stdin()).ok()?;
        let mut quiet = before.clone();
        quiet
            .local_modes
            .remove(LocalModes::ECHO | LocalModes::ICANON);
        quiet.local_modes.insert(LocalModes::NOFLSH);
        quiet.input_modes.remove(rustix::termios::InputModes::ICRNL);
        tcsetattr(std::io::stdin(), OptionalActions::Now, &quiet).ok()?;
        Some(Self { before })
    }
}

impl Drop for TypeAhead {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.before);
    }
}
