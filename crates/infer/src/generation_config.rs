//! What a model's publisher says about generating: the tokens that end a text, and the recommended sampling.

use std::path::Path;

use checkpoint::Folder;
use data::Tokenizer;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::sample_config::SampleConfig;

const FILE: &str = "generation_config.json";

/// The tokens that end a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndOfText {
    /// Their ids, sorted, each once.
    pub ids: Vec<u32>,
    /// What of the files was not taken as it is, one sentence each.
    pub notes: Vec<String>,
}

/// The tokens that end a text of a model: those of `generation_config.json`, of `config.json`, and the tokenizer's own
/// ([`Tokenizer::end_ids`]).
/// Chat models name several, often more in their generation config than in `config.json`.
///
/// # Errors
/// If `eos_token_id` in one of the files is neither an id nor a list of ids.
pub fn end_of_text(folder: &Folder, tokenizer: Option<&Tokenizer>) -> Result<EndOfText> {
    let generation_config = folder.path().join(FILE);
    let config = ids_of(folder.config(), &folder.config_path())?;
    let generation = match folder.generation_config() {
        Some(json) => ids_of(json, &generation_config)?,
        None => vec![],
    };
    let mut notes = Vec::new();
    let unshared: Vec<u32> = config
        .iter()
        .filter(|id| !generation.is_empty() && !generation.contains(id))
        .copied()
        .collect();
    if !unshared.is_empty() {
        notes.push(format!(
            "{}: `eos_token_id` has {unshared:?}, `{FILE}` does not; both end a text here, in transformers those of `{FILE}` alone",
            folder.config_path().display()
        ));
    }
    let mut ids = [config, generation].concat();
    ids.extend(tokenizer.iter().flat_map(|tokenizer| tokenizer.end_ids()));
    ids.sort_unstable();
    ids.dedup();
    if let Some(vocab_size) = folder.config()["vocab_size"].as_u64() {
        let beyond = ids.split_off(ids.partition_point(|id| u64::from(*id) < vocab_size));
        if !beyond.is_empty() {
            notes.push(format!(
                "{}: `eos_token_id`: expected ids below the vocabulary size {vocab_size}, found {beyond:?}, which no text ends with",
                folder.path().display()
            ));
        }
    }
    Ok(EndOfText { ids, notes })
}

/// The `eos_token_id` of a config.
fn ids_of(config: &Value, file: &Path) -> Result<Vec<u32>> {
    let value = &config["eos_token_id"];
    data::eos_token_ids(value).ok_or_else(|| Error::EndOfText {
        file: file.to_owned(),
        found: value.to_string().chars().take(80).collect(),
    })
}

