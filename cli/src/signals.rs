//! Signals.
//!
//! SIGINT means two things. While a reply is being made it means "stop this": a flag is set, the reply ends in an orderly way, and
//! what was said is kept. At any other time, and the second time, it means "stop": the program ends with 130. In a conversation it never
//! means that while a reply is being made: who presses Ctrl-C twice because a long prompt goes on for a moment wants the prompt back, not
//! to lose what was said. SIGTERM, SIGHUP and SIGQUIT (Ctrl-\) always end it. Whatever the end, a file that is half written is removed
//! and a terminal that the line editor had put into raw mode is put back first, which is why a thread waits for the signals rather
//! than a handler.
//!
//! SIGTSTP (Ctrl-Z) stops the program as ever. If that happens in the middle of a reply, the shell gets the terminal as it was, and the
//! reply has it back with SIGCONT.
//!
//! SIGPIPE is left ignored, as Rust has it: a broken pipe is an error of a write and ends the program from there, quietly.

use std::io::{IsTerminal as _, stderr, stdin, stdout};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{getpgrp, getsid};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGSTOP, SIGTERM, SIGTSTP};
use signal_hook::iterator::Signals;

use crate::fail::{INTERRUPT, TERMINATE};
use crate::term::{ERASE, Style, is_dumb};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static POLLED: AtomicBool = AtomicBool::new(false);
/// Whether there is a conversation to go back to.
static PATIENT: AtomicBool = AtomicBool::new(false);
/// When a reply of a conversation ended that SIGINT had stopped.
static STOPPED: Mutex<Option<Instant>> = Mutex::new(None);
/// The file that goes away if a signal ends the program.
static UNFINISHED: Mutex<Option<PathBuf>> = Mutex::new(None);
static COOKED: OnceLock<Termios> = OnceLock::new();
/// The modes of the terminal during a reply, see [`TypeAhead`].
static QUIET: Mutex<Option<Termios>> = Mutex::new(None);
/// Dim text is being written to stdout, a terminal.
static DIM: AtomicBool = AtomicBool::new(false);
/// Another program has the terminal, and SIGINT is for that one.
static DEAF: AtomicBool = AtomicBool::new(false);
/// A line is being read that the terminal edits.
static ASKING: AtomicBool = AtomicBool::new(false);
/// How long the program was stopped since [`Polling`] began.
static PAUSED: Mutex<Duration> = Mutex::new(Duration::ZERO);
/// Whether SIGTSTP does what it does by default.
static AT_REST: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// A SIGINT this soon after a reply that was stopped was meant for the reply.
const ECHO: Duration = Duration::from_secs(1);

/// Starts the thread that waits for signals.
pub(crate) fn install() {
    if let Ok(t) = tcgetattr(stdin()) {
        let _ = COOKED.set(t);
    }
    AT_REST.store(has_a_shell(), Ordering::SeqCst);
    let default = signal_hook::flag::register_conditional_default(SIGTSTP, AT_REST.clone());
    let mut wanted = vec![SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGCONT];
    wanted.extend(default.ok().map(|_| SIGTSTP));
    let Ok(mut signals) = Signals::new(wanted) else {
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
                    SIGTSTP => pause(),
                    SIGCONT => go_on(),
                    SIGTERM => exit(TERMINATE),
                    signal => exit(128 + signal as u8),
                }
            }
        });
}

/// Whether there is a shell that lets a stopped program go on. Without one (`xterm -e lemma`) it would stay stopped forever.
fn has_a_shell() -> bool {
    getsid(None).is_ok_and(|session| session != getpgrp())
}

/// Stops in the middle of a reply. At rest the handler has done it.
fn pause() {
    if !POLLED.load(Ordering::SeqCst) || !has_a_shell() {
        return;
    }
    restore_terminal();
    let start = Instant::now();
    let _ = signal_hook::low_level::raise(SIGSTOP);
    *lock(&PAUSED) += start.elapsed();
}

