//! A folder's tokenizer as the keys of a GGUF: the reverse of `from_gguf`.
//!
//! A GGUF has no rules for splitting text, only a name for them. The name is found by the behavior of the rules: the folder's
//! own pre-tokenizer and each known one split a text in which all known ones differ, and the name is that of the one with the
//! same pieces.
//!
//! Source: ggml-org/llama.cpp: conversion/base.py, `get_vocab_base` and `_set_vocab_gpt2`; gguf-py/gguf/vocab.py.

use super::assembly::guarded;
use super::chat_template;
use super::config::{DEFAULT, TOKENIZER, TokenizerConfig, token_type};
use super::splits::Splits;
use super::steps::Steps;
use super::{Tokenizer, TokenizerFiles};
use crate::error::Result;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::HashMap;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

/// The parts of a `tokenizer.json` that become keys.
#[derive(Deserialize)]
struct TokenizerJson {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    model: BpeModel,
}

#[derive(Deserialize)]
struct AddedToken {
    id: usize,
    content: String,
    #[serde(default)]
    special: bool,
}

/// A BPE model. Models without merges are not supported.
#[derive(Deserialize)]
struct BpeModel {
    vocab: HashMap<String, usize>,
    merges: Vec<MergeEntry>,
    #[serde(default)]
    unk_token: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

/// A merge in either spelling.
#[derive(Deserialize)]
#[serde(untagged)]
enum MergeEntry {
    Pair(String, String),
    Text(String),
}

impl MergeEntry {
    /// Both tokens with a space between.
    fn text(&self) -> String {
        match self {
            Self::Pair(left, right) => format!("{left} {right}"),
            Self::Text(text) => text.clone(),
        }
    }

    /// The merged token.
    fn whole(&self) -> String {
        match self {
            Self::Pair(left, right) => format!("{left}{right}"),
            Self::Text(text) => text.replacen(' ', "", 1),
        }
    }
}

/// The largest vocabulary: ids are 32 bits, and every one becomes a token.
const MOST_TOKENS: usize = 1 << 24;

impl TokenizerFiles {
    /// The keys of a GGUF for a model with `vocab_size` tokens. `pre` is the name of the pre-tokenizer; without it, the name is
    /// found.
    ///
    /// # Errors
    /// If a file is malformed, the tokenizer is of a kind that GGUF files cannot describe, its rules for splitting text have no
    /// known name, or it has tokens that the model does not have.
    pub fn to_metadata(
        &self,
        vocab_size: usize,
        pre: Option<&str>,
    ) -> Result<Vec<(String, Value)>> {
        // This checks the files.
        let tokenizer = Tokenizer::new(self)?;
        let problem = |problem: String| self.malformed(TOKENIZER, &problem);
        let json: TokenizerJson =
            serde_json::from_str(&self.tokenizer_json()?).map_err(|cause| {
                problem(format!(
                    "expected byte-level or SentencePiece BPE with merges: {cause}"
                ))
            })?;
        if vocab_size > MOST_TOKENS {
            return Err(problem(format!(
                "expected at most {MOST_TOKENS} tokens, found {vocab_size}"
            )));
        }
        let (tokens, types) = json.tokens(vocab_size).map_err(problem)?;
        let mut keys = if json.model.byte_fallback {
            json.sentencepiece(&tokens)
        } else {
            json.byte_level(pre).map_err(problem)?
        };
        let mut set = |key: &str, value: Value| keys.push((key.to_owned(), value));
        set("ggml.tokens", json!(tokens));
        set("ggml.token_type", json!(types));
        let config = self.config()?;
        let id = |token: Option<&str>| token.and_then(|token| tokenizer.token_id(token));
        for (role, id) in [
            ("bos", tokenizer.bos_id()),
            ("eos", tokenizer.eos_id()),
            (
                "unknown",
                id(config.unk_token()).or_else(|| id(json.model.unk_token.as_deref())),
            ),
            ("padding", id(config.pad_token())),
        ] {
            if let Some(id) = id {
                set(&format!("ggml.{role}_token_id"), id.into());
            }
        }
        let adds_bos = tokenizer.adds_bos && tokenizer.bos_id().is_some();
        set("ggml.add_bos_token", adds_bos.into());
        let adds_eos = config.add_eos_token.unwrap_or(false) && tokenizer.eos_id().is_some();
        set("ggml.add_eos_token", adds_eos.into());
        keys.extend(chat_templates(self, &config));
        let named = |(key, value)| (format!("tokenizer.{key}"), value);
        Ok(keys.into_iter().map(named).collect())
    }
}

/// The keys of the templates: the default one's, and for others one by name each and the list of their names.
fn chat_templates(files: &TokenizerFiles, config: &TokenizerConfig) -> Vec<(String, Value)> {
    let mut keys = Vec::new();
    let mut names: Vec<String> = Vec::new();
    for (name, template, _) in chat_template::sources(files, config) {
        if name == DEFAULT {
            keys.push(("chat_template".to_owned(), template.into()));
            continue;
        }
        // As in keys of metadata: letters and digits.
        let name = name.replace(|char: char| !char.is_ascii_alphanumeric(), "_");
        if !name.is_empty() && !names.contains(&name) {
            keys.push((format!("chat_template.{name}"), template.into()));
            names.push(name);
        }
    }
    if !names.is_empty() {
        keys.push(("chat_templates".to_owned(), json!(names)));
    }
    keys
}

impl TokenizerJson {
    /// The text and the type of every token. Ids without a token get a placeholder.
    fn tokens(&self, vocab_size: usize) -> Result<(Vec<String>, Vec<i32>), String> {
        let padding = |id: usize| format!("[PAD{id}]");
        let mut tokens: Vec<String> = (0..vocab_size).map(padding).collect();
        let mut types = vec![token_type::UNUSED; vocab_size];
        let unknown = self.model.unk_token.as_deref();
        let pieces = self.model.vocab.iter().map(|(text, id)| {
            let of = match text.as_str() {
                text if self.model.byte_fallback && Some(text) == unknown => token_type::UNKNOWN,
                text if self.model.byte_fallback && is_byte(text) => token_type::BYTE,
                _ => token_type::NORMAL,
            };
            (*id, text, of)
        });
        let added = self.added_tokens.iter().map(|token| {
            let steers = token.special || looks_special(&token.content);
            let is_unknown = self.model.byte_fallback && Some(&*token.content) == unknown;
            let of = match (is_unknown, steers) {
                (true, _) => token_type::UNKNOWN,
                (false, true) => token_type::CONTROL,
                (false, false) => token_type::USER_DEFINED,
            };
            (token.id, &token.content, of)
        });
        for (id, text, of) in pieces.chain(added) {
            let Some(token) = tokens.get_mut(id) else {
                return Err(format!(
                    "expected ids below the model's `vocab_size` {vocab_size}, found {id} for {text:?}"
                ));
            };
            token.clone_from(text);
            types[id] = of;
        }
        Ok((tokens, types))
    }

