//! What operations can be told: no operation is here.

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
