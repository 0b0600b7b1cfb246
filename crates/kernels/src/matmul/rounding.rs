//! How products round their operands.

use super::gemm::{gemm, gemm_bf16};
use crate::formats::{Format, Matrix, fp8};
use crate::memory::{Mat, MatMut};
use crate::settings::{Accumulate, Compute, OperandRounding};
use crate::simd::{round_to_bf16, round_to_f16};

impl Compute {
    /// The setting of products with this weight: what [`Compute::MatchWeight`] means for its format.
    pub fn for_weight(self, w: &Matrix) -> Self {
        match (self, w.format()) {
            (Self::MatchWeight, Format::Ggml(format)) if format.has_blocks() => self,
            (Self::MatchWeight, Format::Interleaved(_)) => self,
            (Self::MatchWeight, Format::Bf16) => Self::Bf16,
            (Self::MatchWeight, Format::SplitKvB(heads)) if heads.are_bf16() => Self::Bf16,
            (Self::MatchWeight, _) => Self::F32,
            _ => self,
        }
    }

    /// The rounding of operands, whoever does it. Products with codes quantize activations themselves.
    pub(crate) fn rounding(self) -> OperandRounding {
        match self {
            Self::F32 | Self::MatchWeight => OperandRounding::F32,
            Self::Bf16 => OperandRounding::Bf16,
            Self::F16 => OperandRounding::F16,
            Self::Fp8(scales) => OperandRounding::Fp8(scales),
        }
    }

    /// The rounding of operands before a product: none if the product rounds them itself.
    pub(crate) fn rounding_before_product(self) -> OperandRounding {
        match self {
            Self::Bf16 => OperandRounding::F32,
            _ => self.rounding(),
        }
    }

    /// `dst = a · b`, or added to `dst`, with operands rounded by [`Self::rounding_before_product`]; serial.
    pub(crate) fn multiply(self, dst: MatMut<'_>, a: Mat<'_>, b: Mat<'_>, accumulate: Accumulate) {
        match self {
            Self::Bf16 => gemm_bf16(dst, a, b, false, accumulate),
            _ => gemm(dst, a, b, 1.0, accumulate),
        }
    }
}

impl OperandRounding {
    /// Rounds rows for a product that sums along them.
    pub(crate) fn round_rows(self, values: &mut [f32], width: usize) {
        match self {
            Self::F32 => {}
            Self::Bf16 => round_to_bf16(values),
            Self::F16 => round_to_f16(values),
            Self::Fp8(scales) => fp8::round_rows(values, width, scales),
        }
    }

    /// Rounds a matrix for a product that sums along its columns: an operand of a weight's gradient.
    pub(crate) fn round_columns(self, values: &mut [f32], width: usize) {
        match self {
            Self::Fp8(scales) => fp8::round_columns(values, width, scales),
            _ => self.round_rows(values, width),
        }
    }

    /// Rounds a tile of a weight; it starts at a block's edge.
    pub(crate) fn round_weight(self, values: &mut [f32], width: usize) {
        match self {
            Self::Fp8(scales) => fp8::round_blocks(values, width, scales),
            _ => self.round_rows(values, width),
        }
    }
}
