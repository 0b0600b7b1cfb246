//! The settings of a model: in a GGUF's metadata, and in the `config.json` of the folder that it was converted from.
//!
//! Source: ggml-org/llama.cpp: convert_hf_to_gguf.py, conversion/{base,deepseek}.py, src/models/deepseek2.cpp.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::writer::GgufValue;
use super::{Gguf, decimal, malformed, rope};
use crate::{Result, Tensor};

/// A supported architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Architecture {
    /// R1's Llama distills, and other models of that shape.
    Llama,
    /// R1's Qwen distills.
    Qwen2,
    /// DeepSeek V2, V2-Lite, V3 and R1.
    DeepSeek2,
}

impl Architecture {
    pub(crate) const ALL: [(&'static str, Self); 3] = [
        ("llama", Self::Llama),
        ("qwen2", Self::Qwen2),
        ("deepseek2", Self::DeepSeek2),
    ];
}

/// Whether a setting is required.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    Required,
    Optional,
}

/// Keys of the metadata after the architecture's name, and of a `config.json`.
type KeyTable = [(&'static str, &'static str, Need)];

const COMMON: &KeyTable = &[
    ("embedding_length", "hidden_size", Need::Required),
    ("feed_forward_length", "intermediate_size", Need::Required),
    (BLOCKS, "num_hidden_layers", Need::Required),
    (
        "attention.head_count",
        "num_attention_heads",
        Need::Required,
    ),
    (
        "attention.layer_norm_rms_epsilon",
        "rms_norm_eps",
        Need::Required,
    ),
    ("context_length", "max_position_embeddings", Need::Required),
];
const GROUPED_QUERIES: &KeyTable = &[
    (
        "attention.head_count_kv",
        "num_key_value_heads",
        Need::Optional,
    ),
    ("attention.key_length", "head_dim", Need::Optional),
];
const DEEPSEEK: &KeyTable = &[
    ("attention.q_lora_rank", "q_lora_rank", Need::Optional),
    ("attention.kv_lora_rank", "kv_lora_rank", Need::Required),
    (ROPE_DIM, "qk_rope_head_dim", Need::Required),
    (
        "leading_dense_block_count",
        "first_k_dense_replace",
        Need::Optional,
    ),
    (
        "expert_feed_forward_length",
        "moe_intermediate_size",
        Need::Required,
    ),
    (EXPERT_COUNT, "n_routed_experts", Need::Optional),
    ("expert_shared_count", "n_shared_experts", Need::Optional),
    ("expert_used_count", "num_experts_per_tok", Need::Optional),
    (
        "expert_weights_scale",
        "routed_scaling_factor",
        Need::Optional,
    ),
    ("expert_weights_norm", "norm_topk_prob", Need::Optional),
    ("expert_group_count", "n_group", Need::Optional),
    ("expert_group_used_count", "topk_group", Need::Optional),
    (MODULES, "num_nextn_predict_layers", Need::Optional),
];
const ROPE_SCALING: &KeyTable = &[
    ("rope.scaling.factor", "factor", Need::Optional),
    (
        "rope.scaling.original_context_length",
        "original_max_position_embeddings",
        Need::Optional,
    ),
    ("rope.scaling.yarn_beta_fast", "beta_fast", Need::Optional),
    ("rope.scaling.yarn_beta_slow", "beta_slow", Need::Optional),
];
/// The number of layers with those for multi-token prediction, and the number of the latter.
const BLOCKS: &str = "block_count";
const MODULES: &str = "nextn_predict_layers";
const ROPE_DIM: &str = "rope.dimension_count";
const EXPERT_COUNT: &str = "expert_count";
/// The scoring function of a router, as a number.
const GATING: &str = "expert_gating_func";
const SOFTMAX: u64 = 1;
const SIGMOID: u64 = 2;
/// A deepseek2's `mscale_all_dim`, times 0.1 for historical reasons. The converter drops `mscale`: the two are the same in
/// every release, and llama.cpp assumes it.
const YARN_LOG_MULTIPLIER: &str = "rope.scaling.yarn_log_multiplier";
const YARN_LOG_UNIT: f64 = 0.1;

/// The architecture of a family of folders.
pub(crate) fn architecture(family: &str) -> Option<(&'static str, Architecture)> {
    let name = match family {
        "deepseek_v2" | "deepseek_v3" => "deepseek2",
        other => other,
    };
    let mut known = Architecture::ALL.into_iter();
    known.find(|known| known.0 == name)
}

