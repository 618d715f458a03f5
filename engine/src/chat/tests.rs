use std::time::{Duration, Instant};

use serde_json::json;

use super::*;

fn render(source: &str) -> Result<String, ChatError> {
    let t = ChatTemplate::new(source, "<s>", "</s>")?;
    let messages = json!([
        {"role": "user", "content": "Hi", "n": 1.0, "big": 1e22, "items": [1, 2.5, null, true, "x'y"]},
    ]);
    let now = CivilTime {
        year: 2025,
        month: 3,
        day: 14,
        hour: 15,
        minute: 9,
        second: 26,
    };
    t.render(&RenderInput {
        messages,
        add_generation_prompt: true,
        now: Some(&now),
        ..Default::default()
    })
}

#[test]
fn python_conventions() {
    for (source, want) in [
        ("{{ none }} {{ true }} {{ false }}", "None True False"),
        ("{{ messages[0].n }} {{ messages[0].big }}", "1.0 1e+22"),
        (
            "{{ messages[0]['items'] }}",
            "[1, 2.5, None, True, \"x'y\"]",
        ),
        ("{{ {'a': none, 'b': [1]} }}", "{'a': None, 'b': [1]}"),
        (
            "{{ {'b': 1, 'a': 'é\\n\"'} | tojson }}",
            "{\"b\": 1, \"a\": \"é\\n\\\"\"}",
        ),
        (
            "{{ {'a': [1, {}], 'b': []} | tojson(indent=2) }}",
            "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": []\n}",
        ),
        (
            "{{ 'a\n\nb\n' | indent(2) }}|{{ '{\n' | indent(4, first=true) }}|",
            "a\n\n  b\n|    {\n|",
        ),
        (
            "{% for x in [none, 1, missing, [], {}, 'a'] %}{{ x is iterable }} {% endfor %}",
            "False False True True True True ",
        ),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", "\"\\u00e9\""),
        (
            "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}",
            "{\"a\": 2, \"b\": 1}",
        ),
        (
            "{{ messages[0].big | tojson }} {{ '<&>' | tojson }}",
            "1e+22 \"<&>\"",
        ),
        ("{{ messages[0].items() | list | length }}", "5"),
        (
            "{{ 'abc'[-2:] }} {{ 'abc'[::-1] }} {{ 'a-b'.split('-')[-1] }}",
            "bc cba b",
        ),
        (
            "{{ 'xay'.removeprefix('x').removesuffix('y') }} {{ 'a=b=c'.partition('=')[2] }}",
            "a b=c",
        ),
        (
            "{{ 'a b c'.rsplit(' ', 1) }} {{ 'a b  c'.rsplit() }}",
            "['a b', 'c'] ['a', 'b', 'c']",
        ),
        (
            "{{ strftime_now('%d %b %Y, %A %-d %H:%M:%S %j %p') }}",
            "14 Mar 2025, Friday 14 15:09:26 073 PM",
        ),
        (
            "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "013",
        ),
        (
            "{% for m in messages %}\n  {% generation %}\nx\n  {%- endgeneration %}\n{% endfor %}\n",
            "x",
        ),
        (
            "{% set ns = namespace(n=0) %}{% for i in [1,2] %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
            "3",
        ),
        (
            "{{ bos_token }}{{ eos_token }}{{ enable_thinking is defined }}{{ tools is none }}",
            "<s></s>FalseTrue",
        ),
    ] {
        assert_eq!(render(source).as_deref(), Ok(want), "{source}");
    }
}

#[test]
fn errors_are_told_apart() {
    assert!(matches!(render("{% if %}"), Err(ChatError::Syntax(_))));
    assert!(matches!(
        render("{% include 'x' %}"),
        Err(ChatError::Syntax(_))
    ));
    assert_eq!(
        render("{{ raise_exception('no') }}"),
        Err(ChatError::Refused("no".into()))
    );
    let in_macro = "{% macro f() %}{{ raise_exception('deep') }}{% endmacro %}{{ f() }}";
    assert_eq!(render(in_macro), Err(ChatError::Refused("deep".into())));
    assert!(
        matches!(render("\n\n{{ undefined_name.x }}"), Err(ChatError::Failed(m)) if m.contains("line 3"))
    );
    assert!(matches!(
        render("{% set x = messages.append(1) %}"),
        Err(ChatError::Failed(_))
    ));
    let t = ChatTemplate::new("x", "", "").unwrap();
    for messages in [json!("hi"), json!([1]), json!(null)] {
        assert!(matches!(
            t.render(&RenderInput {
                messages,
                ..Default::default()
            }),
            Err(ChatError::BadMessages(_))
        ));
    }
}

