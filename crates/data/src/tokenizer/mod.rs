//! Text to token ids and back, with the model's own `tokenizer.json`.
//!
//! The file's post-processor (which adds BOS behind the caller's back), its truncation, padding and dropout are read once and
//! then switched off: this crate decides about BOS and length itself, and the same text always has the same ids.

mod assembly;
mod charsmap;
mod chat_template;
mod config;
mod decode_stream;
mod ends;
mod files;
mod from_gguf;
mod json;
mod metadata;
mod sentencepiece;
mod splits;
mod steps;
mod to_gguf;

pub(crate) use chat_template::THOUGHTS;
pub use chat_template::{ChatTemplate, GenerationPrompt};
pub use decode_stream::DecodeStream;
pub use ends::{GgufEnds, eos_token_ids};
pub use files::TokenizerFiles;
pub use metadata::unknown_metadata;

use crate::error::{Error, Result};
use assembly::{BoundedTokenizer, MOST_TOKEN_BYTES, Sections, guarded};
use config::TOKENIZER;
use ends::{eos_of_configs, known_ends};
use files::Tokens;
use from_gguf::GgufTokens;
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// Whether a text gets the token that begins a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bos {
    /// Add it if the model was trained with it (`add_bos_token`, or the tokenizer's
    /// post-processor) and the text does not already begin with it.
    Add,
    /// Leave the text alone, as for the output of a chat template.
    Never,
}

/// Whether decoded text shows special tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// Show them.
    Keep,
    /// Leave out every token that `tokenizer.json` marks as special.
    Skip,
}

/// The tokenizer of a model.
#[derive(Clone)]
pub struct Tokenizer {
    inner: BoundedTokenizer,
    bos_id: Option<u32>,
    eos_id: Option<u32>,
    end_ids: Vec<u32>,
    adds_bos: bool,
    vocab_size: usize,
    special_ids: HashSet<u32>,
    chat_template: Option<ChatTemplate>,
    unread_keys: Vec<String>,
    identity: Identity,
}

/// Everything that ids and renderings depend on, and its SHA-256 once it is computed.
#[derive(Clone)]
struct Identity {
    tokens: TokensHash,
    /// The part outside of `tokenizer.json`.
    rest: String,
    hash: OnceLock<[u8; 32]>,
}

/// The hash of the `tokenizer.json`, or the tokens to write it from.
#[derive(Clone)]
enum TokensHash {
    Hashed(Sha256),
    Unwritten(Arc<GgufTokens>),
}

/// Token ids, and the range of text bytes of each. Tokens that are parts of one character all have that character's range; an
/// added BOS has an empty one.
#[derive(Debug)]
pub(crate) struct Encoded {
    pub(crate) ids: Vec<u32>,
    pub(crate) ranges: Vec<Range<usize>>,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("bos_id", &self.bos_id)
            .field("eos_id", &self.eos_id)
            .field("adds_bos", &self.adds_bos)
            .field("vocab_size", &self.vocab_size)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// [`TokenizerFiles::open`] and [`Tokenizer::new`].
    ///
    /// # Errors
    /// As these two.
    pub fn open(folder: &Path) -> Result<Self> {
        Self::new(&TokenizerFiles::open(folder)?)
    }

    /// The tokenizer that files describe.
    ///
    /// # Errors
    /// If a file is malformed, or the configuration names a BOS or EOS token that is not in the
    /// vocabulary.
    pub fn new(files: &TokenizerFiles) -> Result<Self> {
        let malformed = |problem: &str| files.malformed(TOKENIZER, problem);
        let (inner, processor_bos, largest_id) = match &files.tokens {
            Tokens::Text(text) => {
                let built = guarded(|| {
                    let built = Sections::read(text)?.build()?;
                    // Steps that break down do so now, and not in the middle of a file.
                    built.0.encode("a", false)?;
                    Ok(built)
                });
                let (inner, bos) = built.map_err(|problem| malformed(&problem.to_string()))?;
                let largest_id = largest_id(&inner).map_err(|problem| malformed(&problem))?;
                (inner, bos, largest_id)
            }
            Tokens::Gguf(tokens) => {
                let inner = tokens.build().map_err(files.contradicted())?;
                // The metadata say what begins a sequence.
                (inner, None, tokens.largest_id())
            }
        };
        if let Some(id) = largest_id.filter(|&id| i32::try_from(id).is_err()) {
            return Err(malformed(&format!(
                "expected token ids below 2^31, found {id}"
            )));
        }
        Self::from_parts(inner, processor_bos, largest_id, files)
    }

