//! How a folder's tensors lie in a GGUF: under which names, which of them stacked, in which order of rows.
//!
//! The way back from [`super::origin`], by the same tables.
//!
//! Source: ggml-org/llama.cpp: conversion/{base,llama,deepseek}.py.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;

use super::settings::{self, Architecture};
use super::writer::GgufValue;
use super::{malformed, names, rope};
use crate::Result;

/// A tensor of a GGUF and what it is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufTensor {
    /// Its name there.
    pub name: String,
    /// Its shape, from the outermost dimension in.
    pub shape: Vec<usize>,
    /// The folder's tensors in it: a layer's experts one after the other, else one.
    pub keys: Vec<String>,
    /// Which of a source's rows it has, in which order.
    pub rows: Rows,
}

/// Rows of a folder's tensor as a GGUF has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// All, in their order.
    Same,
    /// All; of so many heads, the two halves row by row beside each other.
    Interleaved {
        /// Number of heads.
        heads: usize,
    },
    /// Of every head its first rows, transposed: what rebuilds keys from a latent.
    Keys {
        /// Number of heads.
        heads: usize,
        /// Rows of a head that rebuild keys.
        width: usize,
    },
    /// Of every head its last rows: what rebuilds values.
    Values {
        /// Number of heads.
        heads: usize,
        /// Rows of a head that rebuild values.
        width: usize,
    },
}

impl Rows {
    /// Of a head of so many rows whose halves are interleaved, the row that stands at a place.
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
    /// The layout of a model with this config, in the dialect that is published; `file` is for messages.
    ///
    /// # Errors
    /// If no architecture of GGUF files is that of the model.
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

    /// The metadata that says what the config does.
    pub fn metadata(&self) -> Vec<(String, GgufValue)> {
        settings::metadata(self.config, self.architecture)
    }

    /// A tensor that is made of the config: name and values.
    pub fn made(&self) -> Option<(&'static str, Vec<f32>)> {
        Some((rope::DIVISORS, rope::divisors(self.config)?))
    }

    /// The tensors that a folder's become, given as keys and shapes, those of a layer's experts in the order of experts.
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
                        tensors.push(GgufTensor::new(name, shape, key, Rows::Same));
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

    fn rows(&self, key: &str) -> Rows {
        let heads = match key {
            _ if self.architecture.1 != Architecture::Llama => return Rows::Same,
            _ if key.ends_with(".q_proj.weight") => "num_attention_heads",
            _ if key.ends_with(".k_proj.weight") => "num_key_value_heads",
            _ => return Rows::Same,
        };
        Rows::Interleaved {
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
        let keys = Rows::Keys { heads, width: nope };
        let values = Rows::Values { heads, width: v };
        [
            half("k_b_proj", [heads, rank, nope], keys),
            half("v_b_proj", [heads, v, rank], values),
        ]
    }
}

impl GgufTensor {
    fn new(name: String, shape: Vec<usize>, key: &str, rows: Rows) -> Self {
        Self {
            name,
            shape,
            keys: vec![key.into()],
            rows,
        }
    }
}
