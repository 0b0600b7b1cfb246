//! A checkpoint's weights as they are stored: in which format, with which scales, whole or in halves.

use std::borrow::Cow;
use std::sync::Arc;

use checkpoint::{DType, Folder};
use kernels::{Format, Ggml, Matrix, fp8};

use crate::Error;
use crate::config::{AttentionConfig, ModelConfig};

/// Reads a weight of any published format.
///
/// # Errors
/// If the tensor is no matrix of the given shape, of another dtype, or its block scales are missing or do not fit; if one
/// that a GGUF keeps in halves is not made of such.
pub fn read_matrix(
    folder: &Folder,
    key: &str,
    [rows, cols]: [usize; 2],
    block: [usize; 2],
) -> Result<Matrix, Error> {
    if let Some([keys, values]) = halves(folder, key) {
        return join(folder, [&keys, &values], [rows, cols]);
    }
    let tensor = folder.tensor(key)?;
    tensor.expect_shape(&[rows, cols])?;
    match tensor.dtype {
        DType::F8E4M3 => read_fp8(folder, &tensor, [rows, cols], block),
        _ => stored(&tensor, [rows, cols]),
    }
}

/// A view of a tensor's bytes, of a format that needs nothing else.
fn stored(tensor: &checkpoint::Tensor, [rows, cols]: [usize; 2]) -> Result<Matrix, Error> {
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

/// A projection of latent attention that a GGUF keeps in halves: its name, and theirs.
const WHOLE: &str = ".kv_b_proj.weight";
const HALVES: [&str; 2] = [".k_b_proj.weight", ".v_b_proj.weight"];

/// The tensors of a weight's halves, where a checkpoint has these instead: of its keys `[heads, rank, nope]`, of its
/// values `[heads, v, rank]`.
fn halves(folder: &Folder, key: &str) -> Option<[String; 2]> {
    let module = key.strip_suffix(WHOLE)?;
    let halves = HALVES.map(|half| format!("{module}{half}"));
    (!folder.contains(key) && folder.contains(&halves[0])).then_some(halves)
}

fn join(folder: &Folder, halves: [&str; 2], [rows, rank]: [usize; 2]) -> Result<Matrix, Error> {
    let [keys, values] = [folder.tensor(halves[0])?, folder.tensor(halves[1])?];
    let heads = keys.shape.first().copied().unwrap_or(0);
    let nope = keys.shape.last().copied().unwrap_or(0);
    keys.expect_shape(&[heads, rank, nope])?;
    let v = (rows / heads.max(1)).saturating_sub(nope);
    values.expect_shape(&[heads, v, rank])?;
    let whole = Matrix::from_split_kv_b(
        stored(&keys, [heads * rank, nope])?,
        stored(&values, [heads * v, rank])?,
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

/// The name under which a model knows a tensor: a half's is that of the whole.
pub(super) fn whole_name(name: &str) -> Cow<'_, str> {
    let of_half = |half: &&str| Some(format!("{}{WHOLE}", name.strip_suffix(*half)?));
    let whole = HALVES.iter().find_map(of_half);
    whole.map_or(Cow::Borrowed(name), Cow::Owned)
}

/// The names of some tensors of a checkpoint as a model knows them: no scales, and a weight in halves once, under the name
/// of the whole.
pub(crate) fn weight_names<'a>(names: impl IntoIterator<Item = &'a str>) -> Vec<Cow<'a, str>> {
    let names = names.into_iter().filter(|name| !is_scale(name));
    // Of the two halves the first stands for both.
    let names = names.filter(|name| !name.ends_with(HALVES[1]));
    names.map(whole_name).collect()
}

/// A tensor of a checkpoint. One in halves is put together, in f32.
///
/// # Errors
/// If there is none, or its halves do not fit.
pub(crate) fn read_tensor(
    folder: &Folder,
    key: &str,
    config: &ModelConfig,
) -> Result<checkpoint::Tensor, Error> {
    let (AttentionConfig::Mla(mla), Some([keys, values])) =
        (&config.attention, halves(folder, key))
    else {
        return Ok(folder.tensor(key)?);
    };
    let rows = config.num_attention_heads * (mla.qk_nope_head_dim + mla.v_head_dim);
    let shape = [rows, mla.kv_lora_rank];
    let whole = join(folder, [&keys, &values], shape)?.to_f32();
    let bytes: Vec<u8> = whole.iter().flat_map(|value| value.to_le_bytes()).collect();
    let tensor = checkpoint::Tensor::new(key, DType::F32, &shape, bytes.into())?;
    Ok(checkpoint::Tensor {
        file: Arc::clone(&folder.stored(&keys)?.file),
        ..tensor
    })
}

/// The format of blocks that a GGUF's tensor is in, if it is in any.
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

/// The name of a weight's block scales. Despite it, they multiply.
pub fn scale_key(key: &str) -> String {
    format!("{key}_scale_inv")
}

/// Whether a tensor holds the block scales of another.
pub(crate) fn is_scale(name: &str) -> bool {
    name.ends_with(".weight_scale_inv")
}
