//! The number formats of written models.

use checkpoint::DType;
use half::{bf16, f16};

use super::hf_fp8::BlockFp8;

/// A checkpoint's config for weights in another format, under the key of the config's own dialect. Without a format it says
/// what it said.
pub(super) fn exported_config(
    config: &serde_json::Value,
    format: impl Into<Option<WeightFormat>>,
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
        if let Some(format) = format.into() {
            keys.insert(key.into(), format.torch_name().into());
        }
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
    /// Half precision.
    F16,
    /// bfloat16; a merge leaves norms and routers that the base keeps in F32 as they are.
    Bf16,
    /// Block FP8 for the products of attention and experts, bfloat16 for the rest.
    Fp8,
}

impl WeightFormat {
    /// The dtype of tensors that are not FP8.
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 | Self::Fp8 => DType::BF16,
        }
    }

    /// The name in `config.json`.
    fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 | Self::Fp8 => "bfloat16",
        }
    }

    pub(crate) fn encode(self, values: &[f32]) -> Vec<u8> {
        encode(self.dtype(), values)
    }
}

/// The dtype that a tensor of some dtype is written in, if not as FP8: in a format, or in its own. Blocks become bf16.
pub(super) fn dtype_of(format: Option<WeightFormat>, stored: DType) -> DType {
    match (format, stored) {
        (Some(format), _) => format.dtype(),
        (None, DType::F32 | DType::F16) => stored,
        (None, _) => DType::BF16,
    }
}

/// Values in a dtype of plain floats.
pub(super) fn encode(dtype: DType, values: &[f32]) -> Vec<u8> {
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
