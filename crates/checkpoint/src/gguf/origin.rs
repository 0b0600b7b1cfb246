//! The Hugging Face folder that a GGUF was converted from: its tensors, and the order of their rows.
//!
//! Source: ggml-org/llama.cpp: convert_hf_to_gguf.py and conversion/.

use std::path::Path;

use bytes::{Bytes, BytesMut};
use serde_json::Value;

use super::settings::{self, Architecture};
use super::{Gguf, malformed, names, rope};
use crate::{Result, Tensor};

/// No model has more experts in a layer: each of them becomes a tensor of its own.
const MOST_EXPERTS: usize = 1 << 12;

/// What a GGUF's tensors and metadata stand for.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    /// A `config.json`.
    pub(crate) config: Value,
    /// Heads of queries and of keys whose rows were reordered: in a llama's file, not in others. A deepseek2's are laid
    /// out as published, pair beside pair.
    reordered: Option<[usize; 2]>,
}

impl Origin {
    /// # Errors
    /// If the architecture is none that is read, or a setting is missing.
    pub(crate) fn of(path: &Path, gguf: &Gguf) -> Result<Self> {
        let name = gguf.metadata.get("general.architecture");
        let name = name.and_then(Value::as_str).unwrap_or("nothing");
        let known = Architecture::ALL.into_iter().find(|known| known.0 == name);
        let Some((name, architecture)) = known else {
            let known = Architecture::ALL.map(|known| known.0).join(", ");
            let name = crate::error::shown(name);
            let problem =
                format!("key `general.architecture`: expected one of {known}, found {name}");
            return Err(malformed(path, problem));
        };
        let config = settings::config(path, gguf, (name, architecture))?;
        let heads = |key: &str| config.get(key).and_then(Value::as_u64).unwrap_or(0) as usize;
        let n_heads = heads("num_attention_heads");
        let n_kv_heads = match heads("num_key_value_heads") {
            0 => n_heads,
            n => n,
        };
        let reordered = (architecture == Architecture::Llama).then_some([n_heads, n_kv_heads]);
        Ok(Self { config, reordered })
    }

    /// A tensor under the name it had; of a layer's stacked experts, each one's matrices, which share the bytes.
    ///
    /// # Errors
    /// If stacked experts are not those of the config.
    pub(crate) fn parts(&self, mut tensor: Tensor) -> Result<Vec<Tensor>> {
        // The config says what this one does.
        if &*tensor.name == rope::DIVISORS {
            return Ok(vec![]);
        }
        let Some((layer, projections)) = names::stacked(&tensor.name) else {
            tensor.name = names::key(&tensor.name).into();
            return Ok(vec![tensor]);
        };
        let experts = self.config.get("n_routed_experts").and_then(Value::as_u64);
        let experts = experts.map_or(0, |n| n as usize);
        let fits = |shape: &[usize]| {
            shape.len() == 3
                && shape[0] == experts
                && shape[1].is_multiple_of(projections.len())
                // Empty ones would make thousands of tensors of a description of some bytes.
                && shape[1..].iter().all(|size| *size > 0)
        };
        if !fits(&tensor.shape) || !(1..=MOST_EXPERTS).contains(&experts) {
            let (name, shape) = (&tensor.name, &tensor.shape);
            let problem = format!(
                "tensor `{name}`: expected the matrices of {experts} experts (1 to {MOST_EXPERTS}), found shape {shape:?}"
            );
            return Err(malformed(&tensor.file, problem));
        }
        let shape = vec![tensor.shape[1] / projections.len(), tensor.shape[2]];
        let size = tensor.bytes.len() / (experts * projections.len());
        let part = |i: usize| Tensor {
            name: names::expert(
                layer,
                i / projections.len(),
                projections[i % projections.len()],
            )
            .into(),
            shape: shape.clone(),
            bytes: tensor.bytes.slice(i * size..(i + 1) * size),
            ..tensor.clone()
        };
        Ok((0..experts * projections.len()).map(part).collect())
    }

    /// A tensor with the order of rows that it had.
    ///
    /// # Errors
    /// If its rows are no heads.
    pub(crate) fn restore(&self, tensor: Tensor) -> Result<Tensor> {
        let heads = self.reordered.and_then(|[queries, keys]| {
            let module = tensor.name.rsplit_once('.')?.0;
            if module.ends_with(".q_proj") {
                Some(queries)
            } else {
                module.ends_with(".k_proj").then_some(keys)
            }
        });
        match heads {
            Some(heads) => in_halves(tensor, heads),
            None => Ok(tensor),
        }
    }
}

/// Puts the rows of every head back: a llama's converter lays the two halves of a head, which rotary positions turn
/// against each other, row by row beside each other. The rows are copied: of a model's bytes the queries and keys are a
/// tenth.
fn in_halves(tensor: Tensor, heads: usize) -> Result<Tensor> {
    let rows = tensor.shape.first().copied().unwrap_or(0);
    if heads == 0 || !rows.is_multiple_of(2 * heads) {
        let (name, file) = (&tensor.name, &tensor.file);
        let problem = format!(
            "tensor `{name}`: expected {heads} heads of an even number of rows, found {rows} rows"
        );
        return Err(malformed(file, problem));
    }
    let row_bytes = tensor.bytes.len() / rows.max(1);
    let half = rows / heads / 2;
    let mut bytes = BytesMut::with_capacity(tensor.bytes.len());
    for head in 0..heads {
        for part in 0..2 {
            for i in 0..half {
                let row = (head * half + i) * 2 + part;
                bytes.extend_from_slice(&tensor.bytes[row * row_bytes..][..row_bytes]);
            }
        }
    }
    let bytes: Bytes = bytes.freeze();
    Ok(Tensor { bytes, ..tensor })
}
