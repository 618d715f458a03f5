//! Pre-tokenizers by name: how text is cut into words before merges are applied.
//!
//! Two tables. [`PRE`] maps each value of `tokenizer.ggml.pre` to a [`Split`] and the defaults that come with the name;
//! [`Split::steps`] gives the passes of a split. Each pass cuts every piece of the pass before it; text between two
//! matches is a piece of its own. The expressions are those that llama.cpp uses, because files carry its names and
//! people compare results; where it simplifies a model's original expression (ASCII-only letter case in tekken and
//! gpt-4o, for instance) so does Lemma.
//!
//! No expression here needs look-around, so every search is linear in the text: `\s+(?!\S)|\s+` is written `\s+` and
//! the last space is given back afterwards, see [`Tail`]. `(?=\p{L})[^a-z]` is the intersection `[\p{L}&&[^a-z]]`.

/// One pass over the pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Isolate the matches of an expression, then treat runs of white space.
    Regex(&'static str, Tail),
    /// Runs of line feeds and runs of anything else.
    Newlines,
    /// Runs of digits in groups of three counted from the right; text before a run stays with its first group.
    DigitsFromRight,
    /// A cut before every group of three ASCII digits counted from the right.
    DigitLookahead,
}

/// What becomes of a match that ends in white space, when more text follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tail {
    /// Stays as matched.
    Keep,
    /// `\s+(?!\S)`: the last character is given back, unless it is the only one.
    GiveBack,
    /// The same, but a match that ends in `\r` or `\n` stays: it came from `\s*[\r\n]+`.
    GiveBackUnlessNewline,
    /// The same, but a match that begins with `\r` or `\n` stays: it came from `[\r\n]`.
    GiveBackUnlessStartsNewline,
    /// `\s{512}(?!\S)|\s{256}(?!\S)|…|\s{4}(?!\S)|\s{1,2}(?!\S)|\s`; a match that ends in `\r` or `\n` stays.
    Cascade,
}

/// Ways to cut text, shared by many names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub(super) enum Split {
    Default,
    Gpt2,
    Llama3,
    Jais2,
    DeepseekLlm,
    DeepseekCoder,
    DeepseekV3,
    Spark25,
    Youtu,
    Falcon,
    Starcoder,
    Qwen2,
    Qwen35,
    Bloom,
    Viking,
    Tekken,
    Chameleon,
    Gpt4o,
    GraniteEmbMulti,
    TinyAya,
    KimiK2,
    SuperBpe,
    BailingMoe,
    SeedCoder,
    Ufakzeka,
    Afmoe,
    Laguna,
    ExaoneMoe,
    Gemma4,
    SarvamMoe,
    MiniCpm5,
    Whitespace,
}

/// A name and what it implies.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pre {
    /// Value of `tokenizer.ggml.pre`.
    pub(super) name: &'static str,
    /// How text is cut.
    pub(super) split: Split,
    /// Detokenization removes the space before punctuation.
    pub(super) clean_spaces: bool,
    /// A word that is a token is not merged up from its parts.
    pub(super) ignore_merges: bool,
    /// Default of `add_bos_token`.
    pub(super) add_bos: bool,
    /// Text is merged as it is (spaces as U+2581) instead of byte by byte.
    pub(super) escape_spaces: bool,
    /// The default beginning-of-sequence id does not apply.
    pub(super) no_default_bos: bool,
}

const fn pre(name: &'static str, split: Split) -> Pre {
    Pre {
        name,
        split,
        clean_spaces: false,
        ignore_merges: false,
        add_bos: false,
        escape_spaces: false,
        no_default_bos: false,
    }
}

impl Pre {
    const fn clean(mut self) -> Self {
        self.clean_spaces = true;
        self
    }
    const fn whole_words(mut self) -> Self {
        self.ignore_merges = true;
        self
    }
    const fn bos(mut self) -> Self {
        self.add_bos = true;
        self
    }
    const fn escaped(mut self) -> Self {
        self.escape_spaces = true;
        self
    }
    const fn no_bos_id(mut self) -> Self {
        self.no_default_bos = true;
        self
    }
}

