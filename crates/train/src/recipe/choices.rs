//! Settings of a recipe that are one of a few words.
//!
//! Words for a type of another crate are listed in `values.rs`.

use burn::tensor::FloatDType;
use serde::{Deserialize, Serialize};

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// A LoRA adapter on frozen weights.
    Lora,
    /// The weights themselves: all, or those that `unfrozen_parameters` selects.
    Full,
}

/// The loss to minimize.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loss {
    /// Cross-entropy of the next token.
    CrossEntropy,
    /// Direct preference optimization against a reference: arXiv:2305.18290.
    Dpo,
}

/// The model that preferences are learned relative to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DpoReference {
    /// The model that training starts from, with `model.adapter` as it is at the start.
    Start,
    /// The base without any adapter.
    Base,
}

impl Loss {
    /// A loss up to this is not high, whatever came before. Preferences are learned from ln 2, which is no preference,
    /// towards zero, and there single pairs are many times the average.
    pub(crate) fn calm(self) -> f64 {
        match self {
            Self::CrossEntropy => 0.0,
            Self::Dpo => std::f64::consts::LN_2,
        }
    }
}

/// The part of the routers that is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RouterTraining {
    /// Nothing, as DeepSeek fine-tunes.
    Frozen,
    /// The weight: updated by the adapter, or trained with the rest.
    Trainable,
    /// The correction bias, by the balancer; the weight stays.
    BiasOnly,
}

/// The dtype of AdamW's running means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Moments {
    /// Single precision.
    F32,
    /// Half the memory.
    Bf16,
}

impl Moments {
    pub(crate) fn dtype(self) -> checkpoint::DType {
        match self {
            Self::F32 => checkpoint::DType::F32,
            Self::Bf16 => checkpoint::DType::BF16,
        }
    }

    pub(crate) fn float(self) -> FloatDType {
        match self {
            Self::F32 => FloatDType::F32,
            Self::Bf16 => FloatDType::BF16,
        }
    }
}

/// The shape of the learning rate after the warmup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Stays at the peak.
    Constant,
    /// Falls along a line.
    Linear,
    /// Falls along half a cosine wave.
    Cosine,
}

/// The format of a fully trained model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExportDType {
    /// Block FP8 if the base is, else bf16.
    Base,
    /// bfloat16.
    Bf16,
    /// Block FP8 for attention and experts, bf16 for the rest.
    Fp8,
}
