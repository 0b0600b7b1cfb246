//! The cost of training on a token and of reading a prompt, and the memory traffic of decoding, counted from the model's
//! own shapes.
//!
//! The count has the products of the mathematics: of weights and low-rank factors with activations, of their gradients, and
//! of queries with keys and weights with values in attention, in which a token meets itself and all tokens before it. The
//! gradient by a layer's input counts from the lowest layer with something to train upward, the gradient by a weight only
//! if it is trained. Repeated work, by checkpointing or in attention's backward pass, does not count: it is overhead. Nor do
//! norms, activations and the optimizer, which multiply little.
//!
//! Decoding multiplies little and reads much: each weight that a step needs once for all of its sequences, and the whole
//! cache of every sequence. Norms and activations are thousands of times smaller and do not count.

use kernels::CacheType;

use super::Model;
use super::visit::ModuleRef;
use crate::config::AttentionConfig;
use crate::forward::cache::Cache;
use crate::keys::layer_of;
use crate::modules::experts::{ExpertWeights, Experts, ExpertsLora, FactorStacks};
use crate::modules::linear::{Linear, Weight};

/// Bytes of a number of low-rank factors and biases, which are f32.
const F32_BYTES: usize = 4;

/// Floating-point operations of one token; a multiplication and its addition are two.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// The forward pass, output head included.
    pub forward: f64,
    /// Gradients by activations.
    pub input_gradients: f64,
    /// Gradients by trained weights.
    pub weight_gradients: f64,
}

impl Cost {
    /// Forward and backward together.
    pub fn total(&self) -> f64 {
        self.forward + self.input_gradients + self.weight_gradients
    }

    /// Adds the products of one token with a number of weights, a share of them trained.
    fn add(&mut self, weights: f64, is_differentiated: bool, trained: f64) {
        self.forward += 2.0 * weights;
        if is_differentiated {
            self.input_gradients += 2.0 * weights;
        }
        self.weight_gradients += 2.0 * weights * trained;
    }
}

/// Bytes that one step of decoding reads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Traffic {
    /// Weights in their stored bytes, low-rank updates included.
    pub weights: f64,
    /// The KV cache.
    pub cache: f64,
}

impl Traffic {
    /// All of it.
    pub fn total(&self) -> f64 {
        self.weights + self.cache
    }
}

impl Model {
    /// The floating-point operations of reading a prompt of `seq` tokens: a forward pass in which only the last token
    /// meets the output head.
    pub fn prompt_operations(&self, seq: usize) -> f64 {
        let mut head = Cost::default();
        add_linear(&mut head, &self.head(), false);
        seq as f64 * self.cost(seq).forward - seq.saturating_sub(1) as f64 * head.forward
    }

    /// The memory traffic of a step that decodes one token of each of `batch` sequences, with `seen` tokens per sequence in
    /// the cache on average.
    ///
    /// A token reads its `top_k` experts. Several tokens count as choosing independently and evenly, so a step reads
    /// `n · (1 − (1 − top_k / n)^batch)` of `n` experts on average.
    pub fn decode_traffic(&self, batch: usize, seen: f64, cache_type: CacheType) -> Traffic {
        let top_k = self.config.moe.as_ref().map_or(0, |moe| moe.choice.top_k);
        let embedding = &self.model.embed_tokens.weight;
        let row = embedding.size_bytes() as f64 / embedding.dims()[0] as f64;
        let mut weights = batch as f64 * row;
        for (_, module) in self.modules() {
            weights += match module {
                ModuleRef::Linear(linear) => bytes_of_linear(linear),
                ModuleRef::Experts(experts) => bytes_of_experts(experts, top_k, batch),
            };
        }
        if self.lm_head.is_none() {
            weights += bytes_of_linear(&self.head());
        }
        let of_token = Cache::bytes_per_token(&self.config, cache_type) as f64;
        let cache = batch as f64 * seen * of_token;
        Traffic { weights, cache }
    }