/// Takes the terminal back for a reply.
fn go_on() {
    // In the background it belongs to others, and changing it would stop the program again.
    if tcgetpgrp(stdin()).is_ok_and(|group| group != getpgrp()) {
        return;
    }
    if let Some(quiet) = &*lock(&QUIET) {
        let _ = tcsetattr(stdin(), OptionalActions::Now, quiet);
    }
    if DIM.load(Ordering::SeqCst) {
        let _ = rustix::io::write(stdout(), Style(true).dim().as_bytes());
    }
}

/// What a SIGINT means now.
fn is_the_end() -> bool {
    if DEAF.load(Ordering::SeqCst) {
        return false;
    }
    if ASKING.load(Ordering::SeqCst) {
        // The terminal has dropped what was typed.
        let _ = rustix::io::write(stdout(), b"\n> ");
        return false;
    }
    if !POLLED.load(Ordering::SeqCst) {
        return lock(&STOPPED).is_none_or(|at| at.elapsed() > ECHO);
    }
    if !INTERRUPTED.swap(true, Ordering::SeqCst) {
        return false;
    }
    let patient = PATIENT.load(Ordering::SeqCst);
    if patient && stderr().is_terminal() {
        // The reply looks up only between two batches of a prompt.
        let erase = if is_dumb() { "" } else { ERASE };
        let line = format!("{erase}stopping; Ctrl-\\ leaves at once\r\n");
        let _ = rustix::io::write(stderr(), line.as_bytes());
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

/// Puts the terminal into the modes and the colour that the program found it in.
pub(crate) fn restore_terminal() {
    // Past the lock of stdout, which the reply may hold.
    if DIM.load(Ordering::SeqCst) {
        let _ = rustix::io::write(stdout(), Style(true).reset().as_bytes());
    }
    if let Some(t) = COOKED.get() {
        let _ = tcsetattr(stdin(), OptionalActions::Now, t);
    }
}

/// Says whether dim text is being written to stdout, so that no end of the program leaves the shell dim.
pub(crate) fn dim(on: bool) {
    DIM.store(on, Ordering::SeqCst);
}

/// As long as this lives, SIGINT is for another program that has the terminal.
pub(crate) struct Deaf(());

impl Deaf {
    pub(crate) fn begin() -> Self {
        DEAF.store(true, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for Deaf {
    fn drop(&mut self) {
        // One that the other program ended with may be noticed a moment later here.
        *lock(&STOPPED) = Some(Instant::now());
        DEAF.store(false, Ordering::SeqCst);
    }
}

/// As long as this lives, SIGINT drops a line that the terminal edits, as the line editor does by itself.
pub(crate) struct Asking(());

impl Asking {
    pub(crate) fn begin() -> Self {
        ASKING.store(true, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        ASKING.store(false, Ordering::SeqCst);
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
        *lock(&PAUSED) = Duration::ZERO;
        POLLED.store(true, Ordering::SeqCst);
        AT_REST.store(false, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for Polling {
    fn drop(&mut self) {
        if PATIENT.load(Ordering::SeqCst) && interrupted() {
            *lock(&STOPPED) = Some(Instant::now());
        }
        POLLED.store(false, Ordering::SeqCst);
        AT_REST.store(has_a_shell(), Ordering::SeqCst);
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

/// How long the program was stopped since [`Polling::begin`].
pub(crate) fn paused() -> Duration {
    *lock(&PAUSED)
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
        let before = tcgetattr(stdin()).ok()?;
        let mut quiet = before.clone();
        quiet
            .local_modes
            .remove(LocalModes::ECHO | LocalModes::ICANON);
        quiet.local_modes.insert(LocalModes::NOFLSH);
        quiet.input_modes.remove(rustix::termios::InputModes::ICRNL);
        tcsetattr(stdin(), OptionalActions::Now, &quiet).ok()?;
        *lock(&QUIET) = Some(quiet);
        Some(Self { before })
    }
}

impl Drop for TypeAhead {
    fn drop(&mut self) {
        *lock(&QUIET) = None;
        let _ = tcsetattr(stdin(), OptionalActions::Now, &self.before);
    }
}
