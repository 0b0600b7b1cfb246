//! What a product rounds its operands to.

use crate::fp8::{self, Scales};
use crate::matrix::{round_to_bf16, round_to_f16};
use crate::product::strided::{Mat, MatMut, Write, gemm, gemm_bf16};
use crate::rows;
use crate::{Format, Matrix};

/// What the operands of a product are rounded to before they are multiplied. Sums are f32 always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compute {
    /// Multiply f32 values as they are.
    #[default]
    F32,
    /// Round both operands to bf16 first, and keep activations that wait for the backward pass in bf16. Some CPUs have
    /// instructions that multiply such pairs at twice the rate of f32.
    Bf16,
    /// The same in f16, whose range ends at 65504: gradients need a scale to stay inside.
    F16,
    /// Round both operands to E4M3 first, activations and gradients in tiles of 1 × 128 along the sum, weights in blocks
    /// of 128 × 128; and keep activations in that form. The values are those of FP8 units, the arithmetic is f32.
    Fp8(Scales),
    /// Round activations to what the weight is in: to int8 in blocks of 32, with a scale each, where it is in blocks of
    /// ggml's, whose codes are multiplied; to bf16 where it is bf16; not at all where it is another. For inference.
    Int8,
}

impl Compute {
    /// What products with a weight round to.
    pub fn over(self, w: &Matrix) -> Self {
        match (self, w.format()) {
            (Self::Int8, Format::Ggml(format)) if rows::multiplies(*format) => self,
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
    pub(crate) fn multiply(self, dst: MatMut<'_>, a: Mat<'_>, b: Mat<'_>, write: Write) {
        match self {
            Self::Bf16 => gemm_bf16(dst, a, (b, false), write),
            _ => gemm(dst, a, b, 1.0, write),
        }
    }

    /// Rounds rows whose values are summed over in a product.
    pub(crate) fn round_rows(self, values: &mut [f32], width: usize) {
        match self {
            Self::F32 => {}
            Self::Bf16 => round_to_bf16(values),
            Self::F16 => round_to_f16(values),
            Self::Fp8(kind) => fp8::round_rows(values, width, kind),
            Self::Int8 => rows::round_rows(values, width),
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
