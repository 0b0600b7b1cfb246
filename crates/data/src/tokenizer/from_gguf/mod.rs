//! The tokens of a GGUF, as a tokenizer or as a `tokenizer.json`.
//!
//! A GGUF names its kind of pre-tokenizer and leaves the rules to the program; `tokenizer.json` spells them out. The rules
//! are in `splits.rs` for byte-level vocabularies and in `sentencepiece.rs` for the others; `metadata.rs` reads the keys.
//!
//! Problems are sentences that name the GGUF's key; the caller adds the file.
//!
//! Source: ggml-org/llama.cpp: src/llama-vocab.cpp, for the meaning of the keys and their defaults.

use super::assembly::{BoundedTokenizer, MOST_TOKEN_BYTES, guarded};
use super::config::{DEFAULT, token_type};
use super::json::{Bpe, BpeScheme, TokenKind, TokenizerFile, Vocabulary};
use super::sentencepiece;
use super::splits::Splits;
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

/// The names of the two kinds of BPE in `tokenizer.ggml.model`.
const BYTE_LEVEL: &str = "gpt2";
const SENTENCEPIECE: &str = "llama";

/// The keys of a GGUF that are about tokens, as they are in the file. They are untrusted until they become the texts of
/// [`TokenizerFiles`](super::TokenizerFiles).
#[derive(Clone, Debug, Default)]
pub(crate) struct GgufTokens {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE).
    pub(crate) model: String,
    /// `tokenizer.ggml.pre`: how text is split before merging. Only `gpt2` needs it.
    pub(crate) pre: Option<String>,
    /// `tokenizer.ggml.tokens`: the text of every token, by id.
    pub(crate) tokens: Vec<String>,
    /// `tokenizer.ggml.token_type`: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused,
    /// 6 byte. One for each token, or empty if the file has none: all are normal then.
    pub(crate) types: Vec<i32>,
    /// `tokenizer.ggml.scores`: one for each token. Only `llama` needs them.
    pub(crate) scores: Vec<f32>,
    /// `tokenizer.ggml.merges`: two tokens with a space between, the first to be merged first.
    /// Only `gpt2` needs them.
    pub(crate) merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`: the token that begins a sequence.
    pub(crate) bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`: the token that ends a sequence.
    pub(crate) eos: Option<u32>,
    /// `tokenizer.ggml.eot_token_id`: a token that ends a turn.
    pub(crate) eot: Option<u32>,
    /// `tokenizer.ggml.eom_token_id`: a token that ends a message.
    pub(crate) eom: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`: the token for text without another token.
    pub(crate) unknown: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`: the token that fills up a batch.
    pub(crate) padding: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`. The default depends on the kind of tokenizer.
    pub(crate) add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`. False by default.
    pub(crate) add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`. True by default for `llama`; `gpt2` has no prefix.
    pub(crate) add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`: a Jinja template; and those of `tokenizer.chat_template.NAME`, with their names.
    pub(crate) chat_templates: Vec<(String, String)>,
}

/// The tokens with a role, for templates and tools.
struct Roles<'a> {
    bos: Option<Cow<'a, str>>,
    eos: Option<Cow<'a, str>>,
    unknown: Option<Cow<'a, str>>,
    padding: Option<Cow<'a, str>>,
    add_bos: bool,
    add_eos: bool,
}

impl GgufTokens {
    /// `tokenizer.json`.
    pub(super) fn to_json(&self) -> Result<String, String> {
        let json = self.describe(|file| serde_json::to_string(&file))?;
        json.map_err(|problem| problem.to_string())
    }

    /// The library's tokenizer of [`GgufTokens::to_json`], in a fifth of the time.
    pub(super) fn build(&self) -> Result<BoundedTokenizer, String> {
        let built = self.describe(|file| guarded(|| file.build()))?;
        built.map_err(|problem| format!("`tokenizer.ggml`: {problem}"))
    }

    /// The id of the last token.
    pub(super) fn largest_id(&self) -> Option<u32> {
        self.count().ok().map(|count| count - 1)
    }

    /// `tokenizer_config.json`.
    pub(super) fn config(&self) -> Result<Value, String> {
        Ok(self.roles()?.config(self.chat_templates()))
    }

    /// `chat_template` of `tokenizer_config.json`: one template, or a list of named ones.
    fn chat_templates(&self) -> Option<Value> {
        let named =
            |(name, template): &(String, String)| json!({"name": name, "template": template});
        match self.chat_templates.as_slice() {
            [] => None,
            [(name, template)] if name == DEFAULT => Some(template.as_str().into()),
            all => Some(all.iter().map(named).collect()),
        }
    }

