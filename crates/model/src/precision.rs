//! Which parts of a model compute in what.
//!
//! Only the products of attention and of the feed-forward layers are lowered. What is small and decides much is not:
//! a router that is rounded swaps neighboring experts, a head that is rounded moves every probability.
//!
//! Source: DeepSeek-V3, arXiv:2412.19437, section 3.3.1.

use kernels::Compute;
use kernels::fp8::Scales;

/// A part of a model, as precision sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The linear layers of attention and of dense and shared feed-forward layers.
    Linear,
    /// The routed experts.
    Experts,
    /// The router's scores and bias.
    Router,
    /// The output head and the loss.
    Head,
    /// Low-rank updates: factors, and the products with them.
    Lora,
    /// Embedding, norms, rotary embedding, softmax.
    Rest,
}

impl Class {
    /// All classes, in the order of a table.
    pub const ALL: [Self; 6] = [
        Self::Linear,
        Self::Experts,
        Self::Router,
        Self::Head,
        Self::Lora,
        Self::Rest,
    ];

    /// What people call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear layers",
            Self::Experts => "routed experts",
            Self::Router => "router",
            Self::Head => "head and loss",
            Self::Lora => "LoRA factors",
            Self::Rest => "embedding, norms, rope, softmax",
        }
    }

    /// What it computes in where the model computes in `compute`.
    pub fn compute(self, compute: Compute) -> Compute {
        match self {
            Self::Linear | Self::Experts => compute,
            Self::Router | Self::Head | Self::Lora | Self::Rest => Compute::F32,
        }
    }
}

/// What products of a precision read, how they add, and what waits for the backward pass.
pub fn described(compute: Compute) -> [&'static str; 3] {
    match compute {
        Compute::F32 => ["f32", "f32", "f32"],
        Compute::Bf16 => ["bf16", "f32", "bf16"],
        Compute::Fp8(Scales::F32) => ["E4M3, f32 scales", "f32", "E4M3"],
        Compute::Fp8(Scales::PowerOfTwo) => ["E4M3, UE8M0 scales", "f32", "E4M3"],
        Compute::Fp8(Scales::One) => ["E4M3, no scales", "f32", "E4M3"],
    }
}

/// A table of what computes in what, one line per class.
pub fn table(compute: Compute) -> String {
    let width = Class::ALL.map(|class| class.name().len()).into_iter().max();
    let width = width.unwrap_or(0);
    let mut table = format!(
        "{:width$}  {:18}  sums  kept for backward",
        "precision", "operands"
    );
    for class in Class::ALL {
        let [operands, sums, kept] = described(class.compute(compute));
        table += &format!("\n{:width$}  {operands:18}  {sums:4}  {kept}", class.name());
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_large_products_are_lowered() {
        let fp8 = Compute::Fp8(Scales::F32);
        let lowered = Class::ALL.map(|class| class.compute(fp8) == fp8);
        assert_eq!(lowered, [true, true, false, false, false, false]);
        assert_eq!(table(fp8).lines().count(), 7);
    }
}
