//! The architecture, read from `config.json`.
//!
//! Hugging Face writes this file in two dialects: as published (`rope_scaling`, `rope_theta`, `torch_dtype`) and as
//! transformers 5 saves it (`rope_parameters`, `dtype`). Both are read into one [`ModelConfig`] that holds only what
//! the forward pass needs, already checked: code below it does not look at the file again. Versions of the family
//! differ in the values here and in nothing else.
//!
//! Deliberately ignored, as the reference implementation does: `num_key_value_heads` of latent attention,
//! `ep_size`, `pretraining_tp`, `aux_loss_alpha` (a recipe's business), and V2's `norm_topk_prob`, which never had an
//! effect in releases.

use std::ops::Range;
use std::path::Path;

use burn::tensor::Device;
use kernels::fp8::Scales;
use kernels::{Choice, GroupScore, Pairs};
use serde_json::Value;

use crate::Error;
use crate::rope::RotaryTable;

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
    /// The mixture of experts, if there is one.
    pub moe: Option<MoeConfig>,
    /// Block size of FP8 weights.
    pub fp8_block: [usize; 2],
    /// Which numbers the scales of FP8 products may be.
    pub fp8_scales: Scales,
}

/// The families of checkpoints that the one model computes.
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
}

/// Rotary positions.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// How the frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
    /// Which features form a pair.
    pub pairs: Pairs,
}

/// Changes to the rotary frequencies.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    Plain,
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
        /// Temperature settings of the cosines and of the softmax; 0 where absent.
        mscale: f64,
        /// See `mscale`.
        mscale_all_dim: f64,
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
    /// Experts every token uses, fused into one MLP of so many widths.
    pub n_shared_experts: usize,
    /// Inner width of one expert.
    pub moe_intermediate_size: usize,
    /// Layers below this are dense.
    pub first_k_dense_replace: usize,
    /// From there on every so many layers is a mixture.
    pub moe_layer_freq: usize,
    /// How scores are made from logits.
    pub scoring_func: Scoring,
    /// How experts are chosen from scores.
    pub choice: Choice,
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

impl ModelConfig {
    /// Reads the content of a `config.json`; `file` is for messages.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key, if it is missing, of another type, or has a value we do not compute.
    pub fn from_json(json: &Value, file: &Path) -> Result<Self, Error> {
        let keys = Keys {
            json,
            file,
            prefix: "",
        };
        let model_type = keys.one_of("model_type", &Family::ALL)?;
        keys.one_of("hidden_act", &[("silu", ())])?;
        if keys.has("mlp_bias") {
            keys.one_of_bools("mlp_bias", false)?;
        }
        let deepseek = matches!(model_type, Family::DeepseekV2 | Family::DeepseekV3);
        let config = Self {
            model_type,
            vocab_size: keys.size("vocab_size")?,
            hidden_size: keys.size("hidden_size")?,
            intermediate_size: keys.size("intermediate_size")?,
            num_hidden_layers: keys.size("num_hidden_layers")?,
            num_nextn_predict_layers: keys.count_or("num_nextn_predict_layers", 0)?,
            num_attention_heads: keys.size("num_attention_heads")?,
            rms_norm_eps: keys.number_or("rms_norm_eps", 1e-6)? as f32,
            max_position_embeddings: keys.size("max_position_embeddings")?,
            tie_word_embeddings: keys.flag_or("tie_word_embeddings", false)?,
            initializer_range: keys.number_or("initializer_range", 0.02)? as f32,
            attention: if deepseek {
                mla(&keys)?
            } else {
                gqa(&keys, model_type)?
            },
            rope: rope(&keys, model_type)?,
            moe: if deepseek && keys.has("n_routed_experts") {
                Some(moe(&keys, model_type)?)
            } else {
                None
            },
            fp8_block: fp8_block(&keys)?,
            fp8_scales: fp8_scales(&keys)?,
        };
        config.check_sizes(&keys)?;
        Ok(config)
    }

