//! Trains the byte-level BPE tokenizer of the quickstart recipe.
//!
//! ```text
//! cargo run -p moeforge-data --release --example train_tokenizer -- OUT VOCAB FILE.jsonl…
//! ```
//!
//! Each row gives its `text`, and the `content` of its `messages`. Writes `tokenizer.json` and
//! `tokenizer_config.json` into `OUT`. `VOCAB` counts every id, the added tokens included.
//!
//! The text is split as DeepSeek-V3 splits it: digits in groups of up to three, Chinese and
//! Japanese runs on their own, then words with one leading space, runs of marks, and blanks.
//! Begin, end and padding are ids 0, 1 and 2. Chat and thinking marks come last; as in V3 they
//! are not special, so decoding shows them. The same files give the same bytes.
//!
//! Source: the pre-tokenizer of deepseek-ai/DeepSeek-V3: tokenizer.json.

use std::collections::HashSet;
use std::error::Error;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

const BEGIN: &str = "<｜begin▁of▁sentence｜>";
const END: &str = "<｜end▁of▁sentence｜>";
const PAD: &str = "<｜▁pad▁｜>";
const MARKS: [&str; 4] = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"];

const DIGITS: &str = r"\p{N}{1,3}";
const CJK: &str = "[一-龥\u{3040}-ゟ゠-ヿ]+";
const WORDS: &str = concat!(
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"##,
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+",
    "| ?[\\p{P}\\p{S}]+[\r\n]*",
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
);

const MAX_LENGTH_TOKENS: usize = 1024;
const CHAT_TEMPLATE: &str = concat!(
    "{{ bos_token }}{% for message in messages %}",
    "{% if message['role'] == 'system' %}{{ message['content'] }}",
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}",
    "{% elif message['role'] == 'assistant' %}",
    "{{ '<｜Assistant｜>' + message['content'] + eos_token }}",
    "{% endif %}{% endfor %}",
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}",
);

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [out, vocab, files @ ..] = args.as_slice() else {
        return Err("usage: train_tokenizer OUT VOCAB FILE.jsonl…".into());
    };
    let vocab_size = vocab
        .parse()
        .map_err(|_| format!("vocabulary size: expected a number, found `{vocab}`"))?;
    let mut texts = Vec::new();
    for file in files {
        read_texts(Path::new(file), &mut texts)?;
    }

    let trained = train(&texts, vocab_size)?;
    let out = Path::new(out);
    fs::create_dir_all(out)?;
    trained.save(out.join("tokenizer.json"), true)?;
    let config = serde_json::to_string_pretty(&config())? + "\n";
    fs::write(out.join("tokenizer_config.json"), config)?;
    Ok(())
}

/// Adds the texts of one JSON-lines file.
fn read_texts(file: &Path, texts: &mut Vec<String>) -> Outcome<()> {
    let body = fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
    for (i, line) in body.lines().enumerate() {
        let row: Value = serde_json::from_str(line)
            .map_err(|e| format!("{}: line {}: {e}", file.display(), i + 1))?;
        let messages = row["messages"].as_array().into_iter().flatten();
        let contents = messages.filter_map(|m| m["content"].as_str());
        let before = texts.len();
        texts.extend(
            row["text"]
                .as_str()
                .into_iter()
                .chain(contents)
                .map(String::from),
        );
        if texts.len() == before {
            let file = file.display();
            return Err(format!("{file}: line {}: no `text` and no `messages`", i + 1).into());
        }
    }
    Ok(())
}

/// Learns the merges, and places the added tokens at both ends of the ids.
fn train(texts: &[String], vocab_size: usize) -> Outcome<Tokenizer> {
    let first = [BEGIN, END, PAD];
    let alphabet: HashSet<char> = ByteLevel::alphabet().into_iter().collect();
    let least = first.len() + alphabet.len() + MARKS.len();
    if vocab_size < least {
        return Err(
            format!("vocabulary size: expected at least {least}, found {vocab_size}").into(),
        );
    }
    let special = first.map(|token| AddedToken::from(token, true).normalized(false));
    let mut trainer: TrainerWrapper = BpeTrainerBuilder::new()
        .vocab_size(vocab_size - MARKS.len())
        .initial_alphabet(alphabet)
        .special_tokens(special.to_vec())
        .show_progress(false)
        .build()
        .into();

    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(pre_tokenizer()?));
    tokenizer.with_decoder(Some(ByteLevel::new(true, true, true)));
    tokenizer.with_post_processor(Some(ByteLevel::new(true, false, true)));
    tokenizer.train(&mut trainer, texts.iter().map(String::as_str))?;
    let marks = MARKS.map(|token| AddedToken::from(token, false).normalized(true));
    tokenizer.add_tokens(&marks);
    Ok(tokenizer)
}

/// DeepSeek-V3's sequence: digits, Chinese and Japanese, words, then bytes.
fn pre_tokenizer() -> Outcome<Sequence> {
    let mut steps = Vec::new();
    for pattern in [DIGITS, CJK, WORDS] {
        let pattern = SplitPattern::Regex(pattern.into());
        steps.push(Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?.into());
    }
    steps.push(ByteLevel::new(false, true, false).into());
    Ok(Sequence::new(steps))
}

/// `tokenizer_config.json`, with the chat template.
fn config() -> Value {
    let token = |content: &str| {
        json!({
            "__type": "AddedToken", "content": content, "lstrip": false,
            "normalized": true, "rstrip": false, "single_word": false,
        })
    };
    json!({
        "add_bos_token": true,
        "add_eos_token": false,
        "bos_token": token(BEGIN),
        "eos_token": token(END),
        "pad_token": token(PAD),
        "unk_token": null,
        "clean_up_tokenization_spaces": false,
        "legacy": true,
        "model_max_length": MAX_LENGTH_TOKENS,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    })
}
