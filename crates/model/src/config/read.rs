//! The parts of a config, read and checked.

use kernels::fp8::Scales;
use kernels::{GroupScore, RopeLayout, TopK};
use serde_json::Value;

use super::keys::Keys;
use super::{
    AttentionConfig, Family, GqaConfig, MlaConfig, MoeConfig, RopeConfig, RopeScaling, Scoring,
};
use crate::Error;

pub(super) fn mla(keys: &Keys<'_>) -> Result<AttentionConfig, Error> {
    if keys.has("attention_bias") {
        keys.one_of_bools("attention_bias", false)?;
    }
    let q_lora_rank = if keys.has("q_lora_rank") {
        Some(keys.size("q_lora_rank")?)
    } else {
        None
    };
    let mla = MlaConfig {
        q_lora_rank,
        kv_lora_rank: keys.size("kv_lora_rank")?,
        qk_nope_head_dim: keys.size("qk_nope_head_dim")?,
        qk_rope_head_dim: keys.size("qk_rope_head_dim")?,
        v_head_dim: keys.size("v_head_dim")?,
    };
    if mla.qk_rope_head_dim % 2 == 1 {
        return Err(keys.wrong("qk_rope_head_dim", "an even number"));
    }
    Ok(AttentionConfig::Mla(mla))
}

pub(super) fn gqa(keys: &Keys<'_>, family: Family) -> Result<AttentionConfig, Error> {
    let heads = keys.size("num_attention_heads")?;
    if keys.has("use_sliding_window") {
        keys.one_of_bools("use_sliding_window", false)?;
    }
    if keys.has("attention_bias") && family == Family::Llama {
        keys.one_of_bools("attention_bias", false)?;
    }
    let head_dim = if keys.has("head_dim") {
        keys.size("head_dim")?
    } else {
        keys.size("hidden_size")? / heads
    };
    if head_dim % 2 == 1 || head_dim == 0 {
        return Err(keys.wrong(
            "head_dim",
            "an even number (`hidden_size / num_attention_heads` if absent)",
        ));
    }
    let num_key_value_heads = keys.count_or("num_key_value_heads", heads)?.max(1);
    Ok(AttentionConfig::Gqa(GqaConfig {
        num_key_value_heads,
        head_dim,
        qkv_bias: family == Family::Qwen2,
    }))
}

pub(super) fn rope(keys: &Keys<'_>, family: Family) -> Result<RopeConfig, Error> {
    // The two dialects: everything in one object, or theta beside an optional object of the rest.
    let object = if keys.has("rope_parameters") {
        keys.object("rope_parameters")?
    } else {
        keys.object("rope_scaling")?
    };
    let theta = match object.as_ref().filter(|object| object.has("rope_theta")) {
        Some(object) => object.number("rope_theta")?,
        None => keys.number_or("rope_theta", 10_000.0)?,
    };
    if theta <= 1.0 {
        return Err(keys.wrong("rope_theta", "a number above 1"));
    }
    let scaling = object.map_or(Ok(RopeScaling::Plain), |object| rope_scaling(&object))?;
    let interleaved = match family {
        Family::DeepseekV2 => true,
        Family::DeepseekV3 => keys.flag_or("rope_interleave", true)?,
        Family::Qwen2 | Family::Llama => false,
    };
    Ok(RopeConfig {
        theta,
        scaling,
        layout: if interleaved {
            RopeLayout::Interleaved
        } else {
            RopeLayout::HalfSplit
        },
    })
}

pub(super) fn rope_scaling(keys: &Keys<'_>) -> Result<RopeScaling, Error> {
    let key = if keys.has("rope_type") {
        "rope_type"
    } else {
        "type"
    };
    if !keys.has(key) {
        return Ok(RopeScaling::Plain);
    }
    let positive = |key: &str| match keys.number(key)? {
        number if number > 0.0 => Ok(number),
        _ => Err(keys.wrong(key, "a number above 0")),
    };
    match keys.one_of(key, &[("default", 0), ("yarn", 1), ("llama3", 2)])? {
        0 => Ok(RopeScaling::Plain),
        1 => Ok(RopeScaling::Yarn {
            factor: positive("factor")?,
            original: positive("original_max_position_embeddings")?,
            beta_fast: keys.number_or("beta_fast", 32.0)?,
            beta_slow: keys.number_or("beta_slow", 1.0)?,
            mscale: keys.number_or("mscale", 0.0)?,
            mscale_all_dim: keys.number_or("mscale_all_dim", 0.0)?,
        }),
        _ => Ok(RopeScaling::Llama3 {
            factor: positive("factor")?,
            original: positive("original_max_position_embeddings")?,
            low: positive("low_freq_factor")?,
            high: positive("high_freq_factor")?,
        }),
    }
}

