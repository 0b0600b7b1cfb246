//! The memory of passes without gradients: over whole sequences, and over tokens that continue caches.

use kernels::{CacheType, ExpertsShape, HeadShape, MAX_GEMV_ROWS, THREAD_SCRATCH};

use super::BYTES_OF_F32;
use super::shapes::{ExpertsAt, FeedForwardShape, ModelShape};
use crate::config::AttentionConfig;
use crate::forward::cache::Cache;

/// Queries whose scores a thread holds at a time.
const QUERIES: f64 = 64.0;

/// A pass over new tokens that continue a sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CachedPass {
    /// New tokens of each sequence.
    pub tokens: f64,
    /// Sequences in the pass.
    pub sequences: f64,
    /// Tokens of a sequence in its cache, the new ones included.
    pub context: f64,
    /// The form of the cache.
    pub cache: CacheType,
    /// Threads that compute.
    pub threads: f64,
}

impl ModelShape {
    /// Bytes of the caches of sequences.
    pub fn cache_bytes(&self, cache: CacheType, sequences: f64, context: f64) -> f64 {
        Cache::bytes_per_token(&self.config, cache) as f64 * sequences * context
    }

    /// What a pass that continues caches takes besides them.
    pub fn cached_pass(&self, pass: &CachedPass) -> f64 {
        let all = pass.tokens * pass.sequences;
        let hidden = self.config.hidden_size as f64;
        let stream = BYTES_OF_F32 * all * hidden;
        let attention = self.cached_attention(pass);
        let mlp = self.widest_mlp(all);
        let logits = BYTES_OF_F32 * pass.sequences * self.config.vocab_size as f64;
        // A buffer that grows is held twice, layer by layer.
        let layers = self.layers.len().max(1) as f64;
        let grown = self.cache_bytes(pass.cache, 1.0, pass.context) / layers;
        3.0 * stream + attention.max(mlp).max(2.0 * logits) + grown
    }

    /// Attention of one sequence at a time.
    fn cached_attention(&self, pass: &CachedPass) -> f64 {
        let heads = self.config.num_attention_heads as f64;
        let all = pass.tokens * pass.sequences;
        let is_few = pass.tokens <= MAX_GEMV_ROWS as f64;
        let scores = pass.threads * QUERIES.min(pass.tokens) * pass.context;
        let (queries, keys) = match &self.config.attention {
            AttentionConfig::Mla(mla) => {
                let head = mla.qk_head_dim() + mla.v_head_dim;
                let latent = (mla.kv_lora_rank + mla.qk_rope_head_dim) as f64;
                let queries = all * heads * (head + mla.qk_head_dim()) as f64;
                // Many tokens attend to the keys and values of all heads, made of all latents.
                let expanded = heads * (mla.qk_nope_head_dim + mla.v_head_dim) as f64;
                let keys = pass.context * (2.0 * latent + expanded);
                (queries + all * heads * latent, keys)
            }
            AttentionConfig::Gqa(gqa) => {
                let queries = all * heads * (3 * gqa.head_dim) as f64;
                let is_read_in_place = pass.cache == CacheType::F32;
                let width = 2 * gqa.num_key_value_heads * gqa.head_dim;
                let keys = if is_read_in_place {
                    0.0
                } else {
                    pass.context * width as f64
                };
                (queries, keys)
            }
        };
        BYTES_OF_F32 * (queries + if is_few { 0.0 } else { keys + scores })
    }

    /// The feed-forward part that takes most.
    fn widest_mlp(&self, tokens: f64) -> f64 {
        let layers = self.layers.iter();
        let bytes = layers.map(|layer| mlp_bytes(&layer.mlp, tokens));
        bytes.fold(0.0, f64::max)
    }

    /// What threads keep from pass to pass over some tokens.
    pub fn scratch(&self, tokens: f64, threads: f64) -> f64 {
        let of_layer = |mlp: &FeedForwardShape| match mlp {
            FeedForwardShape::Dense(_) => 0.0,
            FeedForwardShape::Moe { experts, .. } => {
                experts_shape(experts, tokens).forward_scratch(threads)
            }
        };
        let layers = self.layers.iter().map(|layer| of_layer(&layer.mlp));
        layers.fold(0.0, f64::max) + threads * THREAD_SCRATCH
    }

    /// Attention over whole sequences: what it makes of some tokens.
    pub(super) fn whole_attention(&self, tokens: f64) -> f64 {
        let heads = self.config.num_attention_heads as f64;
        let width = match &self.config.attention {
            AttentionConfig::Mla(mla) => {
                let head = 2 * mla.qk_head_dim() + mla.qk_nope_head_dim + 2 * mla.v_head_dim;
                heads * head as f64 + 3.0 * mla.kv_lora_rank as f64
            }
            AttentionConfig::Gqa(gqa) => {
                let kv = 3 * gqa.num_key_value_heads * gqa.head_dim;
                3.0 * heads * gqa.head_dim as f64 + kv as f64
            }
        };
        BYTES_OF_F32 * tokens * width
    }

    /// What measuring the loss of whole sequences takes.
    pub fn loss_pass(&self, rows: f64, seq: f64) -> f64 {
        let tokens = rows * seq;
        let hidden = self.config.hidden_size as f64;
        let head = HeadShape {
            tokens,
            hidden,
            vocab: self.config.vocab_size as f64,
        };
        let layers = self.whole_attention(tokens).max(self.widest_mlp(tokens));
        3.0 * BYTES_OF_F32 * tokens * hidden + layers.max(head.loss_bytes())
    }
}

/// What a feed-forward part makes of some tokens.
pub(super) fn mlp_bytes(mlp: &FeedForwardShape, tokens: f64) -> f64 {
    let wide = |width: f64| BYTES_OF_F32 * tokens * width;
    match mlp {
        FeedForwardShape::Dense([gate, ..]) => wide(3.0 * gate.out),
        FeedForwardShape::Moe {
            experts, shared, ..
        } => {
            let shared = shared.as_ref().map_or(0.0, |[gate, ..]| gate.out);
            let routed = 2.0 * experts.top_k * experts.inner;
            wide(2.0 * experts.hidden + 3.0 * experts.experts + routed.max(3.0 * shared))
        }
    }
}

/// The experts of a layer with an input of some tokens.
pub(super) fn experts_shape(experts: &ExpertsAt, tokens: f64) -> ExpertsShape {
    ExpertsShape {
        tokens,
        top_k: experts.top_k,
        experts: experts.experts,
        hidden: experts.hidden,
        inner: experts.inner,
    }
}
