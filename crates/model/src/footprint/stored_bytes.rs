//! The bytes of a model's weights in a file, by the formats of its tensors, from shapes alone.

use std::collections::BTreeMap;

use checkpoint::{DType, Folder, GgufTensor, RowOrder};

use super::BYTES_OF_F32;
use crate::Error;
use crate::config::{AttentionConfig, ModelConfig, MoeConfig};
use crate::export::WeightFormat;
use crate::export::mix::Mix;
use crate::keys::{Module, ParamKey, ParamPart, layer_keys, weight_of_scale};
use crate::precision::PrecisionClass;

/// How a file stores a model's weights.
#[derive(Clone, Debug)]
pub enum StoredAs {
    /// In a Hugging Face folder.
    Folder(WeightFormat),
    /// In a GGUF, each tensor in a type of its own.
    Gguf(Mix),
}

/// Bytes by the name of the dtype.
pub type BytesByFormat = BTreeMap<String, f64>;

/// The bytes of the weights of a model of this config, without layers for multi-token prediction.
pub fn stored_bytes(config: &ModelConfig, stored: &StoredAs) -> BytesByFormat {
    let mut bytes = BytesByFormat::new();
    for (key, shape, count) in tensors(config) {
        for (dtype, of_dtype) in tensor_bytes(config, stored, key, &shape) {
            *bytes.entry(dtype).or_default() += count * of_dtype;
        }
    }
    bytes
}

/// Keys with shapes, and how many tensors each stands for: the first expert of a layer for all.
pub(super) fn tensors(config: &ModelConfig) -> Vec<(ParamKey, Vec<usize>, f64)> {
    let outside = [Module::Embedding, Module::FinalNorm, Module::Head];
    let outside = outside.map(|module| ParamKey::weight(None, module));
    let mut found: Vec<(ParamKey, Vec<usize>, f64)> = outside
        .into_iter()
        .filter_map(|key| Some((key, key.shape(config)?, 1.0)))
        .collect();
    let one = config.moe.clone().map(|moe| MoeConfig {
        n_routed_experts: 1,
        ..moe
    });
    let experts = config.moe.as_ref().map_or(1, |moe| moe.n_routed_experts) as f64;
    let narrow = ModelConfig {
        moe: one,
        ..config.clone()
    };
    for layer_idx in 0..config.num_hidden_layers {
        for (name, _) in layer_keys(&narrow, layer_idx) {
            let key = ParamKey::parse(&name);
            let Some((key, shape)) = key.and_then(|key| Some((key, key.shape(config)?))) else {
                continue;
            };
            let count = match key.module {
                Module::Expert(..) => experts,
                _ => 1.0,
            };
            found.push((key, shape, count));
        }
    }
    found
}

/// The bytes of one tensor.
fn tensor_bytes(
    config: &ModelConfig,
    stored: &StoredAs,
    key: ParamKey,
    shape: &[usize],
) -> Vec<(String, f64)> {
    match stored {
        StoredAs::Folder(format) => folder_bytes(config, *format, key, shape),
        StoredAs::Gguf(mix) => gguf_bytes(config, mix, key, shape),
    }
}

fn folder_bytes(
    config: &ModelConfig,
    format: WeightFormat,
    key: ParamKey,
    shape: &[usize],
) -> Vec<(String, f64)> {
    let elements = shape.iter().map(|n| *n as f64).product::<f64>();
    let is_fp8 = format == WeightFormat::Fp8
        && key.part == ParamPart::Weight
        && PrecisionClass::of(&key.to_string()).is_lowered();
    if !is_fp8 {
        let dtype = match key.part {
            ParamPart::CorrectionBias => DType::F32,
            _ => format.dtype(),
        };
        return vec![(dtype.to_string(), elements * dtype.size_bytes() as f64)];
    }
    let [rows, cols] = config.fp8_block;
    let blocks = |n: usize, block: usize| n.div_ceil(block.max(1)) as f64;
    let scales = blocks(shape[0], rows) * blocks(shape.get(1).copied().unwrap_or(1), cols);
    vec![
        (DType::F8E4M3.to_string(), elements),
        (DType::F32.to_string(), 4.0 * scales),
    ]
}

