//! The path of each product of a linear layer: this is the only place that decides it.

use super::block_product::multiplies_pairs;
use super::operand::{LayerPass, WeightOperand};
use crate::gemv::{MAX_GEMV_ROWS, PackedWeight};
use crate::memory::Mat;
use crate::settings::Compute;

/// How a product is computed. In `Gemv`, `Int8Gemm`, `F32Rows` and `Bf16Rows`, each row of activations has the bits it
/// has alone; the others cut rows into tiles.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ProductPlan<'a> {
    /// Few rows, multiplied with the stored f32, f16 or bf16 numbers.
    Gemv(PackedWeight<'a>),
    /// Any number of rows in int8, multiplied with the stored codes of blocks.
    Int8Gemm(PackedWeight<'a>),
    /// Few rows; each row of the weight is decoded alone.
    F32Rows,
    /// The same with activations rounded to bf16.
    Bf16Rows,
    /// Tiles of the weight, decoded and rounded to f32 values.
    F32Gemm,
    /// Tiles of the weight, rounded to bf16 by the product like the activations.
    Bf16Gemm,
    /// A weight stored in bf16, read in place by instructions for pairs.
    Bf16PairsGemm(Mat<'a>),
}

impl<'a> ProductPlan<'a> {
    /// Whether each row of activations is multiplied alone.
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

/// The path of a product of `rows` rows of activations with a weight, which carries its settings.
///
/// | weight                             | compute   | up to [`MAX_GEMV_ROWS`] | more rows                     |
/// |------------------------------------|-----------|-------------------------|-------------------------------|
/// | ggml's blocks, also interleaved    | int8      | `Int8Gemm`              | `Int8Gemm`                    |
/// | trained f32                        | int8      | `Int8Gemm`, in f32      | `Int8Gemm`, in f32            |
/// | f32, f16, bf16                     | f32       | `Gemv`                  | `F32Gemm`                     |
/// | ggml's blocks, FP8                 | f32       | `F32Rows`               | `F32Gemm`                     |
/// | bf16                               | bf16      | `Gemv`                  | `Bf16PairsGemm` or `Bf16Gemm` |
/// | any other                          | bf16      | `Bf16Rows`              | `Bf16Gemm`                    |
/// | any                                | f16       | `F32Rows`               | `F32Gemm`                     |
/// | FP8                                | FP8       | `F32Rows`               | `F32Gemm`                     |
/// | any other, rounded in blocks       | FP8       | `F32Gemm`               | `F32Gemm`                     |
/// | fake quantized, in blocks          | any       | `F32Gemm`, `Bf16Gemm`   | `F32Gemm`, `Bf16Gemm`         |
/// | split `kv_b_proj`                  | any       | `F32Gemm`, `Bf16Gemm`   | `F32Gemm`, `Bf16Gemm`         |
///
/// Backward products never read stored bytes: `Gemv` becomes `F32Rows` or `Bf16Rows`, `Bf16PairsGemm` becomes
/// `Bf16Gemm`, and `Int8Gemm` becomes `F32Rows` or `F32Gemm`. The compute column is the setting resolved for the weight
/// by [`Compute::for_weight`]. `Bf16PairsGemm` needs the CPU's instructions for pairs and an even width.
pub(crate) fn plan<'a>(w: &WeightOperand<'a>, rows: usize, pass: LayerPass) -> ProductPlan<'a> {
    let (compute, is_forward) = (w.compute(), pass == LayerPass::Forward);
    let stored = is_forward.then(|| w.packed()).flatten();
    if let (Compute::MatchWeight, Some(packed)) = (compute, stored) {
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
