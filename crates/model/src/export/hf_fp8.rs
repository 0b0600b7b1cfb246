//! Weights in block FP8, as DeepSeek publishes them, and the formats of their scales.
//!
//! Source: deepseek-ai/DeepSeek-V3: inference/fp8_cast_bf16.py and the checkpoint's `quantization_config`.

use bytes::Bytes;
use checkpoint::{DType, Folder, TensorSpec};
use kernels::fp8::{Scales, Tiles, encode_tiles, power_of_two_to_e8m0};
use serde_json::{Value, json};

use crate::Error;
use crate::config::ModelConfig;
use crate::keys::{is_scale, scale_key};
use crate::load::has_e8m0_scales;

/// The format of a checkpoint's FP8 weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockFp8 {
    block: [usize; 2],
    scales: Scales,
    scale_dtype: DType,
}

impl BlockFp8 {
    /// The format of `base` if it has FP8 weights, else DeepSeek V3's. Fresh scales are powers of two or f32: in bf16 they
    /// would not be the ones that the codes were made with.
    ///
    /// # Errors
    /// If a scale of the base cannot be read.
    pub(crate) fn of(base: Option<&Folder>, config: &ModelConfig) -> Result<Self, Error> {
        let is_e8m0 = base.map_or(Ok(false), has_e8m0_scales)?;
        Ok(Self {
            block: config.fp8_block,
            scales: config.fp8_scales,
            scale_dtype: if is_e8m0 { DType::F8E8M0 } else { DType::F32 },
        })
    }

    /// The codes and the scales of a weight.
    pub(crate) fn specs(&self, name: &str, [rows, cols]: [usize; 2]) -> [TensorSpec; 2] {
        let grid = [rows.div_ceil(self.block[0]), cols.div_ceil(self.block[1])];
        let spec = |name: String, dtype, shape: [usize; 2]| TensorSpec {
            name: name.into(),
            dtype,
            shape: shape.to_vec(),
        };
        [
            spec(name.into(), DType::F8E4M3, [rows, cols]),
            spec(scale_key(name), self.scale_dtype, grid),
        ]
    }

    pub(crate) fn encode(&self, values: &[f32], shape: [usize; 2]) -> Tiles {
        encode_tiles(values, shape, self.block, self.scales)
    }

    /// The bytes of scales in a file.
    pub(crate) fn scale_bytes(&self, scales: &[f32]) -> Bytes {
        let bytes: Vec<u8> = match self.scale_dtype {
            DType::F8E8M0 => scales.iter().map(|s| power_of_two_to_e8m0(*s)).collect(),
            _ => scales.iter().flat_map(|s| s.to_le_bytes()).collect(),
        };
        bytes.into()
    }

    /// A config's `quantization_config`.
    pub(crate) fn config(&self) -> Value {
        let mut config = json!({
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": self.block,
        });
        if self.scales == Scales::PowerOfTwo {
            config["scale_fmt"] = "ue8m0".into();
        }
        config
    }
}

/// Whether a checkpoint has weights in block FP8.
pub fn is_fp8(folder: &Folder) -> bool {
    folder.names().any(is_scale)
}
