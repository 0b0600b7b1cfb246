//! The forms of latent attention, and the one place that chooses between them.

use crate::forward::context::ForwardContext;
use crate::modules::linear::Linear;

/// Most new positions of a sequence that attend in the absorbed form. Each has the bits it has in a pass of its own.
const MAX_DECODE_QUERIES: usize = kernels::MAX_GEMV_ROWS;

/// How latent attention meets `kv_b_proj`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AttentionForm {
    /// Makes the keys and values of all heads from the latents. For training and prefill. Has a gradient.
    Expanded,
    /// Folds the projection into queries and outputs, and attends to the latents. For decoding, in which making the keys and
    /// values of all earlier tokens at every step would be most of the work. Has no gradient.
    Absorbed,
}

/// The form of a layer's attention for `seq` new positions per sequence.
///
/// | pass | form |
/// |---|---|
/// | whole sequences | expanded |
/// | continues caches by at most [`MAX_DECODE_QUERIES`] tokens | absorbed |
/// | continues caches by more | expanded |
/// | records the inputs of weights | absorbed: a GGUF stores `kv_b_proj` in the two parts that this form multiplies |
/// | the projection is fake-quantized | expanded, whatever else: the blocks do not end at the ends of heads |
pub(super) fn form(ctx: &ForwardContext<'_>, seq: usize, kv_b: &Linear) -> AttentionForm {
    let is_decoding = !ctx.caches.is_empty() && seq <= MAX_DECODE_QUERIES;
    if kv_b.quantizer.is_none() && (is_decoding || ctx.records_inputs()) {
        AttentionForm::Absorbed
    } else {
        AttentionForm::Expanded
    }
}
