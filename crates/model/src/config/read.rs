//! The parts of a config, read and checked.

use kernels::fp8::Scales;
use kernels::{GroupScore, TopK};
use serde_json::json;

use super::fields::Fields;
use super::{AttentionConfig, Family, GqaConfig, MlaConfig, MoeConfig, Scoring};
use crate::Error;

pub(super) fn mla(keys: &Fields<'_>) -> Result<AttentionConfig, Error> {
    keys.only("attention_bias", &[json!(false)])?;
    keys.only("mlp_bias", &[json!(false)])?;
    let heads = keys.size("num_attention_heads")?;
    // Every head has its own keys: another number would repeat them.
    keys.only("num_key_value_heads", &[heads.into()])?;
    if !keys.mentions("q_lora_rank") {
        // Absent, it means 1536 in transformers, which no small model has.
        return Err(keys.wrong("q_lora_rank", "a whole number above 0, or null"));
    }
    let q_lora_rank = match keys.get("q_lora_rank") {
        Some(_) => Some(keys.size("q_lora_rank")?),
        None => None,
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

pub(super) fn gqa(keys: &Fields<'_>, family: Family) -> Result<AttentionConfig, Error> {
    /// What transformers assumes of a qwen2 that does not say it.
    const QWEN2_KEY_VALUE_HEADS: usize = 32;
    let heads = keys.size("num_attention_heads")?;
    let head_dim = match keys.get("head_dim") {
        Some(_) => keys.size("head_dim")?,
        None => keys.size("hidden_size")? / heads,
    };
    if head_dim % 2 == 1 || head_dim == 0 {
        return Err(keys.wrong(
            "head_dim",
            "an even number (`hidden_size / num_attention_heads` if absent)",
        ));
    }
    check_full_attention(keys)?;
    let is_said = family == Family::Llama || keys.mentions("num_key_value_heads");
    let absent = if is_said {
        heads
    } else {
        QWEN2_KEY_VALUE_HEADS
    };
    let has_bias = family == Family::Llama && keys.flag_or("attention_bias", false)?;
    Ok(AttentionConfig::Gqa(GqaConfig {
        num_key_value_heads: match keys.get("num_key_value_heads") {
            Some(_) => keys.size("num_key_value_heads")?,
            None => absent,
        },
        head_dim,
        qkv_bias: has_bias || family == Family::Qwen2,
        o_bias: has_bias,
    }))
}

/// Refuses layers that would not attend to every token before.
fn check_full_attention(keys: &Fields<'_>) -> Result<(), Error> {
    /// What transformers assumes.
    const WINDOW_FROM_LAYER: usize = 28;
    if let Some(layers) = keys.get("layer_types") {
        let layers = layers.as_array().map(Vec::as_slice).unwrap_or_default();
        let n = keys.size("num_hidden_layers")?;
        if layers.len() != n || layers.iter().any(|layer| layer != "full_attention") {
            let expected = format!("`full_attention` for each of the {n} layers");
            return Err(keys.wrong("layer_types", &expected));
        }
        return Ok(());
    }
    let is_on = keys.flag_or("use_sliding_window", false)?;
    let from = keys.count_or("max_window_layers", WINDOW_FROM_LAYER)?;
    let has_window = !keys.mentions("sliding_window") || keys.has("sliding_window");
    if is_on && has_window && from < keys.size("num_hidden_layers")? {
        return Err(keys.wrong("use_sliding_window", "false"));
    }
    Ok(())
}

/// What a family's configs mean by absent keys, as transformers has it.
struct MixtureDefaults {
    n_shared_experts: usize,
    first_k_dense_replace: usize,
    n_group: Option<usize>,
    topk_group: Option<usize>,
    norm_topk_prob: bool,
    routed_scaling_factor: f64,
}

const V2_DEFAULTS: MixtureDefaults = MixtureDefaults {
    n_shared_experts: 2,
    first_k_dense_replace: 0,
    n_group: None,
    topk_group: None,
    norm_topk_prob: false,
    routed_scaling_factor: 1.0,
};
const V3_DEFAULTS: MixtureDefaults = MixtureDefaults {
    n_shared_experts: 1,
    first_k_dense_replace: 3,
    n_group: Some(8),
    topk_group: Some(4),
    norm_topk_prob: true,
    routed_scaling_factor: 2.5,
};

pub(super) fn moe(keys: &Fields<'_>, family: Family) -> Result<MoeConfig, Error> {
    let v3 = family == Family::DeepseekV3;
    let absent = if v3 { V3_DEFAULTS } else { V2_DEFAULTS };
    let (scoring, group_score) = scoring(keys, v3)?;
    let grouped = v3 || keys.text_or("topk_method", "greedy")? != "greedy";
    let groups = |key: &str, absent: Option<usize>| {
        let absent = absent.filter(|_| !keys.mentions(key));
        match (grouped, keys.get(key), absent) {
            // Groups have no effect.
            (false, ..) => Ok(1),
            (true, None, Some(absent)) => Ok(absent),
            (true, ..) => keys.size(key),
        }
    };
    let config = MoeConfig {
        n_routed_experts: keys.size("n_routed_experts")?,
        n_shared_experts: keys.count_or("n_shared_experts", absent.n_shared_experts)?,
        moe_intermediate_size: keys.size("moe_intermediate_size")?,
        first_k_dense_replace: keys
            .count_or("first_k_dense_replace", absent.first_k_dense_replace)?,
        moe_layer_freq: keys.count_or("moe_layer_freq", 1)?.max(1),
        scoring_func: scoring,
        choice: TopK {
            top_k: keys.size("num_experts_per_tok")?,
            n_group: groups("n_group", absent.n_group)?,
            topk_group: groups("topk_group", absent.topk_group)?,
            group_score,
        },
        has_correction_bias: v3,
        norm_topk_prob: keys.flag_or("norm_topk_prob", absent.norm_topk_prob)?,
        routed_scaling_factor: keys
            .number_or("routed_scaling_factor", absent.routed_scaling_factor)?
            as f32,
    };
    check_choice(keys, &config)?;
    Ok(config)
}

/// The scoring of experts and of groups, which a version determines together.
pub(super) fn scoring(keys: &Fields<'_>, v3: bool) -> Result<(Scoring, GroupScore), Error> {
    // Transformers drops keys with the default value of its class.
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

pub(super) fn check_choice(keys: &Fields<'_>, config: &MoeConfig) -> Result<(), Error> {
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

/// The block size of FP8 weights, and the rounding of their scales: scales of activations follow those of the weights.
pub(super) fn fp8(keys: &Fields<'_>) -> Result<([usize; 2], Scales), Error> {
    let default = [128, 128];
    let Some(quantization) = keys.object("quantization_config")? else {
        return Ok((default, Scales::F32));
    };
    quantization.one_of("quant_method", &[("fp8", ())])?;
    quantization.only("fmt", &[json!("e4m3")])?;
    quantization.only("activation_scheme", &[json!("dynamic")])?;
    let block = match quantization.get("weight_block_size") {
        None => default,
        Some(value) => match serde_json::from_value::<[usize; 2]>(value.clone()) {
            Ok(block) if block.iter().all(|side| *side > 0) => block,
            _ => return Err(quantization.wrong("weight_block_size", "two sizes above 0")),
        },
    };
    let scales = match quantization.get("scale_fmt") {
        None => Scales::F32,
        Some(name) if name == "ue8m0" => Scales::PowerOfTwo,
        Some(_) => return Err(quantization.wrong("scale_fmt", "`ue8m0`, or no such key")),
    };
    Ok((block, scales))
}
