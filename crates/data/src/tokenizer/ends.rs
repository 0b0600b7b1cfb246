//! The tokens that end a text: the one that is trained, and those that stop a generation.
//!
//! One token is *trained*: samples end with [`Tokenizer::eos_id`](crate::Tokenizer::eos_id), the tokenizer's `eos_token`. It is in
//! `tokenizer_config.json`, or in `special_tokens_map.json`, which counts first if `tokenizer_config.json` has no
//! `added_tokens_decoder` (as in transformers). A tokenizer without one ends samples with the first `eos_token_id` of
//! `config.json` or else of `generation_config.json`; a GGUF's is `eos_token_id` or else `eot_token_id`.
//!
//! All of them *stop* a generation, wherever they are named: `eos_token_id` of both configs, each an id or a list, and the
//! trained one. A model that was trained elsewhere ends texts with one, a model that is trained here with the other. transformers
//! stops at those of `generation_config.json` alone, if it has any; where `config.json` has others, that is noted. In a GGUF these
//! are `eos_token_id`, `eot_token_id`, `eom_token_id`, and the tokens that llama.cpp knows by their text.

use super::Tokenizer;
use super::files::{TokenizerFiles, Tokens};
use super::from_gguf::GgufTokens;
use crate::error::{Error, Result};
use crate::file::read_text;
use serde_json::Value;

/// Configs are a few kilobytes.
const MAX_CONFIG_BYTES: u64 = 16 << 20;
/// Tokens that llama.cpp ends a generation with, whatever the keys of a GGUF say. Its separators of code prompts are not here.
///
/// Source: ggml-org/llama.cpp: src/llama-vocab.cpp, `special_eog_ids`.
const KNOWN_ENDS: [&str; 21] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<\u{FF5C}end\u{2581}of\u{2581}sentence\u{FF5C}>",
];

/// The names of a model's configs. The end of samples is looked up in the first one first.
const CONFIGS: [&str; 2] = ["config.json", "generation_config.json"];

/// The ids in an `eos_token_id`: an id, a list, or null. None if it is something else.
pub fn eos_token_ids(value: &Value) -> Option<Vec<u32>> {
    let id = |value: &Value| u32::try_from(value.as_u64()?).ok();
    match value {
        Value::Null => Some(vec![]),
        Value::Array(list) => list.iter().map(id).collect(),
        value => Some(vec![id(value)?]),
    }
}

/// The end of samples for a tokenizer that names none.
pub(super) fn eos_of_configs(files: &TokenizerFiles) -> Result<Option<u32>> {
    let Some(folder) = files.folder() else {
        return Ok(None);
    };
    for name in CONFIGS {
        let path = folder.join(name);
        let Some(text) = read_text(&path, MAX_CONFIG_BYTES)? else {
            continue;
        };
        let config: Value = serde_json::from_str(&text)
            .map_err(|problem| Error::malformed(&path, problem.to_string()))?;
        let ids = eos_token_ids(&config["eos_token_id"]).ok_or_else(|| {
            Error::malformed(&path, "`eos_token_id`: expected an id or a list of ids")
        })?;
        if let Some(id) = ids.first() {
            return Ok(Some(*id));
        }
    }
    Ok(None)
}