/// Each must end in an error, soon and without much memory.
#[test]
fn hostile_templates_are_stopped() {
    let nested_blocks = "{% if true %}".repeat(100_000);
    let nested_parens = format!("{{{{ {} }}}}", "(".repeat(100_000));
    let nested_lists = format!("{{{{ {}{} }}}}", "[".repeat(50_000), "]".repeat(50_000));
    let chain = format!("{{{{ 1{} }}}}", "+1".repeat(200_000));
    let nots = format!("{{{{ {}1 }}}}", "not ".repeat(100_000));
    let filters = format!("{{{{ 'a'{} }}}}", "|upper".repeat(100_000));
    let deep = [
        ("+1", "1"),
        ("|e", "'a'"),
        ("[0]", "1"),
        (".a", "tools"),
        (" and 1", "1"),
        ("~1", "1"),
        ("**1", "1"),
        ("==1", "1"),
    ]
    .map(|(op, first)| format!("{{{{ {first}{} }}}}", op.repeat(65_000 / op.len())));
    let elifs = format!("{{% if x %}}{}{{% endif %}}", "{% elif x %}".repeat(80_000));
    let ternaries = format!("{{{{ {}1 }}}}", "1 if 0 else ".repeat(5000));
    let opens = "{%".repeat(400_000);
    let doubling = format!(
        "{{% set x = 'aaaaaaaa' %}}{}{{{{ x }}}}",
        "{% set x = x ~ x %}".repeat(40)
    );
    let lists = format!(
        "{{% set x = [1] %}}{}{{{{ x | tojson }}}}",
        "{% set x = [x, x] %}".repeat(60)
    );
    let printed = format!(
        "{{% set x = [1] %}}{}{{{{ x }}}}",
        "{% set x = [x, x] %}".repeat(60)
    );
    let compared = format!(
        "{{% set x = [1] %}}{{% set y = [1] %}}{}{{{{ x == y }}}}",
        "{% set x = [x, x] %}{% set y = [y, y] %}".repeat(28)
    );
    let shared = format!("{{% set x = [1] %}}{}", "{% set x = [x, x] %}".repeat(60));
    let uses = [
        "{{ ''.join([x]) }}",
        "{{ [x, 1].count(x) }}",
        "{{ {}.get(x) }}",
        "{{ '{}'.format(x) }}",
        "{{ x.nope() }}",
    ]
    .map(|u| format!("{shared}{u}"));
    let cases: &[&str] = &[
        "{{ '{:{}}'.format(1, 999999999) }}",
        "{{ ('{:9999}' * 100000).format(1) }}",
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999999999) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('aaaaaaaa') }}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(1000) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(1000) %}{% set ns.x = ns.x.replace('a', 'aaaaaaaa') %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(1000) %}{% set ns.x = ns.x.join([ns.x, ns.x, ns.x]) %}{% endfor %}",
        "{% set ns = namespace(x=1) %}{% for i in range(100000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=1) %}{% for i in range(60000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=1) %}{% for i in range(60000) %}{% set ns.x = {'a': ns.x} %}{% endfor %}{{ ns.x == ns.x }}{{ ns.x | tojson }}",
        "{{ 'a' * 99999999999 }}",
        "{{ 'a' | indent(99999999999) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ [1] * 99999999999 }}",
        "{% for i in range(100000) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' * 100 }}{% endfor %}",
        "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{{ strftime_now('%c' * 9999999) }}",
        &nested_blocks,
        &nested_parens,
        &nested_lists,
        &chain,
        &nots,
        &filters,
        &opens,
        &elifs,
        &ternaries,
        &doubling,
        &lists,
        &printed,
        &compared,
    ];
    for source in cases
        .iter()
        .copied()
        .chain(uses.iter().chain(&deep).map(String::as_str))
    {
        let start = Instant::now();
        let result = render(source);
        let shown = format!(
            "{:.70}…{}",
            source,
            source.rsplit("%}").next().unwrap_or_default()
        );
        // Some end normally within their budget, which is just as well.
        if let Ok(text) = &result {
            assert!(text.len() < 32 << 20, "{shown}");
        }
        assert!(
            start.elapsed() < Duration::from_secs(4),
            "{shown}: {:?} after {:?}",
            result.err(),
            start.elapsed()
        );
    }
}

