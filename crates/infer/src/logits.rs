//! Logits as values of the host.

use burn::tensor::Tensor;
use kernels::device;
use model::{ForwardContext, Model};

/// Logits that a GPU makes at a time: a quarter of what the smallest of them binds at once.
const MAX_LOGITS: usize = 8 << 20;

/// The logits of hidden states, read from the device, row after row. A GPU holds at most so much in one tensor, so there
/// they are made a part at a time.
///
/// # Shapes
/// - `hidden`: `[tokens, hidden_size]`
/// - returns: `tokens · vocab` values
pub fn read_logits(model: &Model, hidden: Tensor<2>, ctx: &ForwardContext<'_>) -> Vec<f32> {
    let [tokens, hidden_size] = hidden.dims();
    let part = match device::is_gpu(&hidden.device()) {
        true => (MAX_LOGITS / model.config.vocab_size).max(1),
        false => tokens.max(1),
    };
    let mut all = Vec::new();
    for start in (0..tokens).step_by(part) {
        let end = tokens.min(start + part);
        let rows = hidden.clone().slice([start..end, 0..hidden_size]);
        let logits = device::read(model.logits(rows, ctx));
        match all.is_empty() {
            true => all = logits,
            false => all.extend(logits),
        }
    }
    all
}