/// Every name that is known. The first is what a missing name falls back to.
pub(super) const PRE: &[Pre] = &[
    pre("default", Split::Default).clean(),
    pre("llama3", Split::Llama3).clean().whole_words().bos(),
    pre("llama-v3", Split::Llama3).clean().whole_words().bos(),
    pre("llama-bpe", Split::Llama3).clean().whole_words().bos(),
    pre("falcon3", Split::Llama3).clean().whole_words().bos(),
    pre("falcon-h1", Split::Llama3).clean().whole_words().bos(),
    pre("pixtral", Split::Llama3).clean().whole_words().bos(),
    pre("midm-2.0", Split::Llama3).clean().whole_words().bos(),
    pre("lfm2", Split::Llama3).clean().whole_words().bos(),
    pre("jina-v5-nano", Split::Llama3)
        .clean()
        .whole_words()
        .bos(),
    pre("minicpm5", Split::MiniCpm5).clean().whole_words(),
    pre("deepseek-llm", Split::DeepseekLlm),
    pre("deepseek-coder", Split::DeepseekCoder),
    pre("deepseek-v3", Split::DeepseekV3),
    pre("hunyuan-dense", Split::DeepseekV3),
    pre("hy_v4", Split::DeepseekV3),
    pre("joyai-llm", Split::DeepseekV3),
    pre("spark2_5", Split::Spark25),
    pre("youtu", Split::Youtu).whole_words(),
    pre("falcon", Split::Falcon).clean(),
    pre("mpt", Split::Gpt2).clean(),
    pre("starcoder", Split::Starcoder).clean(),
    pre("gpt-2", Split::Gpt2).clean(),
    pre("phi-2", Split::Gpt2).clean(),
    pre("jina-es", Split::Gpt2).clean(),
    pre("jina-de", Split::Gpt2).clean(),
    pre("gigachat", Split::Gpt2).clean(),
    pre("jina-v2-es", Split::Gpt2).clean(),
    pre("jina-v2-de", Split::Gpt2).clean(),
    pre("a.x-4.0", Split::Gpt2).clean(),
    pre("mellum", Split::Gpt2).clean(),
    pre("modern-bert", Split::Gpt2).clean(),
    pre("jina-v1-en", Split::Gpt2).clean(),
    pre("jina-v2-code", Split::Gpt2).clean(),
    pre("roberta-bpe", Split::Gpt2).clean(),
    pre("exaone4", Split::Gpt2).clean(),
    pre("jais-2", Split::Jais2).clean(),
    pre("gemma4", Split::Gemma4).clean().escaped(),
    pre("granite-embed-multi-311m", Split::Gemma4)
        .clean()
        .escaped(),
    pre("sarvam-moe", Split::SarvamMoe).escaped(),
    pre("whitespace", Split::Whitespace).clean(),
    pre("refact", Split::Starcoder).clean(),
    pre("command-r", Split::Starcoder),
    pre("qwen2", Split::Qwen2),
    pre("deepseek-r1-qwen", Split::Qwen2),
    pre("kormo", Split::Qwen2),
    pre("f2llmv2", Split::Qwen2),
    pre("megrez", Split::Qwen2).clean(),
    pre("stablelm2", Split::Qwen2).clean(),
    pre("hunyuan", Split::Qwen2),
    pre("solar-open", Split::Qwen2),
    pre("grok-2", Split::Qwen2),
    pre("qwen35", Split::Qwen35),
    pre("olmo", Split::Gpt2).clean(),
    pre("dbrx", Split::Llama3).clean(),
    pre("smaug-bpe", Split::Llama3).clean(),
    pre("poro-chat", Split::Bloom),
    pre("bloom", Split::Bloom).clean(),
    pre("gpt3-finnish", Split::Bloom).clean(),
    pre("viking", Split::Viking),
    pre("chatglm-bpe", Split::Llama3).clean().no_bos_id(),
    pre("glm4", Split::Llama3).clean().whole_words().no_bos_id(),
    pre("glm5", Split::Llama3).clean().whole_words().no_bos_id(),
    pre("jais", Split::Gpt2).clean(),
    pre("tekken", Split::Tekken).whole_words().bos(),
    pre("smollm", Split::Starcoder),
    pre("codeshell", Split::Starcoder).clean(),
    pre("exaone", Split::Starcoder).clean(),
    pre("minerva-7b", Split::Starcoder).clean(),
    pre("mellum2", Split::Starcoder).clean(),
    pre("exaone-moe", Split::ExaoneMoe).clean(),
    pre("chameleon", Split::Chameleon).bos(),
    pre("gpt-4o", Split::Gpt4o),
    pre("llama4", Split::Gpt4o),
    pre("kanana2", Split::Gpt4o),
    pre("talkie", Split::Gpt4o),
    pre("minimax-m2", Split::Gpt4o),
    pre("granite-embed-multi-97m", Split::GraniteEmbMulti).whole_words(),
    pre("tiny_aya", Split::TinyAya),
    pre("cohere2moe", Split::TinyAya),
    pre("superbpe", Split::SuperBpe),
    pre("trillion", Split::Gpt2),
    pre("granite-docling", Split::Gpt2),
    pre("bailingmoe", Split::BailingMoe),
    pre("bailingmoe2", Split::BailingMoe),
    pre("llada-moe", Split::BailingMoe),
    pre("seed-coder", Split::SeedCoder),
    pre("kimi-k2", Split::KimiK2),
    pre("ufakzeka", Split::Ufakzeka),
    pre("afmoe", Split::Afmoe),
    pre("laguna", Split::Laguna),
];

/// The entry of `name`.
pub(super) fn lookup(name: &str) -> Option<&'static Pre> {
    PRE.iter().find(|p| p.name == name)
}

/// All names, for messages.
pub(super) fn names() -> String {
    PRE.iter().map(|p| p.name).collect::<Vec<_>>().join(" ")
}

impl Split {
    /// Text is merged as UTF-8 characters; otherwise every byte becomes one character first.
    pub(super) fn raw_text(self) -> bool {
        matches!(self, Self::Gemma4 | Self::SarvamMoe | Self::Whitespace)
    }

