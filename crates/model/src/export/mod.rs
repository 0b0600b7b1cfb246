//! Writing a fully trained model as a Hugging Face folder, and what lies beside the weights of any model.

pub(crate) mod block_fp8;
pub mod gguf;
pub mod importance;
pub mod lora_gguf;
pub mod mix;

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Tensor;
use checkpoint::{DType, Folder, FolderWriter, TensorSpec};
use half::{bf16, f16};

use self::block_fp8::{BlockFp8, is_lowered};
use crate::Error;
use crate::config::ModelConfig;
use crate::decoder::Model;
use crate::load::{audit, is_scale, keys, parameter_keys, read_matrix};

/// Copies what stands beside a model's weights: tokenizer, templates and the like.
///
/// # Errors
/// As [`copy_texts`], or if the tokenizer of a GGUF is malformed.
pub fn copy_companions(model: &Folder, writer: &mut FolderWriter) -> Result<(), Error> {
    if model.metadata().is_none() {
        return copy_texts(model.path(), writer);
    }
    for (name, text) in model.companions()? {
        writer.write_bytes(&name, text.as_bytes())?;
    }
    Ok(())
}

/// Copies every small file of a folder but those that an export makes anew.
///
/// # Errors
/// If the folder cannot be read, or a file not be copied.
pub fn copy_texts(folder: &Path, writer: &mut FolderWriter) -> Result<(), Error> {
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

/// A checkpoint's config for weights in another format, which is named under the key of the dialect it is written in.
pub(crate) fn exported_config(
    config: &serde_json::Value,
    format: WeightFormat,
    fp8: Option<BlockFp8>,
) -> serde_json::Value {
    let mut config = config.clone();
    if let Some(keys) = config.as_object_mut() {
        keys.shift_remove("quantization_config");
        let key = if keys.contains_key("dtype") {
            "dtype"
        } else {
            "torch_dtype"
        };
        keys.insert(key.into(), format.torch_name().into());
    }
    if let Some(fp8) = fp8 {
        config["quantization_config"] = fp8.config();
    }
    config
}

/// The number format of a written model's weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightFormat {
    /// Single precision.
    F32,
    /// bfloat16; a merge leaves norms and routers that the base keeps in F32 as they are.
    Bf16,
    /// Block FP8 for the products of attention and experts, bfloat16 for the rest.
    Fp8,
}

impl WeightFormat {
    /// Of what is not FP8.
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 | Self::Fp8 => DType::BF16,
        }
    }

    /// The name in `config.json`.
    fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 | Self::Fp8 => "bfloat16",
        }
    }

    pub(crate) fn encode(self, values: &[f32]) -> Vec<u8> {
        encode(self.dtype(), values)
    }
}

/// Values in a dtype of plain floats.
fn encode(dtype: DType, values: &[f32]) -> Vec<u8> {
    let values = values.iter();
    match dtype {
        DType::BF16 => values
            .flat_map(|value| bf16::from_f32(*value).to_le_bytes())
            .collect(),
        DType::F16 => values
            .flat_map(|value| f16::from_f32(*value).to_le_bytes())
            .collect(),
        _ => values.flat_map(|value| value.to_le_bytes()).collect(),
    }
}

/// Whether a checkpoint has weights in block FP8.
pub fn is_fp8(folder: &Folder) -> bool {
    folder.names().any(is_scale)
}

/// Largest shard of an exported model.
const SHARD_BYTES: usize = 4 << 30;

/// Writes a fully trained model's tensors, the routers' biases in f32, what its base has beside them (MTP layers,
/// tensors nobody knows) as it is, an index and a `config.json`. `origin` is the base, if there is one, and the config
/// as it was read.
///
/// # Errors
/// If reading the base or writing fails.
pub fn export(
    model: &Model,
    origin: (Option<&Folder>, &serde_json::Value),
    format: WeightFormat,
    writer: &mut FolderWriter,
) -> Result<(), Error> {
    let (base, config) = origin;
    let fp8 = match format {
        WeightFormat::Fp8 => Some(BlockFp8::of(base, &model.config)?),
        WeightFormat::F32 | WeightFormat::Bf16 => None,
    };
    let mut tensors = exported_tensors(model, base, (format, fp8))?;
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
        writer.add_shard(&name, &specs, |i| Ok(sources[i].bytes()))?;
    }
    writer.write_index()?;
    let config = exported_config(config, format, fp8);
    Ok(writer.write_json("config.json", &config)?)
}

/// Where an exported tensor's values are, and what they become.
enum Exported {
    /// A part of a trained tensor, in a number format.
    Values(Part, DType),
    /// The FP8 codes of one.
    Codes(Part, BlockFp8, [usize; 2]),
    /// The scales of those.
    Scales(Part, BlockFp8, [usize; 2]),
    /// Bytes of the base.
    Bytes(bytes::Bytes),
}

/// Some of a flat tensor's values.
#[derive(Clone)]
struct Part(Tensor<1>, std::ops::Range<usize>);

impl Part {
    fn values(&self) -> Vec<f32> {
        let Self(values, range) = self;
        let values = values.clone().slice([range.clone()]).into_data();
        values.iter::<f32>().collect()
    }
}

