//! The routed experts of an MoE layer: `grouped` for many tokens, `decode` for a few.

mod bank;
mod decode;
mod expert_cache;
mod grouped;
mod routed;
mod slots;

pub use self::bank::{ExpertBank, SharedExperts};
pub(crate) use self::expert_cache::CachedExpert;
pub use self::expert_cache::{ExpertCache, ExpertTraffic, OffloadedLayer};
use self::grouped::forward_in_groups;
pub(crate) use self::grouped::{
    InputGrads, SavedProducts, backward_inputs, backward_trained, backward_updated,
};
pub use self::routed::ExpertLora;
pub(crate) use self::routed::{ExpertOperands, RoutedExperts, StackedFactors};
pub use self::slots::SlotPart;
pub(crate) use self::slots::Slots;
pub(super) use self::slots::{GROUP_TASKS, TASK_SLOTS};
use crate::settings::Compute;

/// x `[tokens, hidden]`, weights `[slots]` → y `[tokens, hidden]` and the products of gate and up
/// `[slots, inner]`, sorted by expert, for the backward pass.
pub(crate) fn forward(
    experts: RoutedExperts<'_>,
    slots: Slots<'_>,
    x: &[f32],
    weights: &[f32],
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    decode::forward(experts, slots, x, weights, None)
        .unwrap_or_else(|| forward_in_groups(experts, slots, x, weights))
}

/// Whether [`forward_fused`] supports these weights, for few tokens.
pub(crate) fn serves_fused(bank: &ExpertBank, shared: &SharedExperts, compute: Compute) -> bool {
    decode::serves(bank, shared, compute)
}

/// The routed and the shared experts of a few tokens, fused: `[tokens, hidden]`. `None` if there are too many tokens,
/// or products do not read the weights' stored bytes.
pub(crate) fn forward_fused(
    experts: RoutedExperts<'_>,
    slots: Slots<'_>,
    x: &[f32],
    weights: &[f32],
    shared: &SharedExperts,
) -> Option<Vec<f32>> {
    decode::forward(experts, slots, x, weights, Some(shared)).map(|(y, ..)| y)
}
