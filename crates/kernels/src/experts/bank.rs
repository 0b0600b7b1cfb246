//! The weights of a layer's experts.

use std::sync::Arc;

use super::OffloadedLayer;
use crate::{Compute, Matrix};

/// The frozen weights of a layer's experts; each list holds one matrix per expert.
#[derive(Clone, Debug)]
pub struct ExpertBank {
    /// `[moe_intermediate_size, hidden_size]` each.
    pub gate: Vec<Matrix>,
    /// `[moe_intermediate_size, hidden_size]` each.
    pub up: Vec<Matrix>,
    /// `[hidden_size, moe_intermediate_size]` each.
    pub down: Vec<Matrix>,
    /// Where those are that were used last, if memory has no room for all.
    pub cached: Option<OffloadedLayer>,
}

impl ExpertBank {
    /// Experts that are all read where they lie.
    pub fn new(gate: Vec<Matrix>, up: Vec<Matrix>, down: Vec<Matrix>) -> Self {
        Self {
            gate,
            up,
            down,
            cached: None,
        }
    }
}

/// The frozen weights of the experts that every token has, fused into one, and what products with them compute in.
#[derive(Clone, Debug)]
pub struct SharedExperts {
    /// `[intermediate_size, hidden_size]`.
    pub gate: Arc<Matrix>,
    /// `[intermediate_size, hidden_size]`.
    pub up: Arc<Matrix>,
    /// `[hidden_size, intermediate_size]`.
    pub down: Arc<Matrix>,
    /// What products round their operands to.
    pub compute: Compute,
}