    fn from_parts(
        inner: BoundedTokenizer,
        processor_bos: Option<u32>,
        largest_id: Option<u32>,
        files: &TokenizerFiles,
    ) -> Result<Self> {
        let mut config = files.config()?;
        let known = |name: &str, token: Option<&str>| match token {
            None => Ok(None),
            Some(text) => inner.token_to_id(text).map(Some).ok_or_else(|| {
                let problem =
                    format!("`{name}`: expected a token of the vocabulary, found `{text}`");
                files.malformed(config.file_of(name), &problem)
            }),
        };
        let bos_id = known("bos_token", config.bos_token())?.or(processor_bos);
        let mut eos_id = known("eos_token", config.eos_token())?;
        if eos_id.is_none()
            && let Some(id) = eos_of_configs(files)?
            && let Some(text) = inner.id_to_token(id)
        {
            eos_id = Some(id);
            // Templates name it.
            config.set_eos_token(text);
        }
        let special = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special);
        let special_ids = special
            .map(|(id, _)| id)
            .chain(bos_id)
            .chain(eos_id)
            .collect();

        let adds_bos = config.add_bos_token.unwrap_or(processor_bos.is_some());
        let chat_template = ChatTemplate::from_files(files, &config)?;
        let template = chat_template.as_ref().map(ChatTemplate::identity);
        let rest = format!("{bos_id:?} {eos_id:?} {adds_bos} {template:?}");

        Ok(Self {
            bos_id,
            eos_id,
            end_ids: known_ends(files, eos_id),
            adds_bos,
            vocab_size: largest_id.map_or(0, |id| id as usize + 1),
            special_ids,
            chat_template,
            unread_keys: config.unread(),
            identity: Identity::new(&files.tokens, rest),
            inner,
        })
    }

    /// Text to ids. Special tokens written in the text are recognized, as Hugging Face does.
    ///
    /// # Errors
    /// If the tokenizer has no token for a part of the text.
    pub fn encode(&self, text: &str, bos: Bos) -> Result<Vec<u32>> {
        Ok(self.encode_with_ranges(text, bos)?.ids)
    }

    pub(crate) fn encode_with_ranges(&self, text: &str, bos: Bos) -> Result<Encoded> {
        let encoding = guarded(|| self.inner.encode(text, false)).map_err(tokenize_error)?;
        let mut ids = encoding.get_ids().to_vec();
        let mut ranges: Vec<_> = encoding
            .get_offsets()
            .iter()
            .map(|&(start, end)| start..end)
            .collect();
        if let Some(id) = self.bos_id
            && bos == Bos::Add
            && self.adds_bos
            && ids.first() != Some(&id)
        {
            ids.insert(0, id);
            ranges.insert(0, 0..0);
        }
        Ok(Encoded { ids, ranges })
    }

    /// Ids to text. Ids without a token become nothing, bytes that are not UTF-8 become `U+FFFD`.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], special: Special) -> Result<String> {
        let skip = special == Special::Skip;
        guarded(|| self.inner.decode(ids, skip)).map_err(tokenize_error)
    }

    /// The token that begins a sequence.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// The token that samples end with.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos_id
    }

    /// The tokens that end a text, as far as the tokenizer's files or a GGUF's metadata say; a model's configs may name more.
    /// Sorted, each once.
    pub fn end_ids(&self) -> &[u32] {
        &self.end_ids
    }

    /// One more than the largest token id. The model's own `vocab_size` is often larger.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token, written as in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The model's chat template, if it has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// Keys of `tokenizer_config.json` that are neither read nor known to change nothing.
    pub fn unread_keys(&self) -> &[String] {
        &self.unread_keys
    }

    /// SHA-256 of everything that ids and renderings depend on.
    pub(crate) fn identity(&self) -> &[u8; 32] {
        self.identity.hash()
    }

    /// Whether a token controls the model instead of being text.
    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// Whether a text ends with the text of a special token.
    pub(crate) fn ends_with_special(&self, text: &str) -> bool {
        let ends = |&id: &u32| {
            self.inner
                .id_to_token(id)
                .is_some_and(|token| text.ends_with(&token))
        };
        self.special_ids.iter().any(ends)
    }
}