#[test]
fn long_conversations_fit_the_budget() {
    let t = ChatTemplate::new(named_template("chatml").unwrap(), "", "").unwrap();
    let messages: Vec<_> = (0..4000)
        .map(|i| {
            Message::new(
                if i % 2 == 0 { "user" } else { "assistant" },
                "lorem ipsum ".repeat(200),
            )
        })
        .collect();
    let input = RenderInput {
        messages: Message::list_to_json(&messages),
        ..Default::default()
    };
    assert_eq!(
        t.render(&input).unwrap().matches("<|im_end|>").count(),
        4000
    );
}

#[test]
fn named_templates_render() {
    let messages = Message::list_to_json(&[
        Message::new("system", "S"),
        Message::new("user", "U1"),
        Message::new("assistant", "A1"),
        Message::new("user", "U2"),
    ]);
    let want = [
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama2",
            "[INST] <<SYS>>\nS\n<</SYS>>\n\nU1 [/INST]A1</s>[INST] U2 [/INST]",
        ),
        (
            "mistral-v1",
            " [INST] S\n\nU1 [/INST] A1</s> [INST] U2 [/INST]",
        ),
        ("mistral-v3", "[INST] S\n\nU1[/INST] A1</s>[INST] U2[/INST]"),
        (
            "mistral-v3-tekken",
            "[INST]S\n\nU1[/INST]A1</s>[INST]U2[/INST]",
        ),
        (
            "mistral-v7",
            "[SYSTEM_PROMPT] S[/SYSTEM_PROMPT][INST] U1[/INST] A1</s>[INST] U2[/INST]",
        ),
        (
            "gemma",
            "<start_of_turn>user\nS\n\nU1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n<start_of_turn>user\nU2<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            "phi3",
            "<|system|>\nS<|end|>\n<|user|>\nU1<|end|>\n<|assistant|>\nA1<|end|>\n<|user|>\nU2<|end|>\n<|assistant|>\n",
        ),
        (
            "deepseek3",
            "S\n\n<｜User｜>U1<｜Assistant｜>A1<｜end▁of▁sentence｜><｜User｜>U2<｜Assistant｜>",
        ),
        (
            "vicuna",
            "S\n\nUSER: U1\nASSISTANT: A1</s>\nUSER: U2\nASSISTANT:",
        ),
    ];
    for name in TEMPLATE_NAMES {
        let t = ChatTemplate::new(named_template(name).unwrap(), "<s>", "</s>").unwrap();
        let got = t
            .render(&RenderInput {
                messages: messages.clone(),
                add_generation_prompt: true,
                ..Default::default()
            })
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(
            ["S", "U1", "A1", "U2"].iter().all(|s| got.contains(s)),
            "{name}: {got}"
        );
        if let Some((_, want)) = want.iter().find(|w| w.0 == *name) {
            assert_eq!(got, *want, "{name}");
        }
    }
    assert!(matches!(
        named_template("chatml2"),
        Err(ChatError::UnknownName { .. })
    ));
}

fn split(tags: &ThinkTags, prompt: &str, tokens: &[(u32, &str)]) -> (String, String) {
    let mut s = ThinkSplitter::new(Some(tags), prompt);
    let mut out = Vec::new();
    for (id, text) in tokens {
        s.push(*id, text, &mut out);
    }
    s.finish(&mut out);
    let all = |part| {
        out.iter()
            .filter(|p| p.part == part)
            .map(|p| p.text.as_str())
            .collect()
    };
    (all(Part::Thinking), all(Part::Answer))
}

