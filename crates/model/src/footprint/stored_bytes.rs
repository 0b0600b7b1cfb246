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

/// Bytes of a model's weights.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WeightBytes {
    /// All of them, by the name of the dtype.
    pub by_format: BTreeMap<String, f64>,
    /// Of them, those of routed experts: a token reads the experts it chooses.
    pub experts: f64,
    /// Of them, those of an embedding that is not the output head as well: a token reads one row.
    pub embedding: f64,
    /// Of the largest tensor.
    pub largest: f64,
}

impl WeightBytes {
    /// All of them.
    pub fn all(&self) -> f64 {
        // A sum of none is -0.
        0.0 + self.by_format.values().sum::<f64>()
    }

    /// Those that every token reads.
    pub fn common(&self) -> f64 {
        self.all() - self.experts - self.embedding
    }

    /// Those of the routed experts that one token reads.
    pub fn chosen(&self, config: &ModelConfig) -> f64 {
        config.moe.as_ref().map_or(0.0, |moe| {
            self.experts * moe.choice.top_k as f64 / moe.n_routed_experts as f64
        })
    }

    /// Those that one token reads.
    pub fn per_token(&self, config: &ModelConfig) -> f64 {
        self.common() + self.chosen(config)
    }

    fn add(&mut self, config: &ModelConfig, key: ParamKey, dtype: String, bytes: f64) {
        match key.module {
            Module::Expert(..) => self.experts += bytes,
            Module::Embedding if !config.tie_word_embeddings => self.embedding += bytes,
            _ => {}
        }
        *self.by_format.entry(dtype).or_default() += bytes;
    }
}

/// The bytes of the weights of a model of this config, without layers for multi-token prediction.
pub fn stored_bytes(config: &ModelConfig, stored: &StoredAs) -> WeightBytes {
    let mut weights = WeightBytes::default();
    for (key, shape, count) in tensors(config) {
        for (dtype, bytes) in tensor_bytes(config, stored, key, &shape) {
            weights.add(config, key, dtype, count * bytes);
            weights.largest = weights.largest.max(bytes);
        }
    }
    weights
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

/// The parameter of the model that a parameter of a file is a part of.
fn whole(key: ParamKey) -> ParamKey {
    match key.module {
        Module::KvBKeys | Module::KvBValues => key.with_module(Module::KvB),
        _ => key,
    }
}

/// Bytes of the frozen weights of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FrozenBytes {
    /// Read as they are stored.
    pub mapped: WeightBytes,
    /// Made when they are opened: scales of FP8 blocks and what is no matrix, in f32.
    pub held: f64,
    /// The largest tensor of the others: while it is converted, its pages are in memory.
    pub largest_other: f64,
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
            let key = ParamKey::parse(weight).map(whole);
            let is_used = |key: &ParamKey| {
                let is_layer = |layer| layer < config.num_hidden_layers;
                key.layer.is_none_or(is_layer) && key.shape(config).is_some()
            };
            let Some(key) = key.filter(is_used) else {
                continue;
            };
            let stored = folder.stored(name)?;
            let size = stored.bytes.len() as f64;
            if !is_frozen(&key.to_string()) {
                bytes.largest_other = bytes.largest_other.max(size);
                continue;
            }
            if weight != name || stored.shape.len() < 2 {
                let elements: f64 = stored.shape.iter().map(|n| *n as f64).product();
                bytes.held += BYTES_OF_F32 * elements;
                continue;
            }
            let dtype = stored.dtype.to_string();
            bytes.mapped.add(config, key, dtype, size);
            bytes.mapped.largest = bytes.mapped.largest.max(size);
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
