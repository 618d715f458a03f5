//! Signals.
//!
//! SIGINT means two things. While a reply is being made it means "stop this": a flag is set, the reply ends in an orderly way, and
//! what was said is kept. At any other time, and the second time, it means "stop": the program ends with 130. SIGTERM and SIGHUP
//! always end it. Whatever the end, a terminal that the line editor had put into raw mode is put back first, which is why a
//! thread waits for the signals rather than a handler.
//!
//! SIGPIPE is left ignored, as Rust has it: a broken pipe is an error of a write and ends the program from there, quietly.

use std::io::{IsTerminal as _, stderr};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::fail::{INTERRUPT, TERMINATE};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static POLLED: AtomicBool = AtomicBool::new(false);
static COOKED: OnceLock<Termios> = OnceLock::new();

/// Starts the thread that waits for signals.
pub(crate) fn install() {
    if let Ok(t) = tcgetattr(std::io::stdin()) {
        let _ = COOKED.set(t);
    }
    let Ok(mut signals) = Signals::new([SIGINT, SIGTERM, SIGHUP]) else {
        return;
    };
    // Without the thread the defaults of the system apply, which end the program as well.
    let _ = std::thread::Builder::new()
        .name("signals".into())
        .stack_size(128 << 10)
        .spawn(move || {
            for signal in signals.forever() {
                match signal {
                    SIGINT
                        if POLLED.load(Ordering::SeqCst)
                            && !INTERRUPTED.swap(true, Ordering::SeqCst) => {}
                    SIGINT => exit(INTERRUPT),
                    SIGTERM => exit(TERMINATE),
                    _ => exit(129),
                }
            }
        });
}

fn exit(code: u8) -> ! {
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
        INTERRUPTED.store(false, Ordering::SeqCst);
        POLLED.store(true, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for Polling {
    fn drop(&mut self) {
        POLLED.store(false, Ordering::SeqCst);
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