fn think_ids(t: &str) -> Option<u32> {
    ["<think>", "</think>"]
        .iter()
        .position(|x| *x == t)
        .map(|i| i as u32 + 1)
}

#[test]
fn splits_on_token_ids() {
    let tags = ThinkTags::detect("{{ '</think>' }}", think_ids).unwrap();
    let reply = [
        (1, "<think>"),
        (9, "\n"),
        (9, "a <think> b"),
        (2, "</think>"),
        (9, "\n\n"),
        (9, "c"),
        (9, " </think>"),
    ];
    assert_eq!(
        split(&tags, "assistant\n", &reply),
        ("a <think> b".into(), "c </think>".into())
    );
    assert_eq!(
        split(&tags, "assistant\n<think>\n", &reply[2..]),
        ("a <think> b".into(), "c </think>".into())
    );
    assert_eq!(
        split(&tags, "assistant\n<think>\n\n</think>\n\n", &[(9, "x")]),
        (String::new(), "x".into())
    );
    // Special tokens may come without text.
    assert_eq!(
        split(&tags, "", &[(1, ""), (9, "t"), (2, ""), (9, "u")]),
        ("t".into(), "u".into())
    );
    let mut s = ThinkSplitter::new(Some(&tags), "<think>");
    let mut out = Vec::new();
    assert_eq!(s.push(9, "x", &mut out), Part::Thinking);
    assert_eq!(s.push(2, "</think>", &mut out), Part::Tag);
    assert_eq!(s.push(9, "\n\n", &mut out), Part::Answer);
}

#[test]
fn splits_on_text_across_tokens() {
    let tags = ThinkTags::detect("[THINK]", |_| None).unwrap();
    let reply: Vec<(u32, String)> = "[THINK] é [TH no[/THIN [/THINK]\n\nanswer [x] [/THI"
        .chars()
        .map(|c| (9, c.to_string()))
        .collect();
    let reply: Vec<(u32, &str)> = reply.iter().map(|(i, s)| (*i, s.as_str())).collect();
    assert_eq!(
        split(&tags, "", &reply),
        ("é [TH no[/THIN ".into(), "answer [x] [/THI".into())
    );
    let whole = [(9, "[THINK]a[/THINK]b")];
    assert_eq!(split(&tags, "", &whole), ("a".into(), "b".into()));
    // Nothing is held back longer than it could be a tag.
    let mut s = ThinkSplitter::new(Some(&tags), "");
    let mut out = Vec::new();
    s.push(9, "x [", &mut out);
    assert_eq!(out[0].text, "x ");
    s.push(9, "y", &mut out);
    assert_eq!(out[0].text, "x [y");
}

#[test]
fn splits_named_channels() {
    for ids in [true, false] {
        let all = ["<|channel>", "<channel|>", "<turn|>"];
        let id = |t: &str| all.iter().position(|x| *x == t).map(|i| i as u32 + 1);
        let find = |t: &str| if ids { id(t) } else { None };
        let tags = ThinkTags::detect("<|channel>thought\n<channel|>", find).unwrap();
        let parts = [
            "<|channel>",
            "thou",
            "ght",
            "\n",
            "h",
            "m",
            "<channel|>",
            "yes",
        ];
        let reply: Vec<(u32, &str)> = parts.iter().map(|p| (id(p).unwrap_or(9), *p)).collect();
        let want = ("hm".into(), "yes".into());
        assert_eq!(split(&tags, "<|turn>model\n", &reply), want);
        // The template may have opened it.
        let prompt = format!("<|turn>model\n{}\n", tags.open());
        assert_eq!(split(&tags, &prompt, &reply[4..]), want);
        // Another channel is not thinking, and neither is a reply without any.
        let other = [reply[0], (9, "final\nyes")];
        let answer = (String::new(), "yes".to_owned());
        assert_eq!(split(&tags, "", &other), answer);
        assert_eq!(split(&tags, "", &reply[7..]), answer);
        // A name that never ends is none, and is not lost.
        let endless = [reply[0], (9, "yes")];
        assert_eq!(split(&tags, "", &endless), answer);
    }
}