/// The metadata of a config in the published dialect; the reverse of [`config`].
pub(crate) fn metadata(
    config: &Value,
    (name, family): (&'static str, Architecture),
) -> Vec<(String, GgufValue)> {
    let mut metadata = vec![(
        "general.architecture".to_owned(),
        GgufValue::Text(name.into()),
    )];
    let mut set = |key: &str, value: Option<GgufValue>| {
        metadata.extend(value.map(|value| (format!("{name}.{key}"), value)));
    };
    let value = |key: &str| config.get(key).and_then(GgufValue::of);
    let count = |key: &str| config.get(key).and_then(Value::as_u64).unwrap_or(0);
    let counted = |n: u64| u32::try_from(n).ok().map(GgufValue::Count);
    let theirs: &[&KeyTable] = match family {
        Architecture::Llama | Architecture::Qwen2 => &[COMMON, GROUPED_QUERIES],
        Architecture::DeepSeek2 => &[COMMON, DEEPSEEK],
    };
    for (key, name, _) in theirs.iter().copied().flatten() {
        match *key {
            BLOCKS => set(
                key,
                counted(count(name) + count("num_nextn_predict_layers")),
            ),
            _ => set(key, value(name)),
        }
    }
    set("vocab_size", value("vocab_size"));
    set("rope.freq_base", value("rope_theta"));
    match family {
        Architecture::Llama | Architecture::Qwen2 => {
            set("attention.value_length", value("head_dim"));
            set(ROPE_DIM, value("head_dim"));
        }
        Architecture::DeepSeek2 => {
            // The converted model's attention: one shared latent, and the part with rope.
            let (rank, rope) = (count("kv_lora_rank"), count("qk_rope_head_dim"));
            set("attention.head_count_kv", counted(1));
            set("attention.key_length", counted(rank + rope));
            set("attention.value_length", counted(rank));
            let head = count("qk_nope_head_dim") + rope;
            set("attention.key_length_mla", counted(head));
            set("attention.value_length_mla", value("v_head_dim"));
            let is_sigmoid = config.get("scoring_func").is_some_and(|f| f == "sigmoid");
            set(GATING, counted(if is_sigmoid { SIGMOID } else { SOFTMAX }));
        }
    }
    let scaling = config.get("rope_scaling").filter(|s| s.is_object());
    // Llama 3's scaling is a tensor.
    let scaling = scaling.filter(|_| rope::divisors(config).is_none());
    let Some(scaling) = scaling else {
        return metadata;
    };
    set(
        "rope.scaling.type",
        scaling.get("rope_type").and_then(GgufValue::of),
    );
    for (key, name, _) in ROPE_SCALING {
        set(key, scaling.get(name).and_then(GgufValue::of));
    }
    let mscale = scaling.get("mscale_all_dim").and_then(Value::as_f64);
    let mscale = mscale.filter(|mscale| *mscale != 0.0);
    let multiplier = mscale.map(|mscale| GgufValue::Number((YARN_LOG_UNIT * mscale) as f32));
    set(YARN_LOG_MULTIPLIER, multiplier);
    metadata
}

/// A file's metadata under its architecture's name.
struct Said<'a> {
    path: &'a Path,
    gguf: &'a Gguf,
    architecture: &'static str,
}

