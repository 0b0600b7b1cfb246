//! Pre-tokenizers of byte-level BPE by their names in GGUF files: how text is split before bytes are merged.
//!
//! A name stands for rules that are applied one after another, each to the pieces of the previous one; merges never cross the
//! edge of a piece. Letters beyond ASCII are written as code points, because some of them look like others or are changed by
//! editors.
//!
//! Source: the `tokenizer.json` files of the models of these names, and ggml-org/llama.cpp: src/llama-vocab.cpp,
//! `llm_tokenizer_bpe`.

use serde_json::{Value, json};

/// One way to split text.
pub(super) struct Splits {
    names: &'static [&'static str],
    /// Regular expressions; a match is a piece, and so is the text between two matches.
    rules: &'static [&'static str],
    /// Whether text is composed (Unicode NFC) first. llama.cpp does not; the models were trained on composed text.
    composes: bool,
    /// Whether a piece that is a token stays whole, whatever the merges would do.
    pub(super) ignore_merges: bool,
    /// Whether a sequence begins with BOS if the file does not say.
    pub(super) adds_bos: bool,
}

const UNSPLIT: Splits = Splits {
    names: &[],
    rules: &[],
    composes: false,
    ignore_merges: false,
    adds_bos: false,
};

const KNOWN: &[Splits] = &[
    Splits {
        // llama.cpp's own, for files without a better name.
        names: &["default"],
        rules: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        ..UNSPLIT
    },
    Splits {
        names: &["gpt-2"],
        rules: &[GPT2],
        ..UNSPLIT
    },
    Splits {
        names: &["smollm"],
        rules: &[r"\p{N}", GPT2],
        ..UNSPLIT
    },
    Splits {
        names: &["llama-bpe", "llama3", "llama-v3"],
        rules: &[LLAMA3],
        ignore_merges: true,
        adds_bos: true,
        ..UNSPLIT
    },
    Splits {
        names: &["qwen2", "deepseek-r1-qwen"],
        rules: &[QWEN2],
        composes: true,
        ..UNSPLIT
    },
    Splits {
        names: &["deepseek-llm"],
        rules: &[
            r"[\r\n]",
            CASED,
            r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+",
            r"\s+$",
            ASIAN,
            r"\p{N}+",
        ],
        ..UNSPLIT
    },
    Splits {
        names: &["deepseek-coder"],
        rules: &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", ASIAN, r"\p{N}"],
        ..UNSPLIT
    },
    Splits {
        names: &["deepseek-v3"],
        rules: &[
            r"\p{N}{1,3}",
            r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
            DEEPSEEK_V3,
        ],
        ..UNSPLIT
    },
];

const GPT2: &str = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

const DEEPSEEK_V3: &str = concat!(
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"##,
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// Chinese, Korean, and all between U+0800 and U+4E00.
const ASIAN: &str = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+";

/// Letters that have an upper and a lower case.
const CASED: &str = concat!(
    r"\s?[A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}",
    r"\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}",
    r"\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}",
    r"\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}",
    r"\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}",
    r"\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}",
    r"\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}",
    r"\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}",
    r"\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}",
    r"\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}",
    r"\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}",
    r"\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}",
    r"\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}",
    r"\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3}",
    r"\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}",
    r"\x{1E900}-\x{1E943}]+",
);

impl Splits {
    /// The pre-tokenizer of a name (`tokenizer.ggml.pre`).
    pub(super) fn of(name: Option<&str>) -> Result<&'static Self, String> {
        let names = KNOWN.iter().flat_map(|splits| splits.names);
        let known = || names.copied().collect::<Vec<_>>().join(", ");
        // Without the name, ids would be wrong for many texts and nobody would notice.
        let Some(name) = name else {
            return Err(format!(
                "`tokenizer.ggml.pre`: expected one of {}, found none; convert the model again, \
                 with a newer converter",
                known()
            ));
        };
        let named = |splits: &&Self| splits.names.contains(&name);
        KNOWN.iter().find(named).ok_or_else(|| {
            format!(
                "`tokenizer.ggml.pre`: expected one of {}, found `{name}`",
                known()
            )
        })
    }

    /// All known pre-tokenizers.
    pub(super) fn all() -> impl Iterator<Item = &'static Self> {
        KNOWN.iter()
    }

    /// The first of its names.
    pub(super) fn name(&self) -> &'static str {
        self.names[0]
    }

    pub(super) fn normalizer(&self) -> Value {
        match self.composes {
            true => json!({"type": "NFC"}),
            false => Value::Null,
        }
    }

    /// The rules, and then every byte as a character.
    pub(super) fn pre_tokenizer(&self) -> Value {
        let split = |rule: &&str| {
            json!({
                "type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated",
                "invert": false,
            })
        };
        let bytes = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": false,
        });
        let steps: Vec<_> = self.rules.iter().map(split).chain([bytes]).collect();
        json!({"type": "Sequence", "pretokenizers": steps})
    }
}
