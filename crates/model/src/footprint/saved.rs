//! What a layer's graph holds for its backward pass, tensor by tensor.

use kernels::{Compute, saved_element_bytes};

use super::BYTES_OF_F32;
use super::shapes::{ExpertsAt, FeedForwardShape, LayerShape, LinearShape};
use crate::config::{AttentionConfig, ModelConfig, Scoring};
use crate::decoder::checkpointing::Checkpointing;
use crate::keys::Module;

/// A forward and a backward pass over one micro-batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainingPass {
    /// Sequences, padded to one length.
    pub rows: f64,
    /// Tokens of a sequence.
    pub seq: f64,
    /// Tokens that have a target.
    pub trained_tokens: f64,
    /// How products round their operands, and the form of what is saved.
    pub compute: Compute,
    /// What is saved between forward and backward.
    pub checkpointing: Checkpointing,
    /// Threads that compute.
    pub threads: f64,
    /// Whether the losses are compared with those of another model, which runs in between.
    pub is_compared: bool,
}

impl TrainingPass {
    /// Tokens, padding included.
    pub fn tokens(&self) -> f64 {
        self.rows * self.seq
    }
}

/// Bytes of what the graph of a layer holds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct SavedLayer {
    /// By the residual stream and its norms: what comes after attention, and the output.
    pub(super) residual: f64,
    /// By attention.
    pub(super) attention: f64,
    /// By the feed-forward part, its router included.
    pub(super) mlp: f64,
}

impl SavedLayer {
    pub(super) fn total(&self) -> f64 {
        self.residual + self.attention + self.mlp
    }
}

/// Counts what operations save in a pass.
#[derive(Clone, Copy, Debug)]
pub(super) struct Saving<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) pass: &'a TrainingPass,
}

impl Saving<'_> {
    /// A tensor with a number of values for each token, in f32.
    pub(super) fn floats(&self, width: f64) -> f64 {
        BYTES_OF_F32 * self.pass.tokens() * width
    }

    /// A tensor in the form in which inputs of products are saved.
    pub(super) fn saved(&self, width: f64) -> f64 {
        saved_element_bytes(self.pass.compute) * self.pass.tokens() * width
    }

    /// The copy of a tensor that is held in f32 already: none if inputs are saved in f32.
    fn copied(&self, width: f64) -> f64 {
        let element = saved_element_bytes(self.pass.compute);
        if element < BYTES_OF_F32 {
            self.saved(width)
        } else {
            0.0
        }
    }

    /// What the graph of a layer holds.
    pub(super) fn layer(&self, layer: &LayerShape) -> SavedLayer {
        let hidden = self.config.hidden_size as f64;
        SavedLayer {
            residual: 2.0 * self.floats(hidden),
            attention: match &self.config.attention {
                AttentionConfig::Mla(_) => self.mla(layer),
                AttentionConfig::Gqa(_) => self.gqa(layer),
            },
            mlp: match &layer.mlp {
                FeedForwardShape::Dense(mlp) => self.mlp(mlp),
                FeedForwardShape::Moe {
                    router,
                    experts,
                    shared,
                } => {
                    let shared = shared.as_ref().map_or(0.0, |shared| self.mlp(shared));
                    self.router(experts) + self.linear(router, 0.0) + self.experts(experts) + shared
                }
            },
        }
    }

    /// What a linear layer saves, given what its input costs if it saves that: nothing if the input is recomputed from a norm or
    /// SwiGLU, or is held anyway.
    fn linear(&self, linear: &LinearShape, of_input: f64) -> f64 {
        let low = self.floats(linear.rank);
        let input = match linear.saves_input() {
            // A dropped input is nobody else's.
            true if linear.drops && linear.rank > 0.0 => self.saved(linear.width),
            true => of_input,
            false => 0.0,
        };
        // DoRA multiplies the output, and dropout makes two of it.
        let scaled = if linear.has_dora {
            self.floats(linear.out)
        } else {
            0.0
        };
        low + input + scaled
    }

    fn mla(&self, layer: &LayerShape) -> f64 {
        let AttentionConfig::Mla(mla) = &self.config.attention else {
            return 0.0;
        };
        let heads = self.config.num_attention_heads as f64;
        let [latent, rope, nope, value] = [
            mla.kv_lora_rank,
            mla.qk_rope_head_dim,
            mla.qk_nope_head_dim,
            mla.v_head_dim,
        ]
        .map(|width| width as f64);
        // Inputs of the norms inside, then queries, latents, keys and values, outputs, and a sum for each head.
        let norms = mla.q_lora_rank.map_or(0.0, |rank| rank as f64) + latent + rope;
        let read = heads * (nope + rope) + latent + rope + heads * (nope + value);
        let held = self.floats(norms + read + heads * value + heads);
        let linears = layer.attention.iter().map(|(module, linear)| {
            self.linear(
                linear,
                match module {
                    Module::KvB => self.saved(latent),
                    Module::O => self.copied(heads * value),
                    _ => 0.0,
                },
            )
        });
        held + linears.sum::<f64>()
    }

    fn gqa(&self, layer: &LayerShape) -> f64 {
        let AttentionConfig::Gqa(gqa) = &self.config.attention else {
            return 0.0;
        };
        let heads = self.config.num_attention_heads as f64;
        let (kv_heads, dim) = (gqa.num_key_value_heads as f64, gqa.head_dim as f64);
        let held = self.floats(2.0 * heads * dim + 2.0 * kv_heads * dim + heads);
        let linears = layer.attention.iter().map(|(module, linear)| {
            let of_input = match module {
                Module::O => self.copied(heads * dim),
                _ => 0.0,
            };
            self.linear(linear, of_input)
        });
        held + linears.sum::<f64>()
    }

    fn mlp(&self, mlp: &[LinearShape; 3]) -> f64 {
        let inner = mlp[0].out;
        let linears = mlp.iter().map(|linear| self.linear(linear, 0.0));
        2.0 * self.saved(inner) + linears.sum::<f64>()
    }

    /// Logits and scores, what the scores' gradient needs, and the chosen experts with their weights, slot by slot.
    pub(super) fn router(&self, experts: &ExpertsAt) -> f64 {
        let scoring = self.config.moe.as_ref().map(|moe| moe.scoring_func);
        let of_experts = match scoring {
            Some(Scoring::Softmax) => 3.0,
            _ => 2.0,
        };
        self.floats(of_experts * experts.experts + 6.0 * experts.top_k)
    }

    /// Products of gate and up.
    fn experts(&self, experts: &ExpertsAt) -> f64 {
        2.0 * self.saved(experts.top_k * experts.inner)
    }
}
