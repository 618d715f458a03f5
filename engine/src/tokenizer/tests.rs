//! Small vocabularies made on the spot: defects, special tokens, every pre-tokenizer by name.
use super::*;

/// All 256 byte characters, then `extra`.
fn byte_level(extra: &[&'static str]) -> Vec<String> {
    let mut tokens: Vec<String> = (0..=255)
        .map(|b| table::byte_to_char(b).to_string())
        .collect();
    tokens.extend(extra.iter().map(|s| s.to_string()));
    tokens
}

fn source<'a>(tokens: &'a [String], merges: &[&'a str], pre: &'a str) -> VocabSource<'a> {
    VocabSource {
        model: "gpt2",
        pre: Some(pre),
        tokens: tokens.iter().map(|t| t.as_bytes()).collect(),
        merges: Some(merges.iter().map(|m| m.as_bytes()).collect()),
        ..VocabSource::default()
    }
}

#[test]
fn every_pre_tokenizer_constructs_and_loses_nothing() {
    let tokens = byte_level(&[]);
    let text = "Hello  wOrld's 12345 €½\r\n\n\t 世界한국かな  <sentinel:12> ಠ_ಠ don't!! \u{3000}x ";
    for name in Tokenizer::pre_names() {
        let t = Tokenizer::new(&source(&tokens, &[], name)).unwrap();
        t.ready().unwrap_or_else(|e| panic!("{name}: {e}"));
        if !matches!(
            name,
            "gemma4" | "sarvam-moe" | "granite-embed-multi-311m" | "whitespace"
        ) {
            let ids = t.encode(text, false, false);
            let bytes: Vec<u8> = ids
                .iter()
                .flat_map(|&id| t.token_bytes(id, true).to_vec())
                .collect();
            assert_eq!(String::from_utf8_lossy(&bytes), text, "{name}");
        }
    }
}

fn spm<'a>(tokens: &'a [String], scores: &[f32], types: &[i32]) -> VocabSource<'a> {
    VocabSource {
        model: "llama",
        tokens: tokens.iter().map(|t| t.as_bytes()).collect(),
        scores: Some(scores.to_vec()),
        token_types: Some(types.to_vec()),
        ..VocabSource::default()
    }
}

#[test]
fn merges_by_rank_and_by_score() {
    let tokens = byte_level(&["ab", "bc", "abc"]);
    let t = Tokenizer::new(&source(&tokens, &["b c", "a b", "a bc"], "gpt-2")).unwrap();
    assert_eq!(t.encode("abc", false, false), [258]);
    assert_eq!(t.encode("abab", false, false), [256, 256]);
    assert!(t.encode("", true, true).is_empty());

    let list = ["<unk>", "<s>", "</s>", "\u{2581}", "a", "aa", "<0x41>"].map(String::from);
    let t = Tokenizer::new(&spm(&list, &[0.0; 7], &[2, 3, 3, 1, 1, 1, 6])).unwrap();
    // Equal scores: from left to right.
    assert_eq!(t.encode("aaa", true, false), [1, 3, 5, 4]);
    // A byte token, and the unknown token for a byte that has none.
    assert_eq!(t.encode("AB", false, false), [3, 6, 0]);
    assert_eq!(t.decode(&[1, 3, 5, 4], true, false), b" aaa");
    assert_eq!(t.decode(&[3, 5, 4, 2], true, false), b"aaa");
    assert_eq!(
        (t.attr(1), t.attr(6), t.attr(99)),
        (TokenAttr::Control, TokenAttr::Byte, TokenAttr::Unused)
    );
}