    fn byte_level(&self, pre: Option<&str>) -> Result<Vec<(String, Value)>, String> {
        let pre = match pre {
            Some(pre) => pre,
            None => self.name_of_splits()?,
        };
        let merges: Vec<String> = self.model.merges.iter().map(MergeEntry::text).collect();
        Ok(vec![
            ("ggml.model".into(), "gpt2".into()),
            ("ggml.pre".into(), pre.into()),
            ("ggml.merges".into(), json!(merges)),
        ])
    }

    /// The name of the rules that split a text as the file's do.
    fn name_of_splits(&self) -> Result<&'static str, String> {
        let found = pieces(&self.pre_tokenizer)?;
        let names = Splits::all().map(|splits| {
            let same = splits.ignore_merges == self.model.ignore_merges
                && pieces(&splits.pre_tokenizer())? == found;
            Ok(same.then(|| splits.name()))
        });
        let names = names.collect::<Result<Vec<_>, String>>()?;
        names.into_iter().flatten().next().ok_or_else(|| {
            "no known name of llama.cpp fits its pre-tokenizer; if there is one, give it with `--pre NAME`"
                .to_owned()
        })
    }

    /// A token's score is the negative place of the first merge that makes it: the highest score is merged first.
    fn sentencepiece(&self, tokens: &[String]) -> Vec<(String, Value)> {
        let mut rank: HashMap<String, usize> = HashMap::new();
        for (place, merge) in self.model.merges.iter().enumerate() {
            rank.entry(merge.whole()).or_insert(place);
        }
        let last = self.model.merges.len();
        let score = |token: &String| -(rank.get(token).copied().unwrap_or(last) as f64);
        let scores: Vec<f64> = tokens.iter().map(score).collect();
        let prefixes = [&self.normalizer, &self.pre_tokenizer].map(Value::to_string);
        let has_prefix = prefixes.iter().any(|text| {
            text.contains("\"Prepend\"")
                || text.contains("\"prepend_scheme\":\"first\"")
                || text.contains("\"prepend_scheme\":\"always\"")
        });
        vec![
            ("ggml.model".into(), "llama".into()),
            ("ggml.pre".into(), "default".into()),
            ("ggml.scores".into(), json!(scores)),
            ("ggml.add_space_prefix".into(), has_prefix.into()),
        ]
    }
}

/// Whether a token is named as one that steers a model, whatever the file says of it.
fn looks_special(token: &str) -> bool {
    let within = |start: &str, end: &str| token.starts_with(start) && token.ends_with(end);
    within("<|", "|>") || within("<\u{FF5C}", "\u{FF5C}>") || token == "<pad>" || token == "<mask>"
}