    /// Lends the parts of a `tokenizer.json`.
    fn describe<T>(&self, with: impl FnOnce(TokenizerFile<'_>) -> T) -> Result<T, String> {
        let roles = self.roles()?;
        let vocabulary = vocabulary(self)?;
        let scheme = match self.model.as_str() {
            BYTE_LEVEL => byte_level(self, &vocabulary)?,
            _ => {
                let prefix = self.add_space_prefix.unwrap_or(true);
                sentencepiece::scheme(&vocabulary, &self.scores, prefix)?
            }
        };
        Ok(with(TokenizerFile {
            version: "1.0",
            truncation: (),
            padding: (),
            added_tokens: vocabulary.added_tokens(),
            normalizer: scheme.normalizer,
            pre_tokenizer: scheme.pre_tokenizer,
            post_processor: roles.post_processor(&vocabulary),
            decoder: scheme.decoder,
            model: scheme.model,
        }))
    }

    fn roles(&self) -> Result<Roles<'_>, String> {
        let count = self.count()?;
        let token = |key: &str, id: Option<u32>| {
            let text = |id: u32| match self.tokens.get(id as usize) {
                Some(text) => Ok(named(id, text)),
                None => Err(format!(
                    "`tokenizer.ggml.{key}`: expected an id below {count}, found {id}"
                )),
            };
            id.map(text).transpose()
        };
        let (bos, eos) = (
            token("bos_token_id", self.bos)?,
            token("eos_token_id", self.eos)?,
        );
        let eot = token("eot_token_id", self.eot)?;
        token("eom_token_id", self.eom)?;
        let eos = eos.or(eot);
        let added = |wish: Option<bool>, default: bool, role: &str, known: bool| match wish {
            Some(true) if !known => Err(format!(
                "`tokenizer.ggml.add_{role}_token`: expected a `tokenizer.ggml.{role}_token_id` \
                 to add, found none"
            )),
            _ => Ok(wish.unwrap_or(default && known)),
        };
        Ok(Roles {
            add_bos: added(self.add_bos, self.adds_bos()?, "bos", bos.is_some())?,
            add_eos: added(self.add_eos, false, "eos", eos.is_some())?,
            unknown: token("unknown_token_id", self.unknown)?,
            padding: token("padding_token_id", self.padding)?,
            bos,
            eos,
        })
    }

    /// Whether a sequence begins with BOS if the file does not say.
    fn adds_bos(&self) -> Result<bool, String> {
        match self.model.as_str() {
            BYTE_LEVEL => Ok(Splits::of(self.pre.as_deref())?.adds_bos),
            SENTENCEPIECE => Ok(true),
            model => Err(format!(
                "`tokenizer.ggml.model`: expected {BYTE_LEVEL} or {SENTENCEPIECE}, found `{model}`"
            )),
        }
    }

    /// How many tokens there are.
    fn count(&self) -> Result<u32, String> {
        match u32::try_from(self.tokens.len()) {
            Ok(count) if count > 0 => Ok(count),
            _ => Err(format!(
                "`tokenizer.ggml.tokens`: expected 1 to 2^32 tokens, found {}",
                self.tokens.len()
            )),
        }
    }
}

/// A token's text, or llama.cpp's name for an empty one: some files have several of those.
fn named(id: u32, text: &str) -> Cow<'_, str> {
    match text {
        "" => Cow::Owned(format!("[EMPTY_{id}]")),
        text => Cow::Borrowed(text),
    }
}

/// The vocabulary of a GGUF's tokens.
fn vocabulary(gguf: &GgufTokens) -> Result<Vocabulary<'_>, String> {
    let count = gguf.count()? as usize;
    if !gguf.types.is_empty() && gguf.types.len() != count {
        return Err(format!(
            "`tokenizer.ggml.token_type`: expected one for each of {count} tokens, found {}",
            gguf.types.len()
        ));
    }
    let mut tokens = Vec::with_capacity(count);
    let mut ids = HashMap::with_capacity(count);
    for (id, text) in (0..).zip(&gguf.tokens) {
        let kind = kind(gguf.types.get(id as usize).copied(), id)?;
        let text = named(id, text);
        if text.len() > MOST_TOKEN_BYTES {
            let bytes = text.len();
            return Err(format!(
                "`tokenizer.ggml.tokens`: expected at most {MOST_TOKEN_BYTES} bytes, found {bytes} \
                 in token {id}"
            ));
        }
        if let Some(first) = ids.insert(text.clone(), id) {
            return Err(format!(
                "`tokenizer.ggml.tokens`: expected distinct tokens, found {text:?} as {first} \
                 and as {id}"
            ));
        }
        tokens.push((text, kind));
    }
    Ok(Vocabulary { tokens, ids })
}

