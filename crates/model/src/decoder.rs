//! The model: embedding, decoder layers, norm, output head.

mod checkpointing;
mod cost;
mod mtp;

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use kernels::{ExpertCache, ExpertTraffic, Matrix};

pub use self::checkpointing::{Checkpointing, Trace};
pub use self::cost::{Cost, Traffic};
pub use self::mtp::{Mtp, SharedHead};

use crate::attention::Attention;
use crate::config::ModelConfig;
use crate::context::ForwardContext;
use crate::linear::{Linear, Weight};
use crate::mlp::Mlp;
use crate::moe::Moe;
use crate::norm::Norm;
use crate::precision::Class;
use crate::rope::RotaryTable;
use crate::sites::Site;

/// A causal language model. Field names are the checkpoint's keys.
#[derive(Module, Debug)]
pub struct Model {
    /// Everything below the output head.
    pub model: Decoder,
    /// `[vocab, hidden_size]`; none where the embedding serves.
    pub lm_head: Option<Linear>,
    /// The architecture.
    #[module(skip)]
    pub config: ModelConfig,
}

/// The layers between token ids and the last hidden state.
#[derive(Module, Debug)]
pub struct Decoder {
    /// Token embedding.
    pub embed_tokens: Embedding,
    /// The layers.
    pub layers: Vec<DecoderLayer>,
    /// The last norm.
    pub norm: Norm,
}

/// A table with one row per token.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[vocab, hidden_size]`.
    pub weight: Weight,
}

/// One layer: attention and feed-forward, each after a norm and added to the residual stream.
#[derive(Module, Debug)]
pub struct DecoderLayer {
    /// Norm before attention.
    pub input_layernorm: Norm,
    /// Attention.
    pub self_attn: Attention,
    /// Norm before the feed-forward part.
    pub post_attention_layernorm: Norm,
    /// The feed-forward part.
    pub mlp: FeedForward,
}

/// The forms of the feed-forward part.
#[expect(
    clippy::large_enum_variant,
    reason = "tensor handles; there are as many as layers, and burn derives no boxed variants"
)]
#[derive(Module, Debug)]
pub enum FeedForward {
    /// One MLP.
    Dense(Mlp),
    /// A mixture of experts.
    Moe(Moe),
}

impl Model {
    /// The hidden states after the last norm.
    ///
    /// # Shapes
    /// - `input_ids`: `[batch, seq]`, continuing the sequences of the pass's caches if it has some
    /// - returns: `[batch, seq, hidden_size]`
    ///
    /// # Panics
    /// If an id is not below the vocabulary's size, or the pass has caches and not one per row.
    pub fn hidden(&self, input_ids: Tensor<2, Int>, ctx: &mut ForwardContext<'_>) -> Tensor<3> {
        let dims = input_ids.dims();
        let mut x = self.enter(input_ids, ctx);
        for (layer_idx, layer) in self.model.layers.iter().enumerate() {
            x = layer.forward(x, dims, ctx, layer_idx);
        }
        ctx.advance(dims[1]);
        self.leave(x, dims)
    }

    /// What enters the first layer, `[batch · seq, hidden_size]`; gives the pass its rotary tables.
    fn enter(&self, input_ids: Tensor<2, Int>, ctx: &mut ForwardContext<'_>) -> Tensor<2> {
        let [batch, seq] = input_ids.dims();
        ctx.rotary = Some(self.rotary(seq, ctx, &input_ids.device()));
        let ids = input_ids.reshape([batch * seq]);
        let x = self.model.embed_tokens.weight.embed(ids);
        ctx.observe_sum(&x, || "model.embed_tokens".into());
        x
    }

    /// The rotary tables of an input of length `seq`.
    fn rotary(&self, seq: usize, ctx: &ForwardContext<'_>, device: &Device) -> RotaryTable {
        let positions = ctx.positions(seq).into_iter();
        self.config.rotary_table(positions, device)
    }

    /// The hidden states, `[batch, seq, hidden_size]`, from what leaves the last layer.
    fn leave(&self, x: Tensor<2>, [batch, seq]: [usize; 2]) -> Tensor<3> {
        let hidden = self.model.norm.forward(x);
        hidden.reshape([batch, seq, self.config.hidden_size])
    }

    /// Logits of some hidden states.
    ///
    /// # Shapes
    /// - `hidden`: `[tokens, hidden_size]`
    /// - returns: `[tokens, vocab]`, f32
    pub fn logits(&self, hidden: Tensor<2>, ctx: &ForwardContext<'_>) -> Tensor<2> {
        self.head().forward_as(Class::Head, hidden, ctx)
    }

    /// Notes hidden states `[tokens, hidden_size]` as the output head's input, if that is asked for, without any product.
    pub(crate) fn observe_head(&self, hidden: &Tensor<2>, ctx: &ForwardContext<'_>) {
        ctx.observe_input(&self.head().weight, hidden);
    }

