//! A `config.json` from a GGUF's metadata.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::Architecture;
use super::tables::*;
use crate::gguf::{Gguf, decimal, malformed, names, rope};
use crate::{Result, Tensor};

/// The `generation_config.json` of a file, if it recommends a sampling.
pub(crate) fn generation_config(metadata: &BTreeMap<String, Value>) -> Option<Value> {
    let values = SAMPLING.iter().filter_map(|(key, name, _)| {
        let value = metadata.get(*key)?;
        Some(((*name).to_owned(), value.clone()))
    });
    let mut config: Map<String, Value> = values.collect();
    if config.is_empty() {
        return None;
    }
    config.insert("do_sample".into(), true.into());
    Some(Value::Object(config))
}

/// Whether a value is the one of this JSON text; 1 and 1.0 are the same.
fn is_value(found: &Value, text: &str) -> bool {
    let value = serde_json::from_str::<Value>(text).unwrap_or_default();
    let numbers = found.as_f64().zip(value.as_f64());
    numbers.map_or(*found == value, |(found, value)| found == value)
}

/// A file's metadata under its architecture's name.
struct Said<'a> {
    path: &'a Path,
    gguf: &'a Gguf,
    architecture: &'static str,
    /// The keys that were read.
    asked: RefCell<BTreeSet<String>>,
}

