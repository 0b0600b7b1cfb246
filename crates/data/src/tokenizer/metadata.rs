//! The tokenizer keys of a GGUF's metadata, with their types checked.

use super::config::DEFAULT;
use super::files::TokenizerFiles;
use super::from_gguf::GgufTokens;
use crate::error::{Error, Result};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// The keys that are read here or by those who generate.
const KNOWN_METADATA: [&str; 19] = [
    "tokenizer.chat_template",
    "tokenizer.chat_templates",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eom_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.model",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.huggingface.json",
    "tokenizer.rwkv.world",
];
/// The start of the keys of templates with names.
const NAMED_TEMPLATE: &str = "tokenizer.chat_template.";
/// Keys that change nothing in texts and chats: of classifiers, of filling in the middle, of other kinds of tokenizers.
const HARMLESS_METADATA: [&str; 13] = [
    "tokenizer.ggml.fim_mid_token_id",
    "tokenizer.ggml.fim_pad_token_id",
    "tokenizer.ggml.fim_pre_token_id",
    "tokenizer.ggml.fim_rep_token_id",
    "tokenizer.ggml.fim_sep_token_id",
    "tokenizer.ggml.fim_suf_token_id",
    "tokenizer.ggml.mask_token_id",
    "tokenizer.ggml.middle_token_id",
    "tokenizer.ggml.prefix_token_id",
    "tokenizer.ggml.seperator_token_id",
    "tokenizer.ggml.suffix_token_id",
    "tokenizer.ggml.token_type_count",
    "tokenizer.ggml.cls_token_id",
];

/// The keys about tokens in a GGUF's metadata that nothing here knows.
pub fn unknown_metadata(metadata: &BTreeMap<String, Value>) -> Vec<&str> {
    let keys = metadata.keys().map(String::as_str);
    let of_tokens = keys.filter(|key| key.starts_with("tokenizer."));
    of_tokens
        .filter(|key| !is_known(key) && !HARMLESS_METADATA.contains(key))
        .collect()
}

fn is_known(key: &str) -> bool {
    KNOWN_METADATA.contains(&key) || key.starts_with(NAMED_TEMPLATE)
}

impl TokenizerFiles {
    /// The tokenizer of a model: from the metadata of a GGUF, or from a folder if there is no metadata. `None` if the model
    /// has no tokenizer.
    ///
    /// # Errors
    /// If a file cannot be read, or as [`TokenizerFiles::of_metadata`].
    pub fn of_model(
        path: &Path,
        metadata: Option<&BTreeMap<String, Value>>,
    ) -> Result<Option<Self>> {
        match metadata {
            Some(metadata) => Self::of_metadata(path, metadata),
            None => Self::read(path),
        }
    }

    /// The tokenizer in a GGUF's metadata: numbers, texts and lists by their keys. `None` if it has none. `path` is the
    /// GGUF's, for messages.
    ///
    /// # Errors
    /// If a key has a value of a wrong type, the tokens are of an unknown kind, or one with a role is not in the vocabulary.
    /// [`Tokenizer::new`](crate::Tokenizer::new) checks whether they contradict each other.
    pub fn of_metadata(path: &Path, metadata: &BTreeMap<String, Value>) -> Result<Option<Self>> {
        if !metadata.contains_key("tokenizer.ggml.tokens") {
            return Ok(None);
        }
        let keys = GgufKeys { path, metadata };
        let tokens = GgufTokens {
            model: keys.text("model")?.unwrap_or_default(),
            pre: keys.text("pre")?,
            tokens: keys.list("tokens", "texts", text)?,
            types: keys.list("token_type", "whole numbers", |value| {
                i32::try_from(value.as_i64()?).ok()
            })?,
            scores: keys.list("scores", "numbers", |value| Some(value.as_f64()? as f32))?,
            merges: keys.list("merges", "texts", text)?,
            bos: keys.id("bos_token_id")?,
            eos: keys.id("eos_token_id")?,
            eot: keys.id("eot_token_id")?,
            eom: keys.id("eom_token_id")?,
            unknown: keys.id("unknown_token_id")?,
            padding: keys.id("padding_token_id")?,
            add_bos: keys.flag("add_bos_token")?,
            add_eos: keys.flag("add_eos_token")?,
            add_space_prefix: keys.flag("add_space_prefix")?,
            chat_templates: keys.chat_templates()?,
        };
        Self::from_gguf(path, tokens).map(Some)
    }
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

struct GgufKeys<'a> {
    path: &'a Path,
    metadata: &'a BTreeMap<String, Value>,
}