impl Exported {
    fn bytes(&self) -> bytes::Bytes {
        match self {
            Self::Bytes(bytes) => bytes.clone(),
            Self::Values(part, dtype) => encode(*dtype, &part.values()).into(),
            Self::Codes(part, fp8, shape) => fp8.encode(&part.values(), *shape).codes.into(),
            Self::Scales(part, fp8, shape) => {
                fp8.scale_bytes(&fp8.encode(&part.values(), *shape).scales)
            }
        }
    }
}

/// Ends the name of a router's bias.
const BIAS: &str = "e_score_correction_bias";

/// Where the values of the trained tensors are, the routers' biases included, by key.
fn sources(model: &Model) -> BTreeMap<String, Part> {
    let mut sources = BTreeMap::new();
    for parameter in model.parameters() {
        let n = parameter.values.dims()[0];
        for (key, range) in parameter_keys(&parameter.name, n, model) {
            sources.insert(key, Part(parameter.values.clone(), range));
        }
    }
    for (layer_idx, bias) in model.clone().correction_biases() {
        let key = format!("model.layers.{layer_idx}.mlp.gate.{BIAS}");
        sources.insert(key, Part(bias.clone().inner(), 0..bias.dims()[0]));
    }
    sources
}

/// Writes a model of which some tensors were trained: the base's files with the values of those replaced, in the formats
/// they have there. All else keeps its bytes.
///
/// # Errors
/// If reading the base or writing fails.
pub fn export_chosen(model: &Model, base: &Folder, writer: &mut FolderWriter) -> Result<(), Error> {
    let sources = sources(model);
    let fp8 = is_fp8(base)
        .then(|| BlockFp8::of(Some(base), &model.config))
        .transpose()?;
    for (file, names) in base.shards() {
        let mut tensors = Vec::new();
        for name in names {
            let tensor = base.tensor(name)?;
            let key = name.strip_suffix("_scale_inv").unwrap_or(name);
            let exported = match (sources.get(key), fp8, base.stored(key)?.shape.as_slice()) {
                (None, ..) => Exported::Bytes(tensor.bytes.clone()),
                (Some(part), Some(fp8), [rows, cols]) if key != name => {
                    Exported::Scales(part.clone(), fp8, [*rows, *cols])
                }
                (Some(part), Some(fp8), [rows, cols]) if tensor.dtype == DType::F8E4M3 => {
                    Exported::Codes(part.clone(), fp8, [*rows, *cols])
                }
                (Some(part), ..) => Exported::Values(part.clone(), tensor.dtype),
            };
            tensors.push((tensor.spec(), exported));
        }
        let (specs, sources): (Vec<_>, Vec<_>) = tensors.into_iter().unzip();
        writer.add_shard(file, &specs, |i| Ok(sources[i].bytes()))?;
    }
    writer.write_index()?;
    Ok(writer.write_json("config.json", base.config())?)
}

fn exported_tensors(
    model: &Model,
    base: Option<&Folder>,
    (format, fp8): (WeightFormat, Option<BlockFp8>),
) -> Result<Vec<(TensorSpec, Exported)>, Error> {
    let mut sources = sources(model);
    let mut tensors = Vec::new();
    for (key, shape) in keys(&model.config) {
        let Some(part) = sources.remove(&key) else {
            return Err(Error::Unsupported(format!(
                "`{key}` is not trained: only fully trained models are written in another format"
            )));
        };
        let format = if key.ends_with(BIAS) {
            WeightFormat::F32
        } else {
            format
        };
        match (fp8, shape.as_slice()) {
            (Some(fp8), [rows, cols]) if is_lowered(&key) => {
                let shape = [*rows, *cols];
                let [codes, scales] = fp8.specs(&key, shape);
                tensors.push((codes, Exported::Codes(part.clone(), fp8, shape)));
                tensors.push((scales, Exported::Scales(part, fp8, shape)));
            }
            _ => {
                let spec = TensorSpec {
                    name: key.as_str().into(),
                    dtype: format.dtype(),
                    shape,
                };
                tensors.push((spec, Exported::Values(part, format.dtype())));
            }
        }
    }
    if let Some(base) = base {
        let audit = audit(base)?;
        for name in audit.mtp.iter().chain(&audit.unknown) {
            tensors.extend(carried(base, name, &model.config, fp8.is_some())?);
        }
    }
    Ok(tensors)
}

/// A tensor the model does not run, as it is; block FP8 becomes bf16 where the export has no block scales.
fn carried(
    base: &Folder,
    name: &str,
    config: &ModelConfig,
    has_scales: bool,
) -> Result<Option<(TensorSpec, Exported)>, Error> {
    let tensor = base.tensor(name)?;
    if is_scale(name) && !has_scales {
        return Ok(None);
    }
    if has_scales || tensor.dtype != DType::F8E4M3 || tensor.shape.len() != 2 {
        return Ok(Some((tensor.spec(), Exported::Bytes(tensor.bytes))));
    }
    let shape = [tensor.shape[0], tensor.shape[1]];
    let values = read_matrix(base, name, shape, config.fp8_block)?.to_f32();
    let spec = TensorSpec {
        dtype: DType::BF16,
        ..tensor.spec()
    };
    let bytes = WeightFormat::Bf16.encode(&values).into();
    Ok(Some((spec, Exported::Bytes(bytes))))
}