    /// The mean cost of training on a token of a sequence of `seq`. If nothing is trained, it is that of the forward pass.
    pub fn cost(&self, seq: usize) -> Cost {
        let first = self.first_trained_layer();
        let (layers, mut cost) = (self.model.layers.len(), Cost::default());
        let top_k = self.config.moe.as_ref().map_or(0, |moe| moe.choice.top_k);
        let is_trained = !self.parameters().is_empty();
        for (path, module) in self.modules() {
            let is_differentiated = layer_of(&path).map_or(is_trained, |layer| layer >= first);
            match module {
                ModuleRef::Linear(linear) => add_linear(&mut cost, linear, is_differentiated),
                ModuleRef::Experts(experts) => {
                    add_experts(&mut cost, experts, top_k, is_differentiated);
                }
            }
        }
        if self.lm_head.is_none() {
            add_linear(&mut cost, &self.head(), is_trained);
        }
        let attention = self.attention_products(seq);
        cost.forward += attention * layers as f64;
        cost.input_gradients += 2.0 * attention * (layers - first) as f64;
        cost
    }

    /// The mean forward cost of one layer's attention for one token of a sequence.
    fn attention_products(&self, seq: usize) -> f64 {
        let widths = match &self.config.attention {
            AttentionConfig::Mla(mla) => mla.qk_head_dim() + mla.v_head_dim,
            AttentionConfig::Gqa(gqa) => 2 * gqa.head_dim,
        };
        let seen = (seq + 1) as f64 / 2.0;
        2.0 * (self.config.num_attention_heads * widths) as f64 * seen
    }
}

fn add_linear(cost: &mut Cost, linear: &Linear, is_differentiated: bool) {
    let [out, width] = linear.weight.dims();
    let trained = match &linear.weight {
        Weight::Trained(weight) => share(weight.val().is_require_grad()),
        Weight::Frozen(_) => 0.0,
    };
    cost.add((out * width) as f64, is_differentiated, trained);
    if let Some(lora) = &linear.lora {
        let trained = share(lora.lora_a.val().is_require_grad());
        let parameters = lora.rank() * (out + width);
        cost.add(parameters as f64, is_differentiated, trained);
    }
}

/// The products of a token with `top_k` experts, all of them chosen equally often.
fn add_experts(cost: &mut Cost, experts: &Experts, top_k: usize, is_differentiated: bool) {
    let [n, inner, hidden] = experts.dims();
    let updated = experts.n_updated() as f64 / n as f64;
    let trained = match &experts.weights {
        ExpertWeights::Frozen(_) => [0.0; 3],
        ExpertWeights::Trained(stacks) => stacks.trained().map(share),
        ExpertWeights::Partial(partial) => partial.trained.trained().map(|is| updated * share(is)),
    };
    for trained in trained {
        cost.add((top_k * inner * hidden) as f64, is_differentiated, trained);
    }
    for stack in experts.lora.iter().flat_map(ExpertsLora::stacks) {
        let trained = share(stack.lora_a.val().is_require_grad());
        let parameters = top_k as f64 * updated * n_parameters(stack);
        cost.add(parameters, is_differentiated, trained);
    }
}

fn bytes_of_linear(linear: &Linear) -> f64 {
    let [out, width] = linear.weight.dims();
    let bias = linear.bias.as_ref().map_or(0, |_| out);
    let factors = linear
        .lora
        .as_ref()
        .map_or(0, |lora| lora.rank() * (out + width));
    (linear.weight.size_bytes() + F32_BYTES * (bias + factors)) as f64
}

fn bytes_of_experts(experts: &Experts, top_k: usize, batch: usize) -> f64 {
    let [n, ..] = experts.dims();
    let missed = (1.0 - top_k as f64 / n as f64).powi(batch as i32);
    let read = n as f64 * (1.0 - missed);
    let updated = experts.n_updated() as f64 / n as f64;
    let stacks = experts.lora.iter().flat_map(ExpertsLora::stacks);
    let factors: f64 = stacks.map(n_parameters).sum();
    read * (experts.size_bytes() as f64 / n as f64 + updated * factors * F32_BYTES as f64)
}

