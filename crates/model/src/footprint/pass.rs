//! The memory of a training pass: forward, loss and backward, layer by layer, as `decoder/checkpointing.rs` runs them.

use kernels::{Compute, HeadShape, THREAD_SCRATCH};

use super::BYTES_OF_F32;
use super::generation::{experts_shape, mlp_bytes};
use super::saved::{SavedLayer, Saving, TrainingPass};
use super::shapes::{ExpertsAt, FeedForwardShape, LayerShape, LinearShape, ModelShape};
use crate::config::AttentionConfig;
use crate::decoder::checkpointing::Checkpointing;

/// Bytes of a pass, besides what is there before.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PassBytes {
    /// What the forward pass leaves for the backward pass.
    pub saved: f64,
    /// The most that the forward and the backward pass take.
    pub pass: f64,
    /// The gradients that are left.
    pub gradients: f64,
    /// What threads keep from pass to pass.
    pub scratch: f64,
}

impl ModelShape {
    /// The memory of a training pass.
    pub fn training_pass(&self, pass: &TrainingPass) -> PassBytes {
        let walk = PassWalk {
            shape: self,
            saving: Saving {
                config: &self.config,
                pass,
            },
            pass,
        };
        walk.bytes()
    }
}

/// Walks the layers of a pass.
struct PassWalk<'a> {
    shape: &'a ModelShape,
    saving: Saving<'a>,
    pass: &'a TrainingPass,
}

