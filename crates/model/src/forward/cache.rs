//! The KV cache: what attention reads of earlier tokens.
//!
//! Latent attention stores the normalized latent and the rotated shared key, side by side in one row: 576 numbers a
//! layer for DeepSeek V3; plain keys and values of 128 heads would be 40,960. A cache's data type is chosen when it is
//! made. Attention reads the stored values even of a pass's own tokens, so the partition of a text into passes does not
//! matter.

use kernels::{CacheType, KvBuffer};

use crate::config::{AttentionConfig, ModelConfig};

/// The cache of one sequence. Sequences that are decoded together have one each.
#[derive(Clone, Debug)]
pub struct Cache {
    pub(crate) layers: Vec<LayerCache>,
    len: usize,
}

/// The cache of one layer: latents, or keys and values.
#[derive(Clone, Debug)]
pub(crate) struct LayerCache {
    pub(crate) buffers: Vec<KvBuffer>,
}

impl Cache {
    /// An empty cache for a model.
    pub fn new(config: &ModelConfig, cache_type: CacheType) -> Self {
        Self::of_layers(config, config.num_hidden_layers, cache_type)
    }

    /// An empty cache for `n` layers.
    pub(crate) fn of_layers(config: &ModelConfig, n: usize, cache_type: CacheType) -> Self {
        let kinds = match config.attention {
            AttentionConfig::Mla(_) => 1,
            AttentionConfig::Gqa(_) => 2,
        };
        let layer = LayerCache {
            buffers: vec![KvBuffer::new(cache_type); kinds],
        };
        Self {
            layers: vec![layer; n],
            len: 0,
        }
    }

    /// Bytes per token, all layers together.
    pub fn bytes_per_token(config: &ModelConfig, cache_type: CacheType) -> usize {
        let [rows, width] = config.cache_rows();
        rows * cache_type.row_bytes(width) * config.num_hidden_layers
    }

    /// Positions in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the cache is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Keeps only the first `len` positions; does nothing if there are no more.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        for buffer in self.layers.iter_mut().flat_map(|layer| &mut layer.buffers) {
            buffer.truncate(len);
        }
    }

    /// Called once a pass is through all layers.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}