    /// The loss of every position, without holding the logits.
    ///
    /// # Shapes
    /// - `hidden`: `[batch, seq, hidden_size]`, `targets`: `[batch, seq]`, −100 where there is none
    /// - returns: `[batch · seq]`, in nats; 0 where there is no target
    pub fn loss(
        &self,
        hidden: Tensor<3>,
        targets: Tensor<2, Int>,
        ctx: &ForwardContext<'_>,
    ) -> Tensor<1> {
        let [batch, seq, hidden_size] = hidden.dims();
        self.head().cross_entropy(
            hidden.reshape([batch * seq, hidden_size]),
            targets.reshape([batch * seq]),
            ctx,
        )
    }

    /// Bytes that the weights of its linear layers and experts hold in memory or map.
    pub fn size_bytes(&mut self) -> usize {
        let mut bytes = 0;
        self.for_each_site(&mut |_, site| bytes += site.size_bytes());
        bytes
    }

    /// Leaves experts in their file but for those that were used last. So many of a token's experts are asked for before a
    /// layer chooses them; none says half of those that it chooses.
    pub fn cache_experts(&mut self, cache: &Arc<ExpertCache>, n_prefetch: Option<usize>) {
        let mut numbers = 0..;
        self.for_each_site(&mut |_, site| {
            if let Site::Experts(experts) = site {
                experts.cache(cache, &mut numbers);
            }
        });
        for layer in &mut self.model.layers {
            if let FeedForward::Moe(moe) = &mut layer.mlp {
                let chosen = moe.router.config.choice.top_k;
                moe.router.n_prefetch = n_prefetch.unwrap_or(chosen.div_ceil(2)).min(chosen);
            }
        }
    }

    /// How often experts were in memory, where they have a cache.
    pub fn expert_traffic(&self) -> Option<ExpertTraffic> {
        self.model.layers.iter().find_map(|layer| match &layer.mlp {
            FeedForward::Moe(moe) => moe.experts.traffic(),
            FeedForward::Dense(_) => None,
        })
    }

    /// Bytes of frozen weights that every token needs.
    pub fn common_bytes(&mut self) -> usize {
        let mut bytes = 0;
        self.for_each_common(&mut |matrix| bytes += matrix.size_bytes());
        bytes
    }

    /// Visits frozen matrices that are multiplied as they are, but for experts, in the order of the forward pass.
    pub fn for_each_common(&mut self, visit: &mut dyn FnMut(&mut Matrix)) {
        self.for_each_site(&mut |_, site| {
            if let Site::Linear(_) = site {
                site.for_each_frozen(visit);
            }
        });
        if self.lm_head.is_none() {
            self.model.embed_tokens.weight.for_each_frozen(visit);
        }
    }

    /// Visits the frozen matrices of experts.
    pub fn for_each_expert(&mut self, visit: &mut dyn FnMut(&mut Matrix)) {
        self.for_each_site(&mut |_, site| {
            if let Site::Experts(_) = site {
                site.for_each_frozen(visit);
            }
        });
    }

    /// The output head, which may be the embedding.
    fn head(&self) -> Linear {
        let tied = || Linear {
            weight: self.model.embed_tokens.weight.clone(),
            bias: None,
            lora: None,
            quantizer: None,
        };
        self.lm_head.clone().unwrap_or_else(tied)
    }
}

impl DecoderLayer {
    /// # Shapes
    /// - `x`: `[batch · seq, hidden_size]`
    /// - returns: `[batch · seq, hidden_size]`
    pub fn forward(
        &self,
        x: Tensor<2>,
        dims: [usize; 2],
        ctx: &mut ForwardContext<'_>,
        layer_idx: usize,
    ) -> Tensor<2> {
        if let FeedForward::Moe(moe) = &self.mlp
            && moe.wants_prefetch(ctx)
        {
            // Attention changes little of what is in the residual stream.
            let likely = self.post_attention_layernorm.forward(x.clone());
            moe.expect(likely, ctx);
        }
        let normed = self.input_layernorm.forward(x.clone());
        let x = x + match &self.self_attn {
            Attention::Mla(mla) => mla.forward(normed, dims, ctx, layer_idx),
            Attention::Gqa(gqa) => gqa.forward(normed, dims, ctx, layer_idx),
        };
        ctx.observe_sum(&x, || format!("model.layers.{layer_idx}.self_attn"));
        let normed = self.post_attention_layernorm.forward(x.clone());
        let x = x + match &self.mlp {
            FeedForward::Dense(mlp) => mlp.forward(normed, ctx),
            FeedForward::Moe(moe) => moe.forward(normed, ctx, layer_idx),
        };
        ctx.observe_sum(&x, || format!("model.layers.{layer_idx}.mlp"));
        x
    }
}