impl ExpertsLora {
    /// The updates of projections that have one.
    fn stacks(&self) -> impl Iterator<Item = &FactorStacks> {
        let all = [
            &self.gate_proj,
            &self.up_proj,
            &self.gate_up_proj,
            &self.down_proj,
        ];
        all.into_iter().flatten()
    }
}

/// The number of parameters of one expert's factors.
fn n_parameters(stack: &FactorStacks) -> f64 {
    let [a, b] = [&stack.lora_a, &stack.lora_b].map(|factor| {
        let [_, rows, cols] = factor.val().dims();
        rows * cols
    });
    (a + b) as f64
}

fn share(is_whole: bool) -> f64 {
    if is_whole { 1.0 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::tensor::Device;

    use super::*;

    use crate::ModelConfig;
    use crate::adapt::{self, LoraConfig, Scaling};
    use crate::load::{Training, fresh};

    /// Width 64, 3 layers (the first is dense), 4 heads, 12 experts (4 per token), 1 shared expert.
    const V3: &str = include_str!("../../../../tests/goldens/deepseek_v3/config.json");
    /// Width 64, 3 layers, 8 query heads and 2 key-value heads of width 8.
    const QWEN2: &str = include_str!("../../../../tests/goldens/qwen2_distill/config.json");

    fn model(config: &str, training: Training, lora: Option<&str>) -> Model {
        let (json, device) = (
            serde_json::from_str(config).unwrap(),
            Device::flex().autodiff(),
        );
        let config = ModelConfig::from_json(&json, Path::new("config.json")).unwrap();
        let mut model = fresh(&config, training, 0, &device).unwrap();
        if let Some(target) = lora {
            let config = LoraConfig {
                target: vec![target.into()],
                exclude: vec![],
                rank: 2,
                alpha: 4.0,
                scaling: Scaling::Plain,
                rank_pattern: vec![],
                alpha_pattern: vec![],
                dropout: 0.0,
                seed: 0,
                use_dora: false,
                experts_share: None,
            };
            adapt::attach(&mut model, &config, &device).unwrap();
        }
        model
    }

    /// Products of a token with the weights of the V3 model: attention, feed-forward, head.
    const V3_ATTENTION: f64 = (48 * 64 + 4 * 24 * 48 + 40 * 64 + 4 * 32 * 32 + 64 * 64) as f64;
    const V3_MOE: f64 = (12 * 64 + 4 * 3 * 64 * 24 + 3 * 64 * 24) as f64;
    const V3_WEIGHTS: f64 =
        3.0 * V3_ATTENTION + (3 * 64 * 144) as f64 + 2.0 * V3_MOE + (288 * 64) as f64;
    /// Scores and sums of values: 4 heads of 24 and 16, over 5 of 9 tokens in the mean, 3 layers.
    const V3_SCORES: f64 = (3 * 2 * 4 * (24 + 16) * 5) as f64;

    #[test]
    fn lora_on_a_mixture_costs_no_gradient_of_frozen_weights() {
        let attention = 48 + 64 + 96 + 48 + 40 + 64 + 128 + 32 + 64 + 64;
        let dense = 3 * (64 + 144);
        let moe = 4 * 3 * (64 + 24) + 3 * (64 + 24);
        let factors = f64::from(2 * (3 * attention + dense + 2 * moe));
        assert_eq!((V3_WEIGHTS, factors), (148_992.0, 10_416.0));
        let expected = Cost {
            forward: 2.0 * (V3_WEIGHTS + factors) + V3_SCORES,
            input_gradients: 2.0 * (V3_WEIGHTS + factors) + 2.0 * V3_SCORES,
            weight_gradients: 2.0 * factors,
        };
        let model = model(V3, Training::Frozen, Some("all-linear"));
        assert_eq!(model.cost(9), expected);
        assert_eq!(expected.total(), 323_616.0 + 328_416.0 + 20_832.0);
    }

    #[test]
    fn one_expert_of_twelve_is_met_by_a_third_of_the_tokens() {
        let model = model(V3, Training::Frozen, Some("layers.1.mlp.experts.7"));
        let factors = f64::from(2 * 3 * (64 + 24)) * 4.0 / 12.0;
        let above = 2.0 * (V3_ATTENTION + V3_MOE) + f64::from(288 * 64);
        let expected = Cost {
            forward: 2.0 * (V3_WEIGHTS + factors) + V3_SCORES,
            input_gradients: 2.0 * (above + factors) + 2.0 * V3_SCORES * 2.0 / 3.0,
            weight_gradients: 2.0 * factors,
        };
        let found = model.cost(9);
        assert!((found.total() - expected.total()).abs() < 1e-6, "{found:?}");
        assert!((found.weight_gradients - expected.weight_gradients).abs() < 1e-6);
    }

    #[test]
    fn full_training_costs_three_products_per_weight_and_part_of_it_fewer() {
        let layer = f64::from(64 * 64 + 2 * 16 * 64 + 64 * 64 + 3 * 64 * 176);
        let (head, scores) = (f64::from(320 * 64), f64::from(2 * 8 * (8 + 8) * 5));
        let full = Cost {
            forward: 2.0 * (3.0 * layer + head) + 3.0 * scores,
            input_gradients: 2.0 * (3.0 * layer + head) + 2.0 * 3.0 * scores,
            weight_gradients: 2.0 * (3.0 * layer + head),
        };
        assert_eq!(model(QWEN2, Training::Full, None).cost(9), full);
        assert_eq!(full.total(), 308_992.0 + 312_832.0 + 305_152.0);
        let last = Training::Subset(vec!["layers.2".into()], vec![]);
        let expected = Cost {
            input_gradients: 2.0 * (layer + head) + 2.0 * scores,
            weight_gradients: 2.0 * layer,
            ..full
        };
        assert_eq!(model(QWEN2, last, None).cost(9), expected);
        let expected = Cost {
            input_gradients: 0.0,
            weight_gradients: 0.0,
            ..full
        };
        assert_eq!(model(QWEN2, Training::Frozen, None).cost(9), expected);
    }

    #[test]
    fn a_prompt_meets_the_head_once() {
        let model = model(V3, Training::Frozen, None);
        let token = 2.0 * V3_WEIGHTS + V3_SCORES;
        let expected = 9.0 * token - 8.0 * 2.0 * f64::from(288 * 64);
        assert_eq!(model.prompt_operations(9), expected);
    }

    #[test]
    fn decoding_reads_the_chosen_experts_and_a_row_of_the_embedding() {
        // Of 12 experts two tokens with 4 each choose 12 · (1 − (2/3)²) in the mean; all else is read once for both.
        let model = model(V3, Training::Frozen, None);
        let experts = f64::from(2 * 3 * 64 * 24);
        let others = V3_WEIGHTS - 4.0 * experts;
        let cache = f64::from(3 * (32 + 8) * 4);
        for (batch, n) in [(1, 4.0), (2, 12.0 * (1.0 - 4.0 / 9.0))] {
            let found = model.decode_traffic(batch, 5.0, CacheType::F32);
            let rows = batch as f64 * 64.0;
            let expected = 4.0 * (others + n * experts + rows);
            assert!((found.weights - expected).abs() < 1e-6, "{found:?}");
            assert_eq!(found.cache, batch as f64 * 5.0 * cache);
        }
        let adapted = self::model(V3, Training::Frozen, Some("layers.1.mlp.experts.7"));
        let factors = f64::from(2 * 3 * (64 + 24)) * 4.0 / 12.0 * 4.0;
        let [plain, adapted] =
            [&model, &adapted].map(|model| model.decode_traffic(1, 0.0, CacheType::F32).total());
        assert!(
            (adapted - plain - factors).abs() < 1e-6,
            "{adapted} {plain}"
        );
    }

    #[test]
    fn a_head_that_is_the_embedding_counts_as_one_of_its_own() {
        let tied = QWEN2.replace(
            "\"tie_word_embeddings\": false",
            "\"tie_word_embeddings\": true",
        );
        assert_ne!(tied, QWEN2);
        let costs = [QWEN2, &tied].map(|config| model(config, Training::Full, None).cost(9));
        assert_eq!(costs[0], costs[1]);
    }
}