/// The `config.json` of a file, and the keys of its metadata that nothing here knows.
///
/// # Errors
/// If a setting is missing or makes no sense.
pub(crate) fn config(
    path: &Path,
    gguf: &Gguf,
    (architecture, family): (&'static str, Architecture),
) -> Result<(Value, Vec<String>)> {
    let said = Said {
        path,
        gguf,
        architecture,
        asked: RefCell::default(),
    };
    let mut config = Map::new();
    config.insert("model_type".into(), architecture.into());
    config.insert("hidden_act".into(), "silu".into());
    said.check_neutral(family)?;
    said.copy(COMMON, &mut config)?;
    let Some(vocab_size) = said
        .tensor("token_embd.weight")
        .and_then(|tensor| tensor.shape.first())
    else {
        return Err(said.malformed("expected a tensor `token_embd.weight`, found none".into()));
    };
    said.expect("vocab_size", *vocab_size as u64)?;
    config.insert("vocab_size".into(), (*vocab_size).into());
    let is_tied = said.tensor("output.weight").is_none();
    config.insert("tie_word_embeddings".into(), is_tied.into());
    said.rope(&mut config, family)?;
    match family {
        Architecture::Llama | Architecture::Qwen2 => said.grouped_queries(&mut config)?,
        Architecture::DeepSeek2 => said.deepseek(&mut config)?,
    }
    let class = match config.get("model_type").and_then(Value::as_str) {
        Some("deepseek_v2") => "DeepseekV2ForCausalLM",
        Some("deepseek_v3") => "DeepseekV3ForCausalLM",
        Some("qwen2") => "Qwen2ForCausalLM",
        _ => "LlamaForCausalLM",
    };
    config.insert("architectures".into(), json!([class]));
    for name in ["bos", "eos"] {
        let id = gguf
            .metadata
            .get(&format!("tokenizer.ggml.{name}_token_id"));
        config.extend(id.map(|id| (format!("{name}_token_id"), id.clone())));
    }
    Ok((Value::Object(config), said.unknown()))
}

impl<'a> Said<'a> {
    fn setting(&self, key: &str) -> Option<&'a Value> {
        let key = format!("{}.{key}", self.architecture);
        let value = self.gguf.metadata.get(&key);
        self.asked.borrow_mut().insert(key);
        value
    }

    /// The keys that nothing read and no list has.
    fn unknown(&self) -> Vec<String> {
        let (asked, prefix) = (self.asked.borrow(), format!("{}.", self.architecture));
        let is_known = |key: &str| {
            let own = key.strip_prefix(&prefix);
            asked.contains(key)
                || own.is_some_and(|own| HARMLESS.contains(&own))
                || DESCRIPTIONS.contains(&key)
                || SAMPLING.iter().any(|known| key == known.0)
                || DESCRIBED.iter().any(|known| key.starts_with(known))
                || READ_ELSEWHERE.iter().any(|known| key.starts_with(known))
        };
        let keys = self.gguf.metadata.keys();
        keys.filter(|key| !is_known(key)).cloned().collect()
    }

    /// Refuses what llama.cpp would compute with.
    fn check_neutral(&self, family: Architecture) -> Result<()> {
        let of_dense = match family {
            Architecture::Llama | Architecture::Qwen2 => &NEUTRAL_IN_DENSE[..],
            Architecture::DeepSeek2 => &[],
        };
        for (key, values) in NEUTRAL.iter().chain(of_dense) {
            if let Some(found) = self.setting(key) {
                self.check(key, found, values)?;
            }
        }
        for (key, expected) in [
            ("general.type", "\"model\""),
            ("general.quantization_version", "2"),
        ] {
            self.asked.borrow_mut().insert(key.into());
            match self.gguf.metadata.get(key) {
                Some(found) if !is_value(found, expected) => {
                    let found = crate::error::shown(&found.to_string());
                    let problem = format!("key `{key}`: expected {expected}, found {found}");
                    return Err(self.malformed(problem));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Refuses all but some values, written as in JSON.
    fn check(&self, key: &str, found: &Value, values: &[&str]) -> Result<()> {
        if values.iter().any(|value| is_value(found, value)) {
            return Ok(());
        }
        Err(self.wrong(key, &values.join(" or ")))
    }

    /// Refuses a key that says otherwise than the keys that it follows from.
    fn expect(&self, key: &str, expected: u64) -> Result<()> {
        match self.setting(key) {
            Some(found) => self.check(key, found, &[&expected.to_string()]),
            None => Ok(()),
        }
    }

    fn tensor(&self, name: &str) -> Option<&'a Tensor> {
        self.gguf.tensors().find(|tensor| &*tensor.name == name)
    }

    fn malformed(&self, problem: String) -> crate::Error {
        malformed(self.path, problem)
    }

    /// An error about the value of a key.
    fn wrong(&self, key: &str, expected: &str) -> crate::Error {
        let architecture = self.architecture;
        let found = self.setting(key).map_or("nothing".into(), |value| {
            crate::error::shown(&value.to_string())
        });
        let key = format!("{architecture}.{key}");
        self.malformed(format!("key `{key}`: expected {expected}, found {found}"))
    }

    fn copy(&self, settings: &KeyTable, config: &mut Map<String, Value>) -> Result<()> {
        for (key, name, kind, need) in settings {
            match self.setting(key) {
                Some(value) => {
                    let (fits, expected) = match kind {
                        Count => (value.is_u64(), "a whole number"),
                        Number => (value.is_number(), "a number"),
                        Flag => (value.is_boolean(), "true or false"),
                    };
                    if !fits {
                        return Err(self.wrong(key, expected));
                    }
                    config.insert((*name).into(), value.clone());
                }
                None if *need == Required => return Err(self.lacks(key)),
                None => {}
            }
        }
        Ok(())
    }

    fn lacks(&self, key: &str) -> crate::Error {
        let architecture = self.architecture;
        self.malformed(format!("expected a key `{architecture}.{key}`, found none"))
    }

    /// A required whole number.
    fn count(&self, key: &str) -> Result<u64> {
        let value = self.setting(key).ok_or_else(|| self.lacks(key))?;
        value
            .as_u64()
            .ok_or_else(|| self.wrong(key, "a whole number"))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let value = self.setting(key);
        let number = value.map(|value| value.as_f64().ok_or_else(|| self.wrong(key, "a number")));
        number.transpose()
    }

    /// The first of two settings, or the second in files that are older than the first.
    fn count_of(&self, key: &str, older: &str) -> Result<u64> {
        match self.setting(key) {
            Some(_) => self.count(key),
            None => self.count(older),
        }
    }

    /// The settings of queries that share keys, and the tensors that a model of the kind may have or not.
    fn grouped_queries(&self, config: &mut Map<String, Value>) -> Result<()> {
        self.copy(GROUPED_QUERIES, config)?;
        let heads = self.count(HEADS)?;
        if self.setting(KEY_HEADS).is_none() {
            config.insert("num_key_value_heads".into(), heads.into());
        }
        let width = match config.get("head_dim").and_then(Value::as_u64) {
            Some(width) => width,
            None => self.count("embedding_length")? / heads.max(1),
        };
        self.expect("attention.value_length", width)?;
        self.expect(ROPE_DIM, width)?;
        if self.architecture == "llama" {
            let has = |parts: &[&str]| {
                let mut tensors = self.gguf.tensors();
                tensors.any(|tensor| names::is_bias_of(&tensor.name, parts))
            };
            if has(&names::ATTENTION_BIASES) {
                config.insert("attention_bias".into(), true.into());
            }
            if has(&names::FEED_FORWARD_BIASES) {
                config.insert("mlp_bias".into(), true.into());
            }
        }
        Ok(())
    }

    fn rope(&self, config: &mut Map<String, Value>, family: Architecture) -> Result<()> {
        let theta = self.number("rope.freq_base")?;
        config.insert(
            "rope_theta".into(),
            theta.map_or(json!(10000.0), Value::from),
        );
        let kind = self.setting("rope.scaling.type");
        if let Some(tensor) = self.tensor(rope::DIVISORS) {
            return self.divided(tensor, kind.filter(|kind| **kind != "none"), config);
        }
        // An older key of the same meaning.
        let older = self.number("rope.scale_linear")?;
        let factor = self.number(ROPE_FACTOR)?.or(older);
        let factor = factor.filter(|factor| *factor != 0.0);
        let mut scaling = Map::new();
        match (kind.map_or(Some("linear"), Value::as_str), factor) {
            (Some("none"), _) | (Some("linear"), None | Some(1.0)) => return Ok(()),
            (Some("linear"), Some(factor)) => {
                scaling.insert("rope_type".into(), "linear".into());
                scaling.insert("factor".into(), factor.into());
            }
            (Some("yarn"), factor) => {
                scaling.insert("rope_type".into(), "yarn".into());
                self.copy(ROPE_SCALING, &mut scaling)?;
                scaling.insert("factor".into(), factor.unwrap_or(1.0).into());
                self.attention_factor(&mut scaling, family)?;
            }
            _ => return Err(self.wrong("rope.scaling.type", "none, linear or yarn")),
        }
        config.insert("rope_scaling".into(), Value::Object(scaling));
        Ok(())
    }

    /// YaRN's factor of cosines and sines, and a deepseek2's of the softmax.
    fn attention_factor(
        &self,
        scaling: &mut Map<String, Value>,
        family: Architecture,
    ) -> Result<()> {
        if family == Architecture::DeepSeek2 {
            // llama.cpp would scale the softmax by its square too, which no `config.json` says.
            if let Some(found) = self.setting(ATTENTION_FACTOR) {
                self.check(ATTENTION_FACTOR, found, &["1"])?;
            }
            if let Some(multiplier) = self.number(YARN_LOG_MULTIPLIER)? {
                let mscale = decimal((multiplier / YARN_LOG_UNIT) as f32);
                scaling.insert("mscale".into(), mscale.clone());
                scaling.insert("mscale_all_dim".into(), mscale);
            }
            return Ok(());
        }
        let Some(factor) = self.number(ATTENTION_FACTOR)?.filter(|f| *f != 1.0) else {
            return Ok(());
        };
        if scaling.contains_key("attention_factor") {
            return Err(self.wrong(ATTENTION_FACTOR, "1 with `rope.scaling.yarn_attn_factor`"));
        }
        let own = rope::own_attention_factor(&Value::Object(scaling.clone())).unwrap_or(1.0);
        scaling.insert("attention_factor".into(), (factor * own).into());
        Ok(())
    }

    /// Rope whose frequencies a tensor divides.
    fn divided(
        &self,
        tensor: &Tensor,
        kind: Option<&Value>,
        config: &mut Map<String, Value>,
    ) -> Result<()> {
        let wrong = |expected: String| {
            let name = rope::DIVISORS;
            self.malformed(format!("tensor `{name}`: expected {expected}"))
        };
        if let Some(kind) = kind {
            let kind = crate::error::shown(&kind.to_string());
            return Err(wrong(format!(
                "no `rope.scaling.type` with it, found {kind}"
            )));
        }
        let divisors = tensor.to_f32()?;
        let width = match self.setting(ROPE_DIM) {
            Some(_) => self.count(ROPE_DIM)?,
            None => {
                let heads = self.count(HEADS)?.max(1);
                self.count("embedding_length")? / heads
            }
        };
        if divisors.len() as u64 * 2 != width {
            let (half, found) = (width / 2, divisors.len());
            return Err(wrong(format!(
                "{half} values, half of what is turned, found {found}"
            )));
        }
        let theta = config.get("rope_theta").and_then(Value::as_f64);
        let scaling = rope::scaling(theta.unwrap_or(0.0), &divisors);
        let scaling = scaling.ok_or_else(|| {
            wrong(
                "what Llama 3 divides frequencies by, found others; take the original folder"
                    .into(),
            )
        })?;
        config.insert("rope_scaling".into(), scaling);
        Ok(())
    }

    /// The other settings of a deepseek2: latent attention, mixture of experts, and version.
    fn deepseek(&self, config: &mut Map<String, Value>) -> Result<()> {
        self.copy(DEEPSEEK, config)?;
        self.latent_attention(config)?;
        let gating = self
            .setting(GATING)
            .map(|_| self.count(GATING))
            .transpose()?;
        let grouped = self.setting("expert_group_count").and_then(Value::as_u64) > Some(1);
        let (version, scoring, method) = match gating.unwrap_or(SOFTMAX) {
            SIGMOID => ("deepseek_v3", "sigmoid", "noaux_tc"),
            0 | SOFTMAX if grouped => ("deepseek_v2", "softmax", "group_limited_greedy"),
            0 | SOFTMAX => ("deepseek_v2", "softmax", "greedy"),
            _ => {
                let expected = format!("{SOFTMAX} (softmax) or {SIGMOID} (sigmoid)");
                return Err(self.wrong(GATING, &expected));
            }
        };
        let mut tensors = self.gguf.tensors();
        let bias = tensors.find(|tensor| tensor.name.ends_with(names::ROUTER_BIAS.0));
        if let Some(bias) = bias.filter(|_| scoring == "softmax") {
            let (architecture, name) = (self.architecture, &bias.name);
            let problem = format!(
                "key `{architecture}.{GATING}`: expected {SIGMOID} (sigmoid) beside the tensor `{name}`, found softmax"
            );
            return Err(self.malformed(problem));
        }
        let mut set = |key: &str, value: Value| _ = config.insert(key.into(), value);
        set("model_type", version.into());
        set("scoring_func", scoring.into());
        set("topk_method", method.into());
        let modules = self.setting(MODULES);
        let modules = modules.and_then(Value::as_u64).unwrap_or(0);
        let layers = self.count(BLOCKS)?;
        set("num_hidden_layers", layers.saturating_sub(modules).into());
        if self.number(EXPERT_SCALE)? == Some(0.0) {
            // It means none.
            config.remove("routed_scaling_factor");
        }
        for (key, absent) in ABSENT_IN_DEEPSEEK {
            if !config.contains_key(key) {
                let absent = serde_json::from_str(absent).unwrap_or_default();
                config.insert(key.into(), absent);
            }
        }
        if self.setting(EXPERT_COUNT).is_some_and(|n| *n == 0) {
            config.remove("n_routed_experts");
        }
        Ok(())
    }

    fn latent_attention(&self, config: &mut Map<String, Value>) -> Result<()> {
        // In a converted model, keys and values of all heads are one shared latent; the widths of a head have other keys.
        let key_length = self.count_of("attention.key_length_mla", "attention.key_length")?;
        let value_length = self.count_of("attention.value_length_mla", "attention.value_length")?;
        let (heads, rope_dim) = (self.count(HEADS)?, self.count(ROPE_DIM)?);
        let Some(nope) = key_length.checked_sub(rope_dim) else {
            let problem = format!(
                "expected heads wider than the {rope_dim} features that are turned, found {key_length}"
            );
            return Err(self.malformed(problem));
        };
        if self.setting("attention.key_length_mla").is_some() {
            let rank = self.count("attention.kv_lora_rank")?;
            self.expect("attention.key_length", rank + rope_dim)?;
            self.expect("attention.value_length", rank)?;
        }
        if let Some(found) = self.setting(KEY_HEADS) {
            self.check(KEY_HEADS, found, &["1", &heads.to_string()])?;
        }
        let mut set = |key: &str, value: Value| _ = config.insert(key.into(), value);
        set("qk_nope_head_dim", nope.into());
        set("v_head_dim", value_length.into());
        set("num_key_value_heads", heads.into());
        if self.setting("attention.q_lora_rank").is_none() {
            set("q_lora_rank", Value::Null);
        }
        Ok(())
    }
}
