//! Which path a product of a linear layer takes: the only place that decides it.

use super::operand::{LayerPass, WeightOperand};
use super::packing::multiplies_pairs;
use crate::gemv::{MAX_GEMV_ROWS, PackedWeight};
use crate::memory::Mat;
use crate::settings::Compute;

/// How a product is made. `Gemv`, `Int8Gemm` and the two that go by rows give each row of activations the bits it has
/// alone; the others cut rows into tiles.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ProductPlan<'a> {
    /// Few rows, multiplied with the stored numbers.
    Gemv(PackedWeight<'a>),
    /// Any number of rows, multiplied with stored bytes: codes of blocks, with activations in int8.
    Int8Gemm(PackedWeight<'a>),
    /// Few rows, each row of the weight decoded on its own.
    F32Rows,
    /// The same with activations rounded to bf16.
    Bf16Rows,
    /// Tiles of the weight, decoded and rounded to f32 values.
    F32Gemm,
    /// Tiles whose values the product rounds to bf16, as it does the activations.
    Bf16Gemm,
    /// A weight stored in bf16, read in place by instructions that multiply pairs.
    Bf16PairsGemm(Mat<'a>),
}

impl<'a> ProductPlan<'a> {
    /// Whether each row of activations is multiplied on its own.
    pub(crate) fn is_by_rows(&self) -> bool {
        matches!(
            self,
            Self::Gemv(_) | Self::Int8Gemm(_) | Self::F32Rows | Self::Bf16Rows
        )
    }

    /// The weight, if its stored bytes are multiplied.
    pub(crate) fn packed(self) -> Option<PackedWeight<'a>> {
        match self {
            Self::Gemv(packed) | Self::Int8Gemm(packed) => Some(packed),
            _ => None,
        }
    }
}

/// The path of a product of `rows` rows of activations with a weight, whose settings the weight carries.
///
/// | weight                                         | compute         | up to [`MAX_GEMV_ROWS`] | more rows                     |
/// |------------------------------------------------|-----------------|-------------------------|-------------------------------|
/// | blocks of ggml's, by rows or interleaved       | int8            | `Int8Gemm`              | `Int8Gemm`                    |
/// | f32, f16                                       | f32             | `Gemv`                  | `F32Gemm`                     |
/// | bf16                                           | f32             | `Gemv`                  | `F32Gemm`                     |
/// | bf16                                           | bf16            | `Gemv`                  | `Bf16PairsGemm` or `Bf16Gemm` |
/// | trained f32                                    | int8            | `Int8Gemm`, as f32      | `Int8Gemm`, as f32            |
/// | FP8; blocks of ggml's                          | f32             | `F32Rows`               | `F32Gemm`                     |
/// | any other                                      | bf16            | `Bf16Rows`              | `Bf16Gemm`                    |
/// | any                                            | f16             | `F32Rows`               | `F32Gemm`                     |
/// | FP8                                            | FP8             | `F32Rows`               | `F32Gemm`                     |
/// | rounded in blocks: FP8 of another, fake quantized | any          | `F32Gemm`, `Bf16Gemm`   | `F32Gemm`, `Bf16Gemm`         |
/// | split `kv_b_proj`, whose keys are stored as columns | f32, bf16  | `F32Gemm`, `Bf16Gemm`   | `F32Gemm`, `Bf16Gemm`         |
///
/// Backward, stored bytes are never multiplied: `Gemv` is `F32Rows` or `Bf16Rows` there, and `Int8Gemm` and
/// `Bf16PairsGemm` are what the rows below them say. `compute` is what [`Compute::over`] makes of the setting for this
/// weight. `Bf16PairsGemm` needs the CPU's instructions and an even width.
pub(crate) fn plan<'a>(w: &WeightOperand<'a>, rows: usize, pass: LayerPass) -> ProductPlan<'a> {
    let (compute, is_forward) = (w.compute(), pass == LayerPass::Forward);
    let stored = is_forward.then(|| w.packed()).flatten();
    if let (Compute::Int8, Some(packed)) = (compute, stored) {
        return ProductPlan::Int8Gemm(packed);
    }
    let is_bf16 = compute == Compute::Bf16;
    if rows <= MAX_GEMV_ROWS && w.has_rows() {
        return match stored {
            Some(packed) => ProductPlan::Gemv(packed),
            None if is_bf16 => ProductPlan::Bf16Rows,
            None => ProductPlan::F32Rows,
        };
    }
    if !is_bf16 {
        return ProductPlan::F32Gemm;
    }
    let pairs = (is_forward && multiplies_pairs())
        .then(|| w.bf16_pairs())
        .flatten();
    pairs.map_or(ProductPlan::Bf16Gemm, ProductPlan::Bf16PairsGemm)
}