pub(super) fn moe(keys: &Keys<'_>, family: Family) -> Result<MoeConfig, Error> {
    let v3 = family == Family::DeepseekV3;
    let (scoring, group_score) = scoring(keys, v3)?;
    let grouped = keys.text_or("topk_method", if v3 { "noaux_tc" } else { "greedy" })? != "greedy";
    let config = MoeConfig {
        n_routed_experts: keys.size("n_routed_experts")?,
        n_shared_experts: keys.count_or("n_shared_experts", 0)?,
        moe_intermediate_size: keys.size("moe_intermediate_size")?,
        first_k_dense_replace: keys.count_or("first_k_dense_replace", 0)?,
        moe_layer_freq: keys.count_or("moe_layer_freq", 1)?.max(1),
        scoring_func: scoring,
        choice: TopK {
            top_k: keys.size("num_experts_per_tok")?,
            n_group: if grouped {
                keys.count_or("n_group", 1)?.max(1)
            } else {
                1
            },
            topk_group: if grouped {
                keys.count_or("topk_group", 1)?.max(1)
            } else {
                1
            },
            group_score,
        },
        has_correction_bias: v3,
        norm_topk_prob: v3 && keys.flag_or("norm_topk_prob", true)?,
        routed_scaling_factor: keys.number_or("routed_scaling_factor", 1.0)? as f32,
    };
    check_choice(keys, &config)?;
    Ok(config)
}

/// How scores are made, and what a group is worth: the two go together, by version.
pub(super) fn scoring(keys: &Keys<'_>, v3: bool) -> Result<(Scoring, GroupScore), Error> {
    // Transformers drops the keys whose value its class implies.
    let methods = [
        ("greedy", GroupScore::Max),
        ("group_limited_greedy", GroupScore::Max),
        ("noaux_tc", GroupScore::TopTwoSum),
    ];
    let group_score = keys.one_of_or(
        "topk_method",
        &methods,
        if v3 {
            GroupScore::TopTwoSum
        } else {
            GroupScore::Max
        },
    )?;
    let scoring = keys.one_of_or(
        "scoring_func",
        &[("softmax", Scoring::Softmax), ("sigmoid", Scoring::Sigmoid)],
        if v3 {
            Scoring::Sigmoid
        } else {
            Scoring::Softmax
        },
    )?;
    if v3 != (group_score == GroupScore::TopTwoSum) {
        return Err(keys.wrong(
            "topk_method",
            if v3 {
                "noaux_tc"
            } else {
                "greedy or group_limited_greedy"
            },
        ));
    }
    if v3 != (scoring == Scoring::Sigmoid) {
        return Err(keys.wrong("scoring_func", if v3 { "sigmoid" } else { "softmax" }));
    }
    Ok((scoring, group_score))
}

pub(super) fn check_choice(keys: &Keys<'_>, config: &MoeConfig) -> Result<(), Error> {
    let (experts, choice) = (config.n_routed_experts, config.choice);
    if !experts.is_multiple_of(choice.n_group) {
        return Err(keys.wrong("n_group", &format!("a divisor of the {experts} experts")));
    }
    if choice.topk_group > choice.n_group {
        return Err(keys.wrong(
            "topk_group",
            &format!("at most the {} groups", choice.n_group),
        ));
    }
    let open = experts / choice.n_group * choice.topk_group.min(choice.n_group);
    let open = if choice.n_group == 1 { experts } else { open };
    if choice.top_k > open {
        return Err(keys.wrong(
            "num_experts_per_tok",
            &format!("at most the {open} experts open to a token"),
        ));
    }
    Ok(())
}

/// How scales are rounded: those of activations follow those of the weights.
pub(super) fn fp8_scales(keys: &Keys<'_>) -> Result<Scales, Error> {
    let Some(quantization) = keys.object("quantization_config")? else {
        return Ok(Scales::F32);
    };
    match quantization.json.get("scale_fmt") {
        None | Some(Value::Null) => Ok(Scales::F32),
        Some(name) if name == "ue8m0" => Ok(Scales::PowerOfTwo),
        Some(_) => Err(quantization.wrong("scale_fmt", "`ue8m0`, or no such key")),
    }
}

pub(super) fn fp8_block(keys: &Keys<'_>) -> Result<[usize; 2], Error> {
    let default = [128, 128];
    let Some(quantization) = keys.object("quantization_config")? else {
        return Ok(default);
    };
    quantization.one_of("quant_method", &[("fp8", ())])?;
    match quantization.json.get("weight_block_size") {
        None | Some(Value::Null) => Ok(default),
        Some(value) => match serde_json::from_value::<[usize; 2]>(value.clone()) {
            Ok(block) if block.iter().all(|side| *side > 0) => Ok(block),
            _ => Err(quantization.wrong("weight_block_size", "two sizes above 0")),
        },
    }
}