impl Identity {
    fn new(tokens: &Tokens, rest: String) -> Self {
        let tokens = match tokens {
            Tokens::Text(text) => TokensHash::Hashed(Sha256::new_with_prefix(text)),
            Tokens::Gguf(tokens) => TokensHash::Unwritten(Arc::clone(tokens)),
        };
        Self {
            tokens,
            rest,
            hash: OnceLock::new(),
        }
    }

    fn hash(&self) -> &[u8; 32] {
        self.hash.get_or_init(|| {
            let tokens = match &self.tokens {
                TokensHash::Hashed(hash) => hash.clone(),
                // These tokens became a tokenizer, so they can be written.
                TokensHash::Unwritten(tokens) => {
                    Sha256::new_with_prefix(tokens.to_json().unwrap_or_default())
                }
            };
            tokens.chain_update(&self.rest).finalize().into()
        })
    }
}

fn tokenize_error(problem: tokenizers::Error) -> Error {
    Error::Tokenize(problem.to_string())
}

/// The largest id of a vocabulary, whose tokens must not be longer than any real ones.
fn largest_id(inner: &BoundedTokenizer) -> Result<Option<u32>, String> {
    let vocab = inner.get_vocab(true);
    match vocab.keys().map(String::len).max() {
        Some(bytes) if bytes > MOST_TOKEN_BYTES => Err(format!(
            "expected tokens of at most {MOST_TOKEN_BYTES} bytes, found one of {bytes}"
        )),
        _ => Ok(vocab.into_values().max()),
    }
}