    fn check_sizes(&self, keys: &Keys<'_>) -> Result<(), Error> {
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

    /// Width of the part of a head that is turned by its position.
    pub fn rope_dim(&self) -> usize {
        match &self.attention {
            AttentionConfig::Mla(mla) => mla.qk_rope_head_dim,
            AttentionConfig::Gqa(gqa) => gqa.head_dim,
        }
    }

    /// The rotary tables of some positions.
    pub fn rotary_table(&self, positions: Range<usize>, device: &Device) -> RotaryTable {
        self.rope.table(positions, self.rope_dim(), device)
    }

    /// Numbers one token adds to the cache of one layer.
    pub fn cache_width(&self) -> usize {
        match &self.attention {
            AttentionConfig::Mla(mla) => mla.kv_lora_rank + mla.qk_rope_head_dim,
            AttentionConfig::Gqa(gqa) => 2 * gqa.num_key_value_heads * gqa.head_dim,
        }
    }
}

fn mla(keys: &Keys<'_>) -> Result<AttentionConfig, Error> {
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

fn gqa(keys: &Keys<'_>, family: Family) -> Result<AttentionConfig, Error> {
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

fn rope(keys: &Keys<'_>, family: Family) -> Result<RopeConfig, Error> {
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
        pairs: if interleaved {
            Pairs::Interleaved
        } else {
            Pairs::Halves
        },
    })
}

fn rope_scaling(keys: &Keys<'_>) -> Result<RopeScaling, Error> {
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

fn moe(keys: &Keys<'_>, family: Family) -> Result<MoeConfig, Error> {
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
        choice: Choice {
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
fn scoring(keys: &Keys<'_>, v3: bool) -> Result<(Scoring, GroupScore), Error> {
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

fn check_choice(keys: &Keys<'_>, config: &MoeConfig) -> Result<(), Error> {
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
fn fp8_scales(keys: &Keys<'_>) -> Result<Scales, Error> {
    let Some(quantization) = keys.object("quantization_config")? else {
        return Ok(Scales::F32);
    };
    match quantization.json.get("scale_fmt") {
        None | Some(Value::Null) => Ok(Scales::F32),
        Some(name) if name == "ue8m0" => Ok(Scales::PowerOfTwo),
        Some(_) => Err(quantization.wrong("scale_fmt", "`ue8m0`, or no such key")),
    }
}

fn fp8_block(keys: &Keys<'_>) -> Result<[usize; 2], Error> {
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

/// A JSON object whose keys are read with their types checked.
struct Keys<'a> {
    json: &'a Value,
    file: &'a Path,
    prefix: &'static str,
}

/// No size in a config may exceed this: it bounds every allocation made from one.
const LARGEST_SIZE: u64 = 1 << 24;
/// No model has more layers, or more experts in all of them: every name of a tensor is listed once.
const MOST_LAYERS: usize = 1 << 10;
const MOST_EXPERTS: usize = 1 << 20;

impl<'a> Keys<'a> {
    fn has(&self, key: &str) -> bool {
        self.json.get(key).is_some_and(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, expected: &str) -> Error {
        let found = self.json.get(key).map_or_else(
            || "nothing".into(),
            |value| {
                let text = value.to_string();
                if text.chars().count() > 80 {
                    format!("{}…", text.chars().take(80).collect::<String>())
                } else {
                    text
                }
            },
        );
        let key = if self.prefix.is_empty() {
            key.into()
        } else {
            format!("{}.{key}", self.prefix)
        };
        Error::Config {
            file: self.file.into(),
            key,
            expected: expected.into(),
            found,
        }
    }

    fn size(&self, key: &str) -> Result<usize, Error> {
        match self.json.get(key).and_then(Value::as_u64) {
            Some(size) if (1..=LARGEST_SIZE).contains(&size) => Ok(size as usize),
            _ => Err(self.wrong(key, "a whole number above 0")),
        }
    }

    fn count_or(&self, key: &str, default: usize) -> Result<usize, Error> {
        if !self.has(key) {
            return Ok(default);
        }
        match self.json.get(key).and_then(Value::as_u64) {
            Some(count) if count <= LARGEST_SIZE => Ok(count as usize),
            _ => Err(self.wrong(key, "a whole number")),
        }
    }

    fn number(&self, key: &str) -> Result<f64, Error> {
        self.json
            .get(key)
            .and_then(Value::as_f64)
            .filter(|n| n.is_finite())
            .ok_or_else(|| self.wrong(key, "a number"))
    }

    fn number_or(&self, key: &str, default: f64) -> Result<f64, Error> {
        if self.has(key) {
            self.number(key)
        } else {
            Ok(default)
        }
    }

    fn flag_or(&self, key: &str, default: bool) -> Result<bool, Error> {
        if !self.has(key) {
            return Ok(default);
        }
        self.json
            .get(key)
            .and_then(Value::as_bool)
            .ok_or_else(|| self.wrong(key, "true or false"))
    }

    fn one_of_bools(&self, key: &str, only: bool) -> Result<(), Error> {
        if self.flag_or(key, only)? == only {
            Ok(())
        } else {
            Err(self.wrong(key, &only.to_string()))
        }
    }

    fn text_or(&self, key: &str, default: &'a str) -> Result<&'a str, Error> {
        if !self.has(key) {
            return Ok(default);
        }
        self.json
            .get(key)
            .and_then(Value::as_str)
            .ok_or_else(|| self.wrong(key, "a text"))
    }

    fn one_of<T: Copy>(&self, key: &str, choices: &[(&str, T)]) -> Result<T, Error> {
        let found = self.json.get(key).and_then(Value::as_str);
        let names = || {
            choices
                .iter()
                .map(|(name, _)| *name)
                .collect::<Vec<_>>()
                .join(", ")
        };
        choices
            .iter()
            .find(|(name, _)| Some(*name) == found)
            .map(|(_, value)| *value)
            .ok_or_else(|| match choices {
                [(only, _)] => self.wrong(key, only),
                _ => self.wrong(key, &format!("one of {}", names())),
            })
    }

    fn one_of_or<T: Copy>(&self, key: &str, choices: &[(&str, T)], default: T) -> Result<T, Error> {
        if self.has(key) {
            self.one_of(key, choices)
        } else {
            Ok(default)
        }
    }

    fn object(&self, key: &'static str) -> Result<Option<Self>, Error> {
        match self.json.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(json @ Value::Object(_)) => Ok(Some(Self {
                json,
                file: self.file,
                prefix: key,
            })),
            Some(_) => Err(self.wrong(key, "an object")),
        }
    }
}