#[test]
fn the_best_sum_of_scores() {
    let list = [
        "<unk>", "<s>", "</s>", "a", "b", "ab", "ba", "abab", "<0x63>", "never",
    ];
    let tokens = list.map(String::from);
    let scores = [
        0.0,
        0.0,
        0.0,
        -1.0,
        -1.0,
        -2.0,
        -1.5,
        f32::NAN,
        0.0,
        -3000.0,
    ];
    let types = [2, 3, 3, 1, 1, 1, 1, 1, 6, 1];
    let src = VocabSource {
        model: "plamo2",
        ..spm(&tokens, &scores, &types)
    };
    let t = Tokenizer::new(&src).unwrap();
    let ids = |text: &str| t.encode(text, false, false);
    // Of equals the longest first token; what has no score is never chosen.
    assert_eq!(ids("ab"), [5]);
    assert_eq!(ids("aba"), [3, 6]);
    assert_eq!(ids("abab"), [3, 6, 4]);
    // Bytes, the unknown token for bytes that have none, and control tokens only as text of which there is none.
    assert_eq!(ids("cé"), [8, 0, 0]);
    assert_eq!(ids("<s>a"), [0, 0, 0, 3]);
    assert_eq!(ids("never").len(), 5);
    assert_eq!(t.encode("<s>a", false, true), [1, 3]);
    assert_eq!(t.decode(&[3, 6, 8], true, false), b"abac");
    assert_eq!((t.bos(), t.add_bos(), t.pre_name()), (Some(1), false, None));
}

/// Vocabularies that make every place of a text a long search.
#[test]
fn a_text_of_one_letter_is_cut_in_time() {
    let tokens: Vec<String> = (1..3000).map(|n| "a".repeat(n)).collect();
    let scores: Vec<f32> = (1..3000).map(|n| -(n as f32).sqrt()).collect();
    let types = vec![1; tokens.len()];
    let src = VocabSource {
        model: "plamo2",
        ..spm(&tokens, &scores, &types)
    };
    let t = Tokenizer::new(&src).unwrap();
    let ids = t.encode(&"a".repeat(5000), false, false);
    // None of the tokens above the limit.
    assert!(ids.iter().all(|id| *id < 1024) && ids.len() == 5);
}

#[test]
fn special_tokens_longest_first_and_only_where_asked() {
    let tokens = byte_level(&["<|a|>", "<|a|><|b|>", "<think>", "<|im_end|>", "|><"]);
    let mut src = source(&tokens, &[], "gpt-2");
    let mut types = vec![1; tokens.len()];
    types[256..].copy_from_slice(&[3, 3, 4, 1, 3]);
    src.token_types = Some(types);
    let t = Tokenizer::new(&src).unwrap();
    assert_eq!(t.encode("<|a|><|a|><|b|>", false, true), [256, 257]);
    assert_eq!(t.encode("<think>", false, false), [258]);
    assert_eq!(t.encode("<|a|>", false, false).len(), 5);
    assert_eq!(t.find_tag("<think>"), Some(258));
    assert_eq!(t.find_tag("<nothing>"), None);
    // Known by its text, although the file calls it ordinary.
    assert_eq!(
        (t.attr(259), t.is_eog(259), t.eot()),
        (TokenAttr::Control, true, Some(259))
    );
    assert!(
        t.warnings()[0].starts_with("token 259 "),
        "{:?}",
        t.warnings()
    );
    assert_eq!(
        (t.token_bytes(259, false), t.token_bytes(259, true)),
        (&b""[..], &b"<|im_end|>"[..])
    );
}

#[test]
fn gpt_oss_ends_with_return_and_call_but_not_end() {
    let tokens = byte_level(&["<|end|>", "<|return|>", "<|call|>", "<|channel|>"]);
    let mut src = source(&tokens, &[], "gpt-4o");
    let mut types = vec![3; tokens.len()];
    types[..256].fill(1);
    src.token_types = Some(types);
    src.eos = Some(257);
    let t = Tokenizer::new(&src).unwrap();
    assert_eq!(t.eog(), [257, 258]);
    assert_eq!(
        (t.attr(256), t.attr(259)),
        (TokenAttr::UserDefined, TokenAttr::UserDefined)
    );
}

