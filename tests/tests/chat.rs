//! Chat templates of published models against renderings by Jinja2.
//!
//! `data/chat/NAME.jsonl` holds what Jinja2 made of `NAME.jinja`, set up as Hugging Face transformers does, for the
//! conversations of `conversations.json`. Where the template refused (`TemplateError`), so must we; where Python
//! raised another exception, rendering is allowed too.

use std::fs;
use std::path::{Path, PathBuf};

use lemma_engine::chat::{
    ChatTemplate, CivilTime, Part, Reasoning, ReasoningSwitch, RenderInput, ThinkSplitter,
    ThinkTags,
};
use serde_json::{Map, Value};

fn own_data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/chat")
}

/// The renderings of the repository, and those of an external collection if there is one.
fn folders() -> Vec<PathBuf> {
    let mut folders = vec![own_data()];
    if let Some(dir) = std::env::var_os("LEMMA_FIXTURES").filter(|v| !v.is_empty()) {
        folders.push(Path::new(&dir).join("chat"));
    }
    folders
}

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn now() -> CivilTime {
    CivilTime {
        year: 2025,
        month: 3,
        day: 14,
        hour: 15,
        minute: 9,
        second: 26,
    }
}

fn template(dir: &Path, name: &str) -> ChatTemplate {
    let source = fs::read_to_string(dir.join(name).with_extension("jinja"))
        .unwrap_or_else(|_| fs::read_to_string(dir.join(format!("{name}.jinja"))).unwrap());
    ChatTemplate::new(&source, "<s>", "</s>").unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .filter_map(|e| {
            e.unwrap()
                .file_name()
                .into_string()
                .unwrap()
                .strip_suffix(".jsonl")
                .map(String::from)
        })
        .collect();
    names.sort();
    names
}

#[test]
fn renders_as_jinja2_does() {
    for dir in folders() {
        let data = read_json(&dir.join("conversations.json"));
        let (mut total, mut failures) = (0, Vec::new());
        for name in names(&dir) {
            let template = template(&dir, &name);
            for line in fs::read_to_string(dir.join(format!("{name}.jsonl")))
                .unwrap()
                .lines()
            {
                let case: Value = serde_json::from_str(line).unwrap();
                total += 1;
                let got = render(&template, &data, &case);
                let expected = case["output"].as_str();
                let right = match (&got, expected) {
                    (Ok(text), Some(expected)) => text == expected,
                    (Err(_), Some(_)) => false,
                    (Ok(_), None) => !case["error"].as_str().unwrap().starts_with("TemplateError"),
                    (Err(_), None) => true,
                };
                if !right {
                    failures.push(difference(&name, &case, &got));
                }
            }
        }
        assert!(total > 0);
        assert!(
            failures.is_empty(),
            "{} of {total} differ:\n{}",
            failures.len(),
            failures.join("\n")
        );
    }
}

/// One line on a rendering that is wrong: which, and where it departs from what was expected.
fn difference(name: &str, case: &Value, got: &Result<String, String>) -> String {
    let settings: Vec<String> = [
        "conversation",
        "tools",
        "add_generation_prompt",
        "enable_thinking",
        "error",
    ]
    .iter()
    .filter_map(|k| Some(format!("{k} {}", case.get(*k)?)))
    .collect();
    let (got, want) = match (got, case["output"].as_str()) {
        (Ok(got), Some(want)) => (got.as_str(), want),
        _ => return format!("{name} ({}): {got:?}", settings.join(", ")),
    };
    let at = got
        .bytes()
        .zip(want.bytes())
        .take_while(|(a, b)| a == b)
        .count();
    let from = |s: &str| {
        let tail = s
            .as_bytes()
            .get(at.saturating_sub(30)..)
            .unwrap_or_default();
        String::from_utf8_lossy(&tail[..tail.len().min(90)]).into_owned()
    };
    format!(
        "{name} ({}):\n  got  {:?}\n  want {:?}",
        settings.join(", "),
        from(got),
        from(want)
    )
}

