//! What a GGUF file says of its tokens: the tokenizer it means, and the `tokenizer.json` that says the same.
//!
//! A GGUF names its kind of pre-tokenizer and leaves the rules to the program; `tokenizer.json`
//! spells them out. The rules are in `splits.rs` for byte-level vocabularies and in
//! `sentencepiece.rs` for the others. Deliberately not here: reading the file.
//!
//! Problems are sentences that name the GGUF's key; the caller adds the file.
//!
//! Source: ggml-org/llama.cpp: src/llama-vocab.cpp, for what the keys mean and what holds where
//! one is missing.

use super::splits::Splits;
use super::to_gguf::types;
use super::{guarded, sentencepiece};
use serde::de::DeserializeOwned;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, Vocab};

/// What `tokenizer.ggml.model` calls the two kinds of BPE.
const BYTE_LEVEL: &str = "gpt2";
const SENTENCEPIECE: &str = "llama";

/// The keys of a GGUF that are about tokens, as they are in the file. Nothing is believed: they
/// are checked when they become the texts of [`TokenizerFiles`](super::TokenizerFiles).
#[derive(Clone, Debug, Default)]
pub(crate) struct GgufTokens {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE).
    pub(crate) model: String,
    /// `tokenizer.ggml.pre`: how text is cut before merging. Only `gpt2` has need of it.
    pub(crate) pre: Option<String>,
    /// `tokenizer.ggml.tokens`: the text of every token, by id.
    pub(crate) tokens: Vec<String>,
    /// `tokenizer.ggml.token_type`: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused,
    /// 6 byte. One for each token, or empty if the file has none: all are normal then.
    pub(crate) types: Vec<i32>,
    /// `tokenizer.ggml.scores`: one for each token. Only `llama` has need of them.
    pub(crate) scores: Vec<f32>,
    /// `tokenizer.ggml.merges`: two tokens with a space between, the first to be merged first.
    /// Only `gpt2` has need of them.
    pub(crate) merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`: the token that begins a sequence.
    pub(crate) bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`: the token that ends one.
    pub(crate) eos: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`: the token for what no other stands for.
    pub(crate) unknown: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`: the token that fills up a batch.
    pub(crate) padding: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`. The default depends on the kind of tokenizer.
    pub(crate) add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`. False by default.
    pub(crate) add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`. True by default for `llama`; `gpt2` has no prefix.
    pub(crate) add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`: a Jinja template.
    pub(crate) chat_template: Option<String>,
}

/// What a token stands for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A piece of text that merges make. A token that is not used is one that no merge makes.
    Piece,
    /// What no piece stands for.
    Unknown,
    /// It steers the model.
    Control,
    /// A text that is found before anything is merged.
    UserDefined,
    /// One byte of a character that no piece has.
    Byte,
}

/// The tokens of a GGUF: distinct texts, each with its kind.
pub(super) struct Vocabulary<'a> {
    pub(super) tokens: Vec<(Cow<'a, str>, Kind)>,
    pub(super) ids: HashMap<Cow<'a, str>, u32>,
}

/// The parts of a `tokenizer.json` that differ between the kinds of tokenizers.
pub(super) struct Scheme<'a> {
    pub(super) normalizer: Value,
    pub(super) pre_tokenizer: Value,
    pub(super) decoder: Value,
    pub(super) model: Bpe<'a>,
}

/// A `tokenizer.json`. It is written without a tree of its hundred thousand values before it, and what is used here is made
/// without it: both took a good part of the time to a first token.
#[derive(Serialize)]
struct File<'a> {
    version: &'static str,
    truncation: (),
    padding: (),
    added_tokens: Vec<Added<'a>>,
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: Bpe<'a>,
}

/// Its `model`.
#[derive(Serialize)]
#[serde(tag = "type", rename = "BPE")]
pub(super) struct Bpe<'a> {
    pub(super) dropout: (),
    pub(super) unk_token: Option<&'a str>,
    pub(super) continuing_subword_prefix: (),
    pub(super) end_of_word_suffix: (),
    pub(super) fuse_unk: bool,
    pub(super) byte_fallback: bool,
    pub(super) ignore_merges: bool,
    pub(super) vocab: &'a Vocabulary<'a>,
    pub(super) merges: Vec<(&'a str, &'a str)>,
}

