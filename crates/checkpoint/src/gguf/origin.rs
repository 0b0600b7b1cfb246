//! The Hugging Face folder that a GGUF was converted from: its tensors, and the order of their rows.
//!
//! Source: ggml-org/llama.cpp: convert_hf_to_gguf.py and conversion/.

use std::collections::BTreeSet;
use std::path::Path;

use bytes::{Bytes, BytesMut};
use serde_json::Value;

use super::settings::{self, Architecture};
use super::{Gguf, malformed, names, rope};
use crate::{DType, Result, Tensor};

/// Maximum number of experts in a layer: each of them becomes a separate tensor.
const MAX_STACKED_EXPERTS: usize = 1 << 12;

/// The folder of a GGUF: its configuration, and the changes of the conversion.
#[derive(Clone, Debug)]
pub(crate) struct GgufOrigin {
    /// A `config.json`.
    pub(crate) config: Value,
    /// Heads of queries and of keys whose rows were reordered: in a llama's file, not in others. A deepseek2's have the published
    /// layout, interleaved.
    reordered: Option<[usize; 2]>,
    /// Keys of the metadata that nothing here knows.
    pub(crate) unknown: Vec<String>,
}

impl GgufOrigin {
    /// # Errors
    /// If the architecture is not supported, or a setting is missing.
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
        let (config, unknown) = settings::config(path, gguf, (name, architecture))?;
        let heads = |key: &str| config.get(key).and_then(Value::as_u64).unwrap_or(0) as usize;
        let n_heads = heads("num_attention_heads");
        let n_kv_heads = match heads("num_key_value_heads") {
            0 => n_heads,
            n => n,
        };
        let reordered = (architecture == Architecture::Llama).then_some([n_heads, n_kv_heads]);
        Ok(Self {
            config,
            reordered,
            unknown,
        })
    }

    /// The biases that a folder of the config has and the file has not, as zeros: a file may have one of a single module.
    ///
    /// # Errors
    /// If a size is no size.
    pub(crate) fn absent_biases(&self, path: &Path, gguf: &Gguf) -> Result<Vec<Tensor>> {
        let flag = |key: &str| self.config.get(key) == Some(&Value::Bool(true));
        let of_attention: &[_] = &names::ATTENTION_BIASES;
        let kinds = [
            (flag("attention_bias"), of_attention),
            (flag("mlp_bias"), &names::FEED_FORWARD_BIASES),
        ];
        let parts: Vec<&str> = kinds
            .into_iter()
            .filter(|kind| kind.0)
            .flat_map(|kind| kind.1)
            .copied()
            .collect();
        if parts.is_empty() {
            return Ok(vec![]);
        }
        let weights = gguf.tensors().filter_map(|tensor| {
            let module = tensor.name.strip_suffix(".weight")?;
            let bias = format!("{module}.bias");
            // A shape may say more rows than the file has bytes.
            let len = tensor.shape.first().copied().unwrap_or(0);
            let is_whole = len.saturating_mul(4) <= tensor.bytes.len();
            (is_whole && names::is_bias_of(&bias, &parts)).then_some((bias, tensor))
        });
        let found: BTreeSet<&str> = gguf.tensors().map(|tensor| &*tensor.name).collect();
        let absent = weights.filter(|(bias, _)| !found.contains(bias.as_str()));
        let zeros = absent.map(|(bias, weight)| {
            let len = weight.shape.first().copied().unwrap_or(0);
            let bytes = Bytes::from(vec![0; 4 * len]);
            let tensor = Tensor::new(&names::key(&bias), DType::F32, &[len], bytes)?;
            Ok(Tensor {
                file: path.into(),
                ..tensor
            })
        });
        zeros.collect()
    }

    /// A tensor under its name in the folder, or the matrices of each of a layer's stacked experts, which share the bytes.
    ///
    /// # Errors
    /// If stacked experts are not those of the config.
    pub(crate) fn parts(&self, mut tensor: Tensor) -> Result<Vec<Tensor>> {
        // This tensor is part of the config.
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
                // Empty ones would make thousands of tensors of a few bytes of description.
                && shape[1..].iter().all(|size| *size > 0)
        };
        if !fits(&tensor.shape) || !(1..=MAX_STACKED_EXPERTS).contains(&experts) {
            let (name, shape) = (&tensor.name, &tensor.shape);
            let problem = format!(
                "tensor `{name}`: expected the matrices of {experts} experts (1 to {MAX_STACKED_EXPERTS}), found shape {shape:?}"
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

    /// A tensor with the order of rows of the folder.
    ///
    /// # Errors
    /// If its rows are not those of heads.
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

/// Restores the rows of every head: a llama's converter interleaves the two halves of a head, which rope rotates against each
/// other. The rows are copied: queries and keys are a tenth of a model's bytes.
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
