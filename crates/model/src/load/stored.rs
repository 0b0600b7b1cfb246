//! A checkpoint's weights as they are stored: their format, their block scales, and a `kv_b_proj` in one part or two.

use std::borrow::Cow;
use std::sync::Arc;

use checkpoint::{DType, Folder};
use kernels::{Format, Ggml, Matrix, fp8};

use crate::Error;
use crate::config::ModelConfig;
use crate::keys::{Module, ParamKey, is_scale, scale_key};

/// Reads a weight of any published format.
///
/// # Errors
/// If the tensor is no matrix of the given shape or has another dtype, if its block scales are missing or do not fit, or if
/// the parts of a split weight do not fit.
pub fn read_matrix(
    folder: &Folder,
    key: &str,
    [rows, cols]: [usize; 2],
    block: [usize; 2],
) -> Result<Matrix, Error> {
    if let Some([keys, values]) = split_kv_b(folder, key) {
        return join(folder, [&keys, &values], [rows, cols]);
    }
    let tensor = folder.tensor(key)?;
    tensor.expect_shape(&[rows, cols])?;
    match tensor.dtype {
        DType::F8E4M3 => read_fp8(folder, &tensor, [rows, cols], block),
        _ => view(&tensor, [rows, cols]),
    }
}

/// A view of a tensor's bytes, in a format without separate scales.
fn view(tensor: &checkpoint::Tensor, [rows, cols]: [usize; 2]) -> Result<Matrix, Error> {
    let format = match tensor.dtype {
        DType::F32 => Format::F32,
        DType::F16 => Format::F16,
        DType::BF16 => Format::Bf16,
        found => Format::Ggml(ggml(found).ok_or_else(|| Error::DType {
            file: tensor.file.to_path_buf(),
            name: tensor.name.to_string(),
            found,
        })?),
    };
    Matrix::dense(rows, cols, format, tensor.bytes.clone()).map_err(|cause| unfit(tensor, cause))
}

fn read_fp8(
    folder: &Folder,
    tensor: &checkpoint::Tensor,
    shape: [usize; 2],
    block: [usize; 2],
) -> Result<Matrix, Error> {
    let scales = folder.tensor(&scale_key(&tensor.name))?;
    let values = match scales.dtype {
        DType::F8E8M0 => {
            let codes = scales.bytes.iter();
            codes.map(|code| fp8::e8m0_to_f32(*code)).collect()
        }
        _ => scales.to_f32()?,
    };
    Matrix::fp8(shape, tensor.bytes.clone(), values, &scales.shape, block)
        .map_err(|cause| unfit(&scales, cause))
}

fn unfit(tensor: &checkpoint::Tensor, cause: kernels::Error) -> Error {
    Error::Weight {
        file: tensor.file.to_path_buf(),
        name: tensor.name.to_string(),
        cause,
    }
}

/// The tensors of a split `kv_b_proj`, if a checkpoint has these instead: keys `[heads, rank, nope]`, values
/// `[heads, v, rank]`.
pub(super) fn split_kv_b(folder: &Folder, key: &str) -> Option<[String; 2]> {
    let whole = ParamKey::parse(key).filter(|key| key.module == Module::KvB)?;
    let parts = [Module::KvBKeys, Module::KvBValues];
    let parts = parts.map(|module| whole.with_module(module).to_string());
    (!folder.contains(key) && folder.contains(&parts[0])).then_some(parts)
}

fn join(folder: &Folder, parts: [&str; 2], [rows, rank]: [usize; 2]) -> Result<Matrix, Error> {
    let [keys, values] = [folder.tensor(parts[0])?, folder.tensor(parts[1])?];
    let heads = keys.shape.first().copied().unwrap_or(0);
    let nope = keys.shape.last().copied().unwrap_or(0);
    keys.expect_shape(&[heads, rank, nope])?;
    let v = (rows / heads.max(1)).saturating_sub(nope);
    values.expect_shape(&[heads, v, rank])?;
    let whole = Matrix::from_split_kv_b(
        view(&keys, [heads * rank, nope])?,
        view(&values, [heads * v, rank])?,
        heads,
    );
    let whole = whole.map_err(|cause| unfit(&keys, cause))?;
    if whole.rows() == rows {
        return Ok(whole);
    }
    Err(Error::Unsupported(format!(
        "tensor `{}`: expected a divisor of {rows} rows as the number of heads, found {heads}",
        keys.name
    )))
}

/// A tensor's name in a model: the parts of a split weight have the name of the whole.
pub(super) fn whole_name(name: &str) -> Cow<'_, str> {
    match ParamKey::parse(name) {
        Some(key) if matches!(key.module, Module::KvBKeys | Module::KvBValues) => {
            Cow::Owned(key.with_module(Module::KvB).to_string())
        }
        _ => Cow::Borrowed(name),
    }
}