/// One of its `added_tokens`, which are found in a text before it is cut and merged.
#[derive(Serialize)]
struct Added<'a> {
    id: u32,
    content: &'a str,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

/// Texts with their ids.
impl Serialize for Vocabulary<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let texts = self.tokens.iter().map(|(text, _)| text);
        serializer.collect_map(texts.zip(0_u32..))
    }
}

/// The tokens that a template or a tool may ask for by their role.
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

    /// What the library makes of [`GgufTokens::to_json`], in a fifth of the time.
    pub(super) fn build(&self) -> Result<tokenizers::Tokenizer, String> {
        let built = self.describe(|file| guarded(|| file.build()))?;
        built.map_err(|problem| format!("`tokenizer.ggml`: {problem}"))
    }

    /// The last token's.
    pub(super) fn largest_id(&self) -> Option<u32> {
        self.count().ok().map(|count| count - 1)
    }

    /// `tokenizer_config.json`.
    pub(super) fn config(&self) -> Result<Value, String> {
        Ok(self.roles()?.config(self.chat_template.as_deref()))
    }

    /// Lends the parts of a `tokenizer.json`.
    fn describe<T>(&self, with: impl FnOnce(File<'_>) -> T) -> Result<T, String> {
        let roles = self.roles()?;
        let vocabulary = Vocabulary::of(self)?;
        let scheme = match self.model.as_str() {
            BYTE_LEVEL => byte_level(self, &vocabulary)?,
            _ => sentencepiece::scheme(self, &vocabulary)?,
        };
        Ok(with(File {
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

    /// Whether a sequence begins with BOS where the file does not say.
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

/// A token's text, or llama.cpp's name for one without: some files have several.
fn named(id: u32, text: &str) -> Cow<'_, str> {
    match text {
        "" => Cow::Owned(format!("[EMPTY_{id}]")),
        text => Cow::Borrowed(text),
    }
}

impl File<'_> {
    /// The tokenizer that it describes.
    fn build(self) -> tokenizers::Result<tokenizers::Tokenizer> {
        let mut tokenizer = tokenizers::Tokenizer::new(self.model.build()?);
        tokenizer.with_normalizer(part::<tokenizers::NormalizerWrapper>(self.normalizer)?);
        tokenizer.with_pre_tokenizer(part::<tokenizers::PreTokenizerWrapper>(self.pre_tokenizer)?);
        tokenizer.with_post_processor(part::<tokenizers::PostProcessorWrapper>(
            self.post_processor,
        )?);
        tokenizer.with_decoder(part::<tokenizers::DecoderWrapper>(self.decoder)?);
        let added: Vec<AddedToken> = self.added_tokens.iter().map(Added::token).collect();
        tokenizer.add_tokens(&added);
        Ok(tokenizer)
    }
}

fn part<T: DeserializeOwned>(json: Value) -> serde_json::Result<Option<T>> {
    serde_json::from_value(json)
}

impl Bpe<'_> {
    fn build(self) -> tokenizers::Result<BPE> {
        let texts = self.vocab.tokens.iter().zip(0..);
        let vocab: Vocab = texts
            .map(|((text, _), id)| (text.clone().into_owned(), id))
            .collect();
        let merges = self.merges.into_iter();
        let merges = merges.map(|(left, right)| (left.to_owned(), right.to_owned()));
        let builder = BPE::builder()
            .vocab_and_merges(vocab, merges.collect())
            .fuse_unk(self.fuse_unk)
            .byte_fallback(self.byte_fallback)
            .ignore_merges(self.ignore_merges);
        match self.unk_token {
            Some(token) => builder.unk_token(token.to_owned()).build(),
            None => builder.build(),
        }
    }
}

impl Added<'_> {
    fn token(&self) -> AddedToken {
        AddedToken::from(self.content, self.special)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip)
            .normalized(self.normalized)
    }
}

impl<'a> Vocabulary<'a> {
    fn of(gguf: &'a GgufTokens) -> Result<Self, String> {
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
            if let Some(first) = ids.insert(text.clone(), id) {
                return Err(format!(
                    "`tokenizer.ggml.tokens`: expected distinct tokens, found {text:?} as {first} \
                     and as {id}"
                ));
            }
            tokens.push((text, kind));
        }
        Ok(Self { tokens, ids })
    }

    fn added_tokens(&self) -> Vec<Added<'_>> {
        let mut added = Vec::new();
        for ((content, kind), id) in self.tokens.iter().zip(0..) {
            let special = match kind {
                Kind::Unknown | Kind::Control => true,
                Kind::UserDefined => false,
                Kind::Piece | Kind::Byte => continue,
            };
            added.push(Added {
                id,
                content,
                single_word: false,
                lstrip: false,
                rstrip: false,
                normalized: false,
                special,
            });
        }
        added
    }
}

