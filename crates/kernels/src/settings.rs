//! Settings of operations. There are no operations here.

/// How products treat their operands: an [`OperandRounding`] in training, an [`ActivationQuant`] in inference. Sums are
/// always f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compute {
    /// f32 operands, unrounded.
    #[default]
    F32,
    /// Both operands rounded to bf16, and activations saved for the backward pass in bf16. Some CPUs multiply pairs of
    /// bf16 at twice the rate of f32.
    Bf16,
    /// The same in f16. Its range ends at 65,504, so gradients need a loss scale.
    F16,
    /// Both operands rounded to E4M3: activations and gradients in tiles of 1 × 128 along the sum, weights in blocks of
    /// 128 × 128. Saved activations have that form too. The values are those of FP8 units, the arithmetic is f32.
    Fp8(Scales),
    /// For inference: activations quantized to match each weight's format. Int8 in blocks of 32 for ggml's blocks, bf16
    /// for bf16, unrounded for all others.
    MatchWeight,
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
    /// To match each weight's format: int8 for ggml's blocks, bf16 for bf16, not at all for others, like llama.cpp.
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
            ActivationQuant::MatchWeight => Self::MatchWeight,
        }
    }
}

/// How the scale of an E4M3 tile is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scales {
    /// Any f32: the tile's largest magnitude becomes 448 exactly.
    #[default]
    F32,
    /// Rounded up to a power of two, which scales without rounding error (UE8M0).
    PowerOfTwo,
    /// Always 1: E4M3 without scales, for comparison.
    One,
}

/// Whether a product replaces its output or is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accumulate {
    Replace,
    Add,
}

impl Accumulate {
    /// The setting of one of several partial products: as given for the first, `Add` for the others.
    pub(crate) fn after(self, first: bool) -> Self {
        if first { self } else { Self::Add }
    }
}
