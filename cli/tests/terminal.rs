//! The conversation, on a terminal of 80 columns.

#![cfg(bundled_model)]

mod common;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{lemma, shell, temp};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, OptionalActions, Winsize, tcgetattr, tcsetattr, tcsetwinsize};

const COLUMNS: u16 = 80;
const PATIENCE: Duration = Duration::from_secs(20);

struct Terminal {
    child: Child,
    keyboard: File,
    screen: Arc<Mutex<Vec<u8>>>,
    /// How much of the screen has been looked at.
    read: usize,
}

impl Terminal {
    fn start(args: &[&str]) -> Self {
        Self::start_with(args, "vi")
    }

    fn start_with(args: &[&str], editor: &str) -> Self {
        Self::start_in("xterm", args, editor)
    }

    fn start_in(kind: &str, args: &[&str], editor: &str) -> Self {
        let mut command = lemma(args);
        // A shell gives every job a group of its own.
        command.process_group(0);
        Self::show(kind, command, editor)
    }

    /// A shell whose own the terminal is.
    fn start_shell(script: &str, args: &[&str]) -> Self {
        let mut command = shell(script, args);
        let lead = || {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
            Ok(())
        };
        // SAFETY: two system calls.
        unsafe { command.pre_exec(lead) };
        Self::show("xterm", command, "vi")
    }