/// Whether a token stands for one byte, as `<0x0A>`.
fn is_byte(token: &str) -> bool {
    let code = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
    code.is_some_and(|code| code.len() == 2 && u8::from_str_radix(code, 16).is_ok())
}

/// A text that no two of the known rules split alike.
const SAMPLE: &str = concat!(
    "Hello  world, it's I'LL we'Ve (x+y)=z^2 ~$5 <a|b> 1 22 333 4444 55555 ½ ²³ Ⅷ\n\n  \r\n\t tab\t\tend  ",
    "naïve Ångström ΑΒΓδ привет мир ЁЖ שלום عربي हिन्दी ไทย 한국어 日本語テスト 中文，测试。ﬁ ǅ ª º ꟹ ",
    "#tag @user a_b-c foo.bar !important \"quoted\"  'single' …—– ‘’ “” « » ¿ ¡ € £ 12,345.678 3rd 1st ",
    "e\u{301}e\u{308} 👍🏽 🤷\u{200D}♂️ a1b2 x\u{3000}y \u{2028}z\r\r\n .com\n   \n",
);

/// The ends of the pieces into which a pre-tokenizer splits the sample.
fn pieces(pre_tokenizer: &Value) -> Result<Vec<usize>, String> {
    let cut = || -> tokenizers::Result<Vec<usize>> {
        let mut text = PreTokenizedString::from(SAMPLE);
        if let Some(rules) = Steps::pre_tokenizer(pre_tokenizer.clone())? {
            rules.pre_tokenize(&mut text)?;
        }
        let splits = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
        Ok(splits.into_iter().map(|(_, (_, end), _)| end).collect())
    };
    guarded(cut).map_err(|cause| format!("its pre-tokenizer does not work: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::{folder, goldens};
    use crate::{Bos, Special};
    use std::collections::BTreeMap;
    use std::path::Path;

    fn metadata(files: &TokenizerFiles, vocab_size: usize) -> BTreeMap<String, Value> {
        let keys = files.to_metadata(vocab_size, None).unwrap();
        keys.into_iter().collect()
    }

    #[test]
    fn every_known_pre_tokenizer_is_told_from_the_others() {
        let mut seen = Vec::new();
        for splits in Splits::all() {
            let found = pieces(&splits.pre_tokenizer()).unwrap();
            assert!(!seen.contains(&found), "{}", splits.name());
            seen.push(found);
        }
    }

    #[test]
    fn a_folders_tokenizer_becomes_keys_that_become_it_again() {
        let files = TokenizerFiles::open(&goldens()).unwrap();
        let original = Tokenizer::new(&files).unwrap();
        // The model has more tokens than the tokenizer.
        let metadata = metadata(&files, 300);
        assert_eq!(metadata["tokenizer.ggml.model"], "gpt2");
        assert_eq!(metadata["tokenizer.ggml.pre"], "deepseek-v3");
        assert_eq!(metadata["tokenizer.ggml.tokens"][299], "[PAD299]");
        assert_eq!(
            metadata["tokenizer.ggml.token_type"][299],
            token_type::UNUSED
        );
        let again = TokenizerFiles::of_metadata(Path::new("m.gguf"), &metadata).unwrap();
        let again = Tokenizer::new(&again.unwrap()).unwrap();
        assert_eq!(
            (again.bos_id(), again.eos_id()),
            (original.bos_id(), original.eos_id())
        );
        for text in [SAMPLE, "Hello, world! 1234567", "<｜begin▁of▁sentence｜>x"] {
            let [ids, expected] = [&again, &original].map(|t| t.encode(text, Bos::Add).unwrap());
            assert_eq!(ids, expected, "{text}");
            let decoded = again.decode(&ids, Special::Keep).unwrap();
            assert_eq!(decoded, original.decode(&expected, Special::Keep).unwrap());
        }
        let source = again.chat_template().is_some();
        assert_eq!(source, original.chat_template().is_some());
    }

    #[test]
    fn an_unknown_pre_tokenizer_is_refused_unless_it_is_named() {
        let folder = folder(|tokenizer, _| {
            tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] =
                json!("\\p{N}{1,4}");
        });
        let files = TokenizerFiles::open(folder.path()).unwrap();
        let error = files.to_metadata(300, None).unwrap_err().to_string();
        assert!(error.contains("--pre NAME"), "{error}");
        let keys = files.to_metadata(300, Some("deepseek-v3")).unwrap();
        assert!(keys.contains(&("tokenizer.ggml.pre".into(), "deepseek-v3".into())));
        let error = files.to_metadata(100, None).unwrap_err().to_string();
        assert!(
            error.contains("expected ids below the model's `vocab_size` 100"),
            "{error}"
        );
    }
}
