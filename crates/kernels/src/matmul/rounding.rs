//! What a product rounds its operands to.

use super::gemm::{gemm, gemm_bf16};
use crate::formats::{Format, Matrix, fp8};
use crate::gemv::round_rows_to_int8;
use crate::memory::{Mat, MatMut};
use crate::settings::{Accumulate, Compute};
use crate::simd::{round_to_bf16, round_to_f16};

impl Compute {
    /// What products with a weight round to.
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

    /// What operands are rounded to before a product: nothing where products do it themselves.
    pub(crate) fn before_products(self) -> Self {
        match self {
            Self::Int8 | Self::Bf16 => Self::F32,
            _ => self,
        }
    }

    /// `dst = a · b`, or added to `dst`, of operands that were rounded as [`Self::before_products`] says; serial.
    pub(crate) fn multiply(self, dst: MatMut<'_>, a: Mat<'_>, b: Mat<'_>, accumulate: Accumulate) {
        match self {
            Self::Bf16 => gemm_bf16(dst, a, (b, false), accumulate),
            _ => gemm(dst, a, b, 1.0, accumulate),
        }
    }

    /// Rounds rows whose values are summed over in a product.
    pub(crate) fn round_rows(self, values: &mut [f32], width: usize) {
        match self {
            Self::F32 => {}
            Self::Bf16 => round_to_bf16(values),
            Self::F16 => round_to_f16(values),
            Self::Fp8(kind) => fp8::round_rows(values, width, kind),
            Self::Int8 => round_rows_to_int8(values, width),
        }
    }

    /// Rounds a matrix whose columns are summed over in a product: both operands of a weight's gradient.
    pub(crate) fn round_columns(self, values: &mut [f32], width: usize) {
        match self {
            Self::Fp8(kind) => fp8::round_columns(values, width, kind),
            _ => self.round_rows(values, width),
        }
    }

    /// Rounds a tile of a weight that starts at a block's edge.
    pub(crate) fn round_weight(self, values: &mut [f32], width: usize) {
        match self {
            Self::Fp8(kind) => fp8::round_blocks(values, width, kind),
            Self::Int8 => {}
            _ => self.round_rows(values, width),
        }
    }
}