/// The keys that are read here.
const READ: [&str; 7] = [
    "do_sample",
    "eos_token_id",
    "min_p",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
];
/// Keys that change no text: what made the file, how other programs run, limits that the caller sets.
const HARMLESS_SAMPLING: [&str; 17] = [
    "_from_model_config",
    "assistant_confidence_threshold",
    "bos_token_id",
    "cache_implementation",
    "decoder_start_token_id",
    "is_assistant",
    "max_length",
    "max_new_tokens",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "transformers_version",
    "use_cache",
];
/// Keys that would change it, with the values that do not.
const NEUTRAL_SAMPLING: [(&str, f64); 11] = [
    ("diversity_penalty", 0.0),
    ("encoder_no_repeat_ngram_size", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("length_penalty", 1.0),
    ("min_length", 0.0),
    ("no_repeat_ngram_size", 0.0),
    ("num_beam_groups", 1.0),
    ("num_beams", 1.0),
    ("typical_p", 1.0),
];

/// The keys of `generation_config.json` that are neither obeyed nor known to change nothing, with their values.
pub fn unknown_generation_keys(folder: &Folder) -> Vec<(&str, &Value)> {
    let config = folder.generation_config().and_then(Value::as_object);
    let is_known = |key: &str, value: &Value| {
        let neutral = NEUTRAL_SAMPLING.iter().find(|known| known.0 == key);
        let is_off = value.is_null() || *value == Value::Bool(false);
        is_off
            || READ.contains(&key)
            || HARMLESS_SAMPLING.contains(&key)
            || neutral.is_some_and(|(_, neutral)| value.as_f64() == Some(*neutral))
    };
    let entries = config.into_iter().flatten();
    let entries = entries.map(|(key, value)| (key.as_str(), value));
    entries
        .filter(|(key, value)| !is_known(key, value))
        .collect()
}

/// The sampling that `generation_config.json` recommends; greedy if it recommends none.
///
/// # Errors
/// If one of its settings is not a number of the right kind.
pub fn recommended_sampling(folder: &Folder) -> Result<SampleConfig> {
    match folder.generation_config() {
        Some(config) => sampling(config, &folder.path().join(FILE)),
        None => Ok(SampleConfig::greedy()),
    }
}

fn sampling(config: &Value, file: &Path) -> Result<SampleConfig> {
    let given = |key: &str| {
        debug_assert!(READ.contains(&key), "`{key}` is not in READ");
        config.get(key).filter(|value| !value.is_null())
    };
    let problem = |key: &'static str, expected, found: &Value| Error::GenerationConfig {
        file: file.to_owned(),
        key,
        expected,
        found: found.to_string().chars().take(80).collect(),
    };
    let number = |key: &'static str, default: f32| {
        let Some(value) = given(key) else {
            return Ok(default);
        };
        let number = value.as_f64().map(|number| number as f32);
        number.ok_or_else(|| problem(key, "a number", value))
    };
    let penalized = SampleConfig {
        repetition_penalty: number("repetition_penalty", 1.0)?,
        ..SampleConfig::greedy()
    };
    if given("do_sample").and_then(Value::as_bool) != Some(true) {
        return Ok(penalized);
    }
    let top_k = match given("top_k") {
        None => 0,
        Some(value) => value
            .as_u64()
            .and_then(|top_k| usize::try_from(top_k).ok())
            .ok_or_else(|| problem("top_k", "a number from 0 up", value))?,
    };
    Ok(SampleConfig {
        // Absent ones are 1 in Hugging Face's tools.
        temperature: number("temperature", 1.0)?,
        top_p: number("top_p", 1.0)?,
        min_p: number("min_p", 0.0)?,
        top_k,
        ..penalized
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn sampling_is_what_the_publisher_recommends() {
        let file = Path::new(FILE);
        let greedy = SampleConfig::greedy();
        let check = |config: Value, expected: SampleConfig| {
            assert_eq!(sampling(&config, file).unwrap(), expected, "{config}");
        };
        let all = json!({
            "do_sample": true, "temperature": 0.5, "top_p": 0.75, "top_k": 20, "min_p": 0.25,
            "repetition_penalty": 1.5,
        });
        let expected = SampleConfig {
            temperature: 0.5,
            top_p: 0.75,
            top_k: 20,
            min_p: 0.25,
            repetition_penalty: 1.5,
            ..greedy
        };
        check(all, expected);
        let plain = SampleConfig {
            temperature: 1.0,
            ..greedy
        };
        check(json!({"do_sample": true}), plain);
        check(json!({"do_sample": true, "top_k": null}), plain);
        check(json!({"do_sample": false, "temperature": 0.5}), greedy);
        check(json!({"temperature": 0.5}), greedy);
        let penalized = SampleConfig {
            repetition_penalty: 1.25,
            ..greedy
        };
        check(json!({"repetition_penalty": 1.25, "top_k": 3}), penalized);
        check(json!({}), greedy);
        for (config, expected) in [
            (
                json!({"do_sample": true, "top_p": "all"}),
                "`top_p`: expected a number",
            ),
            (
                json!({"do_sample": true, "top_k": -1}),
                "`top_k`: expected a number from 0 up, found -1",
            ),
        ] {
            let problem = sampling(&config, file).unwrap_err().to_string();
            assert!(problem.contains(expected), "{problem}");
        }
    }
}
