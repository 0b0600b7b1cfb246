//! What operations can be told: no operation is here.

/// What an operation is told about its products: an [`OperandRounding`] in training, an [`ActivationQuant`] in inference.
/// Sums are always f32.
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

/// How training rounds the operands of products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OperandRounding {
    /// Not at all.
    #[default]
    F32,
    /// To bf16.
    Bf16,
    /// To f16.
    F16,
    /// To E4M3 with scales.
    Fp8(Scales),
}

/// How inference quantizes activations before products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ActivationQuant {
    /// Not at all.
    None,
    /// To match each weight's format: to int8 for blocks of ggml's, to bf16 for bf16, not at all for others. As llama.cpp.
    #[default]
    MatchWeight,
}

impl From<OperandRounding> for Compute {
    fn from(rounding: OperandRounding) -> Self {
        match rounding {
            OperandRounding::F32 => Self::F32,
            OperandRounding::Bf16 => Self::Bf16,
            OperandRounding::F16 => Self::F16,
            OperandRounding::Fp8(scales) => Self::Fp8(scales),
        }
    }
}

impl From<ActivationQuant> for Compute {
    fn from(quant: ActivationQuant) -> Self {
        match quant {
            ActivationQuant::None => Self::F32,
            ActivationQuant::MatchWeight => Self::Int8,
        }
    }
}

/// Which numbers a scale may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scales {
    /// Any f32: the tile's largest magnitude becomes 448 exactly.
    #[default]
    F32,
    /// The next power of two above, which scales without rounding (UE8M0).
    PowerOfTwo,
    /// Always 1: what E4M3 is worth without scales, for comparison.
    One,
}

/// Whether a product replaces what is there or is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accumulate {
    Replace,
    Add,
}

impl Accumulate {
    /// The first of several partial products writes as asked, the others add.
    pub(crate) fn after(self, first: bool) -> Self {
        if first { self } else { Self::Add }
    }
}