#[test]
fn errors_name_the_key_and_escape_names() {
    let tokens = byte_level(&[]);
    let ok = source(&tokens, &[], "gpt-2");
    let text = |src: &VocabSource<'_>| Tokenizer::new(src).unwrap_err().to_string();
    assert!(
        text(&VocabSource {
            tokens: TextList::default(),
            ..ok.clone()
        })
        .contains("tokenizer.ggml.tokens")
    );
    assert!(
        text(&VocabSource {
            token_types: Some(vec![1; 3]),
            ..ok.clone()
        })
        .contains("token_type: 3 entries for 256")
    );
    assert!(
        text(&VocabSource {
            scores: Some(vec![]),
            ..ok.clone()
        })
        .contains("scores")
    );
    assert!(
        text(&VocabSource {
            merges: None,
            ..ok.clone()
        })
        .contains("merges: missing")
    );
    assert!(
        text(&VocabSource {
            model: "rwkv\x1b[2J",
            ..ok.clone()
        })
        .contains("rwkv\\u{1b}")
    );
    for bad in [&b"ab"[..], b"", b" a", b"a "] {
        let src = VocabSource {
            merges: Some([b"a b", bad].into_iter().collect()),
            ..ok.clone()
        };
        assert!(text(&src).contains("merges: entry 1"), "{bad:?}");
    }
    let unknown = VocabSource {
        pre: Some("zzz\n"),
        ..ok.clone()
    };
    let e = crate::error::Error::from(Tokenizer::new(&unknown).unwrap_err());
    assert_eq!(
        (e.exit_code(), e.to_string().contains("\"zzz\\u{a}\"")),
        (4, true)
    );
    assert!(e.hint().unwrap().contains("llama-bpe"));
    let options = TokenizerOptions {
        pre_override: Some("qwen2".into()),
    };
    assert_eq!(
        Tokenizer::with_options(&unknown, &options)
            .unwrap()
            .pre_name(),
        Some("qwen2")
    );
    let options = TokenizerOptions {
        pre_override: Some("yyy".into()),
    };
    let e = crate::error::Error::from(Tokenizer::with_options(&ok, &options).unwrap_err());
    assert_eq!(e.exit_code(), 2);
    assert_eq!(
        Tokenizer::new(&VocabSource { pre: None, ..ok })
            .unwrap()
            .pre_name(),
        Some("default")
    );
}

#[test]
fn defective_vocabularies_work_as_far_as_they_go() {
    // No byte characters at all but two; merges that name what is not there, twice, and a long result.
    let list = ["a", "b", "ab", "", "a"].map(String::from);
    let mut src = source(
        &list,
        &["a b", "a b", "ab ab", "x y", "xy z", "abab xyz"],
        "gpt-2",
    );
    let more = src.tokens.iter().chain([&b"\xff\xfe"[..]]);
    src.tokens = more.collect();
    src.bos = Some(u32::MAX);
    src.eos = Some(7_000_000);
    src.add_bos = Some(true);
    let t = Tokenizer::new(&src).unwrap();
    t.ready().unwrap();
    assert_eq!(t.encode("ab", true, true), [2]);
    // The later of equal texts; a missing character still separates its neighbours.
    assert_eq!(t.encode("a!b", false, false), [4, 1]);
    // A merge whose result is no token falls apart into characters.
    assert_eq!(t.encode("abab", false, false), [4, 1, 4, 1]);
    assert_eq!(t.token_text(3), Some(&b"[EMPTY_3]"[..]));
    assert_eq!((t.bos(), t.token_bytes(9, true)), (None, &b""[..]));
    assert_eq!(t.encode_bytes(b"a\xffb", false, false), [4, 1]);
    assert!(t.warnings().iter().any(|w| w.contains("bos_token_id")));

    let tiny = [String::from("x")];
    let t = Tokenizer::new(&spm(&tiny, &[f32::NAN], &[99])).unwrap();
    // Ten bytes with the two escaped spaces; the default unknown token is id 0.
    assert_eq!(t.encode("xx y\u{0}", true, true), [0; 10]);
}

