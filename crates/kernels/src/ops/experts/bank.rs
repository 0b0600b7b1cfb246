//! The weights of a layer's experts.

use std::sync::Arc;

use super::expert_cache::{CachedExpert, OffloadedLayer};
use super::slots::Slots;
use crate::formats::Matrix;
use crate::settings::Compute;

/// The frozen weights of a layer's experts; each list holds one matrix per expert.
#[derive(Clone, Debug)]
pub struct ExpertBank {
    /// `[moe_intermediate_size, hidden_size]` each.
    pub gate: Vec<Matrix>,
    /// `[moe_intermediate_size, hidden_size]` each.
    pub up: Vec<Matrix>,
    /// `[hidden_size, moe_intermediate_size]` each.
    pub down: Vec<Matrix>,
    /// The cache of recently used experts, if memory has no room for all.
    pub cached: Option<OffloadedLayer>,
}

impl ExpertBank {
    /// Experts without a cache.
    pub fn new(gate: Vec<Matrix>, up: Vec<Matrix>, down: Vec<Matrix>) -> Self {
        Self {
            gate,
            up,
            down,
            cached: None,
        }
    }

    /// Cached copies of the experts that have slots, in order. Without a cache, or without room in it, experts are read
    /// in place.
    pub(crate) fn resident(&self, slots: Slots<'_>) -> Vec<CachedExpert> {
        let Some(OffloadedLayer { cache, layer }) = &self.cached else {
            return vec![];
        };
        let experts = 0..slots.offsets.len() - 1;
        let chosen = experts.filter(|expert| !slots.of_expert(*expert).is_empty());
        cache.fill(*layer, chosen, |expert| self.weights_of(expert))
    }

    /// Prefetches experts that will probably be chosen next, if there is a cache.
    ///
    /// # Panics
    /// If there is no such expert.
    pub(crate) fn prefetch(&self, likely: impl Iterator<Item = usize>) {
        if let Some(OffloadedLayer { cache, layer }) = &self.cached {
            cache.prefetch(*layer, likely, |expert| self.weights_of(expert));
        }
    }

    pub(super) fn weights_of(&self, expert: usize) -> [Matrix; 3] {
        [&self.gate, &self.up, &self.down].map(|list| list[expert].clone())
    }
}

/// The frozen weights of the shared experts, fused into one, and the setting of their products.
#[derive(Clone, Debug)]
pub struct SharedExperts {
    /// `[intermediate_size, hidden_size]`.
    pub gate: Arc<Matrix>,
    /// `[intermediate_size, hidden_size]`.
    pub up: Arc<Matrix>,
    /// `[hidden_size, intermediate_size]`.
    pub down: Arc<Matrix>,
    /// The setting of the products.
    pub compute: Compute,
}
