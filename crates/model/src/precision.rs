//! Precision policy: which parts of a model compute in which precision.
//!
//! Only the products of attention and of the feed-forward layers are lowered. Small parts with a large effect are not:
//! rounding a router swaps neighboring experts, rounding a head moves every probability.
//!
//! Source: DeepSeek-V3, arXiv:2412.19437, section 3.3.1.

use kernels::Compute;

use crate::keys::{Module, ParamKey, ParamPart};

/// A part of a model, as precision sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PrecisionClass {
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
    Other,
}

impl PrecisionClass {
    /// All classes, in the order of a table.
    pub const ALL: [Self; 6] = [
        Self::Linear,
        Self::Experts,
        Self::Router,
        Self::Head,
        Self::Lora,
        Self::Other,
    ];

    /// The class of a checkpoint's tensor.
    pub fn of(key: &str) -> Self {
        let Some(ParamKey { module, part, .. }) = ParamKey::parse(key) else {
            return Self::Other;
        };
        match (module, part) {
            (Module::Router, _) => Self::Router,
            (Module::Head, _) => Self::Head,
            (_, ParamPart::Weight) => Self::of_weight(module),
            _ => Self::Other,
        }
    }

    /// The class of a module's weight.
    fn of_weight(module: Module) -> Self {
        match module {
            Module::Router => Self::Router,
            Module::Head => Self::Head,
            Module::Experts | Module::Expert(..) => Self::Experts,
            Module::Q
            | Module::QA
            | Module::QB
            | Module::KvA
            | Module::KvB
            | Module::KvBKeys
            | Module::KvBValues
            | Module::K
            | Module::V
            | Module::O
            | Module::Mlp(_)
            | Module::SharedExperts(_) => Self::Linear,
            Module::Embedding
            | Module::FinalNorm
            | Module::InputNorm
            | Module::PostAttentionNorm
            | Module::QANorm
            | Module::KvANorm
            | Module::MtpEmbedding
            | Module::MtpTokenNorm
            | Module::MtpHiddenNorm
            | Module::MtpInput
            | Module::MtpNorm
            | Module::MtpHead => Self::Other,
        }
    }

    /// The name to print.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear layers",
            Self::Experts => "routed experts",
            Self::Router => "router",
            Self::Head => "head and loss",
            Self::Lora => "LoRA factors",
            Self::Other => "embedding, norms, rope, softmax",
        }
    }

    /// Whether its products may be lowered.
    pub(crate) fn is_lowered(self) -> bool {
        matches!(self, Self::Linear | Self::Experts)
    }

    /// What it computes in if the model computes in `compute`.
    pub fn compute(self, compute: Compute) -> Compute {
        match self {
            _ if self.is_lowered() => compute,
            // Every token reads all of a head; in blocks that is few bytes.
            Self::Head if compute == Compute::MatchWeight => compute,
            _ => Compute::F32,
        }
    }
}

/// Whether a tensor is published in FP8: the weights of attention and of feed-forward layers. Embedding, head, norms and
/// routers are not.
pub(crate) fn is_lowered(key: &str) -> bool {
    PrecisionClass::of(key).is_lowered()
}

#[cfg(test)]
mod tests {
    use kernels::fp8::Scales;

    use super::*;

    #[test]
    fn only_the_large_products_are_lowered() {
        let fp8 = Compute::Fp8(Scales::F32);
        let lowered = PrecisionClass::ALL.map(|class| class.compute(fp8) == fp8);
        assert_eq!(lowered, [true, true, false, false, false, false]);
    }

    #[test]
    fn a_tensor_belongs_to_a_class() {
        let of = |key: &str, class| assert_eq!(PrecisionClass::of(key), class, "{key}");
        of(
            "model.layers.1.mlp.experts.3.up_proj.weight",
            PrecisionClass::Experts,
        );
        of(
            "model.layers.1.mlp.shared_experts.up_proj.weight",
            PrecisionClass::Linear,
        );
        of(
            "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
            PrecisionClass::Linear,
        );
        of("model.layers.1.mlp.gate.weight", PrecisionClass::Router);
        of(
            "model.layers.1.mlp.gate.e_score_correction_bias",
            PrecisionClass::Router,
        );
        of("lm_head.weight", PrecisionClass::Head);
        of("model.embed_tokens.weight", PrecisionClass::Other);
        of(
            "model.layers.1.self_attn.kv_a_layernorm.weight",
            PrecisionClass::Other,
        );
    }
}
