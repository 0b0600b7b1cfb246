//! The architecture, read from `config.json`.
//!
//! Hugging Face writes this file in two dialects: as published (`rope_scaling`, `rope_theta`, `torch_dtype`) and as
//! transformers 5 saves it (`rope_parameters`, `dtype`). Both are read into one [`ModelConfig`] that holds only what
//! the forward pass needs, already checked: code below it does not look at the file again. Versions of the family
//! differ in the values here and in nothing else.
//!
//! A key that is read is obeyed, one of `table.rs` changes nothing or is refused, and any other is unknown:
//! [`ModelConfig::unknown_keys`]. What an absent key means is what it means in transformers.

mod fields;
mod read;
mod rope_scaling;
mod table;
mod write;

use std::path::Path;

use kernels::fp8::Scales;
use kernels::{RopeLayout, TopK};
use serde_json::Value;

use self::fields::{Asked, Fields};
use self::read::{fp8, gqa, mla, moe};
use self::rope_scaling::rope;
use crate::Error;

/// Everything the forward pass needs to know of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The family, as the checkpoint names it.
    pub model_type: Family,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Inner width of a dense feed-forward layer.
    pub intermediate_size: usize,
    /// Decoder layers, MTP layers not counted.
    pub num_hidden_layers: usize,
    /// Multi-token-prediction layers, stored after the decoder layers.
    pub num_nextn_predict_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Epsilon of the norms, except the latent ones (always 1e-6).
    pub rms_norm_eps: f32,
    /// Longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Standard deviation of fresh weights.
    pub initializer_range: f32,
    /// The form of attention.
    pub attention: AttentionConfig,
    /// Rotary positions.
    pub rope: RopeConfig,
    /// Whether dense feed-forward layers have biases.
    pub mlp_bias: bool,
    /// The mixture of experts, if there is one.
    pub moe: Option<MoeConfig>,
    /// Block size of FP8 weights.
    pub fp8_block: [usize; 2],
    /// Which numbers the scales of FP8 products may be.
    pub fp8_scales: Scales,
}

/// The families of checkpoints, all computed by the same model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// DeepSeek V2, V2-Lite, V2.5.
    DeepseekV2,
    /// DeepSeek V3, R1, V3.1.
    DeepseekV3,
    /// R1's Qwen distills.
    Qwen2,
    /// R1's Llama distills.
    Llama,
}

impl Family {
    const ALL: [(&'static str, Self); 4] = [
        ("deepseek_v2", Self::DeepseekV2),
        ("deepseek_v3", Self::DeepseekV3),
        ("qwen2", Self::Qwen2),
        ("llama", Self::Llama),
    ];

    /// The checkpoint's name of the family.
    pub fn name(self) -> &'static str {
        Self::ALL
            .iter()
            .find(|(_, family)| *family == self)
            .map_or("", |(name, _)| name)
    }
}

/// Latent attention, or grouped queries.
#[derive(Clone, Debug, PartialEq)]
pub enum AttentionConfig {
    /// DeepSeek's multi-head latent attention.
    Mla(MlaConfig),
    /// Keys and values shared by groups of query heads.
    Gqa(GqaConfig),
}

/// Sizes of latent attention.
#[derive(Clone, Debug, PartialEq)]
pub struct MlaConfig {
    /// Width of the query bottleneck; none means a plain `q_proj`.
    pub q_lora_rank: Option<usize>,
    /// Width of the key-value latent, which the cache stores.
    pub kv_lora_rank: usize,
    /// Part of a head without positions.
    pub qk_nope_head_dim: usize,
    /// Part of a head with rotary positions; its key is one for all heads.
    pub qk_rope_head_dim: usize,
    /// Width of a head's value.
    pub v_head_dim: usize,
}

impl MlaConfig {
    /// Width of a head's query and key.
    pub fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }
}

