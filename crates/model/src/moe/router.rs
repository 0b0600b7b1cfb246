//! The router: which experts serve a token, and with what weight.
//!
//! Everything here is f32: bf16 rounds enough to swap neighbours among the best. The correction bias takes part in
//! choosing and never in weighting, and has no gradient.
//!
//! Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2; deepseek-ai/DeepSeek-V3: inference/model.py, `Gate`.

use burn::tensor::activation::sigmoid;
use burn::tensor::{Int, Tensor};
use kernels::TopK;

use crate::config::{MoeConfig, Scoring};

/// The decisions of one layer's router; its weight is the layer's `gate`.
#[derive(Clone, Debug)]
pub struct Router {
    /// `[n_routed_experts]`: chooses, never weighs, never gets a gradient.
    pub e_score_correction_bias: Option<Tensor<1>>,
    /// Settings.
    pub config: MoeConfig,
    /// How many of a token's experts are asked for before it chooses them, where they are read from a file.
    pub n_prefetch: usize,
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
    /// Chooses experts, unless they are given, and weighs them.
    ///
    /// # Shapes
    /// - `logits`: `[tokens, experts]`, f32; `chosen`: `[tokens, top_k]`
    pub fn route(&self, logits: Tensor<2>, chosen: Option<Tensor<2, Int>>) -> Routed {
        let scores = self.scores(logits);
        let ids = chosen.unwrap_or_else(|| self.choose(scores.clone(), self.config.choice));
        let weights = self.weigh(scores.clone().gather(1, ids.clone()));
        Routed {
            scores,
            ids,
            weights,
        }
    }

    /// Those of every token's experts that are asked for ahead, `[tokens, n_prefetch]`, of logits `[tokens, experts]`.
    pub(crate) fn top_k(&self, logits: Tensor<2>) -> Tensor<2, Int> {
        let best = TopK {
            top_k: self.n_prefetch,
            ..self.config.choice
        };
        self.choose(self.scores(logits), best)
    }

    fn scores(&self, logits: Tensor<2>) -> Tensor<2> {
        match self.config.scoring_func {
            Scoring::Softmax => softmax(logits),
            Scoring::Sigmoid => sigmoid(logits),
        }
    }

    /// The best experts of every token, by scores and bias.
    fn choose(&self, scores: Tensor<2>, best: TopK) -> Tensor<2, Int> {
        let choice = match &self.e_score_correction_bias {
            Some(bias) => scores + bias.clone().unsqueeze(),
            None => scores,
        };
        kernels::choose_experts(choice, best)
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

/// burn's own softmax is one operation without autodiff and several with it, which differ in the last bit: a layer that runs
/// again in a graph would not give the values of its first run.
fn softmax(logits: Tensor<2>) -> Tensor<2> {
    let max = logits.clone().detach().max_dim(1);
    let exps = (logits - max).exp();
    exps.clone() / exps.sum_dim(1)
}