/// The `config.json` of a file.
///
/// # Errors
/// If a setting is missing or makes no sense.
pub(crate) fn config(
    path: &Path,
    gguf: &Gguf,
    (architecture, family): (&'static str, Architecture),
) -> Result<Value> {
    let said = Said {
        path,
        gguf,
        architecture,
    };
    let mut config = Map::new();
    config.insert("model_type".into(), architecture.into());
    config.insert("hidden_act".into(), "silu".into());
    said.copy(COMMON, &mut config)?;
    let Some(vocab_size) = said
        .tensor("token_embd.weight")
        .and_then(|tensor| tensor.shape.first())
    else {
        return Err(said.malformed("expected a tensor `token_embd.weight`, found none".into()));
    };
    config.insert("vocab_size".into(), (*vocab_size).into());
    let is_tied = said.tensor("output.weight").is_none();
    config.insert("tie_word_embeddings".into(), is_tied.into());
    said.rope(&mut config)?;
    match family {
        Architecture::Llama | Architecture::Qwen2 => said.copy(GROUPED_QUERIES, &mut config)?,
        Architecture::DeepSeek2 => said.deepseek(&mut config)?,
    }
    for name in ["bos", "eos"] {
        let id = gguf
            .metadata
            .get(&format!("tokenizer.ggml.{name}_token_id"));
        config.extend(id.map(|id| (format!("{name}_token_id"), id.clone())));
    }
    Ok(Value::Object(config))
}

impl<'a> Said<'a> {
    fn setting(&self, key: &str) -> Option<&'a Value> {
        self.gguf
            .metadata
            .get(&format!("{}.{key}", self.architecture))
    }

    fn tensor(&self, name: &str) -> Option<&'a Tensor> {
        self.gguf.tensors().find(|tensor| &*tensor.name == name)
    }

    fn malformed(&self, problem: String) -> crate::Error {
        malformed(self.path, problem)
    }

    fn copy(&self, settings: &KeyTable, config: &mut Map<String, Value>) -> Result<()> {
        for (key, name, need) in settings {
            match self.setting(key) {
                Some(value) => _ = config.insert((*name).into(), value.clone()),
                None if *need == Need::Required => return Err(self.lacks(key)),
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
        value.as_u64().ok_or_else(|| {
            let value = crate::error::shown(&value.to_string());
            let architecture = self.architecture;
            self.malformed(format!(
                "key `{architecture}.{key}`: expected a whole number, found {value}"
            ))
        })
    }

    /// The first of two settings, or the second in files that are older than the first.
    fn count_of(&self, key: &str, older: &str) -> Result<u64> {
        match self.setting(key) {
            Some(_) => self.count(key),
            None => self.count(older),
        }
    }

    fn rope(&self, config: &mut Map<String, Value>) -> Result<()> {
        let theta = self.setting("rope.freq_base").cloned();
        config.insert("rope_theta".into(), theta.unwrap_or_else(|| json!(10000.0)));
        let kind = self.setting("rope.scaling.type");
        let kind = kind.filter(|kind| **kind != "none");
        if let Some(tensor) = self.tensor(rope::DIVISORS) {
            return self.divided(tensor, kind, config);
        }
        let Some(kind) = kind else {
            return Ok(());
        };
        let mut scaling = Map::from_iter([("rope_type".into(), kind.clone())]);
        self.copy(ROPE_SCALING, &mut scaling)?;
        let multiplier = self.setting(YARN_LOG_MULTIPLIER).and_then(Value::as_f64);
        if let Some(multiplier) = multiplier {
            let mscale = decimal((multiplier / YARN_LOG_UNIT) as f32);
            scaling.insert("mscale".into(), mscale.clone());
            scaling.insert("mscale_all_dim".into(), mscale);
        }
        config.insert("rope_scaling".into(), Value::Object(scaling));
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
                let heads = self.count("attention.head_count")?.max(1);
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
        let mut set = |key: &str, value: Value| _ = config.insert(key.into(), value);
        // In a converted model, keys and values of all heads are one shared latent; the widths of a head have other keys.
        let key_length = self.count_of("attention.key_length_mla", "attention.key_length")?;
        let rope_dim = self.count(ROPE_DIM)?;
        let Some(nope) = key_length.checked_sub(rope_dim) else {
            let problem = format!(
                "expected heads wider than the {rope_dim} features that are turned, found {key_length}"
            );
            return Err(self.malformed(problem));
        };
        set("qk_nope_head_dim", nope.into());
        let value_length = self.count_of("attention.value_length_mla", "attention.value_length")?;
        set("v_head_dim", value_length.into());
        set(
            "num_key_value_heads",
            self.count("attention.head_count")?.into(),
        );
        if self.setting("attention.q_lora_rank").is_none() {
            set("q_lora_rank", Value::Null);
        }
        let gating = self
            .setting(GATING)
            .map(|_| self.count(GATING))
            .transpose()?;
        let grouped = self.setting("expert_group_count").and_then(Value::as_u64) > Some(1);
        let (version, scoring, method) = match gating.unwrap_or(SOFTMAX) {
            SIGMOID => ("deepseek_v3", "sigmoid", "noaux_tc"),
            0 | SOFTMAX if grouped => ("deepseek_v2", "softmax", "group_limited_greedy"),
            0 | SOFTMAX => ("deepseek_v2", "softmax", "greedy"),
            found => {
                let architecture = self.architecture;
                let problem = format!(
                    "key `{architecture}.{GATING}`: expected {SOFTMAX} (softmax) or {SIGMOID} (sigmoid), found {found}"
                );
                return Err(self.malformed(problem));
            }
        };
        set("model_type", version.into());
        set("scoring_func", scoring.into());
        set("topk_method", method.into());
        if self.setting("expert_weights_norm").is_none() {
            set("norm_topk_prob", false.into());
        }
        let modules = self.setting(MODULES);
        let modules = modules.and_then(Value::as_u64).unwrap_or(0);
        let layers = self.count(BLOCKS)?;
        set("num_hidden_layers", layers.saturating_sub(modules).into());
        if self.setting(EXPERT_COUNT).is_some_and(|n| *n == 0) {
            config.remove("n_routed_experts");
        }
        Ok(())
    }
}