fn render(template: &ChatTemplate, data: &Value, case: &Value) -> Result<String, String> {
    let mut input = RenderInput {
        messages: data["conversations"][case["conversation"].as_str().unwrap()].clone(),
        tools: (case["tools"] == true).then(|| data["tools"].clone()),
        add_generation_prompt: case["add_generation_prompt"] == true,
        enable_thinking: case.get("enable_thinking").and_then(Value::as_bool),
        extra: Map::new(),
        now: Some(&now()),
    };
    if case["tools"] != "undefined" {
        return template.render(&input).map_err(|e| e.to_string());
    }
    let mut vars = Map::new();
    vars.insert("messages".into(), input.messages.take());
    vars.insert("documents".into(), Value::Null);
    vars.insert(
        "add_generation_prompt".into(),
        input.add_generation_prompt.into(),
    );
    if let Some(b) = input.enable_thinking {
        vars.insert("enable_thinking".into(), b.into());
    }
    template
        .render_vars(&vars, input.now)
        .map_err(|e| e.to_string())
}

#[test]
fn refusals_carry_the_words_of_the_template() {
    let dir = own_data();
    let data = read_json(&dir.join("conversations.json"));
    let input = RenderInput {
        messages: data["conversations"]["system_user"].clone(),
        ..Default::default()
    };
    let error = template(&dir, "google-gemma-2-2b-it")
        .render(&input)
        .unwrap_err()
        .to_string();
    assert!(error.contains("System role not supported"), "{error}");
}

/// What each model's thinking looks like, and where a prompt leaves it.
#[test]
fn thinking_starts_where_the_prompt_leaves_it() {
    let dir = own_data();
    let data = read_json(&dir.join("conversations.json"));
    let cases = [
        ("Qwen-Qwen3-0.6B", Some("<think>"), Part::Answer),
        ("Qwen-QwQ-32B", Some("<think>"), Part::Thinking),
        ("MiniMax-M2", Some("<think>"), Part::Thinking),
        ("GLM-4.6", Some("<think>"), Part::Answer),
        ("ByteDance-Seed-OSS", Some("<seed:think>"), Part::Answer),
        (
            "openai-gpt-oss-120b",
            Some("<|channel|>analysis<|message|>"),
            Part::Tag,
        ),
        ("LFM2.5-8B-A1B", Some("<think>"), Part::Answer),
        ("NVIDIA-Nemotron-Nano-v2", Some("<think>"), Part::Thinking),
        (
            "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
            Some("<think>"),
            Part::Thinking,
        ),
        ("google-gemma-2-2b-it", None, Part::Answer),
        ("meta-llama-Llama-3.1-8B-Instruct", None, Part::Answer),
    ];
    for (name, open, start) in cases {
        let template = template(&dir, name);
        let tags = ThinkTags::detect(template.source(), |_| None);
        assert_eq!(tags.as_ref().map(ThinkTags::open), open, "{name}");
        let switch = ReasoningSwitch::detect(template.source());
        for mode in [Reasoning::Auto, Reasoning::On, Reasoning::Off] {
            let input = RenderInput {
                messages: data["conversations"]["user"].clone(),
                add_generation_prompt: true,
                extra: switch.variables(mode),
                now: Some(&now()),
                ..Default::default()
            };
            let mut prompt = template.render(&input).unwrap();
            prompt += &switch.prompt_suffix(mode, tags.as_ref(), &prompt);
            let part = ThinkSplitter::new(tags.as_ref(), &prompt).part();
            match mode {
                Reasoning::Auto => assert_eq!(part, start, "{name}: {prompt}"),
                Reasoning::Off => assert_eq!(part, Part::Answer, "{name}: {prompt}"),
                Reasoning::On => {}
            }
        }
    }
}
