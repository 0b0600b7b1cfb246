//! How products round their operands.

use super::gemm::{gemm, gemm_bf16};
use crate::formats::{Format, Matrix, fp8};
use crate::gemv::round_rows_to_int8;
use crate::memory::{Mat, MatMut};
use crate::settings::{Accumulate, Compute};
use crate::simd::{round_to_bf16, round_to_f16};

impl Compute {
    /// The setting of products with this weight.
    pub fn over(self, w: &Matrix) -> Self {
        match (self, w.format()) {
            (Self::Int8, Format::Ggml(format)) if format.has_blocks() => self,
            (Self::Int8, Format::Interleaved(_)) => self,
            (Self::Int8, Format::Bf16) => Self::Bf16,
            (Self::Int8, Format::SplitKvB(heads)) if heads.are_bf16() => Self::Bf16,
            (Self::Int8, _) => Self::F32,
            _ => self,
        }
    }

    /// The rounding of operands before a product: none if the product rounds them itself.
    pub(crate) fn before_products(self) -> Self {
        match self {
            Self::Int8 | Self::Bf16 => Self::F32,
            _ => self,
        }
    }

    /// `dst = a · b`, or added to `dst`, with operands rounded by [`Self::before_products`]; serial.
    pub(crate) fn multiply(self, dst: MatMut<'_>, a: Mat<'_>, b: Mat<'_>, accumulate: Accumulate) {
        match self {
            Self::Bf16 => gemm_bf16(dst, a, b, false, accumulate),
            _ => gemm(dst, a, b, 1.0, accumulate),
        }
    }

    /// Rounds rows for a product that sums along them.
    pub(crate) fn round_rows(self, values: &mut [f32], width: usize) {
        match self {
            Self::F32 => {}
            Self::Bf16 => round_to_bf16(values),
            Self::F16 => round_to_f16(values),
            Self::Fp8(kind) => fp8::round_rows(values, width, kind),
            Self::Int8 => round_rows_to_int8(values, width),
        }
    }

    /// Rounds a matrix for a product that sums along its columns: an operand of a weight's gradient.
    pub(crate) fn round_columns(self, values: &mut [f32], width: usize) {
        match self {
            Self::Fp8(kind) => fp8::round_columns(values, width, kind),
            _ => self.round_rows(values, width),
        }
    }

    /// Rounds a tile of a weight; it starts at a block's edge.
    pub(crate) fn round_weight(self, values: &mut [f32], width: usize) {
        match self {
            Self::Fp8(kind) => fp8::round_blocks(values, width, kind),
            Self::Int8 => {}
            _ => self.round_rows(values, width),
        }
    }
}
