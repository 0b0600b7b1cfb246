//! Writing a trained model as a Hugging Face folder.

use std::collections::BTreeMap;
use std::ops::Range;

use checkpoint::{DType, Folder, FolderWriter, TensorSpec};
use kernels::device::read;

use super::hf_fp8::{BlockFp8, is_fp8};
use super::weight_format::{WeightFormat, encode, exported_config};
use crate::Error;
use crate::config::ModelConfig;
use crate::decoder::Model;
use crate::decoder::parameters::Parameter;
use crate::keys::{Module, ParamKey, ParamPart, is_scale, keys, weight_of_scale};
use crate::load::{audit, read_matrix};
use crate::precision::is_lowered;

/// Largest shard of an exported model.
const SHARD_BYTES: usize = 4 << 30;

/// Reads some of a trained parameter's values, by the parameter's path. Those of a stack of experts count over all experts,
/// also if ranks share them out; a call reads one expert of it.
pub type TrainedReader<'a> =
    dyn FnMut(&str, Range<usize>) -> Result<Vec<f32>, checkpoint::Error> + 'a;

/// Writes a fully trained model: its tensors, the routers' biases in f32, the base's other tensors (MTP layers, unknown ones)
/// unchanged, an index and a `config.json`. `origin` is the base, if there is one, and the config as it was read.
///
/// # Errors
/// If reading the base or writing fails.
pub fn export(
    model: &Model,
    origin: (Option<&Folder>, &serde_json::Value),
    format: WeightFormat,
    writer: &mut FolderWriter,
    read_values: &mut TrainedReader<'_>,
) -> Result<(), Error> {
    let (base, config) = origin;
    let fp8 = match format {
        WeightFormat::Fp8 => Some(BlockFp8::of(base, &model.config)?),
        WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => None,
    };
    let mut tensors = exported_tensors(model, base, format, fp8)?;
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
        writer.add_shard(&name, &specs, |i| sources[i].bytes(read_values))?;
    }
    writer.write_index()?;
    let config = exported_config(config, format, fp8);
    Ok(writer.write_json("config.json", &config)?)
}

/// A tensor to export: its values, and its format.
enum Exported {
    /// Values of a trained tensor, in a number format.
    Values(ExportSource, DType),
    /// The FP8 codes of one.
    Codes(ExportSource, BlockFp8, [usize; 2]),
    /// The scales of those.
    Scales(ExportSource, BlockFp8, [usize; 2]),
    /// Bytes of the base.
    Bytes(bytes::Bytes),
}

/// Where a tensor's values come from.
#[derive(Clone)]
enum ExportSource {
    /// A range of a trained parameter.
    Parameter(String, Range<usize>),
    /// The bias of a router, which nothing but balancing changes.
    Bias(Vec<f32>),
}

impl ExportSource {
    fn values(&self, read_values: &mut TrainedReader<'_>) -> Result<Vec<f32>, checkpoint::Error> {
        match self {
            Self::Parameter(name, range) => read_values(name, range.clone()),
            Self::Bias(values) => Ok(values.clone()),
        }
    }
}

impl Exported {
    fn bytes(
        &self,
        read_values: &mut TrainedReader<'_>,
    ) -> Result<bytes::Bytes, checkpoint::Error> {
        Ok(match self {
            Self::Bytes(bytes) => bytes.clone(),
            Self::Values(source, dtype) => encode(*dtype, &source.values(read_values)?).into(),
            Self::Codes(source, fp8, shape) => {
                let encoded = fp8.encode(&source.values(read_values)?, *shape);
                encoded.codes.into()
            }
            Self::Scales(source, fp8, shape) => {
                let encoded = fp8.encode(&source.values(read_values)?, *shape);
                fp8.scale_bytes(&encoded.scales)
            }
        })
    }
}

/// The sources of the trained tensors and of the routers' biases, by key.
fn sources(model: &Model) -> BTreeMap<String, ExportSource> {
    let mut sources = BTreeMap::new();
    for Parameter { name, shape, .. } in model.parameters() {
        let len = match shape[..] {
            // Ranks may have a part of the experts each.
            [_, rows, cols] => model.updated_experts(&name).len() * rows * cols,
            _ => shape.iter().product(),
        };
        for (key, range) in model.parameter_keys(&name, len) {
            sources.insert(key, ExportSource::Parameter(name.clone(), range));
        }
    }
    for (layer_idx, bias) in model.correction_biases() {
        let key = ParamKey {
            part: ParamPart::CorrectionBias,
            ..ParamKey::weight(layer_idx, Module::Router)
        };
        sources.insert(
            key.to_string(),
            ExportSource::Bias(read(bias.clone().inner())),
        );
    }
    sources
}

/// Writes a model with a subset of trained tensors: the base's files with the values of those replaced, in their formats
/// there. All else keeps its bytes.
///
/// # Errors
/// If reading the base or writing fails.
pub fn export_subset(
    model: &Model,
    base: &Folder,
    writer: &mut FolderWriter,
    read_values: &mut TrainedReader<'_>,
) -> Result<(), Error> {
    let sources = sources(model);
    let fp8 = is_fp8(base)
        .then(|| BlockFp8::of(Some(base), &model.config))
        .transpose()?;
    for (file, names) in base.shards() {
        let mut tensors = Vec::new();
        for name in names {
            let tensor = base.tensor(name)?;
            let key = weight_of_scale(name);
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
        writer.add_shard(file, &specs, |i| sources[i].bytes(read_values))?;
    }
    writer.write_index()?;
    Ok(writer.write_json("config.json", base.config())?)
}

/// The tensors of a fully trained model in a format, FP8 if `fp8` is given, and the base's tensors that it carries along.
fn exported_tensors(
    model: &Model,
    base: Option<&Folder>,
    format: WeightFormat,
    fp8: Option<BlockFp8>,
) -> Result<Vec<(TensorSpec, Exported)>, Error> {
    let mut sources = sources(model);
    let mut tensors = Vec::new();
    for (key, shape) in keys(&model.config) {
        let Some(part) = sources.remove(&key) else {
            return Err(Error::Unsupported(format!(
                "`{key}` is not trained: only fully trained models are written in another format"
            )));
        };
        let format = match ParamKey::parse(&key) {
            Some(key) if key.part == ParamPart::CorrectionBias => WeightFormat::F32,
            _ => format,
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

/// A tensor that the model does not run, unchanged; block FP8 becomes bf16 if the export has no block scales.
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