    fn show(kind: &str, mut command: Command, editor: &str) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let size = Winsize {
            ws_row: 24,
            ws_col: COLUMNS,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&master, size).unwrap();
        let slave = File::options()
            .read(true)
            .write(true)
            .open(name.to_str().unwrap())
            .unwrap();
        let side = || Stdio::from(slave.try_clone().unwrap());
        let child = command
            .env("TERM", kind)
            .env("VISUAL", editor)
            .env("XDG_STATE_HOME", temp("state"))
            .stdin(side())
            .stdout(side())
            .stderr(side())
            .spawn()
            .unwrap();
        let keyboard = File::from(master);
        let mut output = keyboard.try_clone().unwrap();
        let screen = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&screen);
        std::thread::spawn(move || {
            let mut part = [0; 4096];
            while let Ok(n @ 1..) = output.read(&mut part) {
                seen.lock().unwrap().extend_from_slice(&part[..n]);
            }
        });
        Self {
            child,
            keyboard,
            screen,
            read: 0,
        }
    }

    /// Waits for a text behind what was waited for before; returns everything up to it.
    #[track_caller]
    fn expect(&mut self, text: &str) -> String {
        let start = Instant::now();
        loop {
            let bytes = self.screen.lock().unwrap()[self.read..].to_vec();
            let new = String::from_utf8_lossy(&bytes).into_owned();
            if let Some(at) = new.find(text) {
                self.read += at + text.len();
                return new[..at + text.len()].to_owned();
            }
            assert!(start.elapsed() < PATIENCE, "no {text:?} in {new:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Types a line at the prompt, and waits for what comes of it.
    #[track_caller]
    fn say(&mut self, line: &str, answer: &str) -> String {
        self.expect("> ");
        self.keyboard.write_all(line.as_bytes()).unwrap();
        self.keyboard.write_all(b"\r").unwrap();
        self.expect("\n");
        self.expect(answer)
    }

    /// What the terminal would send if it were the child's own.
    #[track_caller]
    fn signal(&self, signal: &str) {
        let mut kill = Command::new("kill");
        kill.args([signal, &self.child.id().to_string()]);
        assert!(kill.status().unwrap().success());
    }

    /// The colour that the terminal writes in.
    fn colour(&self) -> Option<String> {
        let screen = String::from_utf8_lossy(&self.screen.lock().unwrap()).into_owned();
        let ends = screen.split("\x1b[").skip(1);
        let codes = ends.filter_map(|s| Some(s.split_once('m')?.0));
        let colours = codes.filter(|c| c.bytes().all(|b| b.is_ascii_digit() || b == b';'));
        colours.last().map(str::to_owned)
    }

    /// The exit code, soon.
    #[track_caller]
    fn code(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(start.elapsed() < PATIENCE, "it goes on");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Leaves, and shows all that was on the screen.
    #[track_caller]
    fn leave_with_screen(self, look: impl Fn(&str)) {
        let screen = Arc::clone(&self.screen);
        self.leave();
        look(&String::from_utf8_lossy(&screen.lock().unwrap()));
    }

    #[track_caller]
    fn leave(mut self) {
        self.expect("> ");
        self.keyboard.write_all(b"\x04").unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Lines as they are seen: without sequences.
fn lines(screen: &str) -> Vec<String> {
    let mut plain = String::new();
    let mut chars = screen.chars();
    while let Some(c) = chars.next() {
        match c {
            '\x1b' => {
                // Only control sequences are written, never strings.
                assert_eq!(chars.next(), Some('['), "{screen:?}");
                chars.by_ref().find(|c| ('@'..='~').contains(c));
            }
            '\r' => {}
            c => plain.push(c),
        }
    }
    plain.lines().map(str::to_owned).collect()
}

#[test]
fn what_it_says_of_itself_fits_80_columns() {
    let mut t = Terminal::start(&["--temp", "0", "--color", "never"]);
    let seen = [
        t.expect("Ctrl-D leaves."),
        t.say("/help", "is sent as"),
        t.say("What is 1+1?", "stop:eos ]"),
        t.say("/kv", "long ago"),
    ];
    for line in seen.iter().flat_map(|s| lines(s)) {
        assert!(line.chars().count() <= usize::from(COLUMNS), "{line}");
    }
    t.leave();
}

#[test]
fn commands_in_the_words_of_others() {
    let mut t = Terminal::start(&["--color", "never"]);
    t.say("/?", "this list");
    t.say("/set parameter temperature 0.25", "temperature = 0.25");
    t.say("/set system be brief", "no place for a system message");
    t.say("/set nothink", "thinking is off");
    for wrong in ["top_k -3", "think_budget -9", "n_predict -9"] {
        t.say(&format!("/set {wrong}"), "error: ");
    }
    t.say("/clear all", "/clear takes nothing");
    t.say("/exit now", "/exit takes nothing");
    t.say("/set num_ctx 9", "hint: /show");
    let seen = t.say("/show", "be brief");
    let temp = seen.lines().find(|l| l.contains("  temp ")).unwrap();
    assert!(temp.trim_end().ends_with("set"), "{temp}");
    t.leave();
}

#[test]
fn a_conversation_without_a_word_is_saved_and_loaded() {
    let path = temp("empty.json");
    let name = path.to_str().unwrap();
    let mut t = Terminal::start(&[]);
    t.say(&format!("/save {name}"), "0 messages");
    t.say(&format!("/load {name}"), "0 messages");
    t.leave();
    std::fs::write(&path, "\n").unwrap();
    let mut t = Terminal::start(&[]);
    t.say(&format!("/read {name}"), "nothing in it");
    t.leave();
    let _ = std::fs::remove_file(&path);
}

#[test]
fn the_echo_of_a_file_does_not_drive_the_terminal() {
    let path = temp("escapes.txt");
    std::fs::write(&path, "What is \x1b]0;title\x071\x1b[5m+1?\n").unwrap();
    let mut t = Terminal::start(&["-cnv", "-f", path.to_str().unwrap(), "-n", "4"]);
    let seen = t.expect("What is 1+1?");
    assert!(!seen.contains("\x1b[5m"), "{seen:?}");
    t.leave();
    let _ = std::fs::remove_file(&path);
}

#[test]
fn a_message_in_an_editor_is_nobody_elses() {
    let editor = "sh -c 'ls -l \"$0\" >&2'";
    let mut t = Terminal::start_with(&[], editor);
    let seen = t.say("/edit", "nothing was written");
    assert!(seen.contains("-rw------- "), "{seen}");
    t.leave();
}

#[test]
fn a_prompt_that_is_being_read_can_be_stopped_by_an_impatient_hand() {
    let path = temp("long.txt");
    std::fs::write(&path, "one two ".repeat(2500)).unwrap();
    let name = path.to_str().unwrap();
    let mut t = Terminal::start(&["-cnv", "-f", name, "-t", "1", "-b", "8", "--color", "never"]);
    t.expect("reading the prompt");
    for _ in 0..3 {
        t.signal("-INT");
    }
    t.expect("stopped before a reply");
    t.say("/undo", "taken back");
    t.say("What is 1+1?", "The answer is 2.");
    t.leave();
    // There is a way out at any time.
    let mut t = Terminal::start(&["-cnv", "-f", name, "-t", "1", "-b", "8"]);
    t.expect("reading the prompt");
    t.signal("-QUIT");
    assert_eq!(t.child.wait().unwrap().code(), Some(131));
    let _ = std::fs::remove_file(&path);
}

#[test]
fn json_is_for_one_answer() {
    let mut t = Terminal::start(&["--json"]);
    t.expect("there is no prompt");
    assert_eq!(t.child.wait().unwrap().code(), Some(2));
    // One turn of a conversation is one answer.
    let mut t = Terminal::start(&["-st", "-cnv", "-p", "What is 1+1?"]);
    t.expect("The answer is 2.");
    assert_eq!(t.child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_line_that_is_no_text_costs_the_line_and_nothing_else() {
    let mut t = Terminal::start(&["--color", "never", "--temp", "0"]);
    t.say("What is 1+1?", "The answer is 2.");
    t.expect("> ");
    t.keyboard.write_all(b"What is \xff 2+2?\r").unwrap();
    t.expect("note: the line was not UTF-8 and was dropped");
    t.say("/context", "1 from you");
    t.leave();
}

#[test]
fn names_of_files_may_have_blanks() {
    let path = temp("a question.txt");
    std::fs::write(&path, "What is 1+1?\n").unwrap();
    let name = path.to_str().unwrap();
    let mut t = Terminal::start(&["--color", "never", "--temp", "0"]);
    t.say(&format!("/read \"{name}\""), "The answer is 2.");
    t.say(
        &format!("/read {}", name.replace(' ', "\\ ")),
        "The answer is 2.",
    );
    t.leave();
    let _ = std::fs::remove_file(&path);
}

#[test]
fn what_stands_between_fences_is_no_command() {
    let mut t = Terminal::start(&["--color", "never", "-n", "8"]);
    let seen = t.say("\"\"\"/help\"\"\"", "-n was reached");
    assert!(!seen.contains("this list"), "{seen}");
    t.leave();
}

#[test]
fn an_interrupt_is_for_the_editor_while_it_runs() {
    let mut t = Terminal::start_with(&["--color", "never"], "echo running >&2; sleep 1; true");
    let draft = std::env::temp_dir().join(format!("lemma-{}.md", t.child.id()));
    t.say("/edit", "running");
    assert!(draft.exists());
    t.signal("-INT");
    t.expect("nothing was written");
    assert!(!draft.exists());
    t.say("/edit", "running");
    t.signal("-TERM");
    assert_eq!(t.child.wait().unwrap().code(), Some(143));
    assert!(!draft.exists());
}

/// A chain of thought on this goes round for long with so small a pool.
const HARD: &str = "What is 8213746 * 95371?";
const LONG: [&str; 10] = [
    "--temp",
    "0",
    "-t",
    "1",
    "--kv-policy",
    "h2o",
    "--kv-demote",
    "none",
    "--kv-budget",
    "64",
];

/// A conversation in the middle of a chain of thought, which is shown dim.
fn thinking() -> Terminal {
    let mut t = Terminal::start(&LONG);
    t.say(HARD, "\x1b[2m");
    t.expect("a1=");
    t
}

/// Waits until something is so.
#[track_caller]
fn until(is: impl Fn() -> bool) {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_shell_gets_its_colours_back() {
    for (signal, code) in [("-QUIT", 131), ("-TERM", 143)] {
        let mut t = thinking();
        until(|| t.colour().as_deref() == Some("2"));
        t.signal(signal);
        assert_eq!(t.code(), Some(code));
        until(|| t.colour().as_deref() == Some("0"));
    }
}

#[test]
fn a_reply_that_was_stopped_goes_on() {
    let mut t = thinking();
    let echoes = |t: &Terminal| {
        let modes = tcgetattr(&t.keyboard).unwrap().local_modes;
        modes.contains(LocalModes::ECHO | LocalModes::ICANON)
    };
    assert!(!echoes(&t));
    t.signal("-TSTP");
    let stat = format!("/proc/{}/stat", t.child.id());
    if std::path::Path::new(&stat).exists() {
        until(|| std::fs::read_to_string(&stat).unwrap().contains(") T "));
    }
    until(|| echoes(&t));
    until(|| t.colour().as_deref() == Some("0"));
    t.signal("-CONT");
    until(|| t.colour().as_deref() == Some("2"));
    until(|| !echoes(&t));
    t.signal("-INT");
    t.expect("stopped; /continue goes on");
    t.leave();
}

#[test]
fn a_dumb_terminal_is_not_drawn_on() {
    let mut t = Terminal::start_in("dumb", &["--temp", "0", "--think", "fold"], "vi");
    t.expect("> ");
    t.signal("-INT");
    t.say("What is 8213746 * 95371?", "stop:eos");
    t.leave_with_screen(|screen| assert!(!screen.contains('\x1b'), "{screen:?}"));
}

#[test]
fn the_rest_of_a_paste_is_not_obeyed() {
    let mut t = Terminal::start(&["--color", "never"]);
    t.expect("> ");
    for part in [
        &b"\x1b[200~What \xff"[..],
        b" is\r/help\r",
        b"\x03\x03",
        b"1+1?\r",
        b"\x1b[201~",
    ] {
        t.keyboard.write_all(part).unwrap();
        std::thread::sleep(Duration::from_millis(50));
    }
    let seen = t.expect("note: the line was not UTF-8 and was dropped");
    assert!(!seen.contains("this list"), "{seen}");
    let seen = t.say("/context", "0 from you");
    assert!(!seen.contains("this list"), "{seen}");
    t.leave();
}

#[test]
fn a_job_in_the_background_can_be_ended() {
    let hard = ["-p", HARD];
    for (script, args) in [
        (
            r#"set -m; "$0" "$@" & read -r go; kill %1; wait %1; echo "ended $?""#,
            &hard[..],
        ),
        (
            r#"set -m; "$0" "$@"; bg %1; kill %1; wait %1; echo "ended $?""#,
            &[&hard[..], &["-cnv"]].concat(),
        ),
    ] {
        let mut t = Terminal::start_shell(script, &[args, &LONG].concat());
        t.expect("a1=");
        let key = if args.contains(&"-cnv") {
            b"\x1a"
        } else {
            b"\n"
        };
        t.keyboard.write_all(key).unwrap();
        t.expect("ended 143");
    }
}

#[test]
fn modes_that_it_did_not_change_are_not_its_own() {
    let mut t = Terminal::start(&[&["-p", HARD][..], &LONG].concat());
    t.expect("a1=");
    let mut modes = tcgetattr(&t.keyboard).unwrap();
    modes.local_modes.remove(LocalModes::ECHO);
    tcsetattr(&t.keyboard, OptionalActions::Now, &modes).unwrap();
    t.signal("-TERM");
    assert_eq!(t.code(), Some(143));
    let modes = tcgetattr(&t.keyboard).unwrap();
    assert!(!modes.local_modes.contains(LocalModes::ECHO));
}

#[test]
fn a_terminal_that_was_stopped_is_not_waited_for() {
    let mut t = thinking();
    until(|| t.colour().as_deref() == Some("2"));
    t.keyboard.write_all(b"\x13").unwrap();
    std::thread::sleep(Duration::from_millis(100));
    t.signal("-TERM");
    assert_eq!(t.code(), Some(143));
    let modes = tcgetattr(&t.keyboard).unwrap().local_modes;
    assert!(modes.contains(LocalModes::ECHO | LocalModes::ICANON));
}

#[test]
fn what_was_ignored_at_the_start_stays_ignored() {
    let ask = [&["-p", HARD][..], &LONG].concat();
    let mut t = Terminal::start_shell(r#"trap "" HUP; exec "$0" "$@""#, &ask);
    t.expect("a1=");
    t.signal("-HUP");
    t.signal("-TERM");
    assert_eq!(t.code(), Some(143));
}

#[test]
fn an_interrupt_drops_all_lines_on_a_dumb_terminal() {
    let mut t = Terminal::start_in("dumb", &[], "vi");
    t.expect("> ");
    t.keyboard.write_all(b"\"\"\"one\r").unwrap();
    t.expect("one\r\n");
    // Until the line has been read.
    std::thread::sleep(Duration::from_millis(100));
    t.signal("-INT");
    t.say("/context", "0 from you");
    t.say("\"\"\"/help\rme\"\"\"", "[ ");
    t.say("/context", "1 from you");
    t.leave();
}

#[test]
fn lines_typed_ahead_on_a_dumb_terminal_stay_lines() {
    let mut t = Terminal::start_in("dumb", &LONG, "vi");
    t.say(HARD, "a1=");
    t.keyboard.write_all(b"/context\r/help\r").unwrap();
    std::thread::sleep(Duration::from_millis(50));
    t.signal("-INT");
    t.expect("1 from you");
    t.expect("this list");
    t.leave();
}