impl Roles<'_> {
    /// Puts BOS and EOS around a text, in the tools that leave it to `tokenizer.json`.
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
    fn config(&self, chat_template: Option<&str>) -> Value {
        let mut config = json!({
            "add_bos_token": self.add_bos,
            "add_eos_token": self.add_eos,
            "clean_up_tokenization_spaces": false,
            "tokenizer_class": "PreTrainedTokenizerFast",
        });
        let texts = [
            ("bos_token", self.bos.as_deref()),
            ("eos_token", self.eos.as_deref()),
            ("unk_token", self.unknown.as_deref()),
            ("pad_token", self.padding.as_deref()),
            ("chat_template", chat_template),
        ];
        for (key, text) in texts {
            if let Some(text) = text {
                config[key] = text.into();
            }
        }
        config
    }
}

fn kind(code: Option<i32>, id: u32) -> Result<Kind, String> {
    match code {
        // Files from before there were types have none; 0 says that the type is not known.
        None | Some(0 | types::NORMAL | types::UNUSED) => Ok(Kind::Piece),
        Some(types::UNKNOWN) => Ok(Kind::Unknown),
        Some(types::CONTROL) => Ok(Kind::Control),
        Some(types::USER_DEFINED) => Ok(Kind::UserDefined),
        Some(types::BYTE) => Ok(Kind::Byte),
        Some(code) => Err(format!(
            "`tokenizer.ggml.token_type`: expected 0 to 6, found {code} for token {id}"
        )),
    }
}

