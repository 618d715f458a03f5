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