impl PassWalk<'_> {
    fn hidden(&self) -> f64 {
        self.shape.config.hidden_size as f64
    }

    /// A tensor of the residual stream's width.
    fn stream(&self) -> f64 {
        self.saving.floats(self.hidden())
    }

    fn bytes(&self) -> PassBytes {
        let first = self.shape.first_trained_layer();
        let layers = &self.shape.layers;
        let saved: Vec<SavedLayer> = layers
            .iter()
            .map(|layer| self.saving.layer(layer))
            .collect();
        let is_block = self.pass.checkpointing == Checkpointing::Block;
        // The output of the embedding, and what each layer leaves.
        let (mut held, mut forward) = (self.stream(), 0.0_f64);
        let mut left = Vec::with_capacity(layers.len());
        for (layer_idx, layer) in layers.iter().enumerate() {
            let own = saved[layer_idx];
            let run = match is_block || layer_idx < first {
                true => self.run_without_graph(layer),
                false => own.total() + self.forward_extra(layer),
            };
            forward = forward.max(held + run);
            let leaves = match (layer_idx < first, is_block) {
                (true, _) => self.record(layer),
                (false, true) => self.stream() + self.choices(layer),
                (false, false) => own.total(),
            };
            left.push(leaves);
            held += leaves;
        }
        let all_saved = held;
        let mut pass = forward.max(all_saved + self.loss());
        let mut gradients = self.head_gradients();
        for layer_idx in (first..layers.len()).rev() {
            let layer = &layers[layer_idx];
            let own = saved[layer_idx];
            held -= left[layer_idx];
            let again = if is_block {
                pass = pass.max(
                    held + gradients + self.stream() + own.total() + self.forward_extra(layer),
                );
                self.stream()
            } else {
                0.0
            };
            gradients += BYTES_OF_F32 * (layer.trained() + layer.update());
            pass = pass.max(held + again + gradients + self.backward(layer, own));
        }
        let embedding =
            BYTES_OF_F32 * (self.shape.embedding.trained() + self.shape.embedding.update());
        if embedding > 0.0 {
            gradients += embedding;
            pass = pass.max(held + gradients + 4.0 * self.stream());
        }
        PassBytes {
            saved: all_saved,
            pass,
            gradients,
            scratch: self.scratch(),
        }
    }

    /// What threads keep from pass to pass.
    fn scratch(&self) -> f64 {
        let threads = self.pass.threads;
        let of_layer = |layer: &LayerShape| match &layer.mlp {
            FeedForwardShape::Dense(_) => 0.0,
            FeedForwardShape::Moe { experts, .. } => {
                let shape = experts_shape(experts, self.pass.tokens());
                shape.forward_scratch(threads) + shape.backward_scratch(threads)
            }
        };
        let layers = self.shape.layers.iter().map(of_layer);
        layers.fold(0.0, f64::max) + threads * THREAD_SCRATCH
    }

    /// The gradients of the output head and of the last norm.
    fn head_gradients(&self) -> f64 {
        let head = &self.shape.head;
        BYTES_OF_F32 * (head.trained() + head.update() + self.shape.final_norm)
    }

    /// What is recorded of the routing of a layer that saves nothing else.
    fn record(&self, layer: &LayerShape) -> f64 {
        match &layer.mlp {
            FeedForwardShape::Dense(_) => 0.0,
            FeedForwardShape::Moe { experts, .. } => self.saving.router(experts),
        }
    }

    /// The experts that a layer chose.
    fn choices(&self, layer: &LayerShape) -> f64 {
        match &layer.mlp {
            FeedForwardShape::Dense(_) => 0.0,
            FeedForwardShape::Moe { experts, .. } => self.saving.floats(experts.top_k),
        }
    }

    /// Whether products round their operands, in copies.
    fn rounds(&self) -> f64 {
        match self.pass.compute {
            Compute::F32 | Compute::MatchWeight => 0.0,
            _ => 1.0,
        }
    }

    /// Gate and up of experts in f32, where they are saved in another form.
    fn widened(&self, experts: &ExpertsAt) -> f64 {
        let slots = experts_shape(experts, self.pass.tokens()).slots();
        2.0 * self.rounds() * BYTES_OF_F32 * slots * experts.inner
    }

    /// What the forward pass of a layer takes besides what its graph holds.
    fn forward_extra(&self, layer: &LayerShape) -> f64 {
        let rounded = self.rounds();
        match &layer.mlp {
            // The norm's output, the activations, and gate and up before they are narrowed.
            FeedForwardShape::Dense([gate, ..]) => {
                self.stream() * (1.0 + rounded)
                    + self.saving.floats(gate.out) * (1.0 + 2.0 * rounded)
            }
            FeedForwardShape::Moe { experts, .. } => {
                self.stream() * (2.0 + rounded) + self.widened(experts)
            }
        }
    }

    /// What a layer takes that runs without a graph.
    fn run_without_graph(&self, layer: &LayerShape) -> f64 {
        let (shape, tokens) = (self.shape, self.pass.tokens());
        let attention = 2.0 * self.stream() + shape.whole_attention(tokens);
        attention.max(4.0 * self.stream() + mlp_bytes(&layer.mlp, tokens))
    }

    /// What the loss takes, forward and backward, with the gradients that it leaves.
    fn loss(&self) -> f64 {
        let (head, config) = (&self.shape.head, &self.shape.config);
        let shape = HeadShape {
            tokens: self.pass.trained_tokens,
            hidden: self.hidden(),
            vocab: config.vocab_size as f64,
        };
        let normed = self.stream();
        let own = if head.saves_input() {
            let low = self.saving.floats(3.0 * head.rank);
            2.0 * self.stream() + self.head_gradients() + low + shape.backward_bytes()
        } else {
            shape.fused_loss_bytes()
        };
        // The other model's pass, and the losses of both, while all is held.
        let other = if self.pass.is_compared {
            let pass = self.pass;
            self.shape.loss_pass(pass.rows, pass.seq)
        } else {
            0.0
        };
        normed + own.max(other)
    }

    /// What the backward pass of a layer takes, with what its graph holds and without the gradients of its weights.
    fn backward(&self, layer: &LayerShape, saved: SavedLayer) -> f64 {
        // Gradients of the output and of what comes after attention, and the product that starts the pass.
        let around = 3.0 * self.stream();
        let mlp = saved.total() + self.backward_mlp(layer);
        let attention = saved.residual + saved.attention + self.backward_attention();
        around + mlp.max(attention)
    }

    fn backward_mlp(&self, layer: &LayerShape) -> f64 {
        match &layer.mlp {
            FeedForwardShape::Dense(mlp) => self.backward_dense(mlp),
            FeedForwardShape::Moe {
                experts, shared, ..
            } => {
                // The recomputed input, its gradients by the parts, and their sums.
                let routed = 6.0 * self.stream() + self.widened(experts);
                let shared = shared.as_ref().map_or(0.0, |mlp| self.backward_dense(mlp));
                routed.max(shared)
            }
        }
    }

    /// The activations again, or their gradient, and gate and up as they are read.
    fn backward_dense(&self, mlp: &[LinearShape; 3]) -> f64 {
        let rounded = self.rounds();
        let inner = self.saving.floats(mlp[0].out);
        self.stream() * rounded + inner * (1.0 + 2.0 * rounded)
    }

    fn backward_attention(&self) -> f64 {
        let heads = self.shape.config.num_attention_heads as f64;
        let width = match &self.shape.config.attention {
            // Gradients of queries, keys and values, latents and output, and the shared key of each head.
            AttentionConfig::Mla(mla) => {
                let head = mla.qk_head_dim()
                    + mla.qk_nope_head_dim
                    + 2 * mla.v_head_dim
                    + mla.qk_rope_head_dim;
                let latent = mla.kv_lora_rank + mla.qk_rope_head_dim;
                heads * head as f64 + latent as f64
            }
            AttentionConfig::Gqa(gqa) => {
                2.0 * heads * gqa.head_dim as f64
                    + 2.0 * (gqa.num_key_value_heads * gqa.head_dim) as f64
            }
        };
        self.saving.floats(width) + self.stream()
    }
}
