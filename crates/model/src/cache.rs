//! What attention keeps of earlier tokens.
//!
//! Latent attention stores the normalized latent and the rotated shared key, side by side in one row: 576 numbers a
//! layer for DeepSeek V3, where plain keys and values of 128 heads would be 40,960.

use burn::tensor::{Device, Tensor};

use crate::config::{AttentionConfig, ModelConfig};

/// The cache of one batch of sequences of equal length.
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

/// Rows `[batch, capacity, heads, width]`, filled from the front.
#[derive(Clone, Debug)]
pub(crate) struct Buffer {
    rows: Option<Tensor<4>>,
    len: usize,
}

/// Buffers grow by this many positions at least.
const GROWTH: usize = 256;

impl Cache {
    /// An empty cache for a model.
    pub fn new(config: &ModelConfig) -> Self {
        let n_buffers = match config.attention {
            AttentionConfig::Mla(_) => 1,
            AttentionConfig::Gqa(_) => 2,
        };
        let layer = LayerCache {
            buffers: vec![Buffer { rows: None, len: 0 }; n_buffers],
        };
        Self {
            layers: vec![layer; config.num_hidden_layers],
            len: 0,
        }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Called once a pass is through all layers.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}

impl Buffer {
    /// Appends rows `[batch, seq, heads, width]` and returns all rows held, `[batch, len, heads, width]`.
    pub(crate) fn append(&mut self, rows: Tensor<4>) -> Tensor<4> {
        let ([batch, seq, heads, width], start) = (rows.dims(), self.len);
        self.len += seq;
        let buffer = match self.rows.take() {
            Some(buffer) if buffer.dims()[1] >= self.len => buffer,
            old => grown(
                old,
                [batch, (self.len + GROWTH).max(2 * start), heads, width],
                &rows.device(),
            ),
        };
        let buffer = buffer.slice_assign([0..batch, start..self.len, 0..heads, 0..width], rows);
        let held = buffer.clone().slice([0..batch, 0..self.len]);
        self.rows = Some(buffer);
        held
    }
}

fn grown(old: Option<Tensor<4>>, shape: [usize; 4], device: &Device) -> Tensor<4> {
    let new = Tensor::zeros(shape, device);
    let Some(old) = old else { return new };
    let [batch, len, heads, width] = old.dims();
    new.slice_assign([0..batch, 0..len, 0..heads, 0..width], old)
}
