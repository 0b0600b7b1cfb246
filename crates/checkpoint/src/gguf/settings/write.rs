//! A GGUF's metadata from a `config.json` in the published dialect.

use serde_json::Value;

use super::Architecture;
use super::tables::*;
use crate::gguf::rope;
use crate::gguf::writer::GgufValue;

/// The metadata of the sampling that a `generation_config.json` recommends.
pub(crate) fn sampling(config: &Value) -> Vec<(String, GgufValue)> {
    if config.get("do_sample") != Some(&Value::Bool(true)) {
        return vec![];
    }
    let values = SAMPLING.iter().filter_map(|(key, name, kind)| {
        let value = of_kind(config.get(name)?, *kind)?;
        Some(((*key).to_owned(), value))
    });
    values.collect()
}

/// The metadata of a config in the published dialect.
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
    for (key, name, kind, _) in theirs.iter().copied().flatten() {
        match *key {
            BLOCKS => set(
                key,
                counted(count(name) + count("num_nextn_predict_layers")),
            ),
            _ => set(
                key,
                config.get(name).and_then(|value| of_kind(value, *kind)),
            ),
        }
    }
    set("vocab_size", value("vocab_size"));
    let theta = config.get("rope_theta");
    set(
        "rope.freq_base",
        theta.and_then(|theta| of_kind(theta, Number)),
    );
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
    for (key, value) in rotary_scaling(config, family) {
        set(key, value);
    }
    metadata
}

/// The settings of rotary scaling, as keys after the architecture's name. Llama 3's is a tensor.
fn rotary_scaling(config: &Value, family: Architecture) -> Vec<(&'static str, Option<GgufValue>)> {
    let scaling = config.get("rope_scaling").filter(|s| s.is_object());
    let Some(scaling) = scaling.filter(|_| rope::divisors(config).is_none()) else {
        return vec![];
    };
    let kind = scaling.get("rope_type").and_then(GgufValue::of);
    let mut keys = vec![("rope.scaling.type", kind)];
    let is_latent = family == Architecture::DeepSeek2;
    let attention_factor = rope::attention_factor(scaling).filter(|_| !is_latent);
    for (key, name, kind, _) in ROPE_SCALING {
        let value = scaling.get(name).filter(|_| *name != "attention_factor");
        keys.push((key, value.and_then(|value| of_kind(value, *kind))));
    }
    let ratio = attention_factor.zip(rope::own_attention_factor(scaling));
    let ratio = ratio.map(|(found, own)| (found / own) as f32);
    let ratio = ratio.filter(|ratio| *ratio != 1.0);
    keys.push((ATTENTION_FACTOR, ratio.map(GgufValue::Number)));
    let mscale = scaling.get("mscale_all_dim").and_then(Value::as_f64);
    let mscale = mscale.filter(|mscale| *mscale != 0.0 && is_latent);
    let multiplier = mscale.map(|mscale| GgufValue::Number((YARN_LOG_UNIT * mscale) as f32));
    keys.push((YARN_LOG_MULTIPLIER, multiplier));
    keys
}

/// A value with the type that readers of its key expect.
fn of_kind(value: &Value, kind: Kind) -> Option<GgufValue> {
    match kind {
        Count => Some(GgufValue::Count(u32::try_from(value.as_u64()?).ok()?)),
        Number => Some(GgufValue::Number(value.as_f64()? as f32)),
        Flag => Some(GgufValue::Flag(value.as_bool()?)),
    }
}