#[cfg(test)]
mod meaning;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::file::require_text;
    use config::CONFIG;
    use serde_json::{Value, json};
    use std::path::PathBuf;

    pub(crate) fn goldens() -> PathBuf {
        Path::new(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../tests/goldens/deepseek_v3"
        ))
        .to_path_buf()
    }

    /// A copy of the golden tokenizer, its two files changed at will.
    pub(crate) fn folder(change: impl FnOnce(&mut Value, &mut Value)) -> tempfile::TempDir {
        let read = |name: &str| -> Value {
            serde_json::from_str(&require_text(&goldens().join(name), 1 << 20).unwrap()).unwrap()
        };
        let (mut tokenizer, mut config) = (read("tokenizer.json"), read(CONFIG));
        change(&mut tokenizer, &mut config);
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        std::fs::write(folder.path().join(CONFIG), config.to_string()).unwrap();
        folder
    }

    /// The golden tokenizer with a chat template and a choice about BOS.
    pub(crate) fn tokenizer(chat_template: Option<&str>, add_bos: bool) -> Tokenizer {
        let folder = folder(|_, config| {
            config["chat_template"] = json!(chat_template);
            config["add_bos_token"] = json!(add_bos);
        });
        Tokenizer::open(folder.path()).unwrap()
    }

    #[test]
    fn ids_are_those_of_hugging_face() {
        let tokenizer = Tokenizer::open(&goldens()).unwrap();
        let text = require_text(&goldens().join("golden.json"), 1 << 20).unwrap();
        let golden: Value = serde_json::from_str(&text).unwrap();
        let rows = golden["tokenizer"].as_array().unwrap();
        assert!(rows.len() >= 5);
        for row in rows {
            let text = row["text"].as_str().unwrap();
            let ids: Vec<u32> = serde_json::from_value(row["ids"].clone()).unwrap();
            assert_eq!(tokenizer.encode(text, Bos::Never).unwrap(), ids, "{text}");
            assert_eq!(
                tokenizer.decode(&ids, Special::Keep).unwrap(),
                row["decoded"].as_str().unwrap()
            );
        }
        assert_eq!(
            (
                tokenizer.bos_id(),
                tokenizer.eos_id(),
                tokenizer.vocab_size()
            ),
            (Some(0), Some(1), 288)
        );
        assert_eq!(tokenizer.token_id("<think>"), Some(286));
    }

    #[test]
    fn bos_is_added_once_and_only_where_the_model_expects_it() {
        const BOS: &str = "<｜begin▁of▁sentence｜>";
        let template = json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}}
        });
        let check = |config: Value, template: Option<&Value>, expected: [usize; 3]| {
            let folder = folder(|file, old| {
                *old = config.clone();
                if let Some(template) = template {
                    file["post_processor"] = template.clone();
                }
            });
            let tokenizer = Tokenizer::open(folder.path()).unwrap();
            let count = |text: &str, bos| {
                tokenizer
                    .encode(text, bos)
                    .unwrap()
                    .iter()
                    .filter(|&&id| id == 0)
                    .count()
            };
            let written = format!("{BOS}x");
            let found = [
                count("x", Bos::Add),
                count(&written, Bos::Add),
                count("x", Bos::Never),
            ];
            assert_eq!(found, expected, "{config}");
        };
        check(
            json!({"add_bos_token": true, "bos_token": BOS}),
            None,
            [1, 1, 0],
        );
        check(
            json!({"add_bos_token": false, "bos_token": BOS}),
            None,
            [0, 1, 0],
        );
        check(
            json!({"add_bos_token": false, "bos_token": BOS}),
            Some(&template),
            [0, 1, 0],
        );
        check(
            json!({"bos_token": {"content": BOS}}),
            Some(&template),
            [1, 1, 0],
        );
        check(json!({}), Some(&template), [1, 1, 0]);
        check(json!({}), None, [0, 1, 0]);
    }

    #[test]
    fn truncation_padding_and_dropout_of_the_file_do_not_change_ids() {
        let folder = folder(|file, _| {
            file["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
            file["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
                "pad_id": 2, "pad_type_id": 0, "pad_token": "<｜▁pad▁｜>"});
            file["model"]["dropout"] = json!(0.9);
        });
        let (changed, plain) = (
            Tokenizer::open(folder.path()).unwrap(),
            Tokenizer::open(&goldens()).unwrap(),
        );
        let text = "the cat sat on the mat and the rat";
        assert_eq!(
            changed.encode(text, Bos::Never).unwrap(),
            plain.encode(text, Bos::Never).unwrap()
        );
    }

    #[test]
    fn special_tokens_are_skipped_on_request() {
        let tokenizer = Tokenizer::open(&goldens()).unwrap();
        let ids = tokenizer
            .encode("<｜User｜>a<｜end▁of▁sentence｜>", Bos::Add)
            .unwrap();
        assert_eq!(
            tokenizer.decode(&ids, Special::Skip).unwrap(),
            "<｜User｜>a"
        );
    }

    #[test]
    fn malformed_files_are_named() {
        let check = |change: fn(&mut Value, &mut Value), expected: &str| {
            let folder = folder(change);
            let problem = Tokenizer::open(folder.path()).unwrap_err().to_string();
            assert!(problem.contains(expected), "{problem}");
        };
        check(|file, _| *file = json!([]), "tokenizer.json: ");
        check(
            |file, _| *file = json!({"version": "1.0"}),
            "tokenizer.json: ",
        );
        check(
            |file, _| file["model"]["merges"] = json!(["no such"]),
            "tokenizer.json: ",
        );
        check(
            |file, _| {
                file["pre_tokenizer"] = json!({"type": "Split", "pattern": {"Regex": "("},
            "behavior": "Isolated", "invert": false})
            },
            "tokenizer.json: ",
        );
        check(
            |_, config| config["eos_token"] = json!("<eos>"),
            "tokenizer_config.json: `eos_token`: expected a token of the vocabulary, found `<eos>`",
        );
        check(
            |file, _| file["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0}),
            "tokenizer.json: the tokenizers library broke down on this file",
        );
        check(
            |file, _| file["model"]["vocab"]["a"] = json!(u32::MAX),
            "tokenizer.json: expected token ids below 2^31, found 4294967295",
        );
        let empty = tempfile::tempdir().unwrap();
        let problem = Tokenizer::open(empty.path()).unwrap_err().to_string();
        assert!(problem.contains("tokenizer.json: cannot read"), "{problem}");
    }
}