#[test]
fn splits_channels() {
    for ids in [true, false] {
        let all = [
            "<|start|>",
            "<|channel|>",
            "<|message|>",
            "<|end|>",
            "<|return|>",
        ];
        let id = |t: &str| all.iter().position(|x| *x == t).map(|i| i as u32 + 1);
        let tags = ThinkTags::detect(
            "<|channel|> <|message|>",
            |t| if ids { id(t) } else { None },
        )
        .unwrap();
        let parts = [
            "<|channel|>",
            "analysis",
            "<|message|>",
            "hm",
            "<|end|>",
            "<|start|>",
            "assistant",
            "<|channel|>",
            "final",
            "<|message|>",
            "yes",
            "<|return|>",
        ];
        let reply: Vec<(u32, &str)> = parts.iter().map(|p| (id(p).unwrap_or(9), *p)).collect();
        assert_eq!(
            split(
                &tags,
                "<|start|>user<|message|>q<|end|><|start|>assistant",
                &reply
            ),
            ("hm".into(), "yes".into())
        );
        let prompt = format!("<|start|>assistant{}", tags.open());
        assert_eq!(
            split(&tags, &prompt, &reply[3..]),
            ("hm".into(), "yes".into())
        );
        let prompt = format!(
            "<|start|>assistant{}x{}",
            tags.open(),
            tags.close_sequence()
        );
        assert_eq!(
            split(&tags, &prompt, &reply[10..]),
            (String::new(), "yes".into())
        );
    }
}

#[test]
fn no_tags_is_all_answer() {
    assert_eq!(ThinkTags::detect("plain", |_| None), None);
    let mut s = ThinkSplitter::new(None, "<think>");
    let mut out = Vec::new();
    assert_eq!(s.push(1, "  <think>", &mut out), Part::Answer);
    assert_eq!(out[0].text, "  <think>");
}

#[test]
fn switches() {
    let qwen = ReasoningSwitch::detect(
        "{%- if enable_thinking is defined and enable_thinking is false %}",
    );
    assert_eq!(
        serde_json::Value::Object(qwen.variables(Reasoning::Off)),
        json!({"enable_thinking": false})
    );
    assert_eq!(
        serde_json::Value::Object(qwen.variables(Reasoning::Auto)),
        json!({"enable_thinking": true})
    );
    let granite = ReasoningSwitch::detect("{% if thinking %}");
    assert!(granite.is_supported() && granite.variables(Reasoning::Auto).is_empty());
    let none = ReasoningSwitch::detect(
        "{{ message.thinking }} {{ 'a thinking \\' thinking' }} {# thinking #} enable_thinking",
    );
    assert!(!none.is_supported());
    let tags = ThinkTags::detect("<think>", |_| None).unwrap();
    assert_eq!(
        none.prompt_suffix(Reasoning::Off, Some(&tags), "A:"),
        "<think>\n\n</think>\n\n"
    );
    assert_eq!(
        none.prompt_suffix(Reasoning::Off, Some(&tags), "A:<think>\n"),
        "\n</think>\n\n"
    );
    assert_eq!(none.prompt_suffix(Reasoning::On, Some(&tags), "A:"), "");
    assert_eq!(none.prompt_suffix(Reasoning::Off, None, "A:"), "");
}

#[test]
fn calendar() {
    let t = CivilTime::from_unix(1_741_964_966);
    assert_eq!(t.strftime("%F %T"), "2025-03-14 15:09:26");
    assert_eq!(
        CivilTime::from_unix(951_782_400).strftime("%Y-%m-%d %a %u %j"),
        "2000-02-29 Tue 2 060"
    );
    assert_eq!(
        CivilTime::from_unix(-1).strftime("%F %T %I%p"),
        "1969-12-31 23:59:59 11PM"
    );
    assert_eq!(t.strftime("%q %"), "%q %");
}