#[test]
fn long_texts_take_time_linear_in_their_length() {
    let tokens = byte_level(&["aa", "aaaa", "<s>"]);
    let n = 300_000;
    for pre in [
        "llama3",
        "default",
        "jais-2",
        "deepseek-llm",
        "superbpe",
        "tekken",
    ] {
        let mut src = source(&tokens, &["a a", "aa aa"], pre);
        let mut types = vec![1; tokens.len()];
        types[258] = 3;
        src.token_types = Some(types);
        let t = Tokenizer::new(&src).unwrap();
        t.ready().unwrap();
        let started = std::time::Instant::now();
        for unit in ["a", " ", "  a", "1", "\n", "<", "<s>", "\u{301}", "'"] {
            let text = unit.repeat(n / unit.len());
            let ids = t.encode(&text, false, true);
            assert!(ids.len() * 4 >= text.len(), "{pre} {unit:?}: {}", ids.len());
        }
        // Quadratic work would take minutes.
        assert!(
            started.elapsed().as_secs() < 60,
            "{pre}: {:?}",
            started.elapsed()
        );
    }
}

#[test]
fn many_nested_special_tokens() {
    // Every length of a run is a token: more occurrences than are worth keeping.
    let runs: Vec<String> = (1..=64).map(|n| "=".repeat(n)).collect();
    let mut tokens = byte_level(&[]);
    tokens.extend(runs);
    let mut src = source(&tokens, &[], "gpt-2");
    let mut types = vec![4; tokens.len()];
    types[..256].fill(1);
    src.token_types = Some(types);
    let t = Tokenizer::new(&src).unwrap();
    let ids = t.encode(&"=".repeat(64 * 100 + 5), false, false);
    assert_eq!((ids.len(), ids[0], ids[100]), (101, 256 + 63, 256 + 4));
}

/// A small generator of texts that mixes everything tokenizers trip over.
fn random_text(state: &mut u64) -> String {
    let mut next = |n: u64| {
        *state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (*state >> 33) % n
    };
    const PIECES: &[&str] = &[
        " ", "  ", "\n", "\r\n", "\t", "a", "The", "'s", "12", "中", "é", "e\u{301}", "😀",
        "\u{3000}", "<s>", "\0",
    ];
    (0..next(30))
        .map(|_| match next(4) {
            0 => char::from_u32(next(0x11_0000) as u32)
                .unwrap_or('?')
                .to_string(),
            _ => PIECES[next(PIECES.len() as u64) as usize].to_string(),
        })
        .collect()
}

#[test]
fn what_is_encoded_decodes_to_itself() {
    let tokens = byte_level(&["aa", "Ġa", "he", "The", "<s>"]);
    let merges = ["Ġ a", "h e", "T he"];
    let mut state = 42;
    for pre in [
        "qwen2",
        "deepseek-v3",
        "smollm",
        "kimi-k2",
        "afmoe",
        "youtu",
    ] {
        let t = Tokenizer::new(&source(&tokens, &merges, pre)).unwrap();
        for _ in 0..300 {
            let text = random_text(&mut state);
            let ids = t.encode(&text, true, true);
            assert_eq!(
                t.decode(&ids, true, true),
                text.as_bytes(),
                "{pre} {text:?}"
            );
            let mut stream = t.detokenizer(true);
            let mut streamed = String::new();
            for &id in &ids {
                streamed.push_str(stream.push(id));
            }
            assert!(!stream.is_pending());
            assert_eq!(streamed, text, "{pre}");
        }
    }
    let mut list: Vec<String> = vec!["<unk>".into(), "<s>".into(), "</s>".into()];
    list.extend((0..=255).map(|b| String::from_utf8(table::byte_token(b).to_vec()).unwrap()));
    list.extend(["\u{2581}", "a", "\u{2581}a", "T", "h", "Th"].map(String::from));
    let types: Vec<i32> = (0..list.len())
        .map(|i| {
            if i < 3 {
                3
            } else if i < 259 {
                6
            } else {
                1
            }
        })
        .collect();
    let scores: Vec<f32> = (0..list.len()).map(|i| -(i as f32)).collect();
    let t = Tokenizer::new(&spm(&list, &scores, &types)).unwrap();
    for _ in 0..1000 {
        let text = random_text(&mut state);
        if !text.contains("<s>") {
            let ids = t.encode(&text, false, false);
            assert_eq!(t.decode(&ids, false, true), text.as_bytes(), "{text:?}");
        }
    }
}
