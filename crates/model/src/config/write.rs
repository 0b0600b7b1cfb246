//! A config as it is published, for files that are made from it.

use serde_json::{Value, json};

use super::{AttentionConfig, Family, ModelConfig, MoeConfig, RopeScaling, Scoring};
use kernels::{GroupScore, RopeLayout};

impl ModelConfig {
    /// The config in the published dialect, whichever it was read in: the settings of the forward pass, and nothing else.
    pub fn to_json(&self) -> Value {
        let mut config = json!({
            "model_type": self.model_type.name(),
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "rms_norm_eps": decimal(self.rms_norm_eps),
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": decimal(self.initializer_range),
            "rope_theta": self.rope.theta,
        });
        match &self.attention {
            AttentionConfig::Mla(mla) => {
                config["num_key_value_heads"] = self.num_attention_heads.into();
                config["q_lora_rank"] = mla.q_lora_rank.into();
                config["kv_lora_rank"] = mla.kv_lora_rank.into();
                config["qk_nope_head_dim"] = mla.qk_nope_head_dim.into();
                config["qk_rope_head_dim"] = mla.qk_rope_head_dim.into();
                config["v_head_dim"] = mla.v_head_dim.into();
            }
            AttentionConfig::Gqa(gqa) => {
                config["num_key_value_heads"] = gqa.num_key_value_heads.into();
                config["head_dim"] = gqa.head_dim.into();
                if gqa.o_bias {
                    config["attention_bias"] = true.into();
                }
            }
        }
        if self.mlp_bias {
            config["mlp_bias"] = true.into();
        }
        if self.rope.layout == RopeLayout::HalfSplit && self.model_type == Family::DeepseekV3 {
            config["rope_interleave"] = false.into();
        }
        if self.num_nextn_predict_layers > 0 {
            config["num_nextn_predict_layers"] = self.num_nextn_predict_layers.into();
        }
        if let Some(scaling) = scaling(&self.rope.scaling) {
            config["rope_scaling"] = scaling;
        }
        if let (Some(moe), Some(config)) = (&self.moe, config.as_object_mut()) {
            config.extend(mixture(moe));
        }
        config
    }
}

fn scaling(scaling: &RopeScaling) -> Option<Value> {
    match scaling {
        RopeScaling::Plain => None,
        RopeScaling::Linear { factor } => Some(json!({ "rope_type": "linear", "factor": factor })),
        RopeScaling::Yarn {
            factor,
            original,
            beta_fast,
            beta_slow,
            mscale,
            mscale_all_dim,
            attention_factor,
            truncate,
        } => {
            let mut scaling = json!({
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": length(*original),
                "beta_fast": beta_fast,
                "beta_slow": beta_slow,
                "mscale": mscale,
                "mscale_all_dim": mscale_all_dim,
                "truncate": truncate,
            });
            if let Some(attention_factor) = attention_factor {
                scaling["attention_factor"] = json!(attention_factor);
            }
            Some(scaling)
        }
        RopeScaling::Llama3 {
            factor,
            original,
            low,
            high,
        } => Some(json!({
            "rope_type": "llama3",
            "factor": factor,
            "original_max_position_embeddings": length(*original),
            "low_freq_factor": low,
            "high_freq_factor": high,
        })),
    }
}

/// A length as people write it: whole, unless it is not.
fn length(length: f64) -> Value {
    if length.fract() == 0.0 {
        json!(length as u64)
    } else {
        json!(length)
    }
}

fn mixture(moe: &MoeConfig) -> serde_json::Map<String, Value> {
    let choice = moe.choice;
    let method = match (choice.group_score, choice.n_group) {
        (GroupScore::TopTwoSum, _) => "noaux_tc",
        (GroupScore::Max, 1) => "greedy",
        (GroupScore::Max, _) => "group_limited_greedy",
    };
    let scoring = match moe.scoring_func {
        Scoring::Softmax => "softmax",
        Scoring::Sigmoid => "sigmoid",
    };
    let entries = [
        ("n_routed_experts", json!(moe.n_routed_experts)),
        ("n_shared_experts", json!(moe.n_shared_experts)),
        ("moe_intermediate_size", json!(moe.moe_intermediate_size)),
        ("first_k_dense_replace", json!(moe.first_k_dense_replace)),
        ("moe_layer_freq", json!(moe.moe_layer_freq)),
        ("num_experts_per_tok", json!(choice.top_k)),
        ("n_group", json!(choice.n_group)),
        ("topk_group", json!(choice.topk_group)),
        ("topk_method", json!(method)),
        ("scoring_func", json!(scoring)),
        ("norm_topk_prob", json!(moe.norm_topk_prob)),
        (
            "routed_scaling_factor",
            json!(decimal(moe.routed_scaling_factor)),
        ),
    ];
    entries
        .map(|(key, value)| (key.to_owned(), value))
        .into_iter()
        .collect()
}

/// A number as it would be written: 1e-5 in f32 is 1e-5, not the f64 next to its bits.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| value.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_config_reads_as_the_same() {
        for name in [
            "deepseek_v2_lite",
            "deepseek_v2_group",
            "deepseek_v3",
            "llama_distill",
            "qwen2_distill",
        ] {
            for file in ["config.json", "config_v5_style.json"] {
                let path = crate::goldens::path(name).join(file);
                let json = std::fs::read_to_string(&path).unwrap();
                let json = serde_json::from_str(&json).unwrap();
                let config = ModelConfig::from_json(&json, &path).unwrap();
                let written = config.to_json();
                let found = ModelConfig::from_json(&written, &path).unwrap();
                assert_eq!(found, config, "{name}/{file}");
            }
        }
    }
}