fn gguf_bytes(
    config: &ModelConfig,
    mix: &Mix,
    key: ParamKey,
    shape: &[usize],
) -> Vec<(String, f64)> {
    let parts = match (&config.attention, key.module) {
        (AttentionConfig::Mla(mla), Module::KvB) => {
            let heads = config.num_attention_heads;
            let (nope, latent) = (mla.qk_nope_head_dim, mla.kv_lora_rank);
            vec![
                (
                    vec![heads * latent, nope],
                    RowOrder::Keys { heads, width: nope },
                ),
                (
                    vec![heads * mla.v_head_dim, latent],
                    RowOrder::Values {
                        heads,
                        width: mla.v_head_dim,
                    },
                ),
            ]
        }
        _ => vec![(shape.to_vec(), RowOrder::Same)],
    };
    let of_part = |(shape, rows): (Vec<usize>, RowOrder)| {
        let elements = shape.iter().map(|n| *n as f64).product::<f64>();
        let tensor = GgufTensor {
            name: String::new(),
            shape,
            keys: vec![key.to_string()],
            rows,
        };
        let dtype = mix.type_of(&tensor, config).dtype();
        let bytes = elements / dtype.block() as f64 * dtype.size_bytes() as f64;
        (dtype.to_string(), bytes)
    };
    parts.into_iter().map(of_part).collect()
}

/// The bytes of weights that one token reads: of the experts, those it chooses, and of the embedding, a row.
pub fn token_bytes(config: &ModelConfig, stored: &StoredAs) -> f64 {
    let top_k = config.moe.as_ref().map_or(1, |moe| moe.choice.top_k) as f64;
    let read = tensors(config).into_iter().map(|(key, shape, count)| {
        let share = match key.module {
            Module::Expert(..) => top_k,
            Module::Embedding if !config.tie_word_embeddings => 1.0 / config.vocab_size as f64,
            _ => count,
        };
        let bytes = tensor_bytes(config, stored, key, &shape);
        share * bytes.iter().map(|(_, bytes)| bytes).sum::<f64>()
    });
    read.sum()
}

/// Bytes of the frozen weights of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FrozenBytes {
    /// Read as they are stored.
    pub mapped: f64,
    /// Made when they are opened: scales of FP8 blocks and what is no matrix, in f32.
    pub held: f64,
    /// The largest tensor of the others: while it is converted, its pages are in memory.
    pub largest_other: f64,
    /// `mapped` by the name of the dtype.
    pub by_format: BytesByFormat,
}

impl FrozenBytes {
    /// Those of a model in a folder, as far as `is_frozen` says so by key.
    ///
    /// # Errors
    /// If a tensor's header cannot be read.
    pub fn of(
        folder: &Folder,
        config: &ModelConfig,
        is_frozen: &dyn Fn(&str) -> bool,
    ) -> Result<Self, Error> {
        let mut bytes = Self::default();
        for name in folder.names() {
            let weight = weight_of_scale(name);
            let key = ParamKey::parse(weight);
            let is_used = key.is_some_and(|key| {
                key.layer
                    .is_none_or(|layer| layer < config.num_hidden_layers)
                    && key.shape(config).is_some()
            });
            if !is_used {
                continue;
            }
            let stored = folder.stored(name)?;
            let size = stored.bytes.len() as f64;
            if !is_frozen(weight) {
                bytes.largest_other = bytes.largest_other.max(size);
                continue;
            }
            if weight != name || stored.shape.len() < 2 {
                let elements: f64 = stored.shape.iter().map(|n| *n as f64).product();
                bytes.held += BYTES_OF_F32 * elements;
                continue;
            }
            bytes.mapped += size;
            *bytes.by_format.entry(stored.dtype.to_string()).or_default() += size;
        }
        Ok(bytes)
    }

    /// Bytes of fresh weights, in f32, as far as `is_frozen` says so by key.
    pub fn fresh(config: &ModelConfig, is_frozen: &dyn Fn(&str) -> bool) -> f64 {
        let frozen = tensors(config)
            .into_iter()
            .filter(|(key, ..)| is_frozen(&key.to_string()));
        let bytes = frozen.map(|(_, shape, count)| {
            let elements: f64 = shape.iter().map(|n| *n as f64).product();
            BYTES_OF_F32 * elements * count
        });
        bytes.sum()
    }
}
