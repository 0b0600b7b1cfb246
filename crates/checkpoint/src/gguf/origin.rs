//! The Hugging Face folder that a GGUF was converted from: its config, its names, the order of its rows.
//!
//! Source: ggml-org/llama.cpp: convert_hf_to_gguf.py and gguf-py/gguf/{constants,tensor_mapping}.py.

use std::path::Path;

use bytes::{Bytes, BytesMut};
use serde_json::{Map, Value, json};

use super::{Gguf, malformed};
use crate::{Result, Tensor};

/// An architecture that is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Architecture {
    Llama,
    Qwen2,
}

impl Architecture {
    const ALL: [(&'static str, Self); 2] = [("llama", Self::Llama), ("qwen2", Self::Qwen2)];
}

/// Names of a layer's parts: here, and in a Hugging Face folder.
const LAYER: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];
/// Names outside the layers.
const MODEL: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];
/// Keys of the metadata behind the architecture's name, and of a `config.json`; whether one has to be there.
const SETTINGS: [(&str, &str, bool); 8] = [
    ("embedding_length", "hidden_size", true),
    ("feed_forward_length", "intermediate_size", true),
    ("block_count", "num_hidden_layers", true),
    ("attention.head_count", "num_attention_heads", true),
    ("attention.head_count_kv", "num_key_value_heads", false),
    ("attention.key_length", "head_dim", false),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps", true),
    ("context_length", "max_position_embeddings", true),
];
/// Frequencies of Llama 3's rotary positions, computed by the converter.
const ROPE_FREQUENCIES: &str = "rope_freqs.weight";

/// What a GGUF's tensors and metadata stand for.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    /// A `config.json`.
    pub(crate) config: Value,
    /// Heads of queries and of keys whose rows were reordered: in a llama's file, not in others.
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
            let known = Architecture::ALL.map(|known| known.0).join(" or ");
            let name = crate::error::shown(name);
            let problem = format!("key `general.architecture`: expected {known}, found {name}");
            return Err(malformed(path, problem));
        };
        let config = config(path, gguf, name)?;
        let heads = |key: &str| config.get(key).and_then(Value::as_u64).unwrap_or(0) as usize;
        let n_heads = heads("num_attention_heads");
        let n_kv_heads = match heads("num_key_value_heads") {
            0 => n_heads,
            n => n,
        };
        let reordered = (architecture == Architecture::Llama).then_some([n_heads, n_kv_heads]);
        Ok(Self { config, reordered })
    }

    /// A tensor under the name and with the order of rows that it had.
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

/// The name a tensor had. One that is not known keeps its own.
pub(crate) fn key(name: &str) -> String {
    if let Some((_, key)) = MODEL.iter().find(|known| known.0 == name) {
        return (*key).to_owned();
    }
    let in_layer = || {
        let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
        let (part, kind) = rest.rsplit_once('.')?;
        let (_, key) = LAYER.iter().find(|known| known.0 == part)?;
        let layer: u32 = layer.parse().ok()?;
        Some(format!("model.layers.{layer}.{key}.{kind}"))
    };
    in_layer().unwrap_or_else(|| name.to_owned())
}

fn config(path: &Path, gguf: &Gguf, architecture: &str) -> Result<Value> {
    let setting = |key: &str| gguf.metadata.get(&format!("{architecture}.{key}"));
    let tensors = || gguf.files.iter().flat_map(|file| &file.1);
    let tensor = |name: &str| tensors().find(|tensor| &*tensor.name == name);
    if tensor(ROPE_FREQUENCIES).is_some() {
        let problem = format!(
            "tensor `{ROPE_FREQUENCIES}`: stretched rotary positions are not read; take the original folder"
        );
        return Err(malformed(path, problem));
    }
    let mut config = Map::new();
    config.insert("model_type".into(), architecture.into());
    config.insert("hidden_act".into(), "silu".into());
    for (key, name, is_required) in SETTINGS {
        match setting(key) {
            Some(value) => _ = config.insert(name.into(), value.clone()),
            None if is_required => {
                let problem = format!("expected a key `{architecture}.{key}`, found none");
                return Err(malformed(path, problem));
            }
            None => {}
        }
    }
    let vocab_size = tensor("token_embd.weight").and_then(|tensor| tensor.shape.first());
    let Some(vocab_size) = vocab_size else {
        return Err(malformed(
            path,
            "expected a tensor `token_embd.weight`, found none".into(),
        ));
    };
    config.insert("vocab_size".into(), (*vocab_size).into());
    let is_tied = tensor("output.weight").is_none();
    config.insert("tie_word_embeddings".into(), is_tied.into());
    let theta = setting("rope.freq_base").cloned();
    config.insert("rope_theta".into(), theta.unwrap_or_else(|| json!(10000.0)));
    if let Some(kind) = setting("rope.scaling.type").filter(|kind| **kind != "none") {
        let mut scaling = Map::from_iter([("rope_type".into(), kind.clone())]);
        for (key, name) in [
            ("rope.scaling.factor", "factor"),
            (
                "rope.scaling.original_context_length",
                "original_max_position_embeddings",
            ),
        ] {
            scaling.extend(setting(key).map(|value| (name.into(), value.clone())));
        }
        config.insert("rope_scaling".into(), Value::Object(scaling));
    }
    for name in ["bos", "eos"] {
        let id = gguf
            .metadata
            .get(&format!("tokenizer.ggml.{name}_token_id"));
        config.extend(id.map(|id| (format!("{name}_token_id"), id.clone())));
    }
    Ok(Value::Object(config))
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
