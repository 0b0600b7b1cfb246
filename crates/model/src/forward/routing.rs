//! What routers decide, as a pass records it.

use burn::tensor::{Int, Tensor};

/// What a router decided.
#[derive(Clone, Debug)]
pub struct Routed {
    /// `[tokens, experts]`, without the bias; differentiable.
    pub scores: Tensor<2>,
    /// `[tokens, top_k]`.
    pub ids: Tensor<2, Int>,
    /// `[tokens, top_k]`; differentiable.
    pub weights: Tensor<2>,
}

/// The routing of one mixture layer in one pass.
#[derive(Clone, Debug)]
pub struct RoutingRecord {
    /// Which layer.
    pub layer_idx: usize,
    /// Router logits `[tokens, experts]`, f32.
    pub logits: Tensor<2>,
    /// What was made of them.
    pub routed: Routed,
}

/// How many of the experts that tokens chose, `top_k` each, another model did not choose for the same tokens.
pub fn routing_drift<T: PartialEq>(chosen: &[T], others: &[T], top_k: usize) -> usize {
    let tokens = chosen.chunks(top_k).zip(others.chunks(top_k));
    let changed = tokens.map(|(ids, others)| ids.iter().filter(|id| !others.contains(id)).count());
    changed.sum()
}
