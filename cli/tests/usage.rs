//! What the binary says before a model is involved.

mod common;

use common::{ends, err, out, pipe, run};

#[test]
fn help_and_version_go_to_stdout() {
    for args in [
        &["--help"][..],
        &["-h"],
        &["--usage"],
        &["score", "--help"],
        &["bench", "-h"],
    ] {
        let o = run(args);
        ends(&o, 0);
        assert!(out(&o).contains("Usage"), "{args:?}: {}", out(&o));
        assert_eq!(err(&o), "");
    }
    let o = run(&["--version"]);
    ends(&o, 0);
    assert_eq!(out(&o), format!("lemma {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn the_long_help_documents_environment_and_exit_codes() {
    let text = out(&run(&["--help"]));
    for word in [
        "LEMMA_MODEL",
        "LEMMA_THREADS",
        "NO_COLOR",
        "Exit codes",
        "130",
        "--kv-policy",
        "raas",
    ] {
        assert!(text.contains(word), "{word}");
    }
    assert!(out(&run(&["-h"])).lines().count() < text.lines().count());
}

#[test]
fn the_help_of_an_evaluation_says_that_it_is_greedy() {
    let text = out(&run(&["kv", "eval", "--help"]));
    let temp = text.split("--temp <F>").nth(1).unwrap();
    assert!(
        temp.trim_start()
            .lines()
            .next()
            .unwrap()
            .ends_with("[default: 0]")
    );
    assert!(out(&run(&["--help"])).contains("[default: 0.8]"));
}

#[test]
fn an_unknown_flag_is_answered_with_the_nearest() {
    for (args, near) in [
        (&["--tmep", "1"][..], "--temp"),
        (&["-nlg", "1"], "-ngl"),
        (&["--top_k", "1"], "--top-k"),
        (&["--n-predct", "1"], "--n-predict"),
        (&["score", "--logit", "x"], "--logits"),
    ] {
        let o = run(args);
        ends(&o, 2);
        assert_eq!(out(&o), "");
        let text = err(&o);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert_eq!(
            lines[0],
            format!(
                "error: unknown flag {}",
                args.iter().find(|a| a.starts_with('-')).unwrap()
            )
        );
        assert_eq!(lines[1], format!("hint: did you mean {near}?"));
    }
}

#[test]
fn mistakes_of_usage_are_code_2_and_two_lines() {
    for args in [
        &["--temp", "warm", "-p", "x"][..],
        &["-n", "many"],
        &["-p"],
        &["--kv-policy", "rass", "-p", "x"],
        &["-ctk", "q9", "-p", "x"],
        &["--device", "tpu", "-p", "x"],
        &["--json", "--stream-json", "-p", "x"],
        &["a.gguf", "-m", "b.gguf", "-p", "x"],
        &["synth", "no-such-shape", "-o", "/dev/null/x"],
        &["-p", ""],
        &["-t", "100000", "-p", "x"],
        &["-n", "-5", "-p", "x"],
        &["-b", "0", "-p", "x"],
        &["-ub", "0", "-p", "x"],
        &["--top-p", "5", "-p", "x"],
        &["--top-k", "-3", "-p", "x"],
        &["bench", "-r", "0"],
        &["synth", "tiny", "-o", "-"],
        &["inspect", "--chat-template", "chatml"],
    ] {
        let o = run(args);
        ends(&o, 2);
        assert_eq!(out(&o), "", "{args:?}");
        let text = err(&o);
        assert!(
            text.starts_with("error: ") && text.lines().count() <= 2,
            "{args:?}: {text}"
        );
    }
}

#[test]
fn a_missing_model_is_code_3_and_a_misspelt_command_is_recognised() {
    let o = run(&["-m", "/no/such/model.gguf", "-p", "x"]);
    ends(&o, 3);
    assert!(
        err(&o).starts_with("error: /no/such/model.gguf: "),
        "{}",
        err(&o)
    );
    let o = run(&["bnech"]);
    ends(&o, 3);
    assert!(err(&o).contains("the command 'bench'"), "{}", err(&o));
    let o = run(&["inspcet", "-p", "x"]);
    ends(&o, 3);
    assert!(
        err(&o).contains("hint: did you mean the command 'inspect'?"),
        "{}",
        err(&o)
    );
}

#[test]
fn habits_from_elsewhere_get_a_useful_answer() {
    for (args, code, hint) in [
        (&["-hf", "a/b", "-p", "x"][..], 2, "nothing is downloaded"),
        (&["run", "llama3"], 2, "lemma -m FILE"),
        (&["serve"], 2, "no server"),
        (&["-ot", "x"], 2, "-ncmoe"),
        (&["-sp"], 2, "detokenize --special"),
        (&["--prompt-cache", "x"], 2, "/save"),
        (&["--override-kv", "x"], 2, "--chat-template"),
        (&["--in-prefix", "x"], 2, "--chat-template"),
        (&["llama3.2", "-p", "x"], 3, "nothing is downloaded"),
        (&["-m", "a/b", "-p", "x"], 3, "nothing is downloaded"),
        (&["-m", "/", "-p", "x"], 3, "name the GGUF file in it"),
        (&["What is 1+1?", "-p", "x"], 3, "a prompt goes behind -p"),
        (&["What", "is", "1+1?"], 2, "a prompt goes behind -p"),
    ] {
        let o = run(args);
        ends(&o, code);
        let text = err(&o);
        let last = text.lines().last().unwrap_or_default();
        assert!(
            text.lines().count() == 2 && last.starts_with("hint: ") && last.contains(hint),
            "{args:?}: {text}"
        );
    }
    let o = run(&["help", "score"]);
    ends(&o, 0);
    assert!(out(&o).contains("--logits"));
}

#[test]
fn a_stream_without_end_is_not_read_to_its_end() {
    if !std::path::Path::new("/dev/zero").exists() {
        return;
    }
    for args in [
        &["-f", "/dev/zero"][..],
        &["-sysf", "/dev/zero", "-p", "x"],
        &["-jf", "/dev/zero", "-p", "x"],
    ] {
        let o = run(args);
        ends(&o, 6);
        assert_eq!(
            err(&o),
            "error: /dev/zero: more than 64 MiB, expected a text\n"
        );
    }
}

#[test]
fn a_file_that_is_no_model_is_code_4_and_its_name_is_escaped() {
    let path = common::temp("evil\u{1b}[31m.gguf");
    std::fs::write(&path, b"this is not a model, whatever its name says").unwrap();
    let o = run(&["inspect", path.to_str().unwrap()]);
    let _ = std::fs::remove_file(&path);
    ends(&o, 4);
    assert!(!err(&o).contains('\u{1b}'), "{:?}", err(&o));
}

#[test]
fn an_empty_pipe_is_no_prompt() {
    let o = pipe(&[], b"");
    ends(&o, 2);
    assert!(err(&o).contains("the prompt is empty"));
    let o = pipe(&[], b"\xff\xfe");
    ends(&o, 2);
    assert!(err(&o).contains("UTF-8"));
}

#[test]
fn colour_only_where_asked() {
    assert!(!err(&run(&["--tmep", "1"])).contains('\u{1b}'));
    assert!(err(&run(&["--tmep", "1", "--color", "always"])).contains('\u{1b}'));
    assert!(err(&run(&["--tmep", "1", "--color=always"])).contains('\u{1b}'));
}

#[test]
fn completions_are_scripts() {
    for shell in ["bash", "zsh", "fish"] {
        let o = run(&["completions", shell]);
        ends(&o, 0);
        assert!(out(&o).contains("lemma"));
        assert!(out(&o).contains("lrfu"));
        // fish is told of flags only.
        assert!(shell == "fish" || out(&o).contains("tiny-qwen2"));
    }
    ends(&run(&["completions", "tcsh"]), 2);
}

#[test]
fn devices_has_the_cpu() {
    let o = run(&["devices", "--json"]);
    ends(&o, 0);
    let list = common::json(out(&o).trim());
    assert_eq!(list[0]["device"], "cpu");
    assert_eq!(list[0]["isa"][0], "scalar");
}