/// All ends that a tokenizer's files know of, without those of a model's configs.
pub(super) fn known_ends(files: &TokenizerFiles, eos: Option<u32>) -> Vec<u32> {
    let mut ids: Vec<u32> = eos.into_iter().collect();
    if let Tokens::Gguf(tokens) = &files.tokens {
        ids.extend(tokens.eot.into_iter().chain(tokens.eom));
        ids.extend(ends_by_text(tokens));
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}

impl TokenizerFiles {
    /// The ends of a text that a GGUF's metadata name; see [`Tokenizer::end_ids`]. None for a folder's files.
    pub(crate) fn gguf_ends(&self) -> Vec<u32> {
        match &self.tokens {
            Tokens::Gguf(tokens) => known_ends(self, tokens.eos),
            Tokens::Text(_) => vec![],
        }
    }
}

/// The tokens that llama.cpp knows as ends.
fn ends_by_text(gguf: &GgufTokens) -> Vec<u32> {
    let named = (0..)
        .zip(&gguf.tokens)
        .filter(|(_, text)| is_known_end(text));
    let named: Vec<(u32, &String)> = named.collect();
    let has = |end: &str| named.iter().any(|(_, text)| *text == end);
    // There a message ends with `<|end|>`, and more of them may follow.
    let is_harmony = has("<|return|>") && has("<|call|>");
    let is_solar = has("<|flush|>") && (has("<|call|>") || has("<|calls|>"));
    let counts = |text: &str| text != "<|end|>" || !(is_harmony || is_solar);
    let counted = named.iter().filter(|(_, text)| counts(text));
    counted.map(|(id, _)| *id).collect()
}

fn is_known_end(text: &str) -> bool {
    KNOWN_ENDS.contains(&text)
}

/// Ends of a text as keys of a GGUF.
#[derive(Debug, Default, PartialEq)]
pub struct GgufEnds {
    /// `tokenizer.ggml.eot_token_id` and `eom_token_id`, if need be.
    pub keys: Vec<(String, Value)>,
    /// Ends that no key is left for, and that llama.cpp does not know by their text: ids and texts.
    pub lost: Vec<(u32, String)>,
}

impl Tokenizer {
    /// Keys for the ends of a text other than [`Tokenizer::eos_id`], which has a key of its own.
    pub fn gguf_ends(&self, ends: &[u32]) -> GgufEnds {
        let text = |id: u32| self.inner.id_to_token(id).unwrap_or_default();
        let mut others: Vec<(u32, String)> = ends
            .iter()
            .filter(|id| self.eos_id() != Some(**id))
            .map(|id| (*id, text(*id)))
            .collect();
        // Those that are known by their text can do without a key.
        others.sort_by_key(|(id, text)| (is_known_end(text), *id));
        let lost = others.split_off(others.len().min(2));
        let names = ["eot", "eom"].map(|name| format!("tokenizer.ggml.{name}_token_id"));
        GgufEnds {
            keys: names
                .into_iter()
                .zip(others)
                .map(|(key, (id, _))| (key, id.into()))
                .collect(),
            lost: lost
                .into_iter()
                .filter(|(_, text)| !is_known_end(text))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::folder;
    use crate::{Bos, companions};
    use serde_json::json;
    use std::collections::BTreeMap;
    use std::path::Path;

    /// The golden tokenizer with some files changed: the config, then others by name.
    fn tokenizer(config: Value, others: &[(&str, Value)]) -> Tokenizer {
        let folder = folder(|_, old| *old = config);
        for (name, json) in others {
            std::fs::write(folder.path().join(name), json.to_string()).unwrap();
        }
        Tokenizer::open(folder.path()).unwrap()
    }

    #[test]
    fn samples_end_with_the_token_that_transformers_takes() {
        let map = |token: Value| [("special_tokens_map.json", json!({"eos_token": token}))];
        let check = |config: Value, others: &[(&str, Value)], expected: &str| {
            let tokenizer = tokenizer(config.clone(), others);
            assert_eq!(
                tokenizer.eos_id(),
                tokenizer.token_id(expected),
                "{config} {others:?}"
            );
        };
        check(json!({"eos_token": "a"}), &[], "a");
        check(
            json!({"eos_token": {"content": "a", "lstrip": false}}),
            &[],
            "a",
        );
        check(json!({}), &map(json!("b")), "b");
        check(
            json!({"eos_token": null}),
            &map(json!({"content": "b"})),
            "b",
        );
        // Only a tokenizer config without `added_tokens_decoder` is completed by the older file.
        check(json!({"eos_token": "a"}), &map(json!("b")), "b");
        check(
            json!({"eos_token": "a", "added_tokens_decoder": {}}),
            &map(json!("b")),
            "a",
        );
        check(json!({"added_tokens_decoder": {}}), &map(json!("b")), "b");
        check(json!({"eos_token": "a"}), &map(json!(null)), "a");
    }

    #[test]
    fn a_tokenizer_without_an_end_takes_that_of_the_configs() {
        let check = |config: Value, generation: Value, expected: Option<u32>| {
            let configs = [
                ("config.json", json!({"eos_token_id": config})),
                (
                    "generation_config.json",
                    json!({"eos_token_id": generation}),
                ),
            ];
            let tokenizer = tokenizer(json!({"eos_token": null}), &configs);
            assert_eq!(tokenizer.eos_id(), expected, "{configs:?}");
        };
        check(json!(7), json!([8, 9]), Some(7));
        check(json!([9, 8]), json!(null), Some(9));
        check(json!(null), json!([8, 9]), Some(8));
        check(json!(null), json!(null), None);
        // A token that the tokenizer does not have.
        check(json!(99_999), json!(null), None);
        let known = tokenizer(
            json!({"eos_token": "a"}),
            &[("config.json", json!({"eos_token_id": 7}))],
        );
        assert_eq!(known.eos_id(), known.token_id("a"));
    }

    #[test]
    fn what_begins_a_text_may_be_in_the_older_file_alone() {
        let begin = "<\u{FF5C}begin\u{2581}of\u{2581}sentence\u{FF5C}>";
        let map = json!({"bos_token": begin, "pad_token": {"content": "a"}});
        let tokenizer = tokenizer(
            json!({"add_bos_token": true}),
            &[("special_tokens_map.json", map)],
        );
        assert_eq!(tokenizer.encode("x", Bos::Add).unwrap()[0], 0);
        let folder = folder(|_, config| *config = json!({}));
        let path = folder.path().join("special_tokens_map.json");
        std::fs::write(path, json!({"bos_token": "<nowhere>"}).to_string()).unwrap();
        let problem = Tokenizer::open(folder.path()).unwrap_err().to_string();
        assert!(
            problem.contains(
                "special_tokens_map.json: `bos_token`: expected a token of the vocabulary"
            ),
            "{problem}"
        );
    }

    fn metadata(tokens: &[&str], ids: Value) -> BTreeMap<String, Value> {
        let tokens = [&["a", "b", "ab"], tokens].concat();
        let mut metadata = json!({
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["a b"],
        });
        for (key, id) in ids.as_object().unwrap() {
            metadata[format!("tokenizer.ggml.{key}_token_id")] = id.clone();
        }
        serde_json::from_value(metadata).unwrap()
    }

    #[test]
    fn a_gguf_ends_texts_with_its_keys_and_what_is_known_by_its_text() {
        let check = |tokens: &[&str], ids: Value, trained: Option<u32>, ends: &[u32]| {
            let metadata = metadata(tokens, ids);
            let files = TokenizerFiles::of_metadata(Path::new("m.gguf"), &metadata)
                .unwrap()
                .unwrap();
            let tokenizer = Tokenizer::new(&files).unwrap();
            assert_eq!(
                (tokenizer.eos_id(), tokenizer.end_ids()),
                (trained, ends),
                "{tokens:?}"
            );
            let files = companions(Path::new("m.gguf"), &metadata).unwrap();
            let config = files.iter().find(|file| file.0 == "generation_config.json");
            let config: Option<Value> = config.map(|file| serde_json::from_str(&file.1).unwrap());
            let expected = (ends.len() > 1).then(|| json!({"eos_token_id": ends}));
            assert_eq!(config, expected);
        };
        check(&[], json!({}), None, &[]);
        check(&[], json!({"eos": 2}), Some(2), &[2]);
        check(
            &[],
            json!({"eos": 2, "eot": 0, "eom": 1}),
            Some(2),
            &[0, 1, 2],
        );
        check(&[], json!({"eot": 1}), Some(1), &[1]);
        check(
            &["<|im_end|>", "<|x|>", "</s>"],
            json!({"eos": 2}),
            Some(2),
            &[2, 3, 5],
        );
        check(
            &["<|return|>", "<|call|>", "<|end|>"],
            json!({"eos": 3}),
            Some(3),
            &[3, 4],
        );
        check(
            &["<|return|>", "<|end|>"],
            json!({"eos": 3}),
            Some(3),
            &[3, 4],
        );
        let beyond = metadata(&[], json!({"eos": 2, "eom": 9}));
        let problem = TokenizerFiles::of_metadata(Path::new("m.gguf"), &beyond)
            .unwrap_err()
            .to_string();
        assert!(
            problem.contains("`tokenizer.ggml.eom_token_id`: expected an id below 3, found 9"),
            "{problem}"
        );
    }

    #[test]
    fn ends_get_the_keys_that_a_gguf_has_and_the_rest_is_named() {
        let metadata = metadata(&["<|im_end|>"], json!({"eos": 2}));
        let files = TokenizerFiles::of_metadata(Path::new("m.gguf"), &metadata)
            .unwrap()
            .unwrap();
        let tokenizer = Tokenizer::new(&files).unwrap();
        let check = |ends: &[u32], eot: Option<u32>, eom: Option<u32>, lost: &[u32]| {
            let found = tokenizer.gguf_ends(ends);
            let key = |name: &str| {
                let name = format!("tokenizer.ggml.{name}_token_id");
                let found = found.keys.iter().find(|(key, _)| *key == name)?;
                found.1.as_u64().map(|id| id as u32)
            };
            assert_eq!((key("eot"), key("eom")), (eot, eom), "{ends:?}");
            assert_eq!(
                found.lost.iter().map(|lost| lost.0).collect::<Vec<_>>(),
                lost
            );
        };
        check(&[2], None, None, &[]);
        check(&[1, 2], Some(1), None, &[]);
        check(&[0, 1, 2], Some(0), Some(1), &[]);
        // The third is known by its text.
        check(&[0, 1, 2, 3], Some(0), Some(1), &[]);
        check(&[0, 1, 2, 9], Some(0), Some(1), &[9]);
        check(&[2, 3], Some(3), None, &[]);
    }
}
