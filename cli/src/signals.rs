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
//! What the program was started to ignore (`nohup`) stays ignored. In the background the terminal belongs to others and is left alone.
//!
//! SIGPIPE is left ignored, as Rust has it: a broken pipe is an error of a write and ends the program from there, quietly.

use std::io::{IsTerminal as _, stderr, stdin, stdout};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use rustix::process::{getpgrp, getsid};
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr,
};
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
/// The modes that a conversation found the terminal in.
static COOKED: OnceLock<Termios> = OnceLock::new();
/// The modes of the terminal during a reply, see [`TypeAhead`].
static QUIET: Mutex<Option<Termios>> = Mutex::new(None);
/// Dim text is being written to stdout, a terminal.
static DIM: AtomicBool = AtomicBool::new(false);
/// Another program has the terminal, and SIGINT is for that one.
static DEAF: AtomicBool = AtomicBool::new(false);
/// A line is being read that the terminal edits.
static ASKING: AtomicBool = AtomicBool::new(false);
/// SIGINT came while such a line was being read.
static DROPPED: AtomicBool = AtomicBool::new(false);
/// How long the program was stopped since [`Polling`] began.
static PAUSED: Mutex<Duration> = Mutex::new(Duration::ZERO);
/// Whether SIGTSTP does what it does by default.
static AT_REST: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// A SIGINT this soon after a reply that was stopped was meant for the reply.
const ECHO: Duration = Duration::from_secs(1);

/// Starts the thread that waits for signals.
pub(crate) fn install() {
    AT_REST.store(has_a_shell(), Ordering::SeqCst);
    let mut wanted = vec![SIGTERM, SIGCONT];
    wanted.extend(
        [SIGINT, SIGHUP, SIGQUIT]
            .iter()
            .filter(|s| !is_ignored(**s)),
    );
    if !is_ignored(SIGTSTP) {
        let default = signal_hook::flag::register_conditional_default(SIGTSTP, AT_REST.clone());
        wanted.extend(default.ok().map(|_| SIGTSTP));
    }
    let Ok(mut signals) = Signals::new(wanted) else {
        return;
    };
    // Without the thread the defaults of the system apply, which end the program as well.
    let _ = std::thread::Builder::new()
        .name("signals".into())
        .stack_size(128 << 10)
        .spawn(move || {
            // The shell may take the terminal at any moment, and whoever touches it then would be stopped instead of ending.
            let _ = SigSet::from(Signal::SIGTTOU).thread_block();
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

/// Whether the program was started with a signal ignored. Only where the system says so in a file (Linux): the call that asks is not a safe
/// one.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|m| u64::from_str_radix(m.trim(), 16).ok());
    mask.is_some_and(|m| m >> (signal - 1) & 1 == 1)
}

/// Keeps the modes of the terminal for the end of the program, before the first change to them.
pub(crate) fn remember_terminal() {
    if let Ok(t) = tcgetattr(stdin()) {
        let _ = COOKED.set(t);
    }
}

/// Whether the terminal belongs to others. One that is not the session's own belongs to nobody.
fn in_background() -> bool {
    tcgetpgrp(stdin()).is_ok_and(|group| group != getpgrp())
}

/// Writes past the locks, which the reply may hold, and only what can be written at once: a terminal may have been stopped with Ctrl-S,
/// and no signal waits for that.
fn write_now(stream: impl AsFd, text: &str) {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)];
    if poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0) {
        let _ = rustix::io::write(&stream, text.as_bytes());
    }
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
    if in_background() {
        return;
    }
    if let Some(quiet) = &*lock(&QUIET) {
        let _ = tcsetattr(stdin(), OptionalActions::Now, quiet);
    }
    if DIM.load(Ordering::SeqCst) {
        write_now(stdout(), Style(true).dim());
    }
}

/// What a SIGINT means now.
fn is_the_end() -> bool {
    if DEAF.load(Ordering::SeqCst) {
        return false;
    }
    if ASKING.load(Ordering::SeqCst) {
        // The terminal has dropped what was typed.
        DROPPED.store(true, Ordering::SeqCst);
        write_now(stdout(), "\n> ");
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
        write_now(
            stderr(),
            &format!("{erase}stopping; Ctrl-\\ leaves at once\r\n"),
        );
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
    if code == INTERRUPT && POLLED.load(Ordering::SeqCst) && stderr().is_terminal() {
        write_now(stderr(), "\n");
    }
    signal_hook::low_level::exit(i32::from(code))
}

/// Puts the terminal into the modes and the colour that the program found it in. Modes that it has not changed may be another's by
/// now (`lemma … | less`).
pub(crate) fn restore_terminal() {
    if let Some(t) = COOKED.get()
        && !in_background()
    {
        let _ = tcsetattr(stdin(), OptionalActions::Now, t);
    }
    if DIM.load(Ordering::SeqCst) {
        write_now(stdout(), Style(true).reset());
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
        DROPPED.store(false, Ordering::SeqCst);
        ASKING.store(true, Ordering::SeqCst);
        Self(())
    }

    /// Whether SIGINT came since this was asked last.
    pub(crate) fn dropped(&self) -> bool {
        DROPPED.swap(false, Ordering::SeqCst)
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
/// what was typed before it. The editor finds all of it in the queue when it reads next, several lines too. Where there is no editor
/// the terminal goes on making lines.
pub(crate) struct TypeAhead {
    before: Termios,
}

impl TypeAhead {
    pub(crate) fn begin() -> Option<Self> {
        let before = tcgetattr(stdin()).ok()?;
        let mut quiet = before.clone();
        quiet.local_modes.remove(LocalModes::ECHO);
        quiet.local_modes.insert(LocalModes::NOFLSH);
        if !is_dumb() {
            quiet.local_modes.remove(LocalModes::ICANON);
            quiet.input_modes.remove(InputModes::ICRNL);
        }
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
