//! What attention keeps of earlier tokens.
//!
//! Latent attention stores the normalized latent and the rotated shared key, side by side in one row: 576 numbers a
//! layer for DeepSeek V3, where plain keys and values of 128 heads would be 40,960.

use burn::tensor::Tensor;

use crate::config::{AttentionConfig, ModelConfig};

/// The cache of one sequence. Sequences that are decoded together have one each.
#[derive(Clone, Debug)]
pub struct Cache {
    pub(crate) layers: Vec<LayerCache>,
    len: usize,
}

/// The cache of one layer: one buffer of latents, or two of keys and values.
#[derive(Clone, Debug)]
pub(crate) struct LayerCache {
    pub(crate) buffers: Vec<Buffer>,
}

/// Rows `[capacity, heads, width]`, filled from the front. Positions are the first axis, so that those held are one piece
/// of memory, which attention reads where it lies.
#[derive(Clone, Debug)]
pub(crate) struct Buffer {
    rows: Option<Tensor<3>>,
    len: usize,
}

/// Buffers grow by this many positions at least.
const GROWTH: usize = 256;

impl Cache {
    /// An empty cache for a model.
    pub fn new(config: &ModelConfig) -> Self {
        Self::of_layers(config, config.num_hidden_layers)
    }

    /// An empty cache for so many layers.
    pub(crate) fn of_layers(config: &ModelConfig, n: usize) -> Self {
        let n_buffers = match config.attention {
            AttentionConfig::Mla(_) => 1,
            AttentionConfig::Gqa(_) => 2,
        };
        let layer = LayerCache {
            buffers: vec![Buffer { rows: None, len: 0 }; n_buffers],
        };
        Self {
            layers: vec![layer; n],
            len: 0,
        }
    }

    /// Bytes that a token takes, in all layers together.
    pub fn bytes_per_token(config: &ModelConfig) -> usize {
        config.cache_width() * config.num_hidden_layers * size_of::<f32>()
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
        for buffer in self.layers.iter_mut().flat_map(|layer| &mut layer.buffers) {
            buffer.len = buffer.len.min(len);
        }
    }

    /// Called once a pass is through all layers.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}

impl Buffer {
    /// Appends rows `[1, seq, heads, width]` and returns all rows held, `[1, len, heads, width]`.
    pub(crate) fn append(&mut self, rows: Tensor<4>) -> Tensor<4> {
        let ([_, seq, heads, width], start) = (rows.dims(), self.len);
        self.len += seq;
        let buffer = match self.rows.take() {
            Some(buffer) if buffer.dims()[0] >= self.len => buffer,
            old => {
                let capacity = (self.len + GROWTH).max(2 * start);
                let new = Tensor::zeros([capacity, heads, width], &rows.device());
                match old {
                    Some(old) => new.slice_assign(0..start, old.slice(0..start)),
                    None => new,
                }
            }
        };
        let buffer = buffer.slice_assign(start..self.len, rows.reshape([seq, heads, width]));
        let held = buffer.clone().slice(0..self.len);
        self.rows = Some(buffer);
        held.reshape([1, self.len, heads, width])
    }
}
