//! Multi-token prediction: one more layer of DeepSeek V3, which predicts the token after the next from the hidden state of a
//! position and the next token.
//!
//! It drafts tokens for speculative decoding. Nothing here trains or merges it: it is no part of a [`Model`]. Every folder
//! that is written carries its tensors unchanged, and a GGUF optionally.
//!
//! Sources: DeepSeek-V3, arXiv:2412.19437, section 2.2, with the embedding first in the input of `eh_proj`, as the published
//! weights have it, and with the hidden state after the model's last norm.

use burn::tensor::{Int, Tensor};
use kernels::{CacheType, Matrix};

use super::{DecoderLayer, Embedding, Model};
use crate::config::ModelConfig;
use crate::forward::cache::Cache;
use crate::forward::context::ForwardContext;
use crate::modules::linear::Linear;
use crate::modules::norm::Norm;
use crate::precision::PrecisionClass;

/// The module for multi-token prediction. Field names are the checkpoint's keys, except for `layer`, which has none.
#[derive(Clone, Debug)]
pub struct Mtp {
    /// `[vocab, hidden_size]`; none if it is the model's.
    pub embed_tokens: Option<Embedding>,
    /// Norm of the embedded token.
    pub enorm: Norm,
    /// Norm of the hidden state.
    pub hnorm: Norm,
    /// `[hidden_size, 2 · hidden_size]`.
    pub eh_proj: Linear,
    /// Attention and experts, as in the model.
    pub layer: DecoderLayer,
    /// The end of the module, which makes logits.
    pub shared_head: SharedHead,
}

/// The end of the module.
#[derive(Clone, Debug)]
pub struct SharedHead {
    /// The last norm.
    pub norm: Norm,
    /// `[vocab, hidden_size]`; none if it is the model's.
    pub head: Option<Linear>,
}

impl Mtp {
    /// An empty cache for the module.
    pub fn cache(config: &ModelConfig, cache_type: CacheType) -> Cache {
        Cache::of_layers(config, 1, cache_type)
    }

    /// Its hidden states after the last norm. Each attends to its own at earlier positions.
    ///
    /// # Shapes
    /// - `hidden`: `[batch, seq, hidden_size]`, of the model, continuing the sequences of the pass's caches if it has any
    /// - `next_ids`: `[batch, seq]`, the token after each position
    /// - returns: `[batch, seq, hidden_size]`
    ///
    /// # Panics
    /// If an id is not below the vocabulary's size, or the pass has caches and not one per row.
    pub fn hidden(
        &self,
        model: &Model,
        hidden: Tensor<3>,
        next_ids: Tensor<2, Int>,
        ctx: &mut ForwardContext<'_>,
    ) -> Tensor<3> {
        let [batch, seq, width] = hidden.dims();
        ctx.rotary = Some(model.rotary(seq, ctx, &hidden.device()));
        let embedding = self.embed_tokens.as_ref();
        let embedding = embedding.unwrap_or(&model.model.embed_tokens);
        let tokens = embedding.forward(next_ids.reshape([batch * seq]));
        let hidden = hidden.reshape([batch * seq, width]);
        let x = vec![self.enorm.forward(tokens), self.hnorm.forward(hidden)];
        let x = self.eh_proj.forward(Tensor::cat(x, 1), ctx);
        let x = self.layer.forward(x, [batch, seq], ctx, 0); // The first layer of its own cache.
        ctx.advance(seq);
        let hidden = self.shared_head.norm.forward(x);
        hidden.reshape([batch, seq, width])
    }

    /// Logits of its hidden states: those of position `i` are for the token `i + 2`.
    ///
    /// # Shapes
    /// - `hidden`: `[tokens, hidden_size]`
    /// - returns: `[tokens, vocab]`, f32
    pub fn logits(&self, model: &Model, hidden: Tensor<2>, ctx: &ForwardContext<'_>) -> Tensor<2> {
        let head = self.shared_head.head.clone();
        let head = head.unwrap_or_else(|| model.head());
        head.forward_as(PrecisionClass::Head, hidden, ctx)
    }

    /// Bytes that the weights of its own linear layers and experts hold in memory or map.
    pub fn size_bytes(&self) -> usize {
        let own = [Some(&self.eh_proj), self.shared_head.head.as_ref()];
        let own = own.into_iter().flatten();
        let own: usize = own.map(|linear| linear.weight.size_bytes()).sum();
        let modules = self.layer.modules().into_iter();
        own + modules
            .map(|(_, module)| module.size_bytes())
            .sum::<usize>()
    }

    /// Visits its own frozen matrices that are multiplied as they are.
    pub fn for_each_frozen(&mut self, visit: &mut dyn FnMut(&mut Matrix)) {
        self.eh_proj.weight.for_each_frozen(visit);
        for (_, module) in self.layer.modules_mut() {
            module.for_each_frozen(visit);
        }
        if let Some(head) = &mut self.shared_head.head {
            head.weight.for_each_frozen(visit);
        }
    }
}