impl GgufKeys<'_> {
    fn one<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        debug_assert!(is_known(key), "`{key}` is not in KNOWN_METADATA");
        let Some(value) = self.metadata.get(key) else {
            return Ok(None);
        };
        let value = read(value);
        let wrong = || Error::malformed(self.path, format!("`{key}`: expected {expected}"));
        value.map(Some).ok_or_else(wrong)
    }

    /// The templates by their names. The list of names that such files have, too, says nothing more.
    fn chat_templates(&self) -> Result<Vec<(String, String)>> {
        let mut found = Vec::new();
        for key in self.metadata.keys() {
            let name = match key.strip_prefix(NAMED_TEMPLATE) {
                Some(name) => name,
                None if key == "tokenizer.chat_template" => DEFAULT,
                None => continue,
            };
            if let Some(template) = self.one(key, "a text", text)? {
                found.push((name.to_owned(), template));
            }
        }
        Ok(found)
    }

    fn text(&self, name: &str) -> Result<Option<String>> {
        self.one(&format!("tokenizer.ggml.{name}"), "a text", text)
    }

    fn id(&self, name: &str) -> Result<Option<u32>> {
        self.one(&format!("tokenizer.ggml.{name}"), "a token's id", |value| {
            u32::try_from(value.as_u64()?).ok()
        })
    }

    fn flag(&self, name: &str) -> Result<Option<bool>> {
        let key = format!("tokenizer.ggml.{name}");
        self.one(&key, "true or false", Value::as_bool)
    }

    /// A list; empty if there is none.
    fn list<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Vec<T>> {
        let (key, expected) = (
            format!("tokenizer.ggml.{name}"),
            format!("a list of {expected}"),
        );
        let list = self.one(&key, &expected, |value| {
            value.as_array()?.iter().map(&read).collect()
        })?;
        Ok(list.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bos, GenerationPrompt, Tokenizer};
    use serde_json::json;

    fn metadata(change: impl FnOnce(&mut Value)) -> BTreeMap<String, Value> {
        let mut json = json!({
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": ["<|end|>", "a", "b", "ab"],
            "tokenizer.ggml.token_type": [3, 1, 1, 1],
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.eos_token_id": 0,
            "tokenizer.ggml.add_bos_token": false,
            "tokenizer.chat_template": "{{ messages[0].content }}",
        });
        change(&mut json);
        serde_json::from_value(json).unwrap()
    }

    fn open(metadata: &BTreeMap<String, Value>) -> Result<Option<TokenizerFiles>> {
        TokenizerFiles::of_metadata(Path::new("m.gguf"), metadata)
    }

    #[test]
    fn metadata_become_a_tokenizer() {
        let files = open(&metadata(|_| {})).unwrap().unwrap();
        let tokenizer = Tokenizer::new(&files).unwrap();
        assert_eq!(tokenizer.encode("aab<|end|>", Bos::Add).unwrap(), [1, 3, 0]);
        assert_eq!(tokenizer.eos_id(), Some(0));
        assert!(tokenizer.chat_template().is_some());
    }

    #[test]
    fn templates_with_names_are_read_and_written() {
        let named = metadata(|json| {
            json["tokenizer.chat_template"] = "d".into();
            json["tokenizer.chat_template.tool_use"] = "t".into();
            json["tokenizer.chat_templates"] = json!(["tool_use"]);
        });
        let files = open(&named).unwrap().unwrap();
        let tokenizer = Tokenizer::new(&files).unwrap();
        let template = tokenizer.chat_template().unwrap();
        let tools = json!([{"name": "f"}]);
        let rendered = [None, Some(&tools)]
            .map(|tools| template.render(&[], tools, GenerationPrompt::Omit).unwrap());
        assert_eq!(rendered, ["d", "t"]);
        let config: Value = serde_json::from_str(&files.files().unwrap()[1].1).unwrap();
        let both =
            json!([{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]);
        assert_eq!(config["chat_template"], both);
        let keys = files.to_metadata(4, Some("smollm")).unwrap();
        let templates = keys
            .into_iter()
            .filter(|(key, _)| key.contains("chat_template"));
        let named = named
            .into_iter()
            .filter(|(key, _)| key.contains("chat_template"));
        assert_eq!(templates.collect::<BTreeMap<_, _>>(), named.collect());
    }

    #[test]
    fn a_gguf_without_tokens_has_no_tokenizer() {
        let none = metadata(|json| {
            _ = json
                .as_object_mut()
                .unwrap()
                .remove("tokenizer.ggml.tokens")
        });
        assert!(open(&none).unwrap().is_none());
    }

    #[test]
    fn values_of_another_type_are_refused_by_key() {
        for (key, value, expected) in [
            ("tokenizer.ggml.model", json!(3), "a text"),
            ("tokenizer.ggml.tokens", json!("a"), "a list of texts"),
            ("tokenizer.ggml.tokens", json!(["a", 1]), "a list of texts"),
            (
                "tokenizer.ggml.token_type",
                json!([1u64 << 40]),
                "a list of whole numbers",
            ),
            ("tokenizer.ggml.scores", json!([null]), "a list of numbers"),
            ("tokenizer.ggml.eos_token_id", json!(-1), "a token's id"),
            (
                "tokenizer.ggml.add_bos_token",
                json!("yes"),
                "true or false",
            ),
            ("tokenizer.chat_template", json!(["x"]), "a text"),
            ("tokenizer.chat_template.rag", json!(1), "a text"),
        ] {
            let error = open(&metadata(|json| json[key] = value)).unwrap_err();
            let error = error.to_string();
            assert!(error.contains("m.gguf"), "{error}");
            assert!(
                error.ends_with(&format!("`{key}`: expected {expected}")),
                "{error}"
            );
        }
    }
}
