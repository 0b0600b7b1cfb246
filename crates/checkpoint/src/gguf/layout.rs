//! The layout of a folder's tensors in a GGUF: their names, stacks, and order of rows.
//!
//! The reverse of [`super::origin`], with the same tables.
//!
//! Source: ggml-org/llama.cpp: conversion/{base,llama,deepseek}.py.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;

use super::settings::{self, Architecture};
use super::writer::GgufValue;
use super::{malformed, names, rope};
use crate::Result;

/// A tensor of a GGUF and its sources.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufTensor {
    /// Its name in the GGUF.
    pub name: String,
    /// Its shape, from the outermost dimension in.
    pub shape: Vec<usize>,
    /// The folder's tensors in it: a layer's experts one after another, else one.
    pub keys: Vec<String>,
    /// The selection and the order of a source's rows.
    pub rows: RowOrder,
}

/// The rows of a folder's tensor in a GGUF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// All, in their order.
    Same,
    /// All; the two halves of every head interleaved row by row.
    Interleaved {
        /// Number of heads.
        heads: usize,
    },
    /// The first rows of every head, transposed: they rebuild keys from a latent.
    Keys {
        /// Number of heads.
        heads: usize,
        /// RowOrder of a head that rebuild keys.
        width: usize,
    },
    /// The last rows of every head: they rebuild values.
    Values {
        /// Number of heads.
        heads: usize,
        /// RowOrder of a head that rebuild values.
        width: usize,
    },
}

impl RowOrder {
    /// The row at a place of a head of `rows` rows with interleaved halves.
    pub fn interleaved(place: usize, rows: usize) -> usize {
        place % 2 * (rows / 2) + place / 2
    }
}

/// The layout of a model.
#[derive(Clone, Debug)]
pub struct GgufLayout<'a> {
    config: &'a Value,
    architecture: (&'static str, Architecture),
}

impl<'a> GgufLayout<'a> {
    /// The layout of a model with this config, in the published dialect; `file` is for messages.
    ///
    /// # Errors
    /// If GGUF files have no such architecture.
    pub fn of(file: &Path, config: &'a Value) -> Result<Self> {
        let family = config.get("model_type").and_then(Value::as_str);
        let architecture = settings::architecture(family.unwrap_or_default());
        let architecture = architecture.ok_or_else(|| {
            let problem = "key `model_type`: expected one that GGUF files know of".into();
            malformed(file, problem)
        })?;
        Ok(Self {
            config,
            architecture,
        })
    }

    /// The metadata of the config.
    pub fn metadata(&self) -> Vec<(String, GgufValue)> {
        settings::metadata(self.config, self.architecture)
    }

    /// The metadata of the sampling that a `generation_config.json` recommends.
    pub fn sampling(generation_config: &Value) -> Vec<(String, GgufValue)> {
        settings::sampling(generation_config)
    }

    /// A tensor that is computed from the config: name and values.
    pub fn made(&self) -> Option<(&'static str, Vec<f32>)> {
        Some((rope::DIVISORS, rope::divisors(self.config)?))
    }

    /// The GGUF's tensors for a folder's tensors, given as keys and shapes; those of a layer's experts in the order of experts.
    pub fn tensors(&self, keys: &[(String, Vec<usize>)]) -> Vec<GgufTensor> {
        let mut tensors: Vec<GgufTensor> = Vec::new();
        let mut place_of: HashMap<String, usize> = HashMap::new();
        for (key, shape) in keys {
            if let Some(name) = names::stack(key) {
                match place_of.get(&name) {
                    Some(place) => {
                        let stack = &mut tensors[*place];
                        stack.shape[0] += 1;
                        stack.keys.push(key.clone());
                    }
                    None => {
                        place_of.insert(name.clone(), tensors.len());
                        let shape = [&[1], &shape[..]].concat();
                        tensors.push(GgufTensor::new(name, shape, key, RowOrder::Same));
                    }
                }
            } else if let Some(module) = key.strip_suffix(names::KV_B) {
                tensors.extend(self.halves(key, module, shape));
            } else {
                let rows = self.rows(key);
                tensors.push(GgufTensor::new(names::name(key), shape.clone(), key, rows));
            }
        }
        tensors
    }

    fn count(&self, key: &str) -> usize {
        self.config.get(key).and_then(Value::as_u64).unwrap_or(0) as usize
    }

    fn rows(&self, key: &str) -> RowOrder {
        let module = key.rsplit_once('.').map_or(key, |(module, _)| module);
        let heads = match module {
            _ if self.architecture.1 != Architecture::Llama => return RowOrder::Same,
            _ if module.ends_with(".q_proj") => "num_attention_heads",
            _ if module.ends_with(".k_proj") => "num_key_value_heads",
            _ => return RowOrder::Same,
        };
        RowOrder::Interleaved {
            heads: self.count(heads),
        }
    }

    /// The up-projection of latent attention: keys and values apart.
    fn halves(&self, key: &str, module: &str, shape: &[usize]) -> [GgufTensor; 2] {
        let (heads, rank) = (self.count("num_attention_heads"), shape[1]);
        let (nope, v) = (self.count("qk_nope_head_dim"), self.count("v_head_dim"));
        let half = |half: &str, shape: [usize; 3], rows| {
            let name = names::name(&format!("{module}.{half}.weight"));
            GgufTensor::new(name, shape.to_vec(), key, rows)
        };
        let keys = RowOrder::Keys { heads, width: nope };
        let values = RowOrder::Values { heads, width: v };
        [
            half("k_b_proj", [heads, rank, nope], keys),
            half("v_b_proj", [heads, v, rank], values),
        ]
    }
}

impl GgufTensor {
    fn new(name: String, shape: Vec<usize>, key: &str, rows: RowOrder) -> Self {
        Self {
            name,
            shape,
            keys: vec![key.into()],
            rows,
        }
    }
}
