//! What attention keeps of earlier tokens.
//!
//! Latent attention stores the normalized latent and the rotated shared key, side by side in one row: 576 numbers a
//! layer for DeepSeek V3, where plain keys and values of 128 heads would be 40,960. In what form the numbers are held is
//! chosen where a cache is made; attention reads what is held, of a pass's own tokens too, so that it does not matter in
//! which passes a text was read.

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
    pub(crate) rows: Vec<KvBuffer>,
}

impl Cache {
    /// An empty cache for a model.
    pub fn new(config: &ModelConfig, cache_type: CacheType) -> Self {
        Self::of_layers(config, config.num_hidden_layers, cache_type)
    }

    /// An empty cache for so many layers.
    pub(crate) fn of_layers(config: &ModelConfig, n: usize, cache_type: CacheType) -> Self {
        let kinds = match config.attention {
            AttentionConfig::Mla(_) => 1,
            AttentionConfig::Gqa(_) => 2,
        };
        let layer = LayerCache {
            rows: vec![KvBuffer::new(cache_type); kinds],
        };
        Self {
            layers: vec![layer; n],
            len: 0,
        }
    }

    /// Bytes that a token takes, in all layers together.
    pub fn bytes_per_token(config: &ModelConfig, cache_type: CacheType) -> usize {
        let [rows, width] = config.cache_rows();
        rows * cache_type.row_bytes(width) * config.num_hidden_layers
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all but the first `len` positions; does nothing where no more are held.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        for rows in self.layers.iter_mut().flat_map(|layer| &mut layer.rows) {
            rows.truncate(len);
        }
    }

    /// Called once a pass is through all layers.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}