/// Byte-level BPE: every byte is a character of its own before anything is merged.
fn byte_level<'a>(
    gguf: &'a GgufTokens,
    vocabulary: &'a Vocabulary<'_>,
) -> Result<Scheme<'a>, String> {
    let splits = Splits::of(gguf.pre.as_deref())?;
    Ok(Scheme {
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

/// The merges as pairs of tokens. One that is listed again counts where it was first.
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
        // A token may begin with a space, so the space between is never the first character.
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
mod tests {
    use super::*;
    use crate::file::require_text;
    use crate::tokenizer::tests::{folder, goldens};
    use crate::{Bos, GenerationPrompt, Special, Tokenizer, TokenizerFiles};
    use std::path::Path;

    fn file(name: &str) -> Value {
        let path = goldens().join("../gguf_tokens").join(name);
        serde_json::from_str(&require_text(&path, 1 << 20).unwrap()).unwrap()
    }

    /// The keys of a golden file.
    fn keys(golden: &Value) -> GgufTokens {
        let list = |key: &str| golden.get(key).cloned().unwrap_or(json!([]));
        GgufTokens {
            model: golden["model"].as_str().unwrap().to_owned(),
            pre: golden["pre"].as_str().map(str::to_owned),
            tokens: serde_json::from_value(list("tokens")).unwrap(),
            types: serde_json::from_value(list("types")).unwrap(),
            scores: serde_json::from_value(list("scores")).unwrap(),
            merges: serde_json::from_value(list("merges")).unwrap(),
            bos: Some(1),
            eos: Some(2),
            add_space_prefix: golden["add_space_prefix"].as_bool(),
            ..GgufTokens::default()
        }
    }

    fn files(gguf: &GgufTokens) -> crate::Result<TokenizerFiles> {
        TokenizerFiles::from_gguf(Path::new("model.gguf"), gguf.clone())
    }

    fn tokenizer(gguf: &GgufTokens) -> Tokenizer {
        Tokenizer::new(&files(gguf).unwrap()).unwrap()
    }

    /// Ids of every text are llama.cpp's, and give the text again.
    fn check_ids(name: &str, gguf: &GgufTokens, texts: &Value, ids: &Value) {
        let tokenizer = tokenizer(gguf);
        let texts: Vec<String> = serde_json::from_value(texts.clone()).unwrap();
        let ids: Vec<Vec<u32>> = serde_json::from_value(ids.clone()).unwrap();
        assert!(texts.len() > 30 && texts.len() == ids.len());
        for (text, expected) in texts.iter().zip(&ids) {
            let found = tokenizer.encode(text, Bos::Never).unwrap();
            assert_eq!(&found, expected, "{name}: {text:?}");
            // SentencePiece writes a space after a control token and one kind of space for two.
            let changes = gguf.model == "llama" && text.contains(['<', '▁']);
            let composed = matches!(name, "qwen2" | "deepseek-r1-qwen") && !text.is_ascii();
            if !changes && !composed {
                assert_eq!(&tokenizer.decode(&found, Special::Keep).unwrap(), text);
            }
        }
    }

    #[test]
    fn byte_level_ids_are_those_of_llama_cpp() {
        let golden = file("byte_level.json");
        let all = golden["ids"].as_object().unwrap();
        assert_eq!(all.len(), 9);
        for (pre, ids) in all {
            let gguf = GgufTokens {
                pre: Some(pre.clone()),
                ..keys(&golden)
            };
            check_ids(pre, &gguf, &golden["texts"], ids);
        }
    }

    #[test]
    fn sentencepiece_ids_are_those_of_llama_cpp() {
        for name in ["sentencepiece.json", "sentencepiece_bare.json"] {
            let golden = file(name);
            check_ids(name, &keys(&golden), &golden["texts"], &golden["ids"]);
        }
    }

    #[test]
    fn the_tokenizer_is_the_one_that_its_text_describes() {
        let mut all = vec![deepseek_v3()];
        for name in ["sentencepiece.json", "sentencepiece_bare.json"] {
            all.push(keys(&file(name)));
        }
        let golden = file("byte_level.json");
        all.extend(
            golden["ids"]
                .as_object()
                .unwrap()
                .keys()
                .map(|pre| GgufTokens {
                    pre: Some(pre.clone()),
                    add_eos: Some(true),
                    ..keys(&golden)
                }),
        );
        for gguf in all {
            let read = tokenizers::Tokenizer::from_bytes(gguf.to_json().unwrap()).unwrap();
            let (built, read) = (
                gguf.build().unwrap().to_string(false),
                read.to_string(false),
            );
            assert_eq!(built.unwrap(), read.unwrap(), "{:?}", gguf.pre);
        }
    }

    /// What a GGUF says of the golden model's tokenizer.
    fn deepseek_v3() -> GgufTokens {
        let path = goldens().join("tokenizer.json");
        let file: Value = serde_json::from_str(&require_text(&path, 1 << 20).unwrap()).unwrap();
        let mut gguf = GgufTokens {
            model: "gpt2".into(),
            pre: Some("deepseek-v3".into()),
            tokens: vec![String::new(); 288],
            types: vec![1; 288],
            merges: serde_json::from_value(file["model"]["merges"].clone()).unwrap(),
            bos: Some(0),
            eos: Some(1),
            padding: Some(1),
            add_bos: Some(true),
            ..GgufTokens::default()
        };
        for (text, id) in file["model"]["vocab"].as_object().unwrap() {
            gguf.tokens[id.as_u64().unwrap() as usize].clone_from(text);
        }
        for added in file["added_tokens"].as_array().unwrap() {
            let id = added["id"].as_u64().unwrap() as usize;
            gguf.tokens[id] = added["content"].as_str().unwrap().to_owned();
            gguf.types[id] = if added["special"] == json!(true) {
                3
            } else {
                4
            };
        }
        gguf
    }

    #[test]
    fn a_gguf_gives_the_ids_of_the_tokenizer_it_was_made_from() {
        let original = Tokenizer::open(&goldens()).unwrap();
        let tokenizer = tokenizer(&deepseek_v3());
        let texts = file("byte_level.json")["texts"].clone();
        let mut texts: Vec<String> = serde_json::from_value(texts).unwrap();
        texts.push(
            "<｜begin▁of▁sentence｜>a<｜User｜>b<think>\nc</think> d<｜end▁of▁sentence｜>".into(),
        );
        for text in &texts {
            for bos in [Bos::Add, Bos::Never] {
                let expected = original.encode(text, bos).unwrap();
                assert_eq!(tokenizer.encode(text, bos).unwrap(), expected, "{text:?}");
                for special in [Special::Keep, Special::Skip] {
                    let decode = |from: &Tokenizer| from.decode(&expected, special).unwrap();
                    assert_eq!(decode(&tokenizer), decode(&original));
                }
            }
        }
        let facts = |from: &Tokenizer| (from.bos_id(), from.eos_id(), from.vocab_size());
        assert_eq!(facts(&tokenizer), facts(&original));
    }

    #[test]
    fn a_folder_with_its_files_has_the_same_tokenizer() {
        let mut gguf = deepseek_v3();
        gguf.add_eos = Some(true);
        gguf.chat_template = Some("{{ bos_token }}{{ messages[0].content }}{{ pad_token }}".into());
        let files = files(&gguf).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let texts = files.files().unwrap();
        for (name, text) in &texts {
            std::fs::write(folder.path().join(name), text.as_bytes()).unwrap();
        }
        let (written, direct) = (
            Tokenizer::open(folder.path()).unwrap(),
            Tokenizer::new(&files).unwrap(),
        );
        assert_eq!(written.identity(), direct.identity());
        let rendered = written.chat_template().unwrap().render(
            &[json!({"role": "user", "content": "hi"})],
            None,
            GenerationPrompt::Add,
        );
        let expected = "<｜begin▁of▁sentence｜>hi<｜end▁of▁sentence｜>";
        assert_eq!(rendered.unwrap(), expected);
        // Other tools let the file's post-processor add BOS and EOS.
        let other = tokenizers::Tokenizer::from_bytes(texts[0].1.as_bytes()).unwrap();
        let ids =
            |text: &str, special: bool| other.encode(text, special).unwrap().get_ids().to_vec();
        assert_eq!(
            ids("hi", true),
            [vec![0], ids("hi", false), vec![1]].concat()
        );
    }

    #[test]
    fn bos_is_added_where_the_kind_of_tokenizer_wants_it() {
        let check = |change: fn(&mut GgufTokens), expected: bool| {
            let mut gguf = deepseek_v3();
            gguf.add_bos = None;
            change(&mut gguf);
            let ids = tokenizer(&gguf).encode("hi", Bos::Add).unwrap();
            assert_eq!(ids.first() == Some(&0), expected);
        };
        check(|_| {}, false);
        check(|gguf| gguf.pre = Some("llama-bpe".into()), true);
        check(
            |gguf| (gguf.pre, gguf.bos) = (Some("llama-bpe".into()), None),
            false,
        );
        check(
            |gguf| (gguf.pre, gguf.add_bos) = (Some("llama-bpe".into()), Some(false)),
            false,
        );
        check(|gguf| gguf.add_bos = Some(true), true);
    }

    #[test]
    fn tokens_may_hold_spaces_or_nothing_and_merges_may_repeat() {
        let gguf = GgufTokens {
            tokens: [" ", "a", " a", "", "", " a "].map(String::from).to_vec(),
            ..GgufTokens::default()
        };
        let vocabulary = Vocabulary::of(&gguf).unwrap();
        assert_eq!(vocabulary.ids["[EMPTY_4]"], 4);
        let listed = ["  a", " a  ", "  a"].map(String::from);
        // The second splits into " a" and " ", as its first space is part of a token.
        assert_eq!(
            merges(&listed, &vocabulary).unwrap(),
            [(" ", "a"), (" a", " ")]
        );
    }

    /// The message of a file that was changed.
    fn check_problem(mut gguf: GgufTokens, change: fn(&mut GgufTokens), expected: &str) {
        change(&mut gguf);
        let tokenizer = files(&gguf).and_then(|files| Tokenizer::new(&files));
        let problem = tokenizer.unwrap_err().to_string();
        let expected = format!("model.gguf: `tokenizer.{expected}");
        assert!(problem.starts_with(&expected), "{problem}\n{expected}");
    }

    #[test]
    fn malformed_kinds_are_named() {
        let check = |change, expected: &str| check_problem(deepseek_v3(), change, expected);
        check(
            |gguf| gguf.model = "bert".into(),
            "ggml.model`: expected gpt2 or llama, found `bert`",
        );
        let known = "ggml.pre`: expected one of default, gpt-2, smollm, llama-bpe, llama3, llama-v3, qwen2, \
                     deepseek-r1-qwen, deepseek-llm, deepseek-coder, deepseek-v3, found";
        check(|gguf| gguf.pre = Some("x".into()), &format!("{known} `x`"));
        check(
            |gguf| gguf.pre = None,
            &format!("{known} none; convert the model again"),
        );
        check(
            |gguf| gguf.chat_template = Some("{% if %}".into()),
            "chat_template`: ",
        );
    }

    #[test]
    fn malformed_tokens_are_named() {
        let check = |change, expected: &str| check_problem(deepseek_v3(), change, expected);
        check(
            |gguf| gguf.tokens.clear(),
            "ggml.tokens`: expected 1 to 2^32 tokens, found 0",
        );
        check(
            |gguf| gguf.tokens[7] = gguf.tokens[5].clone(),
            "ggml.tokens`: expected distinct tokens, found \"#\" as 5 and as 7",
        );
        check(
            |gguf| gguf.types.truncate(5),
            "ggml.token_type`: expected one for each of 288 tokens, found 5",
        );
        check(
            |gguf| gguf.types[3] = 9,
            "ggml.token_type`: expected 0 to 6, found 9 for token 3",
        );
    }

    #[test]
    fn malformed_roles_are_named() {
        let check = |change, expected: &str| check_problem(deepseek_v3(), change, expected);
        check(
            |gguf| gguf.bos = Some(288),
            "ggml.bos_token_id`: expected an id below 288, found 288",
        );
        check(
            |gguf| gguf.eos = Some(u32::MAX),
            "ggml.eos_token_id`: expected an id below 288",
        );
        check(
            |gguf| gguf.unknown = Some(999),
            "ggml.unknown_token_id`: expected an id below 288",
        );
        check(
            |gguf| gguf.padding = Some(999),
            "ggml.padding_token_id`: expected an id below 288",
        );
        check(
            |gguf| gguf.bos = None,
            "ggml.add_bos_token`: expected a `tokenizer.ggml.bos_token_id` to add, found none",
        );
        check(
            |gguf| (gguf.eos, gguf.add_eos) = (None, Some(true)),
            "ggml.add_eos_token`: expected a `tokenizer.ggml.eos_token_id` to add, found none",
        );
    }

    #[test]
    fn malformed_merges_are_named() {
        let check = |change, found: &str| {
            let expected = "ggml.merges`: expected two tokens that make a third, found ";
            check_problem(deepseek_v3(), change, &format!("{expected}{found}"));
        };
        check(|gguf| gguf.merges[1] = "ab".into(), "\"ab\" as merge 1");
        check(|gguf| gguf.merges[1].clear(), "\"\" as merge 1");
        check(
            |gguf| gguf.merges[2] = "a zz".into(),
            "\"a zz\" (no token is \"zz\") as merge 2",
        );
        check(
            |gguf| gguf.merges[2] = "a ~".into(),
            "\"a ~\" (no token is \"a~\") as merge 2",
        );
        check(
            |gguf| gguf.merges[2] = "a ".into(),
            "\"a \" (no token is \"\") as merge 2",
        );
        let none = "ggml.merges`: expected merges, found none";
        check_problem(deepseek_v3(), |gguf| gguf.merges.clear(), none);
    }

    #[test]
    fn malformed_sentencepiece_is_named() {
        let check = |change, expected: &str| {
            check_problem(keys(&file("sentencepiece.json")), change, expected);
        };
        check(
            |gguf| gguf.scores.truncate(5),
            "ggml.scores`: expected one for each of 700 tokens, found 5",
        );
        check(
            |gguf| gguf.scores[9] = f32::NAN,
            "ggml.scores`: expected numbers, found NaN for token 9",
        );
        check(
            |gguf| gguf.tokens[699] = "a".repeat(1025),
            "ggml.tokens`: expected at most 1024 bytes, found 1025 in token 699",
        );
        check(
            |gguf| (gguf.types[0], gguf.tokens[14]) = (1, "x0A".into()),
            "ggml.tokens`: expected a token for every byte or one of type 2 (unknown), found no <0x0A>",
        );
        check(
            |gguf| gguf.types[260..].fill(3),
            "ggml.tokens`: expected tokens made of others, found none",
        );
    }

    #[test]
    fn problems_of_a_folder_still_name_its_files() {
        let folder = folder(|_, config| config["chat_template"] = json!("{% if %}"));
        let problem = Tokenizer::open(folder.path()).unwrap_err().to_string();
        assert!(problem.contains("tokenizer_config.json: "), "{problem}");
    }
}
