//! Writing a fully trained model as a Hugging Face folder, and what lies beside the weights of any model.

pub(crate) mod block_fp8;

use std::path::Path;

use burn::tensor::Tensor;
use checkpoint::{DType, Folder, FolderWriter, TensorSpec};

use crate::Error;
use crate::config::ModelConfig;
use crate::decoder::Model;
use crate::weights::{audit, is_scale, keys, parameter_keys, read_matrix};

/// Copies tokenizer, templates and the like: every small file beside the weights.
///
/// # Errors
/// If the folder cannot be read, or a file not be copied.
pub fn copy_companions(folder: &Path, writer: &mut FolderWriter) -> Result<(), Error> {
    const WANTED: [&str; 5] = ["json", "jinja", "model", "txt", "py"];
    const MADE_ANEW: [&str; 3] = [
        "config.json",
        "model.safetensors.index.json",
        "moeforge.manifest.json",
    ];
    let entries = std::fs::read_dir(folder).map_err(|cause| Error::Read {
        file: folder.into(),
        cause,
    })?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.path().is_file())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort_unstable();
    for name in names {
        let wanted = name
            .rsplit_once('.')
            .is_some_and(|(_, ending)| WANTED.contains(&ending));
        if wanted && !MADE_ANEW.contains(&name.as_str()) {
            writer.copy_file(&folder.join(&name), &name)?;
        }
    }
    Ok(())
}

/// A checkpoint's config for weights in another format: not quantized, and with `dtype` (PyTorch's name) under the key
/// of the dialect it is written in.
pub fn exported_config(config: &serde_json::Value, dtype: &str) -> serde_json::Value {
    let mut config = config.clone();
    if let Some(keys) = config.as_object_mut() {
        keys.shift_remove("quantization_config");
        let key = if keys.contains_key("dtype") {
            "dtype"
        } else {
            "torch_dtype"
        };
        keys.insert(key.into(), dtype.into());
    }
    config
}

/// Largest shard of an exported model.
const SHARD_BYTES: usize = 4 << 30;

/// Writes a fully trained model's tensors in bf16, the routers' biases in f32, and what `base` has beside them (MTP
/// layers, tensors nobody knows) as it is.
///
/// # Errors
/// If writing fails.
pub fn export(
    model: &Model,
    base: Option<&Folder>,
    writer: &mut FolderWriter,
) -> Result<(), Error> {
    let mut tensors = exported_tensors(model, base)?;
    let total: usize = tensors
        .iter()
        .map(|(spec, _)| spec.shape.iter().product::<usize>() * spec.dtype.size_bytes())
        .sum();
    let n_shards = total.div_ceil(SHARD_BYTES).max(1);
    let per_shard = tensors.len().div_ceil(n_shards);
    for shard in 0..n_shards {
        let rest = tensors.split_off(per_shard.min(tensors.len()));
        let (specs, sources): (Vec<_>, Vec<_>) =
            std::mem::replace(&mut tensors, rest).into_iter().unzip();
        let name = if n_shards == 1 {
            "model.safetensors".into()
        } else {
            format!("model-{:05}-of-{n_shards:05}.safetensors", shard + 1)
        };
        writer.add_shard(&name, &specs, |i| Ok(sources[i].bytes(specs[i].dtype)))?;
    }
    Ok(())
}

/// Where an exported tensor's values are.
#[expect(
    clippy::large_enum_variant,
    reason = "a list of handles, one per tensor"
)]
enum Exported {
    /// A part of a trained tensor.
    Part(Tensor<1>, std::ops::Range<usize>),
    /// Bytes of the base.
    Bytes(bytes::Bytes),
}

impl Exported {
    fn bytes(&self, dtype: DType) -> bytes::Bytes {
        match self {
            Self::Bytes(bytes) => bytes.clone(),
            Self::Part(values, range) => {
                let values = values.clone().slice([range.clone()]).into_data();
                match dtype {
                    DType::F32 => values
                        .iter::<f32>()
                        .flat_map(f32::to_le_bytes)
                        .collect::<Vec<_>>()
                        .into(),
                    _ => values
                        .iter::<f32>()
                        .flat_map(|value| half::bf16::from_f32(value).to_le_bytes())
                        .collect::<Vec<_>>()
                        .into(),
                }
            }
        }
    }
}

fn exported_tensors(
    model: &Model,
    base: Option<&Folder>,
) -> Result<Vec<(TensorSpec, Exported)>, Error> {
    let mut sources = std::collections::BTreeMap::new();
    for parameter in model.parameters() {
        for (key, range) in
            parameter_keys(&parameter.name, parameter.values.dims()[0], &model.config)
        {
            sources.insert(
                key,
                (DType::BF16, Exported::Part(parameter.values.clone(), range)),
            );
        }
    }
    for (layer_idx, bias) in model.clone().correction_biases() {
        let key = format!("model.layers.{layer_idx}.mlp.gate.e_score_correction_bias");
        let len = bias.dims()[0];
        sources.insert(
            key,
            (DType::F32, Exported::Part(bias.clone().inner(), 0..len)),
        );
    }
    let mut tensors = Vec::new();
    for (key, shape) in keys(&model.config) {
        let Some((dtype, source)) = sources.remove(&key) else {
            return Err(Error::Unsupported(format!(
                "`{key}` is not trained: only fully trained models are exported"
            )));
        };
        tensors.push((
            TensorSpec {
                name: key.as_str().into(),
                dtype,
                shape,
            },
            source,
        ));
    }
    if let Some(base) = base {
        let audit = audit(base)?;
        for name in audit
            .mtp
            .iter()
            .chain(&audit.unknown)
            .filter(|name| !is_scale(name))
        {
            tensors.push(carried(base, name, &model.config)?);
        }
    }
    Ok(tensors)
}

/// A tensor the model does not run, as it is; block FP8 becomes bf16, since the export has no block scales.
fn carried(
    base: &Folder,
    name: &str,
    config: &ModelConfig,
) -> Result<(TensorSpec, Exported), Error> {
    let tensor = base.tensor(name)?;
    if tensor.dtype != DType::F8E4M3 || tensor.shape.len() != 2 {
        return Ok((tensor.spec(), Exported::Bytes(tensor.bytes)));
    }
    let matrix = read_matrix(
        base,
        name,
        [tensor.shape[0], tensor.shape[1]],
        config.fp8_block,
    )?;
    let bytes: Vec<u8> = matrix
        .to_f32()
        .iter()
        .flat_map(|value| half::bf16::from_f32(*value).to_le_bytes())
        .collect();
    Ok((
        TensorSpec {
            dtype: DType::BF16,
            ..tensor.spec()
        },
        Exported::Bytes(bytes.into()),
    ))
}