    /// The passes, in order.
    pub(super) fn steps(self) -> &'static [Step] {
        use super::pre_regex as re;
        use Step::{DigitLookahead, DigitsFromRight, Newlines, Regex};
        use Tail::{Cascade, GiveBack, GiveBackUnlessNewline, GiveBackUnlessStartsNewline, Keep};
        match self {
            Self::Default => &[
                Regex(re::PUNCT_OLD, Keep),
                Regex(re::GPT2, GiveBack),
                Regex(re::NUMBERS, Keep),
                Regex(re::THREE_ASCII_DIGITS, Keep),
            ],
            Self::Gpt2 => &[Regex(re::GPT2, GiveBack)],
            Self::Llama3 => &[Regex(re::LLAMA3, GiveBackUnlessNewline)],
            Self::Jais2 => &[Regex(re::LLAMA3, Cascade)],
            Self::DeepseekLlm => &[
                Regex(re::NEWLINE, Keep),
                Regex(re::DEEPSEEK_LLM_LETTERS, Keep),
                Regex(re::DEEPSEEK_LLM_PUNCT, Keep),
                Regex(r"\s+$", Keep),
                Regex(re::DEEPSEEK_CJK, Keep),
                Regex(re::NUMBERS, Keep),
            ],
            Self::DeepseekCoder => &[
                Regex(re::NEWLINE, Keep),
                Regex(r"\s?\p{L}+", Keep),
                Regex(r"\s?\p{P}+", Keep),
                Regex(re::DEEPSEEK_CJK, Keep),
                Regex(re::NUMBER, Keep),
            ],
            Self::DeepseekV3 => &[
                Regex(re::NUMBERS_3, Keep),
                Regex(re::CJK_KANA, Keep),
                Regex(re::DEEPSEEK_V3, GiveBackUnlessNewline),
            ],
            Self::Spark25 => &[
                Regex(re::NUMBERS_3, Keep),
                Regex(re::CJK_KANA, Keep),
                Regex(re::SPARK, GiveBackUnlessStartsNewline),
                Regex(re::NUMBER, Keep),
            ],
            Self::Youtu => &[
                Regex(re::YOUTU_SCRIPTS, Keep),
                Regex(re::YOUTU, GiveBackUnlessNewline),
            ],
            Self::Falcon => &[
                Regex(re::PUNCT_FALCON, Keep),
                Regex(re::GPT2, GiveBack),
                Regex(re::THREE_ASCII_DIGITS, Keep),
            ],
            Self::Starcoder => &[Regex(re::NUMBER, Keep), Regex(re::GPT2, GiveBack)],
            Self::Qwen2 => &[Regex(re::QWEN2, GiveBackUnlessNewline)],
            Self::Qwen35 => &[Regex(re::QWEN35, GiveBackUnlessNewline)],
            Self::Bloom => &[Regex(re::BLOOM, Keep)],
            Self::Viking => &[Regex(re::BLOOM, Keep), Regex(re::NUMBER, Keep)],
            Self::Tekken => &[Regex(re::TEKKEN, GiveBackUnlessNewline)],
            Self::Chameleon => &[
                Regex(r"<sentinel:[0-9]+>", Keep),
                Regex(r"IMGIMG[A-I]{1,4}Z", Keep),
                Regex(r"[\t\n]|    |  ", Keep),
                Regex(re::NUMBER, Keep),
                Regex(r"[\p{P}!-/:-@\[-`{-~]", Keep),
                Regex(re::GPT2, GiveBack),
            ],
            Self::Gpt4o => &[Regex(re::GPT4O, GiveBackUnlessNewline)],
            Self::GraniteEmbMulti => &[Regex(re::GRANITE_EMB, GiveBackUnlessNewline)],
            Self::TinyAya => &[DigitsFromRight, Regex(re::TINY_AYA, GiveBackUnlessNewline)],
            Self::KimiK2 => &[Regex(re::KIMI_K2, GiveBackUnlessNewline)],
            Self::SuperBpe => &[Regex(re::NUMBERS, Keep), DigitLookahead],
            Self::BailingMoe => &[Regex(re::BAILING, GiveBackUnlessNewline)],
            Self::SeedCoder => &[Regex(re::SEED_CODER, GiveBackUnlessNewline)],
            Self::Ufakzeka => &[Regex(re::UFAKZEKA, GiveBackUnlessNewline)],
            Self::Afmoe => &[
                DigitsFromRight,
                Regex(re::AFMOE_SCRIPTS, Keep),
                Regex(re::DEEPSEEK_V3, GiveBackUnlessNewline),
            ],
            Self::Laguna => &[Newlines, Regex(re::QWEN2, GiveBackUnlessNewline)],
            Self::ExaoneMoe => &[Regex(re::EXAONE_MOE, GiveBackUnlessNewline)],
            Self::Gemma4 | Self::SarvamMoe => &[Newlines],
            Self::MiniCpm5 => &[
                Regex(re::NUMBERS_3, Keep),
                Regex(re::MINICPM5, GiveBackUnlessNewline),
            ],
            Self::Whitespace => &[Regex(r"\S+", Keep)],
        }
    }
}
