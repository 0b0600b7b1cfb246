//! The router: which experts serve a token, and with what weight.
//!
//! Everything here is f32: bf16 rounds enough to swap neighbours among the best. The correction bias takes part in
//! choosing and never in weighting, and has no gradient.
//!
//! Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2; deepseek-ai/DeepSeek-V3: inference/model.py, `Gate`.

use burn::tensor::activation::{sigmoid, softmax};
use burn::tensor::{Int, Tensor};

use crate::config::{MoeConfig, Scoring};

/// The decisions of one layer's router; its weight is the layer's `gate`.
#[derive(Clone, Debug)]
pub struct Router {
    /// `[n_routed_experts]`: chooses, never weighs, never gets a gradient.
    pub e_score_correction_bias: Option<Tensor<1>>,
    /// Settings.
    pub config: MoeConfig,
}

/// What a router decided.
#[derive(Clone, Debug)]
pub struct Routed {
    /// `[tokens, experts]`, without the bias; differentiable.
    pub scores: Tensor<2>,
    /// `[tokens, top_k]`.
    pub ids: Tensor<2, Int>,
    /// `[tokens, top_k]`; differentiable.
    pub weights: Tensor<2>,
}

impl Router {
    /// # Shapes
    /// - `logits`: `[tokens, experts]`, f32
    pub fn route(&self, logits: Tensor<2>) -> Routed {
        let scores = match self.config.scoring_func {
            Scoring::Softmax => softmax(logits, 1),
            Scoring::Sigmoid => sigmoid(logits),
        };
        let choice = match &self.e_score_correction_bias {
            Some(bias) => scores.clone() + bias.clone().unsqueeze(),
            None => scores.clone(),
        };
        let ids = kernels::choose_experts(choice, self.config.choice);
        let weights = self.weigh(scores.clone().gather(1, ids.clone()));
        Routed {
            scores,
            ids,
            weights,
        }
    }

    /// Turns the scores of the chosen experts into their weights.
    fn weigh(&self, chosen: Tensor<2>) -> Tensor<2> {
        let weights = if self.config.norm_topk_prob {
            chosen.clone() / (chosen.sum_dim(1) + 1e-20)
        } else {
            chosen
        };
        weights * self.config.routed_scaling_factor
    }
}