/// Sizes of grouped-query attention.
#[derive(Clone, Debug, PartialEq)]
pub struct GqaConfig {
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether the output projection has one.
    pub o_bias: bool,
}

/// Rotary positions.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// How the frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
    /// Which features form a pair.
    pub layout: RopeLayout,
}

/// Changes to the rotary frequencies.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    Plain,
    /// All positions are divided.
    Linear {
        /// By this.
        factor: f64,
    },
    /// YaRN, arXiv:2309.00071.
    Yarn {
        /// Stretch of the low frequencies.
        factor: f64,
        /// Context length the model was first trained at.
        original: f64,
        /// Rotations above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is stretched in full.
        beta_slow: f64,
        /// Temperature settings of the cosines and of the softmax; 0 if absent.
        mscale: f64,
        /// See `mscale`.
        mscale_all_dim: f64,
        /// The factor of the cosines and sines, in place of the one that follows from the settings.
        attention_factor: Option<f64>,
        /// Whether the ends of the ramp are rounded to whole pairs.
        truncate: bool,
    },
    /// Llama 3's.
    Llama3 {
        /// Stretch of the low frequencies.
        factor: f64,
        /// Context length the model was first trained at.
        original: f64,
        /// Wavelengths above `original / low` are stretched in full.
        low: f64,
        /// Wavelengths below `original / high` are kept.
        high: f64,
    },
}

/// The mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    /// Experts the router chooses among.
    pub n_routed_experts: usize,
    /// Experts that every token uses, fused into one MLP of this many inner widths.
    pub n_shared_experts: usize,
    /// Inner width of one expert.
    pub moe_intermediate_size: usize,
    /// Layers below this are dense.
    pub first_k_dense_replace: usize,
    /// From there on, one layer in this many is a mixture.
    pub moe_layer_freq: usize,
    /// How scores are made from logits.
    pub scoring_func: Scoring,
    /// How experts are chosen from scores.
    pub choice: TopK,
    /// Whether a bias takes part in choosing.
    pub has_correction_bias: bool,
    /// Divide the chosen weights by their sum.
    pub norm_topk_prob: bool,
    /// Multiplies the chosen weights.
    pub routed_scaling_factor: f32,
}

impl MoeConfig {
    /// Whether a layer is a mixture or dense.
    pub fn is_moe_layer(&self, layer_idx: usize) -> bool {
        layer_idx >= self.first_k_dense_replace && layer_idx.is_multiple_of(self.moe_layer_freq)
    }
}

/// How router scores are made from logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// V2.
    Softmax,
    /// V3.
    Sigmoid,
}

/// No model has more layers, or more experts in all of them: every name of a tensor is listed once.
const MOST_LAYERS: usize = 1 << 10;
const MOST_EXPERTS: usize = 1 << 20;

impl ModelConfig {
    /// Reads the content of a `config.json`; `file` is for messages.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key, if it is missing, of another type, or has a value we do not compute.
    pub fn from_json(json: &Value, file: &Path) -> Result<Self, Error> {
        Self::read(&Fields::new(json, file, &Asked::default()))
    }

    /// The keys of a `config.json` that are neither obeyed nor known to change nothing, with their values. Those in an object are
    /// named with it: `rope_scaling.factor`.
    ///
    /// # Errors
    /// As [`ModelConfig::from_json`].
    pub fn unknown_keys(json: &Value, file: &Path) -> Result<Vec<(String, Value)>, Error> {
        let asked = Asked::default();
        let keys = Fields::new(json, file, &asked);
        let config = Self::read(&keys)?;
        let mut unknown = keys.rest(&table::harmless(config.model_type));
        unknown.retain(|(key, value)| !table::is_off(key, value));
        Ok(unknown)
    }