/// The names of some tensors of a checkpoint as a model knows them: no block scales, and a split weight once.
pub(crate) fn weight_names<'a>(names: impl IntoIterator<Item = &'a str>) -> Vec<Cow<'a, str>> {
    // Of a split weight the keys stand for both parts.
    let is_values =
        |name: &str| ParamKey::parse(name).is_some_and(|key| key.module == Module::KvBValues);
    let names = names.into_iter();
    let names = names.filter(|name| !is_scale(name) && !is_values(name));
    names.map(whole_name).collect()
}

/// A tensor of a checkpoint; the parts of a split one are joined, in f32.
///
/// # Errors
/// If there is none, or its parts do not fit.
pub(crate) fn read_tensor(
    folder: &Folder,
    key: &str,
    config: &ModelConfig,
) -> Result<checkpoint::Tensor, Error> {
    let shape = ParamKey::parse(key).and_then(|key| key.shape(config));
    let (Some(&[rows, rank]), Some([keys, values])) = (shape.as_deref(), split_kv_b(folder, key))
    else {
        return Ok(folder.tensor(key)?);
    };
    let whole = join(folder, [&keys, &values], [rows, rank])?.to_f32();
    let bytes: Vec<u8> = whole.iter().flat_map(|value| value.to_le_bytes()).collect();
    let tensor = checkpoint::Tensor::new(key, DType::F32, &[rows, rank], bytes.into())?;
    Ok(checkpoint::Tensor {
        file: Arc::clone(&folder.stored(&keys)?.file),
        ..tensor
    })
}

/// The ggml format of a GGUF's tensor, if it has one.
fn ggml(dtype: DType) -> Option<Ggml> {
    Some(match dtype {
        DType::Q4_0 => Ggml::Q4_0,
        DType::Q4_1 => Ggml::Q4_1,
        DType::Q5_0 => Ggml::Q5_0,
        DType::Q5_1 => Ggml::Q5_1,
        DType::Q8_0 => Ggml::Q8_0,
        DType::Q2K => Ggml::Q2K,
        DType::Q3K => Ggml::Q3K,
        DType::Q4K => Ggml::Q4K,
        DType::Q5K => Ggml::Q5K,
        DType::Q6K => Ggml::Q6K,
        DType::Iq4Nl => Ggml::Iq4Nl,
        DType::MxFp4 => Ggml::MxFp4,
        _ => return None,
    })
}

/// The architecture of a checkpoint.
///
/// # Errors
/// If the config is not one we compute.
pub fn read_config(folder: &Folder) -> Result<ModelConfig, Error> {
    refuse_mlx(folder)?;
    let mut config = ModelConfig::from_json(folder.config(), &folder.config_path())?;
    // A config may not mention its scales, but their dtype does.
    if has_e8m0_scales(folder)? {
        config.fp8_scales = fp8::Scales::PowerOfTwo;
    }
    Ok(config)
}

/// The keys of a checkpoint's config, or of a GGUF's metadata, that are neither obeyed nor known to change nothing, with their
/// values. Those of a GGUF's tokenizer are left out.
///
/// # Errors
/// If the config is not one we compute.
pub fn unknown_keys(folder: &Folder) -> Result<Vec<(String, serde_json::Value)>, Error> {
    match folder.metadata() {
        Some(metadata) => {
            let keys = folder.unknown_metadata().iter();
            let value = |key: &String| metadata.get(key).cloned().unwrap_or_default();
            Ok(keys.map(|key| (key.clone(), value(key))).collect())
        }
        None => ModelConfig::unknown_keys(folder.config(), &folder.config_path()),
    }
}

/// Refuses weights in MLX's own quantization: integers in U32, with scales and biases of their own, which no format here
/// holds as they are.
fn refuse_mlx(folder: &Folder) -> Result<(), Error> {
    let settings = folder.config().get("quantization");
    let setting = |key| settings.and_then(|settings| settings.get(key)?.as_u64());
    let packed = |name: &&str| {
        let weight = name
            .strip_suffix(".scales")
            .map(|module| format!("{module}.weight"));
        let weight = weight.filter(|weight| folder.contains(weight));
        let weight = weight.and_then(|weight| folder.stored(&weight).ok());
        weight.is_some_and(|weight| weight.dtype == DType::U32)
    };
    let tensor = folder.names().find(packed);
    if tensor.is_none() && setting("group_size").is_none() {
        return Ok(());
    }
    let [bits, group] = ["bits", "group_size"].map(|key| {
        let shown = setting(key).map(|value| value.to_string());
        shown.unwrap_or_else(|| "an unknown number".into())
    });
    let place = match tensor {
        Some(name) => format!("tensor `{name}`"),
        None => "`quantization`".into(),
    };
    Err(Error::Unsupported(format!(
        "{}: {place}: the model is MLX-quantized ({bits} bits, groups of {group}), which is not supported; take the original \
         model, or write one with `mlx_lm.convert --dequantize`",
        folder.config_path().display()
    )))
}

/// Whether the block scales of a checkpoint are stored as powers of two; false if it has none.
pub(crate) fn has_e8m0_scales(folder: &Folder) -> Result<bool, Error> {
    match folder.names().find(|name| is_scale(name)) {
        Some(name) => Ok(folder.stored(name)?.dtype == DType::F8E8M0),
        None => Ok(false),
    }
}