impl Roles<'_> {
    /// Puts BOS and EOS around a text, for tools that leave this to `tokenizer.json`.
    fn post_processor(&self, vocabulary: &Vocabulary<'_>) -> Value {
        let bos = self.bos.as_deref().filter(|_| self.add_bos);
        let eos = self.eos.as_deref().filter(|_| self.add_eos);
        if bos.is_none() && eos.is_none() {
            return Value::Null;
        }
        let around = |sequence: &str, type_id: u32| {
            let special = |token: &str| json!({"SpecialToken": {"id": token, "type_id": type_id}});
            let text = json!({"Sequence": {"id": sequence, "type_id": type_id}});
            let parts = [bos.map(special), Some(text), eos.map(special)];
            parts.into_iter().flatten().collect::<Vec<_>>()
        };
        let special_tokens: Map<String, Value> = [bos, eos]
            .into_iter()
            .flatten()
            .map(|token| {
                let ids = [vocabulary.ids[token]];
                (
                    token.to_owned(),
                    json!({"id": token, "ids": ids, "tokens": [token]}),
                )
            })
            .collect();
        let pair = [around("A", 0), around("B", 1)].concat();
        json!({
            "type": "TemplateProcessing",
            "single": around("A", 0),
            "pair": pair,
            "special_tokens": special_tokens,
        })
    }

    /// `tokenizer_config.json`.
    fn config(&self, chat_template: Option<Value>) -> Value {
        let mut config = json!({
            "add_bos_token": self.add_bos,
            "add_eos_token": self.add_eos,
            "clean_up_tokenization_spaces": false,
            "tokenizer_class": "PreTrainedTokenizerFast",
            // Without the key, transformers gives the tokenizers of some families a token that the vocabulary lacks.
            "unk_token": null,
        });
        let texts = [
            ("bos_token", self.bos.as_deref()),
            ("eos_token", self.eos.as_deref()),
            ("unk_token", self.unknown.as_deref()),
            ("pad_token", self.padding.as_deref()),
        ];
        for (key, text) in texts {
            if let Some(text) = text {
                config[key] = text.into();
            }
        }
        if let Some(template) = chat_template {
            config["chat_template"] = template;
        }
        config
    }
}

fn kind(code: Option<i32>, id: u32) -> Result<TokenKind, String> {
    match code {
        // Old files have no types; 0 means an unknown type.
        None | Some(0 | token_type::NORMAL | token_type::UNUSED) => Ok(TokenKind::Piece),
        Some(token_type::UNKNOWN) => Ok(TokenKind::Unknown),
        Some(token_type::CONTROL) => Ok(TokenKind::Control),
        Some(token_type::USER_DEFINED) => Ok(TokenKind::UserDefined),
        Some(token_type::BYTE) => Ok(TokenKind::Byte),
        Some(code) => Err(format!(
            "`tokenizer.ggml.token_type`: expected 0 to 6, found {code} for token {id}"
        )),
    }
}

/// Byte-level BPE: every byte is a character before anything is merged.
fn byte_level<'a>(
    gguf: &'a GgufTokens,
    vocabulary: &'a Vocabulary<'_>,
) -> Result<BpeScheme<'a>, String> {
    let splits = Splits::of(gguf.pre.as_deref())?;
    Ok(BpeScheme {
        normalizer: splits.normalizer(),
        pre_tokenizer: splits.pre_tokenizer(),
        decoder: json!({
            "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true,
        }),
        model: Bpe {
            dropout: (),
            unk_token: None,
            continuing_subword_prefix: (),
            end_of_word_suffix: (),
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: splits.ignore_merges,
            vocab: vocabulary,
            merges: merges(&gguf.merges, vocabulary)?,
        },
    })
}

/// The merges as pairs of tokens. Only the first of repeated merges counts.
fn merges<'a>(
    merges: &'a [String],
    vocabulary: &Vocabulary<'_>,
) -> Result<Vec<(&'a str, &'a str)>, String> {
    if merges.is_empty() {
        return Err("`tokenizer.ggml.merges`: expected merges, found none".into());
    }
    let mut seen = HashSet::with_capacity(merges.len());
    let mut pairs = Vec::with_capacity(merges.len());
    let mut whole = String::new();
    for (index, merge) in merges.iter().enumerate() {
        let problem = |found: String| {
            format!(
                "`tokenizer.ggml.merges`: expected two tokens that make a third, found {found} \
                 as merge {index}"
            )
        };
        // A token may begin with a space, so the separating space is never the first character.
        let space = merge.bytes().skip(1).position(|byte| byte == b' ');
        let Some(space) = space else {
            return Err(problem(format!("{merge:?}")));
        };
        let (left, right) = (&merge[..=space], &merge[space + 2..]);
        whole.clear();
        whole.extend([left, right]);
        let unknown = |token: &&str| !vocabulary.ids.contains_key(*token);
        if let Some(token) = [left, right, whole.as_str()].into_iter().find(unknown) {
            return Err(problem(format!("{merge:?} (no token is {token:?})")));
        }
        if seen.insert((left, right)) {
            pairs.push((left, right));
        }
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests;