    fn read(keys: &Fields<'_>) -> Result<Self, Error> {
        let model_type = keys.one_of("model_type", &Family::ALL)?;
        // Two names of one function.
        keys.one_of("hidden_act", &[("silu", ()), ("swish", ())])?;
        table::check_neutral(keys)?;
        let deepseek = matches!(model_type, Family::DeepseekV2 | Family::DeepseekV3);
        let (fp8_block, fp8_scales) = fp8(keys)?;
        let config = Self {
            model_type,
            vocab_size: keys.size("vocab_size")?,
            hidden_size: keys.size("hidden_size")?,
            intermediate_size: keys.size("intermediate_size")?,
            num_hidden_layers: keys.size("num_hidden_layers")?,
            num_nextn_predict_layers: if deepseek {
                keys.count_or("num_nextn_predict_layers", 0)?
            } else {
                0
            },
            num_attention_heads: keys.size("num_attention_heads")?,
            rms_norm_eps: keys.positive_or("rms_norm_eps", 1e-6)? as f32,
            max_position_embeddings: keys.size("max_position_embeddings")?,
            tie_word_embeddings: keys.flag_or("tie_word_embeddings", false)?,
            initializer_range: keys.number_or("initializer_range", 0.02)? as f32,
            attention: if deepseek {
                mla(keys)?
            } else {
                gqa(keys, model_type)?
            },
            rope: rope(keys, model_type)?,
            mlp_bias: model_type == Family::Llama && keys.flag_or("mlp_bias", false)?,
            moe: if deepseek && keys.has("n_routed_experts") {
                Some(moe(keys, model_type)?)
            } else {
                None
            },
            fp8_block,
            fp8_scales,
        };
        config.check_sizes(keys)?;
        Ok(config)
    }

    fn check_sizes(&self, keys: &Fields<'_>) -> Result<(), Error> {
        let layers = self.num_hidden_layers + self.num_nextn_predict_layers;
        if layers > MOST_LAYERS {
            return Err(keys.wrong("num_hidden_layers", &format!("at most {MOST_LAYERS}")));
        }
        if self
            .moe
            .as_ref()
            .is_some_and(|moe| moe.n_routed_experts > MOST_EXPERTS / layers)
        {
            let expected = format!("at most {MOST_EXPERTS} experts in all layers");
            return Err(keys.wrong("n_routed_experts", &expected));
        }
        let AttentionConfig::Gqa(gqa) = &self.attention else {
            return Ok(());
        };
        if !self
            .num_attention_heads
            .is_multiple_of(gqa.num_key_value_heads)
        {
            let expected = format!(
                "a divisor of the {} attention heads",
                self.num_attention_heads
            );
            return Err(keys.wrong("num_key_value_heads", &expected));
        }
        Ok(())
    }

    /// Whether a layer is a mixture of experts.
    pub fn is_moe_layer(&self, layer_idx: usize) -> bool {
        self.moe
            .as_ref()
            .is_some_and(|moe| moe.is_moe_layer(layer_idx))
    }

    /// The positions that the model was made for: `max_position_embeddings`, or the length that its rotary frequencies are
    /// stretched to where that is more.
    pub fn positions(&self) -> usize {
        let stretched = match self.rope.scaling {
            RopeScaling::Yarn {
                factor, original, ..
            }
            | RopeScaling::Llama3 {
                factor, original, ..
            } => (factor * original) as usize,
            _ => 0,
        };
        self.max_position_embeddings.max(stretched)
    }

    /// Width of the part of a head that is rotated by its position.
    pub fn rope_dim(&self) -> usize {
        match &self.attention {
            AttentionConfig::Mla(mla) => mla.qk_rope_head_dim,
            AttentionConfig::Gqa(gqa) => gqa.head_dim,
        }
    }

    /// Rows that one token adds to the cache of one layer, and numbers in each.
    pub fn cache_rows(&self) -> [usize; 2] {
        match &self.attention {
            AttentionConfig::Mla(mla) => [1, mla.kv_lora_rank + mla.qk_rope_head_dim],
            AttentionConfig::Gqa(gqa) => [2 * gqa.num_key_value_heads, gqa.head_dim],
        }
    }
}
